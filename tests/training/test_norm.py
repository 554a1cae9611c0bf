"""`train.norm`: which norm a run uses, what it says of it, and how older runs go on."""

import json
import shutil
import subprocess

import pytest
import torch

from onelaunch.checkpoints.run_folder import list_checkpoints, read_state
from onelaunch.engines.norm import NORMS, choose_norm, has_norm_kernel, norm_function
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from onelaunch.model import rms_norm
from onelaunch.training import run as runs
from onelaunch.training.recipe import Recipe
from tests.engines.suite import SMALL, weights_of
from tests.kills import SETTINGS, outcome, train_command
from tests.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore:.*plain")


def recipe(**changed) -> Recipe:
    settings = SETTINGS | {"train.updates": 4, "eval.every": 2, "checkpoint.every": 2}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


def losses(run):
    return [r["loss"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "update"]


def norms(run):
    return [r["norm"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "run"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("has_kernel", [False, True])
def test_auto_is_the_operator_where_it_has_a_kernel_and_nothing_is_compiled(has_kernel, compiled):
    chosen = "onelaunch" if has_kernel and not compiled else "torch"
    assert choose_norm("auto", has_kernel, compiled) == chosen
    assert choose_norm("torch", has_kernel, compiled) == "torch"
    assert choose_norm("onelaunch", has_kernel, compiled) == "onelaunch"


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_only_a_gpu_has_a_kernel(device):
    assert not has_norm_kernel(torch.device(device))


@pytest.mark.parametrize("kernel", [False, True])
def test_a_gpu_has_one_where_the_operator_says_so(kernel, monkeypatch):
    from onelaunch.operators.rms_norm import launch

    devices = []
    monkeypatch.setattr(launch, "available", lambda device: devices.append(device) or kernel)
    assert has_norm_kernel(torch.device("cuda", 1)) is kernel
    assert devices == [torch.device("cuda", 1)]


def test_another_name_is_refused():
    with pytest.raises(BadInput, match=r"train\.norm = 'apex': .*auto, torch, onelaunch"):
        recipe(train__norm="apex")
    with pytest.raises(BadInput, match="norm='apex': .*auto"):
        ReferenceEngine(SMALL, weights_of(SMALL), device="cpu", norm="apex")
    for name in NORMS:
        assert recipe(train__norm=name).train.norm == name


def test_an_engine_says_which_norm_it_has():
    for norm, used in (("torch", "torch"), ("onelaunch", "onelaunch"), ("auto", "torch")):
        engine = ReferenceEngine(SMALL, weights_of(SMALL), device="cpu", norm=norm)
        assert engine.norm == engine.describe()["norm"] == used
        assert engine.model.norm_function is norm_function(used)
    assert norm_function("torch") is rms_norm


def test_a_run_says_its_norm_and_learns_the_same_with_either(tmp_path, capfd):
    for name in NORMS:
        runs.start(recipe(train__norm=name), tmp_path / name)
        used = "torch" if name == "auto" else name
        assert f"on cpu, norm {used}\n" in capfd.readouterr().err
        assert norms(tmp_path / name) == [used]
        assert read_state(list_checkpoints(tmp_path / name)[-1])["norm"] == used
    assert losses(tmp_path / "onelaunch") == pytest.approx(losses(tmp_path / "torch"), rel=1e-5)
    assert losses(tmp_path / "auto") == losses(tmp_path / "torch")


def test_a_run_from_before_there_was_a_choice_resumes_exactly(tmp_path, capfd):
    runs.start(recipe(), tmp_path / "whole", quiet=True)
    run = tmp_path / "old"
    runs.start(recipe(), run, quiet=True)
    shutil.rmtree(list_checkpoints(run)[-1])
    text = (run / "recipe.toml").read_text()
    assert 'norm = "auto"\n' in text
    (run / "recipe.toml").write_text(text.replace('norm = "auto"\n', ""))
    path = list_checkpoints(run)[-1] / "state.json"
    state = read_state(path.parent) | {"schema": 1}  # without a checksum of its own
    assert (state.pop("norm"), state["update"]) == ("torch", 2)
    path.write_text(json.dumps(state))
    capfd.readouterr()
    runs.resume(run, {})
    output = capfd.readouterr().err
    assert "resumed from update-00000002" in output
    assert "norm changed" not in output
    assert outcome(run) == outcome(tmp_path / "whole")


def test_a_resume_with_another_norm_says_so(tmp_path, capfd):
    run = tmp_path / "run"
    runs.start(recipe(train__norm="torch"), run, quiet=True)
    runs.resume(run, {"train.updates": 6, "train.norm": "onelaunch"})
    output = capfd.readouterr().err
    assert "norm changed from torch to onelaunch" in output
    assert "train.norm=torch" in output
    assert norms(run) == ["torch", "onelaunch"]
    runs.resume(run, {"train.updates": 8})
    assert "norm changed" not in capfd.readouterr().err


def test_resume_with_the_operator_is_exact(tmp_path):
    r = recipe(train__norm="onelaunch")
    runs.start(r, tmp_path / "whole", quiet=True)
    run = tmp_path / "cut"
    runs.start(r, run, quiet=True)
    newest = list_checkpoints(run)[-1]
    (newest / "model.safetensors").write_bytes(b"")
    runs.resume(run, {}, quiet=True)
    assert outcome(run) == outcome(tmp_path / "whole")


def test_without_a_kernel_the_operator_says_so_before_anything_is_printed(tmp_path):
    """In a new process, as the warning is printed once."""
    output = []
    for norm in ("torch", "onelaunch"):
        command = [*train_command(tmp_path / norm, train__updates=2, train__norm=norm)]
        command.remove("--quiet")
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        output.append(done.stderr)
    assert "no kernel" not in output[0]
    assert output[1].count("no kernel for cpu") == 1
    assert output[1].index("no kernel for cpu") < output[1].index("onelaunch train: ")
