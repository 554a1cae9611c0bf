"""Training through programs beside PyTorch's own: gradients, versions, failures."""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import Future

import pytest
import torch
from safetensors.torch import save_file

from onelaunch.compilation.cache import Store
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput, RunFailed
from onelaunch.model import Model
from tests.engines.coreml.test_programs import tokens_of
from tests.engines.suite import SHAPES, SMALL, relative_error

pytest.importorskip("coremltools")

from onelaunch.engines.coreml import compiler
from onelaunch.engines.coreml import training as module
from onelaunch.engines.coreml.training import CoreMLTrainer
from tests.engines.coreml.in_process import InProcess

UPDATES, LR = 4, 0.05
TINY = SMALL.with_(n_layers=1)
NORMS = SHAPES["qk-norm-wide-heads"]


@pytest.fixture
def trainer(monkeypatch):
    made = []
    monkeypatch.setattr(module, "Compiler", InProcess)

    def make(*args, **kwargs):
        made.append(CoreMLTrainer(*args, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.close()


def start_of(config, seed=0):
    return {n: p.detach() for n, p in Model(config).init_weights(seed).named_parameters()}


def batches_of(config, count, batch=2, sequence=24):
    return [
        (tokens_of(config, batch, sequence, 2 * i), tokens_of(config, batch, sequence, 2 * i + 1))
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("config", "depth", "taps"),
    [
        (SMALL, "half", "full"),
        (SMALL, "half", "inputs"),
        (SMALL, 1, "full"),
        (NORMS, "", "inputs"),
        (SMALL, "stage", "full"),
        (NORMS, "stage", "full"),
    ],
    ids=["half-full", "half-inputs", "1-full", "norms-inputs", "stage", "norms-stage"],
)
def test_gradients_are_pytorchs(config, depth, taps, trainer):
    weights = start_of(config)
    plain = ReferenceEngine(config, weights, "cpu", train=True)
    ours = trainer(config, weights, depth, taps)
    (one, other) = batches_of(config, 2)
    for tokens, targets in (one, other):
        expected = plain.train_step(tokens, targets, 0.5)
        assert float(ours.train_step(tokens, targets, 0.5)) == pytest.approx(
            float(expected), rel=2e-3
        )
    for name, parameter in plain.parameters().items():
        assert relative_error(ours.parameters()[name].grad, parameter.grad) < 2e-2, name
    assert torch.equal(ours.logits(one[0]), plain.logits(one[0]))


def step(engine):
    with torch.no_grad():
        for parameter in engine.parameters().values():
            parameter -= LR * parameter.grad
            parameter.grad = None


def plain_losses(config, staleness, batches):
    """Of plain descent with gradients of weights so many updates old."""
    versions, losses = [start_of(config)], []
    for update in range(UPDATES):
        old = versions[max(0, update - staleness)]
        engine = ReferenceEngine(config, old, "cpu", train=True)
        for tokens, targets in batches[2 * update : 2 * update + 2]:
            losses.append(float(engine.train_step(tokens, targets, 0.5)))
        newest = versions[-1]
        versions.append({n: newest[n] - LR * p.grad for n, p in engine.parameters().items()})
    return losses


def run(engine, batches, first=0):
    losses = []
    for update in range(first, UPDATES):
        for tokens, targets in batches[2 * update : 2 * update + 2]:
            losses.append(float(engine.train_step(tokens, targets, 0.5)))
        step(engine)
        engine.after_update()
    return losses


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_losses_are_those_of_gradients_so_old(staleness, trainer):
    batches = batches_of(TINY, 2 * UPDATES)
    engine = trainer(TINY, start_of(TINY), staleness=staleness)
    losses = run(engine, batches)
    assert losses == pytest.approx(plain_losses(TINY, staleness, batches), rel=1e-2)
    told = engine.telemetry()
    assert told["staleness"] == min(staleness, UPDATES - 1)
    assert told["stall_seconds"] > 0
    assert engine.telemetry()["stall_seconds"] == 0


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_a_resumed_run_goes_on_exactly(staleness, trainer):
    batches = batches_of(TINY, 2 * UPDATES)
    whole = trainer(TINY, start_of(TINY), staleness=staleness)
    losses = run(whole, batches)
    first = trainer(TINY, start_of(TINY), staleness=staleness)
    for update in range(2):
        for tokens, targets in batches[2 * update : 2 * update + 2]:
            first.train_step(tokens, targets, 0.5)
        step(first)
        first.after_update()
    kept = {name: p.detach().clone() for name, p in first.parameters().items()}
    state = {name: t.clone() for name, t in first.state_dict().items()}
    second = trainer(TINY, kept, staleness=staleness)
    second.load_state_dict(state, 2)
    assert run(second, batches, 2) == losses[4:]
    for name, parameter in whole.parameters().items():
        assert torch.equal(second.parameters()[name], parameter)


@pytest.mark.extended
def test_programs_without_weights_are_taken_from_the_store(trainer, tmp_path, monkeypatch):
    """Those of attention, of every layer; those with weights are new in every update."""
    batch = batches_of(SMALL, 1, batch=1, sequence=8)[0]

    def updates(count, depth):
        engine = trainer(SMALL, start_of(SMALL), depth, staleness=0, store=Store(tmp_path))
        for _ in range(count):
            engine.train_step(*batch)
            step(engine)
            engine.after_update()
            told = engine.telemetry()
            yield told["compilations"], told["cache_hits"]

    # two layers: the second one's attention hits at once, and from then on both in both directions
    assert list(updates(2, "stage")) == [(18, 2), (16, 4)]
    monkeypatch.setattr(
        module, "Compiler", compiler.Compiler
    )  # a process that is told of the store
    assert list(updates(1, "stage")) == [(16, 4)]
    assert list(updates(1, "half")) == [(8, 0)]
    assert len(Store(tmp_path).entries()) == 2


def test_another_shape_in_the_middle_has_programs_of_its_own(trainer):
    engine = trainer(TINY, start_of(TINY), staleness=1)
    plain = ReferenceEngine(TINY, start_of(TINY), "cpu", train=True)
    (one,), (other,) = batches_of(TINY, 1), batches_of(TINY, 1, sequence=16)
    for tokens, targets in (one, other, one):
        expected = float(plain.train_step(tokens, targets))
        assert float(engine.train_step(tokens, targets)) == pytest.approx(expected, rel=2e-3)
    for engine_ in (engine, plain):
        step(engine_)
    engine.after_update()  # compiling for the one while the other comes
    expected = float(plain.train_step(*other))
    engine.train_step(*other)
    step(engine)
    engine.after_update()
    assert float(engine.train_step(*other)) == pytest.approx(expected, rel=2e-3)


def failing(monkeypatch, *times):
    """A compiler that fails at these compilations."""
    done = []

    class Failing(InProcess):
        def compile(self, weights, folder):
            done.append(weights)
            if len(done) in times:
                raise RunFailed("a program does not compile: no such op")
            return super().compile(weights, folder)

    monkeypatch.setattr(module, "Compiler", Failing)


def test_settling_waits_for_a_version_and_no_newer_one(trainer):
    engine, old, new = trainer(TINY, start_of(TINY)), Future(), Future()
    engine._coming.extend([(1, old), (2, new)])
    old.set_result(None)
    engine.settle(1)
    new.set_exception(RunFailed("no such op"))
    engine.settle(1)
    with pytest.raises(RunFailed, match="no such op"):
        engine.settle()
    engine._coming.clear()


def test_threads_beside_the_trainer_take_one_core_each(trainer):
    """And the trainer's own keeps what it had; a thread takes its number at its first operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        engine = trainer(TINY, start_of(TINY))
        for executor in (engine._compiling, engine._multiplying):
            executor.submit(torch.ones(512, 512).half).result()
            assert executor.submit(torch.get_num_threads).result() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_compilation_that_fails_once_is_tried_again(trainer, monkeypatch):
    failing(monkeypatch, 2)
    lines = []
    batches = batches_of(TINY, 2 * UPDATES)
    engine = trainer(TINY, start_of(TINY))
    engine.log_to(lines.append)
    assert run(engine, batches) == pytest.approx(plain_losses(TINY, 1, batches), rel=1e-2)
    (line,) = lines
    assert "no such op; once more, and the old programs serve meanwhile" in line


def test_one_that_fails_twice_ends_the_run_with_its_reason(trainer, monkeypatch):
    failing(monkeypatch, 2, 3)
    engine = trainer(TINY, start_of(TINY))
    with pytest.raises(RunFailed, match="a program does not compile: no such op"):
        run(engine, batches_of(TINY, 2 * UPDATES))


CHILD = """
import os, sys
from pathlib import Path
from onelaunch.engines.coreml import compiler
marks = Path(sys.argv[1])
real = compiler.compile_set
def failing(*args):
    (marks / str(len(list(marks.iterdir())))).touch()
    count = len(list(marks.iterdir()))
    if count == 2:
        raise ValueError("no such op")
    if count == 3:
        os._exit(9)
    return real(*args)
compiler.compile_set = failing
compiler.main()
"""


@pytest.mark.extended
def test_a_child_that_fails_or_ends_says_why_and_the_next_one_works(tmp_path, monkeypatch):
    marks, temporary = tmp_path / "marks", tmp_path / "temporary"
    marks.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    shape = compiler.Shape(TINY, 1, 8, 1, "full")
    child = compiler.Compiler(shape, None, (sys.executable, "-c", CHILD, str(marks)))
    save_file(start_of(TINY), tmp_path / "weights.safetensors")

    def compiled(name):
        (tmp_path / name).mkdir()
        return child.compile(tmp_path / "weights.safetensors", tmp_path / name)

    try:
        assert compiled("a")["compilations"] == 2
        assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
            "backward-0.mlpackage",
            "forward-0.mlpackage",
        ]
        with pytest.raises(RunFailed, match="a program does not compile: no such op"):
            compiled("b")
        with pytest.raises(RunFailed, match="the compiler ended"):
            compiled("c")
        assert compiled("d")["compilations"] == 2
        assert any(temporary.iterdir())
        assert not any(temporary.rglob("*.mlpackage"))  # each is as large as its weights
    finally:
        child.close()
    assert not any(temporary.iterdir())
    with pytest.raises(RunFailed, match="the compiler was closed"):  # and begins no other child
        compiled("e")
    assert child._child is None


def test_the_compiler_is_a_child_that_ends_with_the_trainer(trainer, monkeypatch):
    monkeypatch.setattr(module, "Compiler", compiler.Compiler)
    batches = batches_of(TINY, 2 * UPDATES)
    engine = trainer(TINY, start_of(TINY))
    losses = run(engine, batches)
    monkeypatch.setattr(module, "Compiler", InProcess)
    assert losses == run(trainer(TINY, start_of(TINY)), batches)
    child = engine._compiler._child
    assert child.alive
    for _ in range(3):  # more that wait for their turn
        engine.after_update()
    engine.close()
    assert not child.alive
    assert engine._compiler._child is None


def test_gradients_beyond_float16_are_scaled_down(trainer, monkeypatch):
    monkeypatch.setattr(module, "GOAL", 2.0**15)
    weights = start_of(TINY)
    plain = ReferenceEngine(TINY, weights, "cpu", train=True)
    ours = trainer(TINY, weights)
    ((tokens, targets),) = batches_of(TINY, 1)
    plain.train_step(tokens, targets)
    ours.train_step(tokens, targets)
    for name, parameter in plain.parameters().items():
        assert relative_error(ours.parameters()[name].grad, parameter.grad) < 2e-2, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": "all"}, "of a stage, of half a layer or of 1 to 1"),
        ({"depth": "stage", "taps": "inputs"}, "only whole blocks"),
        ({"depth": 2}, "or 1 layer"),
        ({"taps": "none"}, "inputs or full"),
        ({"staleness": 9}, "from 0 to 8"),
        ({"dtype": "bfloat16"}, "float16 or float32"),
    ],
)
def test_what_cannot_be_had_is_refused(options, message):
    with pytest.raises(BadInput, match=message):
        CoreMLTrainer(TINY, start_of(TINY), **options)
