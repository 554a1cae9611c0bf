"""The engine and training where Core ML is there: a stand-in for it evaluates in its child process.
Core ML itself was never asked here."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from onelaunch.errors import RunFailed
from tests.engines.coreml.test_programs import tokens_of
from tests.engines.suite import SHAPES, SMALL, relative_error, weights_of

pytest.importorskip("coremltools")

from onelaunch.engines.coreml import engine as engine_module
from onelaunch.engines.coreml import gradients, ready, run
from onelaunch.engines.coreml import products as products_module
from onelaunch.engines.coreml import training as training_module
from onelaunch.engines.coreml.engine import CoreMLEngine
from onelaunch.engines.coreml.training import CoreMLTrainer
from tests.engines.coreml.in_process import InProcess

ROOT = Path(__file__).parents[3]
TINY = SMALL.with_(n_layers=1)


@pytest.fixture(autouse=True)
def _own_store(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path_factory.getbasetemp() / "programs"))
    monkeypatch.setattr(training_module, "Compiler", InProcess)
    paths = (str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.fixture
def on_a_mac(monkeypatch):
    """Has Core ML's place taken; gives the runners of programs that were made."""
    made = []

    class Noted(run.Runner):
        def __init__(self, package, backend):
            super().__init__(package, backend="tests.engines.coreml.backends:Evaluates")
            made.append(self)

    def begin():
        monkeypatch.setattr(run, "why_not", lambda: None)
        monkeypatch.setattr(run, "Runner", Noted)
        return made

    yield begin
    gc.collect()
    assert all(each._worker is None for each in made), "a process is left"


@pytest.mark.parametrize("depth", ["half", "all"])
def test_the_engines_programs(on_a_mac, depth):
    weights, tokens, lines = weights_of(TINY), tokens_of(TINY, 2, 9), []
    evaluated = CoreMLEngine(TINY, weights, fusion_depth=depth)
    expected = evaluated.logits(tokens)
    assert evaluated.describe()["programs"] == "evaluated"
    made = on_a_mac()
    engine = CoreMLEngine(TINY, weights, fusion_depth=depth, log=lines.append)
    assert torch.equal(engine.logits(tokens), expected)
    assert engine.describe()["programs"] == "run by Core ML"
    count = len(made)
    assert count == {"half": 3, "all": 1}[depth]
    assert lines == [], "nothing is evaluated here"
    engine.close()
    assert all(each._worker is None for each in made)
    assert torch.equal(engine.logits(tokens), expected)
    assert len(made) == 2 * count


def test_programs_of_a_length_that_is_not_kept_end(on_a_mac, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_SEQUENCES", 1)
    made = on_a_mac()
    engine = CoreMLEngine(SMALL.with_(n_layers=1, max_seq_len=64), weights_of(TINY))
    for sequence in (4, 40):
        engine.logits(tokens_of(TINY, 1, sequence))
    assert [each._worker is None for each in made] == [True, False]


def test_float32_is_the_evaluators(on_a_mac):
    made, lines = on_a_mac(), []
    engine = CoreMLEngine(TINY, weights_of(TINY), "float32", log=lines.append)
    engine.logits(tokens_of(TINY, 1, 4))
    assert engine.describe()["programs"] == "evaluated"
    assert made == []
    assert "float32" in lines[0]


def test_where_a_program_does_not_run_it_is_said(on_a_mac, monkeypatch):
    on_a_mac()
    of_its_own = run.Runner

    class Failing(of_its_own):
        def __enter__(self):
            self.notes.append("CPU and Neural Engine: loading failed; CPU and GPU instead")
            return super().__enter__()

    monkeypatch.setattr(run, "Runner", Failing)
    lines = []
    engine = CoreMLEngine(TINY, weights_of(TINY), fusion_depth="half", log=lines.append)
    engine.logits(tokens_of(TINY, 1, 4))
    assert lines == ["Core ML: CPU and Neural Engine: loading failed; CPU and GPU instead"]


def descend(trainer):
    with torch.no_grad():
        for parameter in trainer.parameters().values():
            parameter -= 0.05 * parameter.grad
            parameter.grad = None
    trainer.after_update()


@pytest.mark.parametrize("depth", ["half", ""])
def test_training(on_a_mac, depth):
    weights = weights_of(TINY)
    tokens, targets = tokens_of(TINY, 2, 24), tokens_of(TINY, 2, 24, 1)
    evaluated = CoreMLTrainer(TINY, weights, depth, staleness=0)
    losses = []
    for _ in range(2):
        losses.append(evaluated.train_step(tokens, targets))
        descend(evaluated)
    evaluated.close()
    made = on_a_mac()
    trainer = CoreMLTrainer(TINY, weights, depth, staleness=0)
    of_a_version = {"half": 4, "": 2}[depth]
    for update in range(2):
        assert torch.equal(trainer.train_step(tokens, targets), losses[update])
        assert len(made) == (update + 1) * of_a_version
        assert all(each._worker is None for each in made[:-of_a_version]), "an old version"
        descend(trainer)
    for name, parameter in trainer.parameters().items():
        # the sums of another process's threads have another order
        assert relative_error(parameter.detach(), evaluated.parameters()[name].detach()) < 1e-5, (
            name
        )
    trainer.close()
    assert all(each._worker is None for each in made)


def test_a_program_that_cannot_run_ends_those_that_do(on_a_mac, monkeypatch):
    made = on_a_mac()
    of_its_own = run.Runner

    class Failing(of_its_own):
        def __enter__(self):
            if len(made) % 4 == 3:
                raise RunFailed("does not run here")
            return super().__enter__()

    monkeypatch.setattr(run, "Runner", Failing)
    trainer = CoreMLTrainer(TINY, weights_of(TINY), "half", staleness=0)
    with pytest.raises(RunFailed, match="does not run here"):
        trainer.train_step(tokens_of(TINY, 1, 24), tokens_of(TINY, 1, 24))
    trainer.close()
    assert all(each._worker is None for each in made)


@pytest.mark.parametrize("config", [SMALL, SHAPES["qk-norm-wide-heads"]], ids=["small", "qk-norm"])
def test_each_product_reads_what_is_said(config):
    class Noting(dict):
        def __getitem__(self, name):
            read.append(name)
            raise KeyError(name)

    named = gradients.operands(config)
    products = gradients.products(config, 1, Noting())
    assert list(products) == [f"layers.1.{name}.weight" for name in named]
    for (weight, product), reads in zip(products.items(), named.values(), strict=True):
        read = []
        with pytest.raises(KeyError):
            product()
        assert read[0] in reads, weight
    assert {each for reads in named.values() for each in reads if not each.startswith("d_")} == set(
        gradients.needed(config)
    )


@pytest.mark.parametrize(("depth", "left"), [("", 3), (1, 3), ("half", 3)])
def test_gradients_of_weights_begin_while_the_backward_goes_on(monkeypatch, depth, left):
    """All but those that the last operations of a program give begin before it ends."""
    begun, ends = [], []
    know = products_module.Products.know

    def noting(self, name, value):
        know(self, name, value)
        begun.append(len(self.futures))

    class Ended(ready.Evaluated):
        def __call__(self, inputs, on_output=None):
            before = len(begun)
            outputs = super().__call__(inputs, on_output)
            if on_output is not None:
                ends.append(begun[before:])
            return outputs

    monkeypatch.setattr(products_module.Products, "know", noting)
    monkeypatch.setattr(ready, "Evaluated", Ended)
    trainer = CoreMLTrainer(SMALL, weights_of(SMALL), depth, staleness=0)
    trainer.train_step(tokens_of(SMALL, 1, 24), tokens_of(SMALL, 1, 24, 1))
    trainer.close()
    for counts in ends:
        first_begun = next(i for i, count in enumerate(counts) if count > (counts[0] - 1))
        assert first_begun < len(counts) - left
        assert len(set(counts)) > 2, "one after another, not all at the end"
    assert ends[-1][-1] == 9 * SMALL.n_layers
