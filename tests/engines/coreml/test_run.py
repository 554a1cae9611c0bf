"""Programs in a child process: what it gives, what it dies of, what is left. Other backends take
Core ML's place here; Core ML itself is asked as far as a fake of it shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from onelaunch.engines import coreml
from onelaunch.engines.coreml import backend, run
from onelaunch.engines.coreml.package import Type
from onelaunch.engines.coreml.run import Runner
from onelaunch.engines.coreml.shared import Shared
from onelaunch.errors import BadInput, RunFailed
from tests.engines.coreml.backends import COMPILER_FAILED, SHAPE

ROOT = Path(__file__).parents[3]
MARK = "ONELAUNCH_TEST_MARK"
PACKAGE = Path("a.mlpackage")
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and /dev/shm")


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Whatever a test does, no process of its own outlives it, and no memory or folder."""
    mark = uuid.uuid4().hex
    if sys.platform != "win32":
        resource_tracker.ensure_running()  # once for this process, without the mark
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv(MARK, mark)
    paths = (str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    before = shared_names()
    yield
    assert soon(lambda: not marked(mark)), "a process is left"
    assert soon(lambda: not shared_names() - before), "shared memory is left"
    assert not list(folder.iterdir()), "a folder is left"


def shared_names():
    place = Path("/dev/shm")
    return {each.name for each in place.glob("psm_*")} if place.is_dir() else set()


def marked(mark):
    """Processes that were started in a test."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (place / "environ").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def soon(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def runner(name, units="ne", load=60.0, predict=60.0, package=PACKAGE):
    return Runner(package, units, load, predict, f"tests.engines.coreml.backends:{name}")


def some(seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    x = random.standard_normal(SHAPE).astype(dtype)
    return {"x": x, "tokens": random.integers(-9, 9, (1, 5), dtype=np.int32)}


def check(runner, given):
    outputs = runner.predict(given)
    assert list(outputs) == ["x_out", "ids"]
    assert outputs["x_out"].dtype == np.float32
    np.testing.assert_array_equal(outputs["x_out"], 2 * np.asarray(given["x"], np.float32))
    np.testing.assert_array_equal(outputs["ids"], np.asarray(given["tokens"]) + 1)
    return outputs


# ---- what works


def test_a_program_predicts_again_and_again():
    with runner("Doubles") as program:
        assert (program.units, program.notes) == ("ne", [])
        assert program.inputs == {"x": Type("float16", SHAPE), "tokens": Type("int32", (1, 5))}
        assert program.load_seconds >= 0
        assert program.first_seconds > 0
        first = check(program, some(1))
        for seed in range(2, 50):
            check(program, some(seed))
        assert not np.array_equal(first["x_out"], program.predict(some(2))["x_out"]), "it is a copy"


def test_inputs_of_any_real_type_and_layout():
    with runner("Doubles", "cpu") as program:
        for dtype in (np.float16, np.float64, np.longdouble, np.int8):
            given = some(3, dtype)
            check(program, given)
            turned = np.ascontiguousarray(given["x"].T).T
            turned.flags.writeable = False
            spread = np.repeat(given["tokens"].astype(np.int64), 2, axis=1)[:, ::2]
            check(program, {"tokens": spread, "x": turned})


def test_outputs_of_another_type_and_layout_are_converted():
    with runner("GivesFloat64") as program:
        assert check(program, some())["x_out"].flags.c_contiguous


def test_megabytes_pass():
    with runner("Wide") as program:
        x = np.random.default_rng(0).standard_normal((1, 2048, 1, 1024), np.float32)
        np.testing.assert_array_equal(program.predict({"x": x})["x_out"], x - 1)


def test_times_are_apart_and_add_up():
    with runner("Sleeps") as program:
        start = time.perf_counter()
        program.predict(some())
        waited = time.perf_counter() - start
        times = program.times
    assert times.prediction >= 0.2
    assert times.core_ml == 1e-9
    assert min(times.input_conversion, times.output_conversion, times.transfer) > 0
    assert times.prediction < times.total <= waited
    assert program.first_seconds >= 0.2


def test_the_plan_is_summed_up():
    with runner("Doubles") as program:
        plan = program.plan()
        check(program, some())
    assert [each.name for each in plan.operations] == ["a", "b", "c", "d"]
    assert plan.operations[0].supported == ("ne", "cpu")
    assert list(plan.counts.items()) == [("ne", 2), ("cpu", 1), ("unknown", 1)]


def test_what_is_printed_is_no_answer():
    with runner("Noisy") as program:
        check(program, some())
        check(program, some(1))


# ---- what does not


WRONG_INPUTS = [
    ({"y": np.zeros(2)}, "input y: is none of x, tokens"),
    ({"x": np.zeros((1, 3, 5))}, r"input x: must be of shape \(1, 3, 1, 5\), not \(1, 3, 5\)"),
    ({"x": np.zeros(SHAPE, complex)}, "input x: must be float16, not complex128"),
    ({"tokens": np.zeros((1, 5))}, "input tokens: must be int32, not float64"),
    ({"tokens": np.full((1, 5), 1 << 31)}, "input tokens: has numbers that int32 does not hold"),
]


def test_inputs_that_are_not_the_programs():
    with runner("Doubles", "all") as program:
        assert (program.units, program.notes) == ("all", [])
        for change, message in WRONG_INPUTS:
            with pytest.raises(BadInput, match=message):
                program.predict(some() | change)
        with pytest.raises(BadInput, match="input tokens: is missing"):
            program.predict({"x": some()["x"]})
        check(program, some())


def test_compute_units_that_are_none():
    with pytest.raises(BadInput, match="compute units 'npu': must be ne, all, gpu, cpu"):
        runner("Doubles", "npu")


def test_a_package_that_is_refused_is_not_tried_elsewhere():
    program = runner("Refuses")
    with pytest.raises(BadInput, match=r"a\.mlpackage: is no \.mlpackage"):
        program.__enter__()
    assert program.notes == []


ORDER = {
    "ne": ("CPU and Neural Engine", "CPU and GPU", "CPU alone"),
    "all": ("all compute units", "CPU and GPU", "CPU alone"),
    "gpu": ("CPU and GPU", "CPU alone"),
    "cpu": ("CPU alone",),
}
SHAPES = "output x_out is of shape (1, 3, 5), not (1, 3, 1, 5)"


@pytest.mark.extended
@pytest.mark.parametrize(
    ("name", "units", "what", "reason"),
    [
        ("RaisesAtLoad", "all", "loading", 'RuntimeError: { NSLocalizedDescription = "it cannot'),
        ("HangsAtLoad", "gpu", "loading", "took longer than 0.4 s"),
        ("ExitsAtLoad", "cpu", "loading", "no room"),
        (
            "KillsAtFirst",
            "ne",
            "its first prediction",
            f"ended by SIGKILL after: {COMPILER_FAILED}",
        ),
        ("WrongShape", "gpu", "its first prediction", SHAPES),
        ("LacksOutput", "cpu", "its first prediction", "there is no output x_out"),
    ],
)
def test_where_all_units_fail_each_is_told(name, units, what, reason):
    program = runner(name, units, load=0.4 if name == "HangsAtLoad" else 60.0)
    with pytest.raises(RunFailed, match="does not run here") as raised:
        program.__enter__()
    told, order = str(raised.value), ORDER[units]
    assert len(program.notes) == len(order)
    for each, then, note in zip(order, (*order[1:], None), program.notes, strict=True):
        assert note.startswith(f"{each}: {what} failed ({reason}")
        assert note.endswith(f"; {then} instead") == (then is not None)
        assert f"{each}: {what} failed ({reason}" in told
        assert "\n" not in note
    with pytest.raises(RunFailed, match="closed"):
        program.predict({})


def test_units_that_kill_are_left_for_the_next_ones():
    with runner("KillsOnTheNeuralEngine") as program:
        assert program.units == "gpu"
        check(program, some())
    assert program.notes == [
        "CPU and Neural Engine: its first prediction failed (ended by SIGKILL after: "
        f"{COMPILER_FAILED}); CPU and GPU instead"
    ]


@pytest.mark.extended
def test_two_units_that_fail_in_their_own_ways():
    with runner("HangsOnGpu", predict=2.0) as program:
        assert program.units == "cpu"
        check(program, some())
    assert "(ended by SIGKILL" in program.notes[0]
    assert "CPU and GPU: its first prediction failed (took longer than 2 s)" in program.notes[1]
    assert program.notes[1].endswith("; CPU alone instead")


def test_a_compiler_that_has_failed_is_told_though_all_else_goes_on():
    with runner("Remarks") as program:
        check(program, some())
    (note,) = program.notes
    assert note.startswith("CPU and Neural Engine: predicts, but the Neural Engine's compiler")
    assert COMPILER_FAILED in note
    with runner("Remarks", "cpu") as program:
        assert program.notes == []


@pytest.mark.extended
@pytest.mark.parametrize(
    ("name", "reason"),
    [("HangsAtThird", "took longer than 2 s"), ("DiesAtThird", "ended by SIGSEGV")],
)
def test_a_later_prediction_that_ends_the_child_closes_the_runner(name, reason):
    with runner(name, predict=2.0) as program:
        check(program, some())
        with pytest.raises(RunFailed, match=rf"a\.mlpackage: .*a prediction failed \({reason}"):
            program.predict(some())
        with pytest.raises(RunFailed, match="its runner is closed"):
            program.predict(some())
        with pytest.raises(RunFailed, match="its runner is closed"):
            program.plan()
        assert (program.units, program.notes) == ("ne", [])


def test_a_later_prediction_with_an_error_leaves_the_child():
    with runner("WrongShapeAtThird") as program:
        check(program, some())
        with pytest.raises(RunFailed, match=r"output ids is of shape \(1, 4\), not \(1, 5\)"):
            program.predict(some())
        check(program, some(1))


def test_a_plan_that_fails_leaves_the_child():
    with runner("PlansNothing") as program:
        with pytest.raises(RunFailed, match="its compute plan failed .*not supported"):
            program.plan()
        check(program, some())


# ---- ends


def predict_on(program):
    with program:
        while True:
            check(program, some())


@pytest.mark.extended
@pytest.mark.parametrize("name", ["HangsAtLoad", "HangsAtThird", "Doubles"])
def test_an_interrupt_leaves_nothing(name):
    timer = threading.Timer(
        0.5, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    )
    timer.start()
    program = runner(name)
    with pytest.raises(KeyboardInterrupt):
        predict_on(program)
    with pytest.raises(RunFailed, match="closed"):
        program.predict(some())


@pytest.mark.extended
@linux
def test_a_child_that_hangs_ends_though_its_parent_was_killed():
    program = """
from tests.engines.coreml.test_run import run, runner, some
run.GRACE_SECONDS = 0.5
with runner("HangsAtThird", predict=3.0) as program:
    program.predict(some())
    print("predicted", flush=True)
    program.predict(some())
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        try:
            assert parent.stdout.readline() == b"predicted\n"
            time.sleep(0.2)
            assert len(marked(os.environ[MARK])) >= 2
        finally:
            parent.kill()
    assert soon(lambda: not marked(os.environ[MARK])), "they outlived their parent"
    for each in Path(os.environ["TMPDIR"]).iterdir():  # who is killed cannot delete its files
        (each / "program.mlmodelc").unlink()
        each.rmdir()


@linux
def test_the_memory_has_no_name_once_both_have_it(monkeypatch):
    names = []
    new = Shared.new

    def noted(interface):
        made = new(interface)
        names.append(made.name)
        assert names[0] in shared_names()
        return made

    monkeypatch.setattr(Shared, "new", noted)
    with runner("Doubles") as program:
        assert names[0] not in shared_names()
        check(program, some())


# ---- Core ML


def test_why_not_says_what_can_be_done_instead(monkeypatch):
    def of(system, version="15.1"):
        monkeypatch.setattr(run.platform, "system", lambda: system)
        monkeypatch.setattr(run.platform, "mac_ver", lambda: (version, ("", "", ""), "arm64"))
        return run.why_not()

    assert of("Linux") == (
        "Core ML runs on macOS 15 or later; here a program can be exported, linted and evaluated, "
        "not run"
    )
    assert of("Darwin", "14.6.1").endswith("on macOS 15 or later, not on 14.6.1")
    monkeypatch.setattr(coreml, "why_not", lambda: "the package coremltools is not installed")
    assert "pip install 'onelaunch[coreml]'" in of("Darwin")
    monkeypatch.setattr(coreml, "why_not", lambda: None)
    assert "without its part that calls Core ML" in of("Darwin")
    monkeypatch.setattr(run, "_has_native_part", lambda: True)
    assert of("Darwin") is None


def test_the_native_part_is_looked_for_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(
        run, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    assert not run._has_native_part()
    (tmp_path / "libcoremlpython.so").touch()
    assert run._has_native_part()
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert not run._has_native_part()


def test_without_core_ml_no_child_is_started(monkeypatch):
    monkeypatch.setattr(run, "why_not", lambda: "Core ML runs on macOS")
    monkeypatch.setattr(run, "COMMAND", ("/no/such/command",))
    with pytest.raises(RunFailed, match=r"^a\.mlpackage: Core ML runs on macOS$"):
        Runner(PACKAGE).__enter__()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Two layers from hidden state to hidden state."""
    pytest.importorskip("coremltools")
    from onelaunch.engines.coreml import emit, pack
    from onelaunch.plan import make_plan
    from tests.engines.suite import SMALL, weights_of

    plan = make_plan(SMALL, 1, 20, all_positions=True)
    path = tmp_path_factory.mktemp("program") / "two layers.mlpackage"
    launch = emit.program_launches(plan, 2)[0]
    emit.save(emit.emit(plan, launch, pack.Packed(SMALL, weights_of(SMALL))), path)
    return path


def test_a_real_package_in_a_child_gives_what_it_gives_here(package):
    from onelaunch.engines.coreml.evaluate import Evaluator
    from onelaunch.engines.coreml.package import Package

    with runner("Evaluates", package=package) as program:
        assert program.inputs == {"x": Type("float16", (1, 32, 1, 20))}
        x = np.random.default_rng(0).standard_normal((1, 32, 1, 20), np.float32)
        found = program.predict({"x": x})
        expected = Evaluator(Package(package))({"x": x})
    assert list(found) == list(expected) == ["x_out"]
    np.testing.assert_array_equal(found["x_out"], expected["x_out"].numpy())
    assert program.times.core_ml is None


def test_what_core_ml_is_asked(package, tmp_path, monkeypatch):
    """With fakes that take what coremltools' own take; a name that it lacks fails here."""
    import coremltools as ct
    from coremltools.models import compute_device, compute_plan

    def compile_model(model, destination_path=None):
        assert (model, destination_path) == (str(package), str(tmp_path / "program.mlmodelc"))
        return destination_path

    class Compiled:
        def __init__(self, path, compute_units, **_):
            assert (path, compute_units) == (str(tmp_path / "program.mlmodelc"), units)
            self._proxy = SimpleNamespace(get_last_predict_duration_in_nano_seconds=lambda: 1500)

        def predict(self, data):
            return {"x_out": data["x"]}

    units = ct.ComputeUnit.CPU_AND_NE
    monkeypatch.setattr(ct.models.utils, "compile_model", compile_model)
    monkeypatch.setattr(ct.models, "CompiledMLModel", Compiled)
    core_ml = backend.CoreML()
    interface = core_ml.load(package, tmp_path, "ne")
    assert interface.outputs == {"x_out": Type("float16", (1, 32, 1, 20))}
    outputs, seconds = core_ml.predict({"x": np.ones(2)})
    assert seconds == 1.5e-6
    assert outputs["x_out"].tolist() == [1, 1]

    devices = {
        name: object.__new__(getattr(compute_device, f"ML{name}ComputeDevice"))
        for name in ("CPU", "GPU", "NeuralEngine")
    }
    operations = [
        SimpleNamespace(operator_name=kind, outputs=[SimpleNamespace(name=name)])
        for kind, name in (("const", "w"), ("ios18.conv", "a"), ("add", "b"), ("mul", "c"))
    ]
    used = {
        "a": ("NeuralEngine", ["CPU", "GPU", "NeuralEngine"], 0.75),
        "b": ("CPU", ["CPU"], 0.25),
    }

    class Plan:
        model_structure = SimpleNamespace(
            program=SimpleNamespace(
                functions={"main": SimpleNamespace(block=SimpleNamespace(operations=operations))}
            )
        )

        @classmethod
        def load_from_path(cls, path, compute_units):
            assert (path, compute_units) == (str(tmp_path / "program.mlmodelc"), units)
            return cls()

        def get_compute_device_usage_for_mlprogram_operation(self, operation):
            if (found := used.get(operation.outputs[0].name)) is None:
                return None
            return compute_plan.MLComputePlanDeviceUsage(
                devices[found[0]], [devices[each] for each in found[1]]
            )

        def get_estimated_cost_for_mlprogram_operation(self, operation):
            found = used.get(operation.outputs[0].name)
            return None if found is None else compute_plan.MLComputePlanCost(found[2])

    for name in vars(Plan):
        assert name.startswith("__") or hasattr(compute_plan.MLComputePlan, name), name
    monkeypatch.setattr(compute_plan, "MLComputePlan", Plan)
    assert core_ml.plan() == [
        backend.PlacedOperation("a", "conv", "ne", ("cpu", "gpu", "ne"), 0.75),
        backend.PlacedOperation("b", "add", "cpu", ("cpu",), 0.25),
        backend.PlacedOperation("c", "mul", "unknown", (), None),
    ]


@pytest.mark.skipif(run.why_not() is not None, reason="Core ML is not here")
def test_core_ml_itself(package):
    from onelaunch.engines.coreml.evaluate import Evaluator
    from onelaunch.engines.coreml.package import Package

    x = np.random.default_rng(0).standard_normal((1, 32, 1, 20), np.float32)
    expected = Evaluator(Package(package), "float64")({"x": x})["x_out"].numpy()
    for units in ("ne", "gpu", "cpu"):
        with Runner(package, units) as program:
            found = program.predict({"x": x})["x_out"]
            assert program.times.core_ml > 0
            assert program.plan().operations
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 1e-2
        assert program.units == units or program.notes


def test_a_name_that_is_no_packages_is_refused():
    with pytest.raises(BadInput, match=r"a: its name must end in \.mlpackage"):
        backend.CoreML().load(Path("a"), Path(), "cpu")
