"""Runs through ML Programs: compared with PyTorch, stopped, resumed, their telemetry."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from onelaunch.checkpoints.run_folder import list_checkpoints
from onelaunch.errors import BadInput
from onelaunch.training.recipe import Recipe
from onelaunch.training.run import resume, start

pytest.importorskip("coremltools")

from onelaunch.engines.coreml import training as module
from tests.engines.coreml.in_process import InProcess
from tests.program_soak import beside_the_reference

SETTINGS = {
    "model.n_layers": 1, "train.updates": 4, "train.accum": 2, "train.batch_size": 2,
    "train.seq_len": 32, "eval.every": 0, "eval.batches": 1, "optimizer.warmup": 1,
    "train.engine": "coreml",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    monkeypatch.setattr(module, "Compiler", InProcess)


def recipe(**more):
    settings = SETTINGS | {name.replace("__", "."): value for name, value in more.items()}
    return Recipe.load("quickstart").with_settings(settings, "test")


def records(run, kind="update"):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def final_weights(run):
    return load_file(run / "checkpoints" / "update-00000004" / "model.safetensors")


def test_losses_are_near_pytorchs(tmp_path):
    """Without staleness it is the same run but for float16."""
    start(recipe(coreml__staleness=0), tmp_path / "programs", quiet=True)
    start(recipe(train__engine="reference"), tmp_path / "plain", quiet=True)
    ours, plain = (records(tmp_path / name) for name in ("programs", "plain"))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in plain], rel=1e-3)
    norms = [[r["grad_norm"] for r in each] for each in (ours, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert records(tmp_path / "programs", "eval")[0]["loss"] == pytest.approx(
        records(tmp_path / "plain", "eval")[0]["loss"], rel=1e-3
    )


def test_what_it_tells(tmp_path):
    start(recipe(), tmp_path / "run", quiet=True)
    found = records(tmp_path / "run")
    assert [r["staleness"] for r in found] == [0, 1, 1, 1]
    assert found[0]["compile_seconds"] > 0
    # the last one may come too late for its record
    assert sum(r["compilations"] for r in found) in (6, 8)
    for record in found:
        seconds = record["seconds"]
        # one part of the step's clock holds each wait, measured inside it
        assert 0 <= record["stall_seconds"] <= seconds["stall"] + 1e-4
        assert 0 < record["product_wait_seconds"] < seconds["backward"]


@pytest.mark.extended
@pytest.mark.parametrize(("staleness", "budget"), [(0, 4), (2, 2)])
def test_a_budget_ends_the_process_and_a_resume_goes_on_exactly(staleness, budget, tmp_path):
    whole = recipe(coreml__staleness=staleness)
    assert not start(whole, tmp_path / "whole", quiet=True).restart_requested
    spent = recipe(coreml__staleness=staleness, coreml__compile_budget=budget)
    outcome = start(spent, tmp_path / "parts", quiet=True)
    times = 1
    while outcome.restart_requested:
        assert outcome.progress.update < 4
        outcome = resume(tmp_path / "parts", {}, quiet=True)
        times += 1
    assert times > 1
    one, other = (final_weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


@pytest.mark.extended
def test_a_run_that_was_killed_after_a_checkpoint_goes_on_exactly(tmp_path):
    """The killed one has its compiler in a child; kills at random moments are the soak's."""
    # a rate that does not depend on how many updates there are to be
    start(recipe(optimizer__min_lr_ratio=1.0), tmp_path / "whole", quiet=True)
    run = tmp_path / "killed"
    settings = SETTINGS | {
        "checkpoint.every": 1, "train.updates": 400, "optimizer.min_lr_ratio": 1.0,
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "onelaunch",
        "train",
        "quickstart",
        "--run",
        str(run),
        "--quiet",
    ]
    for name, value in settings.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while len(list((run / "checkpoints").glob("update-*/state.json"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
    assert process.wait() == -9
    assert list_checkpoints(run)[-1].name < "update-00000004"
    resume(run, {"train.updates": 4, "checkpoint.every": 0}, quiet=True)
    assert [r["loss"] for r in records(run)] == [r["loss"] for r in records(tmp_path / "whole")]
    one, other = final_weights(run), final_weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.extended
def test_losses_are_those_of_a_reference_with_weights_as_old():
    settings = {"train.updates": 3, "train.accum": 2, "train.seq_len": 32, "model.n_layers": 1}
    row = beside_the_reference(**settings)
    assert row.ours < 1e-2
    assert len(row.notes["losses"]) == 3
    assert row.notes["losses"] != row.notes["reference"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run = tmp_path / "run"
    start(recipe(train__updates=2, coreml__staleness=2), run, quiet=True)
    (checkpoint,) = (run / "checkpoints").iterdir()
    tensors = load_file(checkpoint / "engine.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"1", "2"}
    from onelaunch.checkpoints.atomic import sha256_file
    from onelaunch.checkpoints.run_folder import read_state
    from onelaunch.checkpoints.tensors import write_tensors

    tensors["1.norm.weight"] = torch.zeros(3)
    (checkpoint / "engine.safetensors").unlink()
    write_tensors(checkpoint / "engine.safetensors", tensors)
    state = read_state(checkpoint) | {"schema": 1}  # without a checksum of its own
    state["sha256"]["engine.safetensors"] = sha256_file(checkpoint / "engine.safetensors")
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(BadInput, match=r"engine\.safetensors: 1\.norm\.weight"):
        resume(run, {"train.updates": 3}, quiet=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("train.dropout", 0.1), ("train.compile", True), ("train.device", "cuda"),
     ("train.dtype", "bfloat16"), ("train.norm", "onelaunch")],
)  # fmt: skip
def test_what_programs_do_not_do_is_refused(setting, value):
    with pytest.raises(BadInput, match=f"{setting} = {value!r}: .*coreml"):
        recipe(**{setting.replace(".", "__"): value})
