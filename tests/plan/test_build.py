import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import onelaunch.model
from onelaunch.config import PRESETS, ModelConfig
from onelaunch.errors import BadInput
from onelaunch.model import Model
from onelaunch.plan import KINDS, NO_LAYER, make_plan
from onelaunch.plan.kinds import LAYER_KINDS
from onelaunch.plan.stages import Totals, add_totals
from tests.plan.plans import CONFIGS, SIZES, TINY
from tests.plan.scalar_model import ScalarModel


def _random_weights(config):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in config.weight_shapes().items()
    }


def _exact_rope_tables(config, length=None):
    positions = torch.arange(length or config.max_seq_len, dtype=torch.float64)
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angles = torch.outer(positions, config.rope_theta**-pairs)
    return torch.cos(angles), torch.sin(angles)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_stage_equals_the_model_counted_number_by_number(config, size, monkeypatch):
    plan = make_plan(config, **size)
    weights = _random_weights(config)
    all_positions, sample = size.get("all_positions", False), size.get("sample", False)
    # A row looked up twice is read twice: the tokens differ, so that counting them once is right.
    ids = torch.randperm(config.vocab_size, generator=torch.Generator().manual_seed(1))
    new = ids[: plan.batch * plan.sequence].view(plan.batch, plan.sequence)
    past = torch.randint(
        config.vocab_size, (plan.batch, plan.past), generator=torch.Generator().manual_seed(2)
    )
    model = ScalarModel(config, {name: w.tolist() for name, w in weights.items()})
    if plan.past:
        model.forward(past.tolist(), False, False)
    model.forward(new.tolist(), all_positions, sample)

    # what is counted is the model, but for the float32 of its rotary tables: where two scores lie
    # close, their rounding is 2e-5 of a logit
    monkeypatch.setattr(onelaunch.model, "rope_tables", _exact_rope_tables)
    exact = Model.from_weights(config, weights)
    logits = F.linear(exact.hidden(torch.cat((past, new), 1)), exact.head_weight())
    logits = logits[:, plan.past :] if all_positions else logits[:, -1:]
    counted = [value for (name, _), value in sorted(model.memory.items()) if name == "logits"]
    counted = torch.tensor(counted, dtype=torch.float64)
    torch.testing.assert_close(counted, logits.flatten(), rtol=1e-9, atol=1e-9)

    itemsizes = {buffer.name: buffer.itemsize for buffer in plan.buffers}
    assert len(plan.stages) == len(model.tallies)
    for stage, tally in zip(plan.stages, model.tallies, strict=True):
        assert (stage.kind, stage.layer) == (tally.kind, tally.layer)
        for of, accesses in (("reads", stage.reads), ("writes", stage.writes)):
            expected = {name: n * itemsizes[name] for name, n in tally.count(of).items()}
            assert {access.buffer: access.nbytes for access in accesses} == expected
        assert set(stage.weights) == set(tally.count("weights"))
        assert stage.weight_bytes == len(tally.weights) * plan.weight_itemsize
        assert stage.flops == tally.flops


def test_totals_of_stories15m_for_one_token():
    D, F_, V, L, H, E = 288, 768, 32000, 6, 6, 48
    totals = make_plan(PRESETS["stories15m"]).totals
    layer_weights = 4 * D * D + 3 * D * F_ + 2 * D
    assert totals.weight_bytes == 4 * (D + L * layer_weights + D + V * D)
    # tokens; each layer x four times in, q, attn_out, hidden; x into the head
    assert totals.activation_bytes_read == 4 * (1 + L * (4 * D + D + D + F_) + D)
    assert totals.activation_bytes_written == 4 * (D + L * (D + D + D + F_ + D) + V)
    assert totals.cache_bytes_read == totals.cache_bytes_written == 4 * L * 2 * D
    norm = 4 * D + 3
    products = 2 * 4 * D * D + 2 * 3 * D * F_
    small = 2 * norm + 3 * 2 * D + 2 * D + 5 * F_
    attention = 4 * E * H + 5 * H
    assert totals.flops == L * (products + small + attention) + norm + 2 * D * V


def test_totals_of_stories15m_for_64_tokens():
    D, F_, V, L, H, E, S = 288, 768, 32000, 6, 6, 48, 64
    totals = make_plan(PRESETS["stories15m"], sequence=S).totals
    assert totals.weight_bytes == 4 * (S * D + L * (4 * D * D + 3 * D * F_ + 2 * D) + D + V * D)
    assert totals.activation_bytes_read == 4 * (S + L * S * (6 * D + F_) + D)
    assert totals.activation_bytes_written == 4 * (S * D + L * S * (4 * D + F_) + V)
    assert totals.cache_bytes_read == totals.cache_bytes_written == 4 * L * S * 2 * D
    norm, pairs = 4 * D + 3, S * (S + 1) // 2
    rows = 8 * D * D + 6 * D * F_ + 2 * norm + 8 * D + 5 * F_
    assert totals.flops == L * (S * rows + pairs * H * (4 * E + 5)) + norm + 2 * D * V


def test_totals_of_qwen3_in_two_bytes_with_a_past():
    """Heads wider than the model over their number, few kv heads, norms of queries and keys."""
    D, F_, V, L, H, K, E = 1024, 3072, 151936, 28, 16, 8, 128
    B, S, T = 3, 5, 100
    plan = make_plan(
        PRESETS["qwen3-0.6b"], B, S, T, all_positions=True, weight_itemsize=2, activation_itemsize=2
    )
    totals, N = plan.totals, B * S
    layer_weights = D + (H + 2 * K) * E * D + 2 * E + H * E * D + D + 3 * D * F_
    assert totals.weight_bytes == 2 * (N * D + L * layer_weights + D + V * D)
    assert totals.activation_bytes_read == 4 * N + 2 * N * (L * (4 * D + 2 * H * E + F_) + D)
    written = 2 * N * (D + L * (2 * H * E + 2 * D + F_)) + 4 * N * V
    assert totals.activation_bytes_written == written
    assert totals.cache_bytes_read == 2 * L * B * (T + S) * 2 * K * E
    assert totals.cache_bytes_written == 2 * L * N * 2 * K * E
    pairs = B * (S * T + 15)
    row = 2 * D * (H + 2 * K) * E + 2 * H * E * D + 6 * D * F_
    row += 2 * (4 * D + 3) + (H + K) * (4 * E + 3) + 3 * (H + K) * E + 2 * D + 5 * F_
    head = N * (4 * D + 3 + 2 * D * V)
    assert totals.flops == L * (N * row + pairs * H * (4 * E + 5)) + head


@pytest.mark.parametrize("name", PRESETS)
def test_one_token_reads_every_weight_once_and_one_row_more(name):
    config = PRESETS[name]
    tied = config.n_params + config.dim
    assert make_plan(config, weight_itemsize=2).totals.weight_bytes == 2 * tied
    untied = config.with_(tied_embeddings=False)
    embedding = config.vocab_size * config.dim
    assert untied.n_params == config.n_params + embedding
    assert make_plan(untied, weight_itemsize=2).totals.weight_bytes == 2 * tied


def test_a_long_prompt_costs_what_its_parts_cost():
    """Fed in two parts, a text needs the same operations, but for the logits in between."""
    config = PRESETS["stories260k"]
    whole = make_plan(config, sequence=40).totals
    parts = [make_plan(config, sequence=25).totals, make_plan(config, sequence=15, past=25).totals]
    head = make_plan(config).stages[-1]
    assert sum(part.flops for part in parts) == whole.flops + head.flops
    written = sum(part.cache_bytes_written for part in parts)
    assert written == whole.cache_bytes_written


def test_buffers_have_the_shapes_of_what_they_hold():
    plan = make_plan(TINY, 3, 2, 7, sample=True, activation_itemsize=2)
    assert {b.name: (b.shape, b.itemsize, b.role) for b in plan.buffers} == {
        "tokens": ((3, 2), 4, "input"),
        "x": ((3, 2, 4), 2, "scratch"),
        "q": ((3, 2, 12), 2, "scratch"),
        "attn_out": ((3, 2, 12), 2, "scratch"),
        "hidden": ((3, 2, 10), 2, "scratch"),
        **{f"cache.{i}": ((2, 3, 1, 9, 6), 2, "state") for i in range(3)},
        "logits": ((3, 1, 17), 4, "scratch"),
        "next": ((3,), 4, "output"),
    }
    assert plan.buffer("hidden").nbytes == 3 * 2 * 10 * 2
    with pytest.raises(KeyError):
        plan.buffer("absent")


@pytest.mark.parametrize(
    ("all_positions", "sample", "shape", "role"),
    [
        (False, False, (2, 1, 17), "output"),
        (False, True, (2, 1, 17), "scratch"),
        (True, False, (2, 3, 17), "output"),
        (True, True, (2, 3, 17), "output"),
    ],
)
def test_logits_are_kept_where_they_are_asked_for(all_positions, sample, shape, role):
    logits = make_plan(TINY, 2, 3, all_positions=all_positions, sample=sample).buffer("logits")
    assert (logits.shape, logits.role) == (shape, role)


def test_stages_come_as_pairs_of_whole_numbers():
    """The order of the kinds is what compiled programs were built with."""
    assert KINDS == (
        "embed", "qkv", "attention", "out_proj", "gate_up", "down", "head", "sample"
    )  # fmt: skip
    plan = make_plan(TINY.with_(n_layers=2), sample=True)
    layers = [(kind, layer) for layer in (0, 1) for kind in (1, 2, 3, 4, 5)]
    assert [stage.code for stage in plan.stages] == [(0, -1), *layers, (6, -1), (7, -1)]
    assert NO_LAYER == -1
    assert KINDS[1:6] == LAYER_KINDS
    assert plan.stages[3].label == "layer 0 out_proj"
    assert plan.stages[-1].label == "sample"


def test_the_total_of_nothing():
    assert add_totals(()) == Totals(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch 0: .* at least 1"),
        ({"batch": True}, "batch True"),
        ({"sequence": 0}, "sequence 0"),
        ({"sequence": 1.0}, "sequence 1.0"),
        ({"past": -1}, "past -1: .* at least 0"),
        ({"weight_itemsize": 0}, "weight_itemsize 0"),
        ({"activation_itemsize": 0}, "activation_itemsize 0"),
        ({"sequence": 13}, "13 tokens after 0 .* 12; use fewer"),
        ({"past": 12}, "1 tokens after 12 .* 12; use fewer"),
        ({"sequence": 5, "past": 8}, "5 tokens after 8 .* 12; use fewer"),
    ],
)
def test_sizes_out_of_range(arguments, message):
    with pytest.raises(BadInput, match=message):
        make_plan(TINY, **arguments)


@pytest.mark.parametrize("arguments", [{"sequence": 12}, {"past": 11}, {"sequence": 5, "past": 7}])
def test_a_full_context_fits(arguments):
    assert make_plan(TINY, **arguments).totals.flops > 0


def test_the_largest_model_that_a_configuration_allows():
    extent = 1 << 24
    config = ModelConfig(
        dim=extent, n_layers=1024, n_heads=1, hidden_dim=extent, vocab_size=extent,
        max_seq_len=extent,
    )  # fmt: skip
    plan = make_plan(config, batch=1000, sequence=extent)
    assert len(plan.stages) == 2 + 5 * 1024
    assert plan.totals.flops > 1 << 80


def test_the_room_imports_no_torch_and_no_room_above_it():
    code = """
import sys
import onelaunch.plan
assert not {"torch", "numpy", "numba", "typer"} & set(sys.modules)
ours = {name.split(".")[1] for name in sys.modules if name.startswith("onelaunch.")}
assert ours == {"config", "errors", "plan"}, ours
"""
    subprocess.run([sys.executable, "-c", code], check=True)
