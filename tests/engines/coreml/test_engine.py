"""The Core ML engine by the suite of every engine, and what is its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onelaunch.checkpoints import load
from onelaunch.compilation.cache import Store
from onelaunch.engines.engine import Sampling
from onelaunch.errors import BadInput, MissingExtra
from onelaunch.generation.decode import generate_ids
from tests.engines.coreml.test_programs import plain_half, tokens_of
from tests.engines.suite import (
    SMALL,
    EngineSuite,
    every_shape,
    exact_logits,
    relative_error,
    weights_of,
)

pytest.importorskip("coremltools")

from onelaunch.engines.coreml.engine import CoreMLEngine

SHARED = Path(__file__).parents[4] / "shared" / "weights"


@pytest.fixture(autouse=True)
def _own_store(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("ONELAUNCH_CACHE", str(tmp_path_factory.getbasetemp() / "programs"))


class TestCoreML(EngineSuite):
    rows = 128  # an evaluator takes its time
    logprob_error = 0.05  # of float16

    def make(self, config, weights):
        return CoreMLEngine(config, weights)

    def plain(self, config, weights, tokens_NS):
        return plain_half(config, weights, tokens_NS)

    @every_shape
    def test_greedy_equals_reading_the_whole_text_anew(self, config):
        """As far as the two best logits are further apart than float16 is exact."""
        weights, text = weights_of(config), [5, 17, 3]
        (new,) = generate_ids(self.make(config, weights), [text], 12, Sampling())
        for i, token in enumerate(new):
            tokens = torch.tensor([text + new[:i]])
            exact = exact_logits(config, weights, tokens)[0, -1]
            (best, second), ids = exact.topk(2)
            assert token in ids
            assert token == ids[0] or best - second < 0.01 * exact.norm()
        assert len(set(new)) > 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real model lies beside this checkout")
def test_a_real_models_greedy_text():
    loaded = load(str(SHARED / "stories260K.bin"))
    expected = [int(i) for i in (SHARED / "stories260K_greedy_ids_n256.txt").read_text().split()]
    engine = CoreMLEngine(loaded.config, loaded.weights)
    tokens = torch.tensor([[1, *expected[:255]]])
    logits = engine.logits(tokens)
    exact = exact_logits(loaded.config, loaded.weights, tokens)
    print(f"stories260K in float16: logits {relative_error(logits, exact):.2e} off")
    assert generate_ids(engine, [[1]], 64, Sampling()) == [expected[:64]]
    assert logits[0].argmax(-1).tolist()[:64] == expected[:64]


@pytest.mark.parametrize("depth", ["half", 1, 2])
def test_every_depth_gives_the_same(depth):
    weights, tokens = weights_of(SMALL), tokens_of(SMALL, 2, 9)
    whole = CoreMLEngine(SMALL, weights).logits(tokens)
    parted = CoreMLEngine(SMALL, weights, fusion_depth=depth)
    assert torch.equal(parted.logits(tokens), whole)
    assert parted.describe()["fusion_depth"] == depth


def test_a_second_process_finds_the_programs(tmp_path):
    weights, tokens = weights_of(SMALL), tokens_of(SMALL, 1, 9)
    first = CoreMLEngine(SMALL, weights, store=Store(tmp_path))
    logits = first.logits(tokens)
    assert (first.programs.compilations, first.programs.hits) == (1, 0)
    second = CoreMLEngine(SMALL, weights, store=Store(tmp_path))
    assert torch.equal(second.logits(tokens), logits)
    assert (second.programs.compilations, second.programs.hits) == (0, 1)
    changed = {name: w + 1e-3 for name, w in weights.items()}
    third = CoreMLEngine(SMALL, changed, store=Store(tmp_path))
    assert not torch.equal(third.logits(tokens), logits)
    assert (third.programs.compilations, third.programs.hits) == (1, 0)


def test_a_damaged_entry_is_compiled_again(tmp_path):
    weights, tokens = weights_of(SMALL), tokens_of(SMALL, 1, 9)
    logits = CoreMLEngine(SMALL, weights, store=Store(tmp_path)).logits(tokens)
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    again = CoreMLEngine(SMALL, weights, store=Store(tmp_path))
    assert torch.equal(again.logits(tokens), logits)
    assert again.programs.compilations == 1


def test_a_weight_that_float16_cannot_hold_is_named():
    weights = dict(weights_of(SMALL))
    weights["layers.1.mlp.down_proj.weight"] = weights["layers.1.mlp.down_proj.weight"] * 1e6
    with pytest.raises(BadInput, match=r"^layers\.1\.mlp\.down_proj\.weight: has a number of"):
        generate_ids(CoreMLEngine(SMALL, weights), [[1]], 3, Sampling())


def test_it_says_once_that_it_evaluates():
    lines = []
    engine = CoreMLEngine(SMALL, weights_of(SMALL), log=lines.append)
    generate_ids(engine, [[1], [2]], 3, Sampling())
    assert len(lines) == 1
    assert "Core ML runs on macOS" in lines[0]


def test_what_cannot_be_had_is_refused(monkeypatch):
    weights = weights_of(SMALL)
    with pytest.raises(BadInput, match="knows float16, float32"):
        CoreMLEngine(SMALL, weights, "bfloat16")
    with pytest.raises(BadInput, match="half a layer at least"):
        CoreMLEngine(SMALL, weights, fusion_depth="stage")
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "8.3.0")
    with pytest.raises(BadInput, match=r"coremltools 8\.3\.0 is not known here"):
        CoreMLEngine(SMALL, weights)

    def missing(name):
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(MissingExtra, match=r"onelaunch\[coreml\]"):
        CoreMLEngine(SMALL, weights)
