"""Which engine a recipe trains with, and runs by the compiled one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from onelaunch import train
from onelaunch.checkpoints.run_folder import list_checkpoints
from onelaunch.engines import cpu, cuda
from onelaunch.engines.cpu.training.engine import CpuTrainer
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from onelaunch.training import engines
from onelaunch.training.engines import engine_name
from onelaunch.training.recipe import Recipe
from onelaunch.training.run import resume, start
from tests.metrics import read_metrics
from tests.training.rank_processes import Launcher

TINY = {
    "model.dim": 32, "model.n_layers": 2, "model.n_heads": 4, "model.hidden_dim": 48,
    "model.max_seq_len": 32, "train.batch_size": 4, "train.updates": 6, "train.device": "cpu",
    "train.accum": 2, "eval.every": 3, "eval.batches": 2, "checkpoint.every": 2,
}  # fmt: skip


def recipe(**settings):
    changed = {key.replace("__", "."): value for key, value in settings.items()}
    return Recipe().with_settings(TINY | changed, "test")


def name_of(recipe):
    return engine_name(recipe, recipe.model_config(64))


def one_of_two_ranks(run):
    train(recipe(train__engine="cpu", train__threads=1), run=run)


def records(run, kind):
    return [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == kind]


@pytest.mark.parametrize(
    "setting",
    [
        {"train__dropout": 0.1},
        {"train__compile": True},
        {"train__dtype": "bfloat16"},
        {"train__norm": "onelaunch"},
        {"train__engine": "reference"},
    ],
)
def test_what_pytorch_trains(setting):
    assert name_of(recipe(**setting)) == "reference"


def test_auto_is_the_compiled_one_where_it_can_be(monkeypatch):
    assert name_of(recipe()) == "cpu"
    assert name_of(recipe(train__engine="coreml")) == "coreml"
    monkeypatch.setattr(cpu, "why_not", lambda: "no compiler")
    assert name_of(recipe()) == "reference"


def test_auto_is_graphs_of_kernels_on_a_gpu_that_has_them(monkeypatch):
    monkeypatch.setattr(engines, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(cuda, "why_not_train", lambda *_: None)
    on_gpu = {"train__device": "cuda"}
    assert name_of(recipe(**on_gpu)) == "cuda"
    for same in ({"train__dtype": "bfloat16"}, {"train__dropout": 0.1}):
        assert name_of(recipe(**on_gpu, **same)) == "cuda"
    for other in ({"train__dtype": "float32"}, {"train__compile": True}):
        assert name_of(recipe(**on_gpu, **other)) == "reference"
    assert name_of(recipe(**on_gpu, train__engine="cuda", train__dtype="float32")) == "cuda"
    monkeypatch.setattr(cuda, "why_not_train", lambda *_: "it is too wide")
    assert name_of(recipe(**on_gpu)) == "reference"


def test_what_is_computed_again_needs_the_engine_that_does(monkeypatch):
    with pytest.raises(BadInput, match="train.recompute = 'layers': only train.engine cuda"):
        name_of(recipe(train__recompute="layers"))
    monkeypatch.setattr(engines, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(cuda, "why_not_train", lambda *_: None)
    assert name_of(recipe(train__device="cuda", train__recompute="layers")) == "cuda"


def test_the_cuda_engine_says_why_it_cannot_train(tmp_path):
    with pytest.raises(BadInput, match="NVIDIA's GPUs, and the device is cpu; use 'reference'"):
        start(recipe(train__engine="cuda"), tmp_path / "run", quiet=True)
    device, config = torch.device("cuda"), recipe().model_config(64)
    assert "multiple of 8" in (cuda.why_not_train(device, config.with_(head_dim=12)) or "")


def test_without_a_compiler_asking_for_it_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr("onelaunch.engines.cpu.training.engine.why_not", lambda: "no compiler")
    with pytest.raises(BadInput, match="no compiler.*reference"):
        start(recipe(train__engine="cpu"), tmp_path / "run", quiet=True)


@pytest.mark.usefixtures("compiled_training")
class TestRuns:
    def test_the_losses_are_pytorchs(self, tmp_path):
        losses = {}
        for name, kind in (("cpu", CpuTrainer), ("reference", ReferenceEngine)):
            run = tmp_path / name
            start(recipe(train__engine=name), run, quiet=True)
            (begun,) = records(run, "run")
            assert begun["engine"] == name
            losses[kind] = [r["loss"] for r in records(run, "update") + records(run, "eval")]
        assert losses[CpuTrainer] == pytest.approx(losses[ReferenceEngine], rel=2e-5)
        assert len(losses[CpuTrainer]) == 8

    def test_a_resumed_run_is_the_same_run(self, tmp_path):
        whole = tmp_path / "whole"
        start(recipe(), whole, quiet=True)
        *_, last = list_checkpoints(whole)
        parts = tmp_path / "parts"
        shutil.copytree(whole, parts)
        shutil.rmtree(parts / last.relative_to(whole))
        resume(parts, {}, quiet=True)
        again = parts / last.relative_to(whole)
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (again / file).read_bytes() == (last / file).read_bytes()

    def test_another_engine_than_before_is_said(self, tmp_path, capfd):
        start(recipe(train__engine="reference"), tmp_path / "run", quiet=True)
        resume(tmp_path / "run", {"train.engine": "auto", "train.updates": 7})
        assert "engine changed from reference to cpu" in capfd.readouterr().err

    def test_two_ranks_are_one_with_twice_the_micro_steps(self, tmp_path):
        call = ["call", "tests.training.test_engines:one_of_two_ranks", str(tmp_path / "two")]
        with Launcher() as launcher, launcher.start(tmp_path / "ranks", 2, call) as ranks:
            assert ranks.codes() == [0, 0], ranks.errors()
        start(recipe(train__engine="cpu", train__accum=4), tmp_path / "one", quiet=True)
        for kind, n in (("update", 6), ("eval", 2)):
            two, one = (
                [r["loss"] for r in records(tmp_path / run, kind)] for run in ("two", "one")
            )
            assert two == pytest.approx(one, rel=1e-6, abs=0)
            assert len(two) == n

    def test_time_on_each_kind_of_work(self, tmp_path):
        start(recipe(), tmp_path / "run", quiet=True)
        for update in records(tmp_path / "run", "update"):
            seconds, spent = update["seconds"], update["thread_seconds"]
            assert min(seconds["forward"], seconds["loss"], seconds["backward"]) > 0
            assert spent["weight_gradient"] > 0
            json.dumps(update)
