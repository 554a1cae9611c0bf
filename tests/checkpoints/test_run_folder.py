"""Run folders read as models: damaged files are named and replaced."""

import json
import shutil

import pytest
import torch
from tests.kills import SETTINGS

from onelaunch import cli
from onelaunch.checkpoints import run_folder
from onelaunch.checkpoints.run_folder import read_state
from onelaunch.errors import BadInput
from onelaunch.training import run as runs
from onelaunch.training.recipe import Recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two updates with two checkpoints, of which the newer is the best."""
    run = tmp_path_factory.mktemp("runs") / "run"
    settings = {"train.updates": 2, "train.accum": 1, "eval.every": 1, "checkpoint.every": 1}
    runs.start(Recipe().with_settings(SETTINGS | settings, "test"), run, quiet=True)
    assert run_folder.best_checkpoint(run).name == "update-00000002"
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


def damage(path):
    """Change one byte within the file."""
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def weights_of(run, name):
    return run_folder.read(run / "checkpoints" / name).weights["norm.weight"]


def test_an_intact_run_has_no_notices(run):
    assert run_folder.read(run).notices == ()


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_damaged_best_checkpoint_is_named_with_its_replacement(run, name):
    damage(run / "checkpoints" / "update-00000002" / name)
    loaded = run_folder.read(run)
    (line,) = loaded.notices
    assert f"damaged checkpoint: {run}/checkpoints/update-00000002/{name}: " in line
    assert line.endswith("using update-00000001")
    assert torch.equal(loaded.weights["norm.weight"], weights_of(run, "update-00000001"))


def test_a_missing_file_of_the_best_checkpoint_is_named_once(run):
    (run / "checkpoints" / "update-00000002" / "model.safetensors").unlink()
    (line,) = run_folder.read(run).notices
    assert "update-00000002/model.safetensors: cannot read" in line


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "best.json: not valid JSON"),
        ('{"checkpoint": 3}', "best.json: damaged"),
        ('{"checkpoint": "update-00000009"}', "best.json: its checkpoint update-00000009"),
    ],
)
def test_a_wrong_best_json_is_named(run, content, reason):
    (run / "best.json").write_text(content)
    (line,) = run_folder.read(run).notices
    assert reason in line
    assert line.endswith("using update-00000002")


def test_a_run_without_an_evaluation_has_no_best_to_miss(run):
    (run / "best.json").unlink()
    assert run_folder.read(run).notices == ()
    damage(run / "checkpoints" / "update-00000002" / "optimizer.safetensors")
    (line,) = run_folder.read(run).notices
    assert "optimizer.safetensors: damaged" in line


def test_any_changed_field_of_state_json_is_damage(run):
    path = run / "checkpoints" / "update-00000002" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state))  # other white space, the same content
    assert read_state(path.parent)["update"] == 2
    for changes in ({"val_loss": 1.25}, {"bos_id": 2}, {"extra": None}):
        path.write_text(json.dumps(state | changes))
        with pytest.raises(BadInput, match=r"state\.json: damaged"):
            read_state(path.parent)
    del state["sha256"]["state.json"]
    path.write_text(json.dumps(state))
    with pytest.raises(BadInput, match=r"state\.json: damaged"):
        read_state(path.parent)


def test_a_state_of_the_first_schema_is_read_without_its_own_checksum(run):
    path = run / "checkpoints" / "update-00000002" / "state.json"
    state = json.loads(path.read_text()) | {"schema": 1}
    del state["sha256"]["state.json"]
    path.write_text(json.dumps(state))
    assert run_folder.read(run).notices == ()


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "RUN", "--max-new-tokens", "2", "--engine", "reference", "--quiet"),
        ("eval", "RUN", "--data", "stories", "--quiet"),
        ("export", "RUN", "OUT", "--format", "hf", "--quiet"),
        ("inspect", "RUN"),
    ],
    ids=lambda words: words[0],
)
def test_every_verb_that_reads_a_model_prints_the_notice(run, tmp_path, capsys, words):
    damage(run / "checkpoints" / "update-00000002" / "model.safetensors")
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    assert cli.run([places.get(word, word) for word in words]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors: damaged" in line
    assert line.endswith("using update-00000001")
