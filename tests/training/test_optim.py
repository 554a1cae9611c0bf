"""Optimizers by name: who updates what, how far, their state, its bytes, and exact resumes."""

import itertools
import signal

import pytest
import torch

from onelaunch.checkpoints.run_folder import list_checkpoints, read_state, read_tensors
from onelaunch.config import PRESETS, ModelConfig
from onelaunch.errors import BadInput
from onelaunch.model import Model
from onelaunch.training import memory
from onelaunch.training import run as runs
from onelaunch.training.loop import Trainer
from onelaunch.training.optim import (
    load_state_tensors,
    make_optimizer,
    state_bytes,
    state_tensors,
)
from onelaunch.training.recipe import Recipe
from tests.kills import SETTINGS, outcome
from tests.metrics import read_metrics

SHAPE = ModelConfig(
    dim=24, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=40, vocab_size=50, max_seq_len=16,
    qk_norm=True, tied_embeddings=False,
)  # fmt: skip
OF_MUON = 2 * 7  # q, k, v, o, gate, up and down of each layer


def recipe(**changed) -> Recipe:
    settings = SETTINGS | {"train.updates": 4, "eval.every": 2, "checkpoint.every": 2}
    settings |= {"optimizer.name": "muon"}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


def parameters(seed: int = 0) -> dict[str, torch.Tensor]:
    """A model's, with a gradient each."""
    named = dict(Model(SHAPE).init_weights(seed).named_parameters())
    generator = torch.Generator().manual_seed(seed)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return named


def stepped(name: str, steps: int = 3, **changed):
    """Parameters and their optimizer after a few steps on gradients that change."""
    named = parameters()
    optimizer = make_optimizer(named, recipe(optimizer__name=name, **changed))
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
        for parameter in named.values():
            parameter.grad = parameter.grad.roll(1) * 0.7
    return named, optimizer


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest():
    named, optimizer = stepped("muon")
    kinds = {key.partition(".")[0::2] for key in state_tensors(optimizer, named)}
    by_muon = {name for kind, name in kinds if kind == "momentum_buffer"}
    by_adamw = {name for kind, name in kinds if kind == "exp_avg_sq"}
    assert by_muon == {name for name in named if name.endswith("_proj.weight")}
    assert len(by_muon) == OF_MUON
    assert by_adamw == named.keys() - by_muon
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight"} <= by_adamw


def test_both_are_pytorchs_own_to_the_bit():
    named, _ = stepped("muon", optimizer__weight_decay=0.3, optimizer__momentum=0.8)
    plain = parameters()
    layers = [p for name, p in plain.items() if name.endswith("_proj.weight")]
    tables = [plain["embed_tokens.weight"], plain["lm_head.weight"]]
    vectors = [p for p in plain.values() if p.dim() == 1]
    adam = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
    optimizers = [
        torch.optim.Muon(layers, 0.01, 0.3, momentum=0.8, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(tables, weight_decay=0.3, **adam),
        torch.optim.AdamW(vectors, weight_decay=0.0, **adam),
    ]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
        for parameter in plain.values():
            parameter.grad = parameter.grad.roll(1) * 0.7
    assert all(torch.equal(named[name], plain[name]) for name in plain)


def test_a_step_of_muon_is_as_large_as_adamws_usually_are():
    """Its singular values are near 1, so that its root mean square is 0.2 times the rate."""
    before = {name: p.detach().clone() for name, p in parameters().items()}
    after, _ = stepped("muon", steps=1, optimizer__weight_decay=0.0)
    for name in before:
        if name.endswith("_proj.weight"):
            change = (after[name] - before[name]).detach().double() / 0.01
            assert 0.13 < change.square().mean().sqrt() < 0.26, name
            longest = max(change.shape)
            values = torch.linalg.svdvals(change) / (0.2 * longest**0.5)
            assert 0.3 < values.min() < values.max() < 1.3, name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_its_bytes_are_known_before_it_exists(name):
    named, optimizer = stepped(name)
    tensors = state_tensors(optimizer, named)
    steps = [key for key in tensors if key.startswith("step.")]
    assert len(steps) == len(named) - (OF_MUON if name == "muon" else 0)
    kept = sum(t.numel() * 4 for key, t in tensors.items() if key not in steps)
    assert state_bytes(name, SHAPE) == kept
    assert (kept == 8 * SHAPE.n_params) == (name == "adamw")
    config = PRESETS["stories15m"]
    estimated = memory.estimate(recipe(optimizer__name=name), config, 256, False)
    assert estimated.fixed == 4 * config.n_params + state_bytes(name, config)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_restored_state_continues_to_the_bit(name):
    named, optimizer = stepped(name, 2)
    tensors = {key: t.clone() for key, t in state_tensors(optimizer, named).items()}
    copies = {n: p.detach().clone().requires_grad_() for n, p in named.items()}
    for n, copy in copies.items():
        copy.grad = named[n].grad.clone()
    other = make_optimizer(copies, recipe(optimizer__name=name))
    load_state_tensors(other, copies, tensors, "here")
    for each in (optimizer, other):
        for group in each.param_groups:
            group["lr"] = 0.01
        each.step()
    assert all(torch.equal(named[n], copies[n]) for n in named)


@pytest.mark.parametrize("key", ["momentum_buffer.layers.1.mlp.up_proj.weight", "step.norm.weight"])
def test_state_that_is_missing_or_misshapen_is_refused(key):
    named, optimizer = stepped("muon")
    tensors = state_tensors(optimizer, named)
    without = {k: t for k, t in tensors.items() if k != key}
    with pytest.raises(BadInput, match=f"here: the tensor {key} is missing"):
        load_state_tensors(optimizer, named, without, "here")
    with pytest.raises(BadInput, match=f"here: {key} has the wrong shape"):
        load_state_tensors(optimizer, named, tensors | {key: torch.zeros(3)}, "here")


def test_a_run_with_muon_learns_and_resumes_exactly(tmp_path, monkeypatch):
    r = recipe(train__updates=12, optimizer__warmup=2, optimizer__lr=5e-3)
    runs.start(r, tmp_path / "whole", quiet=True)
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "update"]
    assert losses[-1] < losses[0] - 0.5
    micro_step, count = Trainer._micro_step, itertools.count(1)

    def stopped(self):
        if next(count) in (4, 14):  # in the second and the fifth update
            signal.raise_signal(signal.SIGTERM)
        micro_step(self)

    monkeypatch.setattr(Trainer, "_micro_step", stopped)
    runs.start(r, tmp_path / "cut", quiet=True)
    for _ in range(2):
        torch.manual_seed(0)
        runs.resume(tmp_path / "cut", {}, quiet=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    newest = list_checkpoints(tmp_path / "cut")[-1]
    saved = read_tensors(newest, "optimizer.safetensors", read_state(newest))
    assert sum(key.startswith("momentum_buffer.layers.") for key in saved) == OF_MUON


def test_a_resume_with_another_optimizer_is_refused_and_changes_nothing(tmp_path):
    runs.start(recipe(), tmp_path / "run", quiet=True)
    before = (tmp_path / "run" / "recipe.toml").read_bytes()
    with pytest.raises(BadInput, match="optimizer.name = 'adamw': .* the state of muon"):
        runs.resume(tmp_path / "run", {"optimizer.name": "adamw"}, quiet=True)
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == before
    runs.resume(tmp_path / "run", {"train.updates": 5}, quiet=True)
