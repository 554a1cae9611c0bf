"""The runner: the rows of an experiment are kept, however the run ends."""

import json
import sys
from types import SimpleNamespace

import pytest

from onelaunch.bench.core import runner
from onelaunch.bench.core.record import Row
from onelaunch.bench.core.runner import conduct
from onelaunch.bench.experiments import (
    MODULES,
    NOT_ON_A_GPU,
    OF_THE_CUDA_ENGINE,
    devices,
    module_name,
)
from onelaunch.errors import BadInput, RunFailed


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a made-up experiment; returns the lines shown, and its folder."""
    lines = []

    def conducted(rows, **views):
        module = SimpleNamespace(UNIT="us", run=lambda device, quick, log: rows, **views)
        monkeypatch.setitem(MODULES, "made-up", "made_up")
        monkeypatch.setitem(sys.modules, module_name("made-up"), module)
        return conduct("made-up", "cpu", True, tmp_path, lines.append)

    conducted.lines, conducted.folder = lines, tmp_path
    return conducted


def cases(run):
    (path,) = run.folder.glob("*/made-up.json")
    return {row["case"]: row["ours"] for row in json.loads(path.read_text())["rows"]}


@pytest.mark.parametrize("kind", [list, iter])
def test_rows_come_as_a_list_or_one_by_one(run, kind):
    path = run(kind([Row("a", 1.0, peers={"PyTorch": 1234.5}), Row("b", 2, notes={"unit": "MB"})]))
    assert cases(run) == {"a": 1.0, "b": 2.0}
    assert run.lines == ["a: 1 us, PyTorch 1,234", "b: 2 MB", f"record: {path}"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError("a device fell off")])
@pytest.mark.parametrize("every", [0.0, 1e9])
def test_a_run_that_ends_early_leaves_what_it_had(run, monkeypatch, end, every):
    monkeypatch.setattr(runner, "SAVE_SECONDS", every)

    def rows():
        yield Row("a", 1.0)
        yield Row("b", 2.0)
        raise end

    with pytest.raises(end if isinstance(end, type) else RuntimeError):
        run(rows(), table=lambda record: f"{len(record['rows'])} rows\n")
    assert cases(run) == {"a": 1.0, "b": 2.0}
    assert next(run.folder.glob("*/made-up.md")).read_text() == "2 rows\n"


def test_rows_are_on_disk_before_the_run_ends(run, monkeypatch):
    monkeypatch.setattr(runner, "SAVE_SECONDS", 0.0)
    seen = []

    def rows():
        yield Row("a", 1.0)
        yield Row("b", 2.0)
        seen.append(cases(run))

    run(rows())
    assert seen == [{"a": 1.0, "b": 2.0}]


def test_views_are_of_the_whole_record(run):
    run([Row("a", 1.0)])
    run([Row("b", 2.0)], table=lambda r: " ".join(row["case"] for row in r["rows"]))
    assert next(run.folder.glob("*/made-up.md")).read_text() == "a b"
    assert "a b" in run.lines


def test_without_matplotlib_the_record_stays_and_one_line_names_the_extra(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run([Row("a", 1.0)], draw=lambda record: runner.plots.new_figure(3, 2))
    assert cases(run) == {"a": 1.0}
    assert [line for line in run.lines if "onelaunch[bench]" in line]
    assert not list(run.folder.glob("*/*.png"))


def test_a_picture_lies_beside_the_record(run):
    pytest.importorskip("matplotlib")
    run([Row("a", 1.0)], draw=lambda record: runner.plots.new_figure(3, 2))
    assert next(run.folder.glob("*/made-up.png")).read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_row_failed(run):
    with pytest.raises(RunFailed, match="no case"):
        run([])
    assert not list(run.folder.glob("*/*"))


@pytest.mark.parametrize("broken", ["{", "[]", '{"schema": 99}', '{"schema": 1, "rows": [3]}'])
def test_a_broken_record_is_an_error_before_anything_runs(run, broken):
    path = run([Row("a", 1.0)])
    path.write_text(broken)
    ran = []

    def rows():
        ran.append(True)
        yield Row("b", 1.0)

    with pytest.raises(BadInput, match="made-up.json"):
        run(rows())
    assert not ran
    assert path.read_text() == broken


def test_a_folder_that_cannot_be_made_is_an_error_before_anything_runs(run, monkeypatch):
    monkeypatch.setattr(runner, "device_name", lambda device: "a device")
    (run.folder / "a-device").write_text("a file")
    ran = []

    def rows():
        ran.append(True)
        yield Row("a", 1.0)

    with pytest.raises(BadInput, match="cannot be made"):
        run(rows())
    assert not ran


def broken_view(record):
    raise KeyError("ratio")


def test_a_view_that_fails_is_said_and_its_old_picture_does_not_stay(run):
    path = run([Row("a", 1.0)])
    path.with_suffix(".png").write_bytes(b"old")
    assert run([Row("b", 2.0)], table=broken_view, draw=broken_view) == path
    assert [line for line in run.lines if line.startswith("without a table: KeyError")]
    assert [line for line in run.lines if line.startswith("without a picture: KeyError")]
    assert not path.with_suffix(".png").exists()
    assert cases(run) == {"a": 1.0, "b": 2.0}


def test_a_view_that_fails_does_not_hide_why_the_run_ended(run):
    def rows():
        yield Row("a", 1.0)
        raise RuntimeError("a device fell off")

    with pytest.raises(RuntimeError, match="fell off"):
        run(rows(), table=broken_view, draw=broken_view)


@pytest.mark.parametrize("experiment", MODULES)
def test_a_device_that_an_experiment_is_not_for_is_refused(experiment, monkeypatch):
    import onelaunch.engines.cuda as cuda

    monkeypatch.setattr(cuda, "why_not", lambda device: "it is made of wood")
    refused = {}
    for device in ("cpu", "cuda:0", "mps"):
        try:
            runner.check_device(experiment, device)
        except BadInput as error:
            refused[device] = str(error)
    kinds = devices(experiment)
    if not kinds:
        assert not refused
        return
    assert refused["mps"] == f"{experiment}: --device mps: it runs on {' or '.join(kinds)}"
    assert ("cpu" in refused) == (experiment == "forward")
    if experiment in NOT_ON_A_GPU:
        assert NOT_ON_A_GPU[experiment] in refused["cuda:0"]
    elif experiment in OF_THE_CUDA_ENGINE:
        assert "made of wood" in refused["cuda:0"]
    else:
        assert "cuda:0" not in refused


def test_a_refused_device_leaves_nothing(tmp_path):
    with pytest.raises(BadInput, match="generate: --device mps"):
        conduct("generate", "mps", True, tmp_path, print)
    assert not list(tmp_path.iterdir())
