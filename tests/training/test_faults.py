"""Faults around a run: the messages, what is saved, and the exit status."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
from pathlib import Path

import pytest

from onelaunch import cli
from onelaunch.checkpoints import run_folder, tensors
from onelaunch.checkpoints.run_folder import best_checkpoint, list_checkpoints, read_state
from onelaunch.errors import BadInput, RunFailed, Terminated
from onelaunch.training import folders, signals
from onelaunch.training import run as runs
from onelaunch.training.loop import Trainer
from onelaunch.training.metrics import MetricsWriter
from onelaunch.training.prepare import prepare
from onelaunch.training.recipe import Recipe
from onelaunch.training.signals import StopSignals
from tests.kills import SETTINGS, outcome
from tests.metrics import read_metrics
from tests.training.token_folders import make_folder

CASE = Path(__file__).parents[2] / ".." / "shared" / "cases" / "two-characters.txt"


def recipe(**changed) -> Recipe:
    settings = SETTINGS | {"train.updates": 4, "train.accum": 1, "eval.every": 2}
    settings |= {"checkpoint.every": 0, "checkpoint.keep": 1}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


def words(**changed) -> list[str]:
    """The same as words of `onelaunch train`."""
    settings = SETTINGS | {"train.updates": 2, "train.accum": 1}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    found = ["--preset", settings.pop("model.preset")]
    return [*found, *(f"--set={key}={value}" for key, value in settings.items())]


# --- evaluations ----------------------------------------------------------------------------------


def test_a_validation_split_that_is_too_short_is_said_before_the_first_step(tmp_path):
    data = make_folder(tmp_path / "data", n_train=100, n_val=1)
    with pytest.raises(BadInput, match=r"val\.bin: 1 tokens "):
        runs.start(recipe(data__path=str(data)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not CASE.is_file(), reason="../shared/cases/two-characters.txt is absent")
def test_the_case_of_two_characters(tmp_path, capsys):
    prepare([CASE], tmp_path / "two")
    changed = {"data__path": tmp_path / "two", "train__seq_len": 1}
    run = tmp_path / "run"
    changed |= {"eval__every": 0, "checkpoint__every": 0}
    assert cli.run(["train", "--run", str(run), *words(**changed)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "val.bin" in line
    assert not run.exists()


def test_an_error_of_an_evaluation_loses_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RunFailed("the device went away")

    run = tmp_path / "run"
    monkeypatch.setattr("onelaunch.training.loop.evaluate", fail)
    with pytest.raises(RunFailed, match="went away"):
        runs.start(recipe(eval__every=0), run, quiet=True)
    assert [path.name for path in list_checkpoints(run)] == ["update-00000004"]
    monkeypatch.undo()
    runs.start(recipe(eval__every=0), tmp_path / "whole", quiet=True)
    runs.resume(run, {}, quiet=True)  # evaluates, and trains no more
    assert outcome(run) == outcome(tmp_path / "whole")
    assert best_checkpoint(run).name == "update-00000004"


def test_the_checkpoint_of_an_evaluation_holds_what_it_found(tmp_path):
    run = tmp_path / "run"
    runs.start(recipe(), run, quiet=True)
    state = read_state(list_checkpoints(run)[-1])
    (last,) = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "eval"][-1:]
    assert (state["evaluated"], state["val_loss"]) == (4, last["loss"])
    assert run_folder.read(run).notices == ()


def test_a_kill_between_the_evaluation_and_its_note_is_made_up_for(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    runs.start(recipe(), tmp_path / "whole", quiet=True)
    monkeypatch.setattr("onelaunch.training.state.save_progress", killed)
    with pytest.raises(Killed):
        runs.start(recipe(), tmp_path / "cut", quiet=True)
    monkeypatch.undo()
    runs.resume(tmp_path / "cut", {}, quiet=True)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_validation_loss_that_is_not_finite_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    from onelaunch.training.evaluate import Evaluation

    losses = iter([3.0, math.nan])
    monkeypatch.setattr(
        "onelaunch.training.loop.evaluate", lambda *a, **k: Evaluation(next(losses), 8)
    )
    with pytest.raises(RunFailed, match=r"the loss is nan at update 4.*update-00000002;"):
        runs.start(recipe(), tmp_path / "run", quiet=True)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["update-00000002"]


# --- exit codes -----------------------------------------------------------------------------------


def test_divergence_exits_1(tmp_path, monkeypatch, capsys):
    micro_step = Trainer._micro_step

    def poisoned(self):
        micro_step(self)
        self._loss_sum += math.nan

    monkeypatch.setattr(Trainer, "_micro_step", poisoned)
    assert cli.run(["train", "--run", str(tmp_path / "run"), "--quiet", *words()]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the loss is nan" in line


def test_a_checkpoint_that_cannot_be_synced_is_none(tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_folder, "sync_file", full)
    with pytest.raises(RunFailed, match="the disk is full"):
        runs.start(recipe(), tmp_path / "run", quiet=True)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_exits_1(tmp_path, monkeypatch, capsys, number):
    def full(values, path, metadata):
        raise tensors.SafetensorError(f"I/O error (os error {number})")

    monkeypatch.setattr(tensors, "save_file", full)
    assert cli.run(["train", "--run", str(tmp_path / "run"), "--quiet", *words()]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "free some space" in line


def test_a_place_that_cannot_be_written_exits_2(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    run = tmp_path / "file" / "run"
    assert cli.run(["train", "--run", str(run), "--quiet", *words()]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait(monkeypatch, number):
    now = [10.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with StopSignals() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at once: a terminal and a wrapper both pass it on
        assert stop.received == number
        now[0] += 2 * signals.REPEAT_SECONDS
        with pytest.raises((KeyboardInterrupt, Terminated)) as ended:
            os.kill(os.getpid(), number)
        assert (ended.type is KeyboardInterrupt) == (number == signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_with_its_own_code(tmp_path, monkeypatch, number):
    """The run would save after the first; the second comes inside the same micro-step."""
    monkeypatch.setattr(signals, "REPEAT_SECONDS", -1.0)
    micro_step = Trainer._micro_step

    def signalled(self):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        micro_step(self)

    monkeypatch.setattr(Trainer, "_micro_step", signalled)
    run = tmp_path / "run"
    assert cli.run(["train", "--run", str(run), "--quiet", *words()]) == 128 + number
    assert list_checkpoints(run) == []


# --- folders --------------------------------------------------------------------------------------


def test_two_default_runs_in_one_second_get_two_folders(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders.time, "strftime", lambda *args: "20260102-030405")
    for _ in range(3):
        assert cli.run(["train", *words(train__updates=1)]) == 0
    names = [f"stories260k-20260102-030405{end}" for end in ("", "-2", "-3")]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names
    assert f"run folder: {Path('runs') / names[-1]}" in capfd.readouterr().err
    for name in names:
        assert list_checkpoints(tmp_path / "runs" / name)


def test_a_default_run_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def full(path, data):
        raise RunFailed(f"{path}: cannot write: the disk is full")

    monkeypatch.setattr(runs, "write_json", full)
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", *words()]) == 1
    assert list((tmp_path / "runs").iterdir()) == []


def test_resume_without_a_run_takes_the_newest_and_says_which(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    # the names sort against the order in which they are made, some within the same second
    for name in ("c", "b", "a"):
        assert cli.run(["train", "--run", f"runs/{name}", "--quiet", *words()]) == 0
    os.utime(tmp_path / "runs" / "c" / "metrics.jsonl")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text("{")
    capfd.readouterr()
    assert cli.run(["train", "--resume", "--set", "train.updates=3"]) == 0
    assert f"the newest run is {Path('runs') / 'a'}\n" in capfd.readouterr().err
    assert list_checkpoints(tmp_path / "runs" / "a")[-1].name == "update-00000003"


def test_a_runs_data_is_found_from_every_working_directory(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    make_folder(Path("data"), n_train=400, n_val=100)
    runs.start(recipe(data__path="data"), Path("runs/a"), quiet=True)
    run = tmp_path / "home" / "runs" / "a"
    monkeypatch.chdir(tmp_path)
    assert runs.resume(run, {"train.updates": 5}, quiet=True).progress.update == 5
    # a run that is moved together with its data, whose old place is gone
    shutil.move(tmp_path / "home", tmp_path / "other")
    run = tmp_path / "other" / "runs" / "a"
    assert runs.resume(run, {"train.updates": 6}, quiet=True).progress.update == 6
    saved = Recipe.load(str(run / "recipe.toml")).data.path
    assert saved == os.path.realpath(tmp_path / "other" / "data")
    # alone it has none; what is named is looked for at its own place only
    shutil.move(tmp_path / "other" / "data", tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="no such data folder"):
        runs.resume(run, {}, quiet=True)
    with pytest.raises(BadInput, match="nowhere: no such data folder"):
        runs.resume(run, {"data.path": "nowhere"}, quiet=True)
    done = runs.resume(run, {"data.path": "elsewhere", "train.updates": 7}, quiet=True)
    assert done.recipe.data.path == str(tmp_path / "elsewhere")


def test_a_relative_path_of_an_older_run_is_looked_for_around_it(tmp_path, monkeypatch):
    make_folder(tmp_path / "data", n_train=400, n_val=100)
    run = tmp_path / "runs" / "a"
    monkeypatch.chdir(tmp_path)
    runs.start(recipe(data__path="data"), run, quiet=True)
    old = Recipe.load(str(run / "recipe.toml")).with_settings({"data.path": "data"}, "test")
    (run / "recipe.toml").write_text(old.to_toml())
    described = run_folder.read_run(run)
    del described["data"]["path_from_run"]
    run_folder.write_json(run / "run.json", described)
    monkeypatch.chdir("/")
    assert runs.resume(run, {"train.updates": 5}, quiet=True).progress.update == 5


def test_a_recipe_named_again_is_the_same_from_its_own_directory(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make_folder(Path("data"), n_train=400, n_val=100)
    r = recipe(data__path="data")
    runs.start(r, tmp_path / "run", quiet=True)
    runs.resume(tmp_path / "run", {}, r)
    assert "recipe of the run" not in capfd.readouterr().err
    runs.resume(tmp_path / "run", {}, recipe(data__path="data", train__seed=5))
    assert "recipe of the run" in capfd.readouterr().err


# --- metrics --------------------------------------------------------------------------------------


def test_a_metrics_file_that_is_removed_is_written_again_with_a_notice(tmp_path):
    path, notices = tmp_path / "metrics.jsonl", []
    head = {"kind": "run", "schema": 1}
    writer = MetricsWriter(path)
    writer.log = notices.append
    writer.push(head)
    writer.push({"kind": "update", "update": 1})
    assert writer.flush()
    path.unlink()
    writer.push({"kind": "update", "update": 2})
    assert writer.flush()
    assert read_metrics(path) == [head, {"kind": "update", "update": 2}]
    assert len(notices) == 1
    assert str(path) in notices[0]
    path.rename(tmp_path / "old.jsonl")
    path.write_text('{"kind": "note"}\n')
    writer.push({"kind": "update", "update": 3})
    writer.close()
    assert read_metrics(path) == [{"kind": "note"}, {"kind": "update", "update": 3}]
    assert (len(notices), writer.error) == (2, None)


def test_a_metrics_file_whose_folder_is_gone_is_an_error_in_one_line(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    writer = MetricsWriter(folder / "metrics.jsonl")
    shutil.rmtree(folder)
    writer.push({"kind": "update", "update": 1})
    writer.close()
    assert "cannot write" in str(writer.error)


def test_a_run_says_that_its_metrics_were_removed(tmp_path, monkeypatch, capfd):
    run, micro_step = tmp_path / "run", Trainer._micro_step

    def removing(self):
        micro_step(self)
        if self.progress.update == 1:
            self.metrics.flush()
            (run / "metrics.jsonl").unlink()

    monkeypatch.setattr(Trainer, "_micro_step", removing)
    runs.start(recipe(), run)
    assert "metrics.jsonl was removed" in capfd.readouterr().err
    kinds = [(r["kind"], r["update"]) for r in read_metrics(run / "metrics.jsonl")]
    assert kinds[:2] == [("run", 0), ("update", 2)]
    monkeypatch.undo()
    (run / "metrics.jsonl").unlink()
    runs.resume(run, {"train.updates": 5})
    assert "metrics.jsonl is missing" in capfd.readouterr().err


# --- which model, which seed ----------------------------------------------------------------------


def test_a_run_of_another_model_names_the_field(tmp_path):
    runs.start(recipe(), tmp_path / "run", quiet=True)
    with pytest.raises(BadInput, match=r"run: .*n_layers 2, not 1"):
        runs.resume(tmp_path / "run", {}, recipe(model__n_layers=1), quiet=True)
    with pytest.raises(BadInput, match=r"run: .*dim 32, not 64; head_dim 8, not 16"):
        runs.resume(tmp_path / "run", {"model.dim": 64}, quiet=True)


def test_the_seed_is_shown_and_recorded_and_draws_the_same_again(tmp_path, capfd):
    settings = words()
    for name in ("a", "b"):
        assert cli.run(["train", "--run", str(tmp_path / name), *settings]) == 0
        assert "seed 1337" in capfd.readouterr().err
    other = ["--set", "train.seed=7"]
    assert cli.run(["train", "--run", str(tmp_path / "c"), *settings, *other]) == 0
    assert "seed 7" in capfd.readouterr().err
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b") != outcome(tmp_path / "c")
    assert read_metrics(tmp_path / "c" / "metrics.jsonl")[0]["seed"] == 7
