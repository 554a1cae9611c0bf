"""Whole micro-steps of the CUDA engine through Triton's interpreter, on CPU tensors. Run by
test_interpreter.py in a process of its own."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

assert "triton" not in sys.modules, "too late: Triton was imported before this"
os.environ["TRITON_INTERPRET"] = "1"


import pytest  # noqa: E402
import torch  # noqa: E402

from onelaunch.checkpoints.run_folder import (  # noqa: E402
    newest_valid_checkpoint,
    read_run,
    read_state,
)
from onelaunch.compilation.cache import Store  # noqa: E402
from onelaunch.config import ModelConfig, YarnRopeScaling  # noqa: E402
from onelaunch.engines.cuda.training import adamw, launches  # noqa: E402
from onelaunch.engines.cuda.training import engine as engines  # noqa: E402
from onelaunch.engines.cuda.training import step as steps  # noqa: E402
from onelaunch.engines.cuda.training.engine import CudaTrainer  # noqa: E402
from onelaunch.engines.cuda.training.flat import FlatParameters  # noqa: E402
from onelaunch.engines.cuda.training.forms import (  # noqa: E402
    FEW_ROWS,
    FEW_ROWS_BACK,
    AttentionBlocks,
    TrainingForms,
    attention_blocks,
    rule,
)
from onelaunch.engines.cuda.training.step import TrainingStep  # noqa: E402
from onelaunch.engines.cuda.training.tuning import timer as timers  # noqa: E402
from onelaunch.engines.cuda.training.tuning.store import (  # noqa: E402
    TunedForms,
    data_of,
    facts_of,
    keep,
)
from onelaunch.engines.cuda.tuning.facts import device_facts  # noqa: E402
from onelaunch.errors import BadInput  # noqa: E402
from onelaunch.model import Model  # noqa: E402
from onelaunch.plan import training as plans  # noqa: E402
from onelaunch.training import run as runs  # noqa: E402
from onelaunch.training.recipe import Recipe  # noqa: E402
from tests.engines.cuda.training.dropout_masks import masked  # noqa: E402
from tests.engines.suite import SMALL  # noqa: E402
from tests.interpreting import mend_loop_bounds  # noqa: E402
from tests.kills import stop_before  # noqa: E402
from tests.metrics import read_metrics  # noqa: E402

mend_loop_bounds()

CONFIGS = {
    "grouped": SMALL.with_(n_kv_heads=2),
    "norms of heads, untied": SMALL.with_(qk_norm=True, tied_embeddings=False, head_dim=16),
    "halves": SMALL.with_(rope_layout="half", hidden_dim=88, rope_scaling=YarnRopeScaling(4.0, 8)),
}


KEYS = (1 << 62) + 11, 12


def weights_and_batches(config):
    """With two batches of 3 x 50, of which one has targets that do not count."""
    torch.manual_seed(5)
    weights = {k: torch.randn(s) * 0.1 + (len(s) == 1) for k, s in config.weight_shapes().items()}
    batches = [torch.randint(0, config.vocab_size, (2, 3, 50)).unbind() for _ in range(2)]
    batches[1][1][1, 30:] = -1
    return weights, batches


def trained(config, weights, batches, scales, dtype=torch.float32, **how):
    """The losses and gradients of micro-steps from nothing; KEYS are those of their masks."""
    parameters = {name: torch.nn.Parameter(w.clone()) for name, w in weights.items()}
    flat = FlatParameters(config, parameters, dtype)
    flat.gradients_M.fill_(float("nan"))
    flat.refresh()
    sequences, length = batches[0][0].shape
    step = TrainingStep(config, flat, sequences, length, **how)
    losses = []
    with torch.no_grad():
        for i, ((tokens, targets), scale) in enumerate(zip(batches, scales, strict=True)):
            step.load(tokens, targets, scale, KEYS[i] if how.get("dropout") else None)
            losses.append(step.train(i > 0).item())
    return losses, {name: flat.gradient(name) for name in weights}, step


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "fused"), [(torch.float32, False), (torch.float16, False), (torch.float16, True)]
)
def test_gradients_of_two_micro_steps_are_autograds(name, dtype, fused):
    config = CONFIGS[name].with_(n_layers=2, max_seq_len=80)
    weights, batches = weights_and_batches(config)
    scales = (0.25, 0.75)
    forms = replace(rule(config, 3, 50, dtype, fused), logits=1)  # parts of 128 rows
    losses, gradients, step = trained(config, weights, batches, scales, dtype, forms=forms)
    assert_autograds(config, weights, batches, scales, dtype, losses, gradients)
    total = step.loss_sum().item()
    assert total == pytest.approx(losses[1] * int((batches[1][1] >= 0).sum()), rel=1e-5)


def assert_autograds(config, weights, batches, scales, dtype, losses, gradients):
    """Against float64."""
    exact = Model.from_weights(config, {k: v.double() for k, v in weights.items()})
    exact.requires_grad_(True)
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    for (tokens, targets), scale, loss in zip(batches, scales, losses, strict=True):
        of_exact = exact.loss(tokens, targets)
        (of_exact * scale).backward()
        assert loss == pytest.approx(of_exact.item(), rel=tolerance / 10)
    for key, parameter in exact.named_parameters():
        assert parameter.grad is not None
        error = (gradients[key].double() - parameter.grad).norm() / parameter.grad.norm()
        assert error < tolerance, (key, error)


@pytest.mark.parametrize(("forward", "backward"), [(FEW_ROWS, None), (None, FEW_ROWS_BACK)])
def test_gradients_in_other_forms_are_autograds(forward, backward):
    """Of the forward one, of the backward the other is fused, in blocks that are not the rule's."""
    config = CONFIGS["grouped"].with_(n_layers=2, max_seq_len=80)
    weights, batches = weights_and_batches(config)
    scales, dtype = (0.25, 0.75), torch.float16
    blocks = AttentionBlocks(32, 16, 3, 4), AttentionBlocks(16, 32, 2, 8)
    forms = TrainingForms(forward, backward, *blocks, logits=1, side_stream=False)
    losses, gradients, step = trained(config, weights, batches, scales, dtype, forms=forms)
    assert step.forms == forms
    assert_autograds(config, weights, batches, scales, dtype, losses, gradients)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["grouped", "norms of heads, untied"])
def test_what_is_computed_again_has_the_same_bits(name, fused, monkeypatch):
    monkeypatch.setattr(steps, "can_fuse", lambda *_: fused)
    config = CONFIGS[name].with_(n_layers=3)
    torch.manual_seed(5)
    weights = {k: torch.randn(s) * 0.1 for k, s in config.weight_shapes().items()}
    batches = [torch.randint(0, config.vocab_size, (2, 2, 7)).unbind() for _ in range(2)]
    found = [
        trained(config, weights, batches, [1.0, 0.5], torch.float16, recompute=recompute)[:2]
        for recompute in plans.RECOMPUTE
    ]
    for losses, gradients in found[1:]:
        assert losses == found[0][0]
        assert all(torch.equal(gradients[key], found[0][1][key]) for key in weights)


@pytest.mark.parametrize(("name", "dtype"), [("grouped", torch.float32), ("halves", torch.float16)])
def test_gradients_with_dropout_are_those_of_the_same_masks(name, dtype):
    config, scales, p = CONFIGS[name].with_(n_layers=2, max_seq_len=80), (0.25, 0.75), 0.2
    weights, batches = weights_and_batches(config)
    losses, gradients, step = trained(config, weights, batches, scales, dtype, dropout=p)
    exact = Model.from_weights(config, {k: v.double() for k, v in weights.items()}, p)
    exact.requires_grad_(True).train()
    tolerance = 2e-5 if dtype == torch.float32 else 0.02
    for (tokens, targets), scale, loss, key in zip(batches, scales, losses, KEYS, strict=True):
        with masked(key, p):
            of_exact = exact.loss(tokens, targets)
            (of_exact * scale).backward()
        assert loss == pytest.approx(of_exact.item(), rel=tolerance / 10)
    for key, parameter in exact.named_parameters():
        assert parameter.grad is not None
        error = (gradients[key].double() - parameter.grad).norm() / parameter.grad.norm()
        assert error < tolerance, (key, error)
    # an evaluation between micro-steps drops nothing
    tokens, targets = batches[0]
    step.load(tokens, targets, 0.0)
    mean = step.loss_sum().item() / targets.numel()
    assert mean == pytest.approx(exact.eval().loss(tokens, targets).item(), rel=tolerance / 10)


@pytest.mark.parametrize("name", ["grouped", "norms of heads, untied"])
def test_parts_of_the_gradients_are_named_once_each_when_they_are_final(name, monkeypatch):
    monkeypatch.setattr("onelaunch.engines.cuda.training.flat.SEGMENT_BYTES", 1)
    config = CONFIGS[name].with_(n_layers=3)
    torch.manual_seed(5)
    weights = {k: torch.randn(s) * 0.1 for k, s in config.weight_shapes().items()}
    batch = torch.randint(0, config.vocab_size, (2, 2, 7)).unbind()
    _, expected, _ = trained(config, weights, [batch], [1.0])
    parameters = {key: torch.nn.Parameter(w.clone()) for key, w in weights.items()}
    flat = FlatParameters(config, parameters, torch.float32)
    flat.gradients_M.fill_(float("nan"))
    step = TrainingStep(config, flat, 2, 7)
    named = []
    with torch.no_grad():
        step.load(*batch, 1.0)
        step.train(False, ready=lambda b, e: named.append((b, e, flat.gradients_M[b:e].clone())))
    for begin, end, then in named:
        assert torch.equal(then.nan_to_num(7), flat.gradients_M[begin:end].nan_to_num(7))
    named.sort(key=lambda part: part[0])
    assert [begin for begin, _, _ in named] == [0, *(end for _, end, _ in named[:-1])]
    assert named[-1][1] == flat.gradients_M.numel()
    assert len(named) == 5 + (not config.tied_embeddings)
    for key, gradient in expected.items():
        assert torch.equal(flat.gradient(key), gradient), key


def test_the_same_bits_again():
    config = CONFIGS["grouped"].with_(n_layers=1)
    torch.manual_seed(5)
    weights = {k: torch.randn(s) * 0.1 for k, s in config.weight_shapes().items()}
    batch = torch.randint(0, config.vocab_size, (2, 2, 7)).unbind()
    for dropout in (0.0, 0.3):
        first, again = (
            trained(config, weights, [batch], [1.0], dropout=dropout)[1] for _ in range(2)
        )
        assert all(torch.equal(first[key], again[key]) for key in weights)


TINY = {
    "model.dim": 32, "model.n_layers": 1, "model.n_heads": 4, "model.n_kv_heads": 2,
    "model.hidden_dim": 48, "model.max_seq_len": 16, "train.batch_size": 2, "train.updates": 5,
    "train.device": "cpu", "train.engine": "reference", "train.accum": 2, "train.threads": 1,
    "eval.every": 2, "eval.batches": 1, "eval.sample_tokens": 2, "checkpoint.every": 2,
    "optimizer.lr": 0.01, "optimizer.warmup": 1,
}  # fmt: skip


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Runs train with the CUDA engine's step, interpreted."""
    monkeypatch.setattr(adamw, "SQUARES_CTAS", 4)  # the interpreter takes one CTA after another
    monkeypatch.setattr(steps, "NORM_CTAS", 4)
    monkeypatch.setattr(engines, "why_not_train", lambda *_: None)
    monkeypatch.setattr(
        runs,
        "make_engine",
        lambda recipe, config, weights: CudaTrainer(
            config, weights, "cpu", dropout=recipe.train.dropout
        ),
    )


def losses_of(run):
    records = read_metrics(run / "metrics.jsonl")
    assert next(r["engine"] for r in records if r["kind"] == "run") == "cuda"
    return [(r["loss"], r["grad_norm"]) for r in records if r["kind"] == "update"]


@pytest.mark.usefixtures("on_the_cpu")
def test_a_run_is_pytorchs_and_goes_on_exactly_where_it_stopped(tmp_path, monkeypatch):
    recipe = Recipe().with_settings(TINY, "test")
    outcome = runs.start(recipe, tmp_path / "whole", quiet=True)
    assert outcome.progress.val_loss is not None
    whole = losses_of(tmp_path / "whole")
    stop_before(monkeypatch, 7)
    stopped = runs.start(recipe, tmp_path / "cut", quiet=True)
    assert (stopped.progress.update, stopped.progress.micro) == (3, 1)
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert losses_of(tmp_path / "cut") == whole
    monkeypatch.undo()
    runs.start(recipe, tmp_path / "plain", quiet=True)
    records = read_metrics(tmp_path / "plain" / "metrics.jsonl")
    plain = [(r["loss"], r["grad_norm"]) for r in records if r["kind"] == "update"]
    assert len(plain) == len(whole) == 5
    for got, expected in zip(whole, plain, strict=True):
        assert got == pytest.approx(expected, rel=2e-3)


@pytest.mark.usefixtures("on_the_cpu")
def test_a_run_with_dropout_goes_on_exactly_where_it_stopped(tmp_path, monkeypatch):
    recipe = Recipe().with_settings(TINY | {"train.dropout": 0.2}, "test")
    runs.start(recipe, tmp_path / "whole", quiet=True)
    whole = losses_of(tmp_path / "whole")
    with monkeypatch.context() as patches:
        stop_before(patches, 7)
        stopped = runs.start(recipe, tmp_path / "cut", quiet=True)
    assert (stopped.progress.update, stopped.progress.micro) == (3, 1)
    torch.manual_seed(999)  # the checkpoint has the state of the random numbers
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert losses_of(tmp_path / "cut") == whole
    runs.start(Recipe().with_settings(TINY, "test"), tmp_path / "plain", quiet=True)
    assert losses_of(tmp_path / "plain")[0] != whole[0]


def keep_tuned(config, **changes):
    """Other forms than the rule's for a batch of 2 x 16, as `tune` keeps them."""
    forms = replace(rule(config, 2, 16, torch.float32, fuses=False), **changes)
    facts = facts_of(config, 2, 16, "float32", False, device_facts(torch.device("cpu")))
    assert keep(Store(), facts, TunedForms(forms, 90.0, 100.0, 9, 1.0, "2026-12-21"))
    return forms


@pytest.mark.usefixtures("on_the_cpu")
def test_a_run_goes_on_in_the_forms_that_it_began_with(tmp_path, monkeypatch):
    """By the rule before there are tuned ones; in the tuned ones where they have gone."""
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "empty"))
    recipe = Recipe().with_settings(TINY, "test")
    runs.start(recipe, tmp_path / "whole", quiet=True)
    whole = losses_of(tmp_path / "whole")
    with monkeypatch.context() as patches:
        stop_before(patches, 7)
        runs.start(recipe, tmp_path / "cut", quiet=True)
    config = ModelConfig.from_dict(read_run(tmp_path / "cut")["config"], "run.json")
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "tuned"))
    blocks = AttentionBlocks(16, 32, 2, 4)
    # blocks of keys of 32 pad a sequence of 16: other sums, of the same numbers
    forms = keep_tuned(config, attention_forward=blocks, attention_backward=blocks)
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert losses_of(tmp_path / "cut") == whole
    assert sources_of(tmp_path / "cut") == ["rule", "rule"]

    with monkeypatch.context() as patches:
        stop_before(patches, 7)
        runs.start(recipe, tmp_path / "tuned run", quiet=True)
    checkpoint = newest_valid_checkpoint(tmp_path / "tuned run")[0]
    saved = read_state(checkpoint)["forms"]["2x16"]
    assert saved == {"source": "tuned", "device": "cpu", "dtype": "float32", **data_of(forms)}
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path / "empty"))
    used = []
    steps_of = CudaTrainer._make_step
    monkeypatch.setattr(
        CudaTrainer, "_make_step", lambda self, *how: used.append(how) or steps_of(self, *how)
    )
    runs.resume(tmp_path / "tuned run", {}, quiet=True)
    assert (2, 16, forms) in used
    assert sources_of(tmp_path / "tuned run") == ["tuned", "tuned"]


def sources_of(run):
    """Where the forms of each of a run's processes were from."""
    records = read_metrics(run / "metrics.jsonl")
    return [r["forms"]["source"] for r in records if r["kind"] == "run"]


class Relaunched:
    """In the place of a CUDA graph."""

    def __init__(self, step, part, accumulate):
        self.forms, self._launch = step.forms, lambda: step._launch(part, accumulate)

    def replay(self):
        self._launch()


def test_tuning_measures_keeps_and_uses_the_fastest(monkeypatch, tmp_path):
    """Of times that are made up: of the forward's blocks one is fastest, one does not compile, and
    one gives wrong gradients."""
    monkeypatch.setattr(engines, "why_not_train", lambda *_: None)
    monkeypatch.setattr(TrainingStep, "_captured", lambda *how: Relaunched(*how))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    config = CONFIGS["grouped"].with_(n_layers=1)
    first = attention_blocks(1, 9, config.n_heads, config.head_dim, backward=False)
    fastest, broken, wrong = (AttentionBlocks(rows, 32, 2, 4) for rows in (16, 32, 64))
    values = {"attention_forward": [first, fastest, broken, wrong], "side_stream": [True, False]}
    monkeypatch.setattr(engines, "candidates", lambda *_: values)
    forward = launches.attention_forward

    def attention_forward(*args):
        blocks = args[6]
        if blocks == broken:
            raise RuntimeError("out of resource: shared memory\nin a kernel")
        forward(*args)
        if blocks == wrong:
            args[4].mul_(1.5)

    monkeypatch.setattr(launches, "attention_forward", attention_forward)
    monkeypatch.setattr(
        timers,
        "replay_us",
        lambda graph, n: 900.0 if graph.forms.attention_forward == fastest else 1000.0,
    )
    torch.manual_seed(5)
    weights = {k: torch.randn(s) * 0.1 for k, s in config.weight_shapes().items()}
    engine = CudaTrainer(config, weights, "cpu", store=Store(tmp_path / "store"))
    tuned = engine.tune(1, 9)
    assert (tuned["us"], tuned["rule_us"], tuned["tried"], tuned["kept"]) == (900, 1000, 6, True)
    rows = [(each["us"], each["why"], each["chosen"]) for each in tuned["timed"]]
    assert rows[:3] == [
        (1000, None, False), (900, None, True),
        (None, "RuntimeError: out of resource: shared memory", False),
    ]  # fmt: skip
    assert rows[3][0] is None
    assert "from the rule's" in rows[3][1]
    assert rows[4:] == [(900, None, True), (900, None, False)]
    assert tuned["forms"]["attention_forward"] == fastest._asdict()
    later = CudaTrainer(config, weights, "cpu", store=Store(tmp_path / "store"))
    assert later.forms(1, 9) == engine.forms(1, 9) == {
        "source": "tuned", "device": "cpu", "dtype": "float32", **tuned["forms"],
    }  # fmt: skip
    tokens, targets = torch.randint(0, config.vocab_size, (2, 1, 9)).unbind()
    loss = later.train_step(tokens, targets).item()
    exact = Model.from_weights(config, {k: v.double() for k, v in weights.items()})
    assert loss == pytest.approx(exact.loss(tokens, targets).item(), rel=1e-5)
    assert later._step(1, 9).forms.attention_forward == fastest
    with pytest.raises(BadInput, match="one sequence or more"):
        engine.tune(1, config.max_seq_len + 1)


def test_forms_of_a_checkpoint_that_cannot_be_used_are_left(monkeypatch):
    monkeypatch.setattr(engines, "why_not_train", lambda *_: None)
    config = CONFIGS["grouped"].with_(n_layers=1)
    weights = {k: torch.ones(s) for k, s in config.weight_shapes().items()}
    engine = CudaTrainer(config, weights, "cpu")
    here = engine.forms(2, 16)
    assert here["source"] == "rule"
    assert engine.describe()["forms"] == {"2x16": here}
    other = here | {"attention_forward": AttentionBlocks(16, 16, 1, 4)._asdict()}
    for wrong in (
        None,
        [here],
        {"2x16": here | {"device": "NVIDIA H200"}},
        {"2x16": other | {"dtype": "bfloat16"}},
        {"2x16": other | {"attention_forward": None, "attention_backward": None}},
        {"2x16": other | {"logits": -1}},
        {"2x16": {}},
        {"2 by 16": other},
        {"3x16": other, "2x16": None},
    ):
        assert not engine.use_forms(wrong)
        assert engine.forms(2, 16) == here
    assert engine.use_forms({"2x16": other, "3x16": here})
    assert engine.forms(2, 16) == other
    # who asks for less memory has fewer logits, whatever was chosen
    saving = CudaTrainer(config, weights, "cpu", recompute="layers")
    assert saving.use_forms({"2x16": other})
    assert saving.forms(2, 16) == other | {"logits": plans.FEWER_LOGITS}


@pytest.mark.usefixtures("on_the_cpu")
def test_another_optimizer_updates_the_same_weights(tmp_path):
    recipe = Recipe().with_settings(TINY | {"optimizer.name": "muon"}, "test")
    runs.start(recipe, tmp_path / "run", quiet=True)
    first, *_, last = losses_of(tmp_path / "run")
    assert last[0] < first[0]


def test_gradients_that_lie_elsewhere_are_what_the_update_takes(monkeypatch):
    """As sums over several processes do."""
    monkeypatch.setattr(adamw, "SQUARES_CTAS", 4)
    monkeypatch.setattr(engines, "why_not_train", lambda *_: None)
    config = CONFIGS["grouped"].with_(n_layers=1)
    torch.manual_seed(5)
    weights = {k: torch.randn(s) * 0.1 for k, s in config.weight_shapes().items()}
    ours, theirs = (CudaTrainer(config, weights, "cpu") for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    flat = adamw.FlatAdamW(ours.parameters(), ours.flat, weight_decay=0.0, **settings)
    torchs = torch.optim.AdamW(theirs.parameters().values(), weight_decay=0.0, **settings)
    for _ in range(2):
        gradients = {k: torch.randn(s) for k, s in config.weight_shapes().items()}
        ours.flat.gradients_M.fill_(float("nan"))
        for engine in (ours, theirs):
            for name, parameter in engine.parameters().items():
                parameter.grad = None if name == "norm.weight" else gradients[name].clone()
        norm = flat.clip_and_step(0.0)
        torchs.step()
    rest = [g for name, g in gradients.items() if name != "norm.weight"]
    assert norm.item() == pytest.approx(torch.nn.utils.get_total_norm(rest).item(), rel=1e-5)
    for name, parameter in ours.parameters().items():
        torch.testing.assert_close(parameter, theirs.parameters()[name], rtol=1e-5, atol=1e-6)


def test_each_micro_step_drops_others_and_the_seed_says_which(monkeypatch):
    monkeypatch.setattr(engines, "why_not_train", lambda *_: None)
    config = CONFIGS["grouped"].with_(n_layers=1)
    torch.manual_seed(5)
    weights = {k: torch.randn(s) * 0.1 for k, s in config.weight_shapes().items()}
    tokens, targets = torch.randint(0, config.vocab_size, (2, 1, 9)).unbind()
    engine, plain = (CudaTrainer(config, weights, "cpu", dropout=p) for p in (0.5, 0.0))

    def losses():
        torch.manual_seed(6)
        return [engine.train_step(tokens, targets).item() for _ in range(3)]

    first = losses()
    assert len(set(first)) == 3
    assert losses() == first
    assert engine.loss_sum(tokens, targets) == plain.loss_sum(tokens, targets)
    wide = config.with_(head_dim=128)
    of_wide = {k: torch.ones(s) for k, s in wide.weight_shapes().items()}
    with pytest.raises(BadInput, match="heads of 128 in float32"):
        CudaTrainer(wide, of_wide, "cpu", dropout=0.1)


def test_what_is_no_batch_is_refused(monkeypatch):
    monkeypatch.setattr(engines, "why_not_train", lambda *_: None)
    config = CONFIGS["grouped"].with_(n_layers=1)
    engine = CudaTrainer(
        config, {k: torch.ones(s) for k, s in config.weight_shapes().items()}, "cpu"
    )
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    for targets, words in (
        (tokens - 100, "a target is outside"),
        (tokens + config.vocab_size, "a target is outside"),
        (tokens[:, :4], "must be alike"),
    ):
        with pytest.raises(BadInput, match=words):
            engine.train_step(tokens, targets)
    assert all(p.grad is None for p in engine.parameters().values())


def test_a_smaller_batch_of_an_evaluation_takes_the_buffers_that_are_there(monkeypatch):
    monkeypatch.setattr(engines, "why_not_train", lambda *_: None)
    config = CONFIGS["grouped"].with_(n_layers=1)
    torch.manual_seed(5)
    weights = {k: torch.randn(s) * 0.1 for k, s in config.weight_shapes().items()}
    engine = CudaTrainer(config, weights, "cpu")
    exact = Model.from_weights(config, {k: w.double() for k, w in weights.items()})
    tokens, targets = torch.randint(0, config.vocab_size, (2, 3, 7)).unbind()
    targets[1, 2] = -1
    engine.train_step(tokens, targets)
    for rows, length in ((3, 7), (2, 7), (1, 4)):
        batch = tokens[:rows, :length], targets[:rows, :length]
        expected = exact.loss(*batch).item() * int((batch[1] >= 0).sum())
        assert engine.loss_sum(*batch) == pytest.approx(expected, rel=1e-5)
    assert list(engine._steps) == [(3, 7)]
    engine.loss_sum(torch.cat((tokens, tokens)), torch.cat((targets, targets)))
    assert list(engine._steps) == [(3, 7), (6, 7)]
    for wrong in (targets[:, :4], targets[0]):
        with pytest.raises(BadInput, match="must be alike"):
            engine.loss_sum(tokens, wrong)
    nothing = tokens[:0]
    with pytest.raises(BadInput, match="one sequence"):
        engine.loss_sum(nothing, nothing)
