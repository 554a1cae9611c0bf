"""bench all: what runs, what is skipped, what fails, and that each of them leaves the others."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from onelaunch import cli
from onelaunch.bench import everything
from onelaunch.bench.core.record import Row, rows_there
from onelaunch.bench.experiments import MODULES, module_name
from onelaunch.errors import BadInput, MissingExtra, RunFailed


def module_of(run):
    module = ModuleType("fake")
    module.UNIT = "s"
    module.run = run
    return module


def rows(device, quick, log):
    log(f"on {device}, {'quick' if quick else 'whole'}")
    yield Row("one", 1.0)


def raising(error):
    def run(device, quick, log):
        yield Row("before", 2.0)
        raise error

    return run


def refusing(error):
    def run(device, quick, log):
        raise error

    return run


@pytest.fixture
def experiments(monkeypatch):
    def use(**runs):
        for name, run in runs.items():
            monkeypatch.setitem(MODULES, name, f"made_up.{name}")
            monkeypatch.setitem(sys.modules, module_name(name), module_of(run))
        named = {name: f"about {name}" for name in runs}
        monkeypatch.setattr(everything, "EXPERIMENTS", named)
        monkeypatch.setattr(everything, "ON_THE_GPU", frozenset({"gpu"}))

    return use


def test_each_ends_as_it_does(experiments, tmp_path):
    experiments(
        fine=rows,
        missing=refusing(MissingExtra("coremltools", "coreml", "this")),
        gpu=refusing(BadInput("it is for a GPU\nmore")),
        failing=raising(RunFailed("no luck")),
        foreign=refusing(ZeroDivisionError("by zero")),
        last=rows,
    )
    log = []
    done = everything.conduct_all(lambda gpu: "cpu", True, tmp_path, log.append)
    ends = {d.experiment: (d.record is not None, d.skipped, d.failed) for d in done}
    assert ends["fine"] == ends["last"] == (True, "", "")
    assert "coreml" in ends["missing"][1]
    assert ends["gpu"] == (False, "it is for a GPU", "")
    assert ends["failing"] == (False, "", "no luck")
    assert ends["foreign"] == (False, "", "ZeroDivisionError: by zero")
    assert log[0] == "[1/6] fine: about fine"
    assert "on cpu, quick" in log
    assert "gpu: skipped: it is for a GPU" in log
    # what it had measured before it failed
    (path,) = tmp_path.glob("*/failing.json")
    assert [row["case"] for row in rows_there(path)] == ["before"]
    table = everything.summary(done)
    assert "failed: no luck" in table
    assert "skipped: it is for a GPU" in table


def test_an_interrupt_ends_all_and_keeps_what_was_measured(experiments, tmp_path):
    experiments(fine=rows, stopped=raising(KeyboardInterrupt()), never=rows)
    with pytest.raises(KeyboardInterrupt):
        everything.conduct_all(lambda gpu: "cpu", True, tmp_path, lambda line: None)
    assert sorted(path.stem for path in tmp_path.glob("*/*.json")) == ["fine", "stopped"]


def test_the_command_line(experiments, tmp_path, capsys):
    experiments(fine=rows, gpu=refusing(BadInput("it is for a GPU")))
    assert cli.run(["bench", "all", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| fine " in out
    assert "skipped: it is for a GPU" in out
    experiments(fine=rows, failing=raising(RunFailed("no luck")))
    assert cli.run(["bench", "all", "--out", str(tmp_path), "--quiet"]) != 0
    assert "1 of 2 experiments failed: failing" in capsys.readouterr().err
    assert cli.run(["bench", "all", "--peer", "a=b"]) != 0
    assert "--peer goes with one experiment" in capsys.readouterr().err
