"""The plan of a training step: what it reads, writes and keeps, and the numbers of it."""

from __future__ import annotations

import math

import pytest

from onelaunch.config import PRESETS, preset
from onelaunch.plan import PlanError, check_training, describe_training, make_training_plan
from onelaunch.plan.training import FEWER_LOGITS, LOGITS, RECOMPUTE, logit_rows

CONFIGS = {
    **PRESETS,
    "untied": preset("stories15m").with_(tied_embeddings=False),
    "grouped, with norms": preset("stories15m").with_(n_kv_heads=2, qk_norm=True),
}


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_plan_is_whole(name, recompute):
    config = CONFIGS[name].with_(max_seq_len=64)
    plan = make_training_plan(config, 3, 40, recompute=recompute)
    check_training(plan)
    shapes = {key: s for key, s in config.weight_shapes().items() if len(s) > 1}
    matrices = sum(math.prod(s) for key, s in shapes.items() if key.startswith("layers"))
    head = config.vocab_size * config.dim
    described = describe_training(plan)
    of = {(line["phase"], line["kind"]): line for line in described["kinds"]}
    # 6 operations a weight and token (2204.02311, appendix B)
    assert of["forward", "product"]["flops"] == 2 * 120 * matrices
    if recompute != "layers":
        assert of["backward", "product"]["flops"] == 2 * 120 * matrices
    assert of["backward", "weight_gradient"]["flops"] == 2 * 120 * matrices
    assert of["loss", "product"]["flops"] == 2 * 2 * 120 * head
    assert of["loss", "weight_gradient"]["flops"] == 2 * 120 * head
    pairs = 3 * 40 * 41 // 2
    width = config.n_heads * config.head_dim
    assert of["forward", "attention"]["flops"] == 4 * pairs * width * config.n_layers
    assert described["flops"] == sum(work.flops for work in plan.works)
    assert described["saved_bytes"] == config.n_layers * sum(described["kept"].values())
    assert described["state_bytes"] == 18 * config.n_params


def test_what_is_computed_again_is_not_kept():
    config = preset("stories15m")
    plans = [make_training_plan(config, 2, 8, recompute=recompute) for recompute in RECOMPUTE]
    saved = [plan.saved_bytes for plan in plans]
    hidden = 16 * config.hidden_dim * 2
    assert saved[0] - saved[1] == config.n_layers * hidden
    assert plans[0].batch_bytes - plans[1].batch_bytes == (config.n_layers - 1) * hidden
    assert saved[2] == config.n_layers * 16 * config.dim * (4 + 2)

    def products(plan):
        return sum(w.flops for w in plan.works if w.kind == "product" and w.layer >= 0)

    down = 2 * 16 * config.n_layers * config.dim * config.hidden_dim
    forward = products(plans[0]) / 2 - down
    again = forward * (config.n_layers - 1) / config.n_layers
    assert products(plans[2]) == products(plans[1]) + again


def test_logits_come_in_equal_parts_of_whole_tiles():
    for tokens, vocab_size in ((1, 32_000), (16_384, 32_000), (16_384, 151_936), (4096, 512)):
        rows = logit_rows(tokens, vocab_size)
        assert rows == tokens or rows % 128 == 0
        assert rows * vocab_size <= LOGITS + 128 * vocab_size
        parts = -(-tokens // rows)
        assert rows * parts - tokens < 128 * parts
    assert logit_rows(16_384, 32_000) == 16_384
    assert logit_rows(65_536, 32_000) == 16_384
    assert logit_rows(16_384, 32_000, FEWER_LOGITS) == 4096
    plan = make_training_plan(preset("stories15m"), 64, 256, logits=FEWER_LOGITS)
    assert plan.logits_bytes == 4096 * 32_000 * 2


def test_bytes_of_a_norm_and_of_an_update():
    config = preset("stories15m")
    plan = make_training_plan(config, 2, 8)
    first = next(work for work in plan.works if work.kind == "norm")
    assert first.bytes == 16 * 288 * (4 + 2) + 4 * 288
    assert plan.works[-1].bytes == config.n_params * 34


def without(plan, **of):
    """The plan without the first work that has these values."""
    gone = next(w for w in plan.works if all(getattr(w, key) == v for key, v in of.items()))
    return plan._replace(works=tuple(w for w in plan.works if w is not gone))


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ({"phase": "forward", "kind": "swiglu", "layer": 0}, r"hidden\.0 is not written before"),
        ({"phase": "backward", "kind": "attention", "layer": 5}, "dqkv is not written before"),
        (
            {"phase": "backward", "kind": "weight_gradient", "layer": 3},
            r"hidden\.3 is kept",
        ),
        ({"phase": "backward", "kind": "embedding"}, "gradient of .* 1 times"),
        ({"phase": "update"}, "an update is the last"),
    ],
)
def test_what_is_missing_is_found(of, message):
    with pytest.raises(PlanError, match=message):
        check_training(without(make_training_plan(preset("stories15m"), 1, 8), **of))


def test_what_is_kept_for_nothing_and_gradients_of_two_are_found():
    plan = make_training_plan(preset("stories15m"), 1, 8)
    twice = [w for w in plan.works if w.kind == "weight_gradient"][-1]
    with pytest.raises(PlanError, match="written 2 times"):
        check_training(plan._replace(works=(*plan.works[:-1], twice, plan.works[-1])))
    with pytest.raises(PlanError, match=r"spare\.0 is kept and not read"):
        check_training(plan._replace(buffers=plan.buffers | {"spare.0": 4}))
