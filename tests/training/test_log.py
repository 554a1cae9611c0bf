"""TensorBoard and Weights & Biases, by modules that stand in for theirs: the records that arrive,
and that what fails or blocks there has no effect on a run."""

import importlib.machinery
import sys
import threading
import time
import types

import pytest

from onelaunch import cli
from onelaunch.errors import MissingExtra
from onelaunch.training import run as runs
from onelaunch.training import sinks
from onelaunch.training.recipe import Recipe
from onelaunch.training.sinks import Sink
from tests.kills import SETTINGS, outcome
from tests.metrics import read_metrics


def recipe(**changed) -> Recipe:
    settings = SETTINGS | {"train.updates": 4, "eval.every": 2, "checkpoint.every": 2}
    settings |= {key.replace("__", "."): value for key, value in changed.items()}
    return Recipe().with_settings(settings, "test")


def module(monkeypatch, name, **contents):
    stand_in = types.ModuleType(name)
    stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in contents.items():
        setattr(stand_in, key, value)
    monkeypatch.setitem(sys.modules, name, stand_in)


@pytest.fixture
def tensorboard(monkeypatch):
    """What writers were given, in order."""
    calls = []

    class SummaryWriter:
        def __init__(self, log_dir, purge_step):
            calls.append(("open", log_dir, purge_step))

        def add_scalar(self, tag, value, step):
            calls.append((tag, value, step))

        def add_text(self, tag, text, step=None):
            calls.append((tag, text, step))

        def close(self):
            calls.append(("close",))

    module(monkeypatch, "tensorboard")
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    return calls


@pytest.fixture
def wandb(monkeypatch):
    """What `init`, `log` and `finish` were given, in order."""
    calls = []

    class Run:
        def log(self, data, step):
            calls.append(("log", data, step))

        def finish(self):
            calls.append(("finish",))

    def init(**arguments):
        calls.append(("init", arguments))
        return Run()

    settings = types.SimpleNamespace
    module(monkeypatch, "wandb", init=init, Settings=settings, setup=lambda settings: None)
    return calls


class Notices:
    """In the place of the display: its notices."""

    def __init__(self, *arguments):
        self.lines = []

    def notice(self, text):
        self.lines.append(text)

    def progress(self, *arguments):
        pass

    push = close = progress


@pytest.fixture
def notices(monkeypatch):
    display = Notices()
    monkeypatch.setattr(runs, "Display", lambda *arguments: display)
    return display.lines


def records(run, kind):
    return [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == kind]


def test_tensorboard_gets_every_record(tmp_path, tensorboard, notices):
    r = recipe(log__tensorboard=str(tmp_path / "tb"))
    runs.start(r, tmp_path / "run")
    assert tensorboard[0] == ("open", str(tmp_path / "tb" / "run"), 1)
    assert tensorboard[-1] == ("close",)
    run = tmp_path / "run"
    for record in records(run, "update"):
        at = record["update"]
        for key in ("loss", "lr", "grad_norm", "tokens", "flops_per_second"):
            assert (f"update/{key}", record[key], at) in tensorboard
        assert ("update/seconds/forward", record["seconds"]["forward"], at) in tensorboard
    assert [c[2] for c in tensorboard if c[0] == "update/loss"] == [1, 2, 3, 4]
    for record in records(run, "eval"):
        assert ("eval/loss", record["loss"], record["update"]) in tensorboard
    for record in records(run, "sample"):
        assert ("sample/text", record["text"], record["update"]) in tensorboard
    (text,) = [call[1] for call in tensorboard if call[0] == "recipe"]
    assert "updates = 4" in text
    assert not [line for line in notices if "tensorboard" in line]


def test_a_resume_continues_there(tmp_path, tensorboard, wandb):
    r = recipe(log__tensorboard=str(tmp_path / "tb"), log__wandb="project")
    runs.start(r, tmp_path / "run", quiet=True)
    runs.resume(tmp_path / "run", {"train.updates": 6}, quiet=True)
    folder = str(tmp_path / "tb" / "run")
    opened = [call for call in tensorboard if call[0] == "open"]
    assert opened == [("open", folder, 1), ("open", folder, 5)]
    assert [c[2] for c in tensorboard if c[0] == "update/loss"] == [1, 2, 3, 4, 5, 6]
    first, second = [call[1] for call in wandb if call[0] == "init"]
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"


def test_wandb_gets_every_record(tmp_path, wandb):
    runs.start(recipe(log__wandb="project"), tmp_path / "run", quiet=True)
    runs.start(recipe(log__wandb="project"), tmp_path / "other", quiet=True)
    first, other = [call[1] for call in wandb if call[0] == "init"]
    assert (first["project"], first["name"]) == ("project", "run")
    assert first["id"] != other["id"]
    assert first["config"]["train"]["updates"] == 4
    assert first["settings"].silent  # the terminal is the display's
    logged = wandb[1 : wandb.index(("finish",))]
    for kind in ("update", "eval"):
        losses = [(c[1][f"{kind}/loss"], c[2]) for c in logged if f"{kind}/loss" in c[1]]
        assert losses == [(r["loss"], r["update"]) for r in records(tmp_path / "run", kind)]
    assert [c[2] for c in logged] == sorted(c[2] for c in logged)
    assert all(isinstance(v, int | float | str) for c in logged for v in c[1].values())


def test_a_relative_folder_is_that_of_the_start(tmp_path, tensorboard, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs.start(recipe(log__tensorboard="tb"), tmp_path / "run", quiet=True)
    assert Recipe.load(str(tmp_path / "run/recipe.toml")).log.tensorboard == str(tmp_path / "tb")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_one_line_before_anything_is_written(
    tmp_path, monkeypatch, capfd, name
):
    monkeypatch.setitem(sys.modules, name, None)
    run = tmp_path / "run"
    with pytest.raises(MissingExtra, match=rf"log.{name} needs the package {name}.*launch\[log\]"):
        runs.start(recipe(**{f"log__{name}": "there"}), run, quiet=True)
    assert cli.run(["train", "--run", str(run), "--set", f"log.{name}=there"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "onelaunch[log]" in line
    assert not run.exists()


@pytest.mark.parametrize("where", ["init", "log", "finish"])
@pytest.mark.parametrize("error", [OSError("no\nnetwork"), SystemExit("no network")], ids=str)
def test_an_error_there_is_one_notice(tmp_path, wandb, notices, monkeypatch, where, error):
    plain, logging = tmp_path / "plain", tmp_path / "logging"
    runs.start(recipe(), plain, quiet=True)

    def fail(*arguments, **rest):
        raise error

    if where == "init":
        monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    else:
        service = sys.modules["wandb"].init()
        monkeypatch.setattr(type(service), where, fail)
    runs.start(recipe(log__wandb="project"), logging)
    assert outcome(logging) == outcome(plain)
    (notice,) = [line for line in notices if line.startswith("wandb")]
    assert notice == "wandb: no network; no more records go there"


def test_a_service_that_blocks_holds_up_nothing(tmp_path, wandb, notices, monkeypatch):
    plain, logging = tmp_path / "plain", tmp_path / "logging"
    runs.start(recipe(), plain, quiet=True)
    free = threading.Event()
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **rest: free.wait(60))
    monkeypatch.setattr(Sink.close, "__defaults__", (0.1,))
    monkeypatch.setattr(sinks, "QUEUE_RECORDS", 2)
    start = time.monotonic()
    runs.start(recipe(log__wandb="project"), logging)
    assert time.monotonic() - start < 30
    free.set()
    assert outcome(logging) == outcome(plain)
    (notice,) = [line for line in notices if line.startswith("wandb")]
    assert "did not end" in notice


def test_what_a_slow_service_misses_is_counted(monkeypatch):
    monkeypatch.setattr(sinks, "QUEUE_RECORDS", 3)
    free, written, lines = threading.Event(), [], []

    class Slow:
        def __init__(self):
            free.wait(60)

        def write(self, update, numbers, texts):
            written.append(update)

        def close(self):
            pass

    sink = Sink("slow", Slow, lines.append)
    for update in range(10):
        sink.push({"kind": "update", "update": update, "loss": 1.0})
    free.set()
    sink.close()
    assert written == [0, 1, 2]
    assert lines == ["slow: too slow; 7 records are missing there"]
