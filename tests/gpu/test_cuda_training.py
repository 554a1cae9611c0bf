"""The CUDA engine's training step: gradients against float64, the same bits again, whole runs."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

import onelaunch
from onelaunch.compilation.cache import Store
from onelaunch.config import YarnRopeScaling, preset
from onelaunch.engines.cuda.training.adamw import FlatAdamW
from onelaunch.engines.cuda.training.engine import CudaTrainer
from onelaunch.engines.cuda.training.swiglu_launches import can_fuse
from onelaunch.engines.cuda.training.tuning.candidates import candidates
from onelaunch.engines.cuda.training.tuning.store import data_of, read_forms
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from onelaunch.model import Model
from onelaunch.training import run as runs
from onelaunch.training.recipe import Recipe
from tests.convergence import llama
from tests.engines.cuda.training.dropout_masks import masked
from tests.kills import SETTINGS, stop_before
from tests.metrics import read_metrics

BASE = preset("stories15m").with_(n_layers=3, vocab_size=4000)
CONFIGS = {
    "stories15m": BASE,
    "grouped": BASE.with_(n_kv_heads=2),
    "norms of heads, untied": BASE.with_(qk_norm=True, tied_embeddings=False),
    "halves": BASE.with_(dim=384, head_dim=64, rope_layout="half"),
    "stories260k": preset("stories260k"),
    "yarn": BASE.with_(rope_scaling=YarnRopeScaling(4.0, 64), rope_theta=500.0, qk_norm=True),
    "wide heads": BASE.with_(dim=256, n_heads=4, n_kv_heads=2, head_dim=128, hidden_dim=704),
    "wide heads with norms": BASE.with_(
        dim=256, n_heads=4, n_kv_heads=2, head_dim=128, qk_norm=True, hidden_dim=704
    ),
}


def recipe(**changed) -> Recipe:
    settings = SETTINGS | {"train.device": "cuda", "train.threads": 0, "train.dropout": 0.0}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


def of_kind(run, kind):
    return [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == kind]


def weights_of(config, seed=3):
    torch.manual_seed(seed)
    return {
        name: torch.randn(shape) * 0.02 if len(shape) > 1 else 1 + 0.1 * torch.randn(shape)
        for name, shape in config.weight_shapes().items()
    }


def error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


def gradients_of(engine, tokens, targets):
    """Of two micro-steps from nothing."""
    for parameter in engine.parameters().values():
        parameter.grad = None
    engine.train_step(tokens, targets, 1.0)
    engine.train_step(tokens.flip(0), targets.flip(0), 0.5)
    return {name: p.grad.clone() for name, p in engine.parameters().items()}


@pytest.mark.parametrize("length", [200, 512])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_as_near_to_float64_as_eager_ones(name, dtype, length):
    config = CONFIGS[name].with_(max_seq_len=length)
    weights = {name: w.cuda() for name, w in weights_of(config).items()}
    tokens, targets = torch.randint(0, config.vocab_size, (2, 4, length), device="cuda").unbind(0)
    targets[1, 100:] = -1
    exact = Model.from_weights(config, {name: w.double() for name, w in weights.items()})
    exact.requires_grad_(True)
    loss = exact.loss(tokens, targets)
    (1.5 * loss).backward()
    eager = ReferenceEngine(config, weights, device="cuda", train=True, dtype=dtype)
    of_eager = gradients_of(eager, tokens, targets)
    engine = CudaTrainer(config, weights, "cuda", dtype)
    engine.flat.gradients_M.fill_(float("nan"))
    first, *others = (gradients_of(engine, tokens, targets) for _ in range(4))
    for other in others:  # launched, captured, replayed
        assert all(torch.equal(first[key], other[key]) for key in first)
    # attention's backward takes its weights from logarithms of up to 10, whose rounding alone is
    # twice what float32 has else
    most = 1.5 if dtype == "bfloat16" else 2.0
    for key, parameter in exact.named_parameters():
        assert error(first[key], parameter.grad) <= most * error(of_eager[key], parameter.grad), key
    mean = engine.loss_sum(tokens, targets) / int((targets >= 0).sum())
    assert mean == pytest.approx(loss.item(), rel=1e-3 if dtype == "bfloat16" else 1e-5)
    assert engine.train_step(tokens, targets).item() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in ("stories15m", "grouped", "halves", "stories260k")
          for dtype in ("bfloat16", "float32")),
        ("wide heads", "bfloat16"),
    ],
)  # fmt: skip
def test_gradients_with_dropout_are_as_near_as_eager_ones_with_the_same_masks(name, dtype):
    config, p, length = CONFIGS[name].with_(max_seq_len=200), 0.2, 200
    weights = {name: w.cuda() for name, w in weights_of(config).items()}
    tokens, targets = torch.randint(0, config.vocab_size, (2, 4, length), device="cuda").unbind(0)
    targets[1, 100:] = -1
    torch.manual_seed(17)
    keys = [int(torch.randint(2**63 - 1, ())) for _ in range(2)]
    batches = ((tokens, targets, 1.0), (tokens.flip(0), targets.flip(0), 0.5))
    exact = Model.from_weights(config, {name: w.double() for name, w in weights.items()}, p)
    exact.requires_grad_(True).train()
    eager = ReferenceEngine(config, weights, device="cuda", train=True, dtype=dtype, dropout=p)
    losses = []
    for key, (*batch, scale) in zip(keys, batches, strict=True):
        with masked(key, p):
            losses.append(exact.loss(*batch))
            (scale * losses[-1]).backward()
        with masked(key, p):
            eager.train_step(*batch, scale)
    of_eager = {name: parameter.grad for name, parameter in eager.parameters().items()}
    engine = CudaTrainer(config, weights, "cuda", dtype, p)

    def gradients(seed):
        torch.manual_seed(seed)
        return gradients_of(engine, tokens, targets)

    first, *others = (gradients(17) for _ in range(4))
    other = gradients(18)
    for key, parameter in exact.named_parameters():
        assert all(torch.equal(first[key], again[key]) for again in others), key
        assert not torch.equal(first[key], other[key]), key
        assert error(first[key], parameter.grad) <= 1.5 * error(of_eager[key], parameter.grad), key
    torch.manual_seed(17)
    got = [engine.train_step(*batch).item() for *batch, _ in batches]
    expected = [loss.item() for loss in losses]
    assert got == pytest.approx(expected, rel=1e-3 if dtype == "bfloat16" else 1e-5)
    # an evaluation of the same shape drops nothing
    plain = CudaTrainer(config, weights, "cuda", dtype)
    for _ in range(3):
        assert engine.loss_sum(tokens, targets) == plain.loss_sum(tokens, targets)
    torch.manual_seed(17)
    assert engine.train_step(tokens, targets).item() == got[0]


def test_tuned_forms_are_kept_and_used_and_every_candidate_is_right(tmp_path):
    config, shape = BASE.with_(n_layers=2, max_seq_len=256), (4, 200)
    weights = {name: w.cuda() for name, w in weights_of(config).items()}
    engine = CudaTrainer(config, weights, "cuda", store=Store(tmp_path / "store"))
    heard = []
    tuned = engine.tune(*shape, lambda *at: heard.append(at))
    assert tuned["kept"]
    assert (tuned["batch"], tuned["sequence"]) == shape
    assert heard[-1][1] == heard[-1][2] == len(heard)
    timed = {each["form"] for each in tuned["timed"]}
    assert timed >= {"attention_forward", "attention_backward", "side_stream"}
    assert all(each["us"] for each in tuned["timed"]), tuned["timed"]
    assert tuned["us"] <= tuned["rule_us"]
    # as another process finds them
    other = CudaTrainer(config, weights, "cuda", store=Store(tmp_path / "store"))
    here = other.forms(*shape)
    assert here == engine.forms(*shape)
    assert here["source"] == "tuned"
    assert tuned["forms"].items() <= here.items()
    assert other.forms(4, 199)["source"] == "rule"

    tokens, targets = torch.randint(0, config.vocab_size, (2, *shape), device="cuda").unbind(0)
    exact = Model.from_weights(config, {name: w.double() for name, w in weights.items()})
    exact.requires_grad_(True)
    (1.5 * exact.loss(tokens, targets)).backward()
    eager = ReferenceEngine(config, weights, device="cuda", train=True, dtype="bfloat16")
    of_eager = gradients_of(eager, tokens, targets)
    forms = read_forms(tuned["forms"])
    fuses = can_fuse(engine.flat.half_M, config.dim, config.hidden_dim)
    values = candidates(config, *shape, torch.bfloat16, fuses)
    for form, of_form in values.items():
        for value in of_form:
            data = data_of(replace(forms, **{form: value}))
            trainer = CudaTrainer(config, weights, "cuda", store=Store(tmp_path / "store"))
            assert trainer.use_forms({"4x200": here | data})
            trainer.flat.gradients_M.fill_(float("nan"))
            first, *others = (gradients_of(trainer, tokens, targets) for _ in range(3))
            for key, parameter in exact.named_parameters():
                assert all(torch.equal(first[key], each[key]) for each in others), (value, key)
                least = error(of_eager[key], parameter.grad)
                assert error(first[key], parameter.grad) <= 1.5 * least, (form, value, key)


def test_a_loaded_model_tunes_its_training_step(tmp_path, monkeypatch):
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path))
    with onelaunch.load("stories260k", random=True) as model:
        tuned = model.tune(2, 64, training=True)
        with pytest.raises(BadInput, match="one sequence or more"):
            model.tune(2, 1 << 20, training=True)
    assert tuned["kept"]
    engine = CudaTrainer(model.config, model.weights, "cuda")
    assert engine.forms(2, 64)["source"] == "tuned"


def test_other_shapes_between_give_the_same():
    config = CONFIGS["grouped"]
    engine = CudaTrainer(config, weights_of(config), "cuda")
    batches = {
        shape: torch.randint(0, config.vocab_size, (2, *shape), device="cuda").unbind(0)
        for shape in ((4, 128), (1, 33), (3, 256))
    }
    first = {shape: gradients_of(engine, *batch) for shape, batch in batches.items()}
    for _ in range(2):
        for shape, batch in batches.items():
            again = gradients_of(engine, *batch)
            assert all(torch.equal(again[key], first[shape][key]) for key in again)


def test_each_kind_of_work_takes_its_time():
    config = CONFIGS["norms of heads, untied"].with_(max_seq_len=256)
    engine = CudaTrainer(config, weights_of(config), "cuda")
    batch = torch.randint(0, config.vocab_size, (2, 8, 256), device="cuda").unbind(0)
    marks = []
    for mark in (lambda part: None, lambda part: None, marks.append):
        for parameter in engine.parameters().values():
            parameter.grad = None
        engine.train_step(*batch, 1.0, mark)
    torch.cuda.synchronize()
    seconds = engine.telemetry()["kind_seconds"]
    assert marks == ["forward", "loss", "backward"]
    for kind in ("product", "norm", "attention", "rotation"):
        assert seconds[f"forward_{kind}"] > 0
    for kind in ("product", "weight_gradient", "norm", "attention", "embedding"):
        assert seconds[f"backward_{kind}"] > 0
    assert seconds["loss_loss"] > 0
    assert engine.telemetry() == {}


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_updates_are_those_of_pytorch(clip):
    config = preset("stories260k")
    ours, theirs = (CudaTrainer(config, weights_of(config), "cuda", "float32") for _ in range(2))
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    flat = FlatAdamW(ours.parameters(), ours.flat, weight_decay=0.1, **settings)
    of_theirs = theirs.parameters()
    matrices = [p for p in of_theirs.values() if p.dim() > 1]
    vectors = [p for p in of_theirs.values() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torchs = torch.optim.AdamW(groups, fused=True, **settings)
    for _ in range(5):
        batch = torch.randint(0, config.vocab_size, (2, 8, 64), device="cuda").unbind(0)
        for engine in (ours, theirs):
            engine.train_step(*batch)
        norm = flat.clip_and_step(clip)
        expected = torch.nn.utils.clip_grad_norm_(of_theirs.values(), clip or float("inf"))
        torchs.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        for optimizer, engine in ((flat, ours), (torchs, theirs)):
            optimizer.zero_grad(set_to_none=True)
            engine.after_update()
        for key, parameter in ours.parameters().items():
            assert error(parameter, of_theirs[key].double()) < 1e-6, key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_losses_of_many_updates_are_within_the_spread_of_eager_ones(qk_norm, dtype):
    """Of the four-layer model, from initial weights that differ in the last place."""
    size = replace(llama.SMALL.with_qk_norm() if qk_norm else llama.SMALL, updates=200)
    plain = [llama.losses(size, "torch", "cuda", dtype, noise) for noise in range(llama.PLAIN_RUNS)]
    assert torch.stack(plain)[:, -20:].mean() < torch.stack(plain)[:, :20].mean() - 0.5  # it learns
    make = partial(CudaTrainer, device="cuda", dtype=dtype)
    ours = llama.losses(size, "torch", "cuda", dtype, make_engine=make)
    assert llama.distance(ours, plain) <= 2 * llama.limit(plain)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_learns_and_the_default_is_this_engine(tmp_path, dropout):
    changed = {"train__updates": 100, "train__accum": 1, "train__batch_size": 32}
    r = recipe(**changed, eval__every=50, train__dropout=dropout)
    outcome = runs.start(r, tmp_path / "run", quiet=True)
    losses = [record["loss"] for record in of_kind(tmp_path / "run", "update")]
    assert losses[0] > 6.0
    assert losses[-1] < 4.5
    assert outcome.progress.val_loss < 4.5
    (run,) = of_kind(tmp_path / "run", "run")
    assert run["engine"] == "cuda"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_stop_inside_an_update_is_made_up_for_exactly(tmp_path, monkeypatch, dropout):
    r = recipe(train__updates=8, train__accum=5, train__dropout=dropout)
    runs.start(r, tmp_path / "whole", quiet=True)
    stop_before(monkeypatch, 18)
    stopped = runs.start(r, tmp_path / "cut", quiet=True)
    assert (stopped.progress.update, stopped.progress.micro) == (3, 3)
    monkeypatch.undo()
    # in a process that has no kernel loaded
    command = [sys.executable, "-m", "onelaunch", "train", "--resume", "--quiet"]
    subprocess.run([*command, "--run", str(tmp_path / "cut")], check=True)
    whole, cut = (
        [(record["loss"], record["grad_norm"]) for record in of_kind(tmp_path / name, "update")]
        for name in ("whole", "cut")
    )
    assert cut == whole
