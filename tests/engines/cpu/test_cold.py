"""Before the compiled form is there: the reference engine answers, and hands over in mid-text."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from onelaunch.engines.cpu import engine as engine_module
from onelaunch.engines.cpu.engine import CpuEngine
from onelaunch.engines.engine import Request, Sampling
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.generation.decode import generate_ids
from tests.engines.cpu.making import make_engine
from tests.engines.suite import (
    SMALL,
    by_request,
    exact_logits,
    relative_error,
    run,
    weights_of,
)


class Held:
    """A compilation that is ready when it has been asked so many times, or fails then."""

    code: bytes
    ready_at: float = float("inf")
    fails_at: float = float("inf")

    def __init__(self, store, key, command, prepare, say, what):
        self.prepare, self.asked, self.form, self.failed = prepare, 0, None, None

    def poll(self):
        self.asked += 1
        if self.asked >= self.ready_at and self.form is None:
            self.form = self.prepare(self.code)
        elif self.asked >= self.fails_at:
            self.failed = "no room on the device"
        return self.form

    def wait(self, seconds=None):
        return self.poll()


@pytest.fixture
def held(compiled_program, monkeypatch):
    class Mine(Held):
        code = compiled_program

    monkeypatch.setattr(engine_module, "Compilation", Mine)
    return Mine


PROMPTS = [[5, 17, 3], [9], [1, 2, 3, 4, 5, 6, 7]]
SAMPLINGS = [
    Sampling(),
    Sampling(1.0, seed=3),
    Sampling(0.8, top_k=20, top_p=0.9, seed=1),
    Sampling(repetition_penalty=1.3),
    Sampling(1.0, seed=3, repetition_penalty=0.7),
    Sampling(presence_penalty=0.5, frequency_penalty=1.5, logit_bias=((25, 2.0), (19, -1.0))),
]


def test_an_empty_store_keeps_nobody_waiting(held):
    engine = CpuEngine(SMALL, weights_of(SMALL))
    reference = ReferenceEngine(SMALL, weights_of(SMALL), "cpu")
    assert generate_ids(engine, PROMPTS, 6, Sampling()) == generate_ids(
        reference, PROMPTS, 6, Sampling()
    )
    tokens = torch.tensor([PROMPTS[2]])
    assert torch.equal(engine.logits(tokens), reference.logits(tokens))
    assert engine.describe()["compiled"] is False
    assert engine.describe()["engine"] == "reference"


@pytest.mark.parametrize("n", [0, 1])
def test_asking_for_little_works_before_the_form_is_there(held, n):
    engine = CpuEngine(SMALL, weights_of(SMALL))
    assert [len(text) for text in generate_ids(engine, PROMPTS, n, Sampling())] == [n] * 3
    assert generate_ids(engine, [], 5, Sampling()) == []


@pytest.mark.parametrize("max_batch", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_texts_handed_over_at_any_moment_are_the_same_texts(
    held, monkeypatch, sampling, dtype, max_batch
):
    """Before the first step, after each until all texts have ended, and never: with texts that
    wait, and one that is cancelled just before."""
    # a swap collects garbage: a tenth of a second in this process, and there are many
    monkeypatch.setattr(gc, "collect", lambda: 0)
    options = {"dtype": dtype, "threads": 1}
    requests = [Request(i, ids, 8, sampling, [33]) for i, ids in enumerate(PROMPTS)]
    cold = CpuEngine(SMALL, weights_of(SMALL), **options)
    expected = run(cold, requests, max_batch)
    assert not cold.describe()["compiled"]
    handed = set()
    for ready_at in range(1, 30):
        held.ready_at = ready_at
        engine = CpuEngine(SMALL, weights_of(SMALL), **options)
        session, events, before = engine.session(max_batch), [], 0
        for request in requests:
            session.submit(request)
        session.submit(Request(9, [7], 8))
        while len(by_request(events)) < 4:
            if len(events) > 4:
                session.cancel(9)
            events += session.step()
            if not engine.describe()["compiled"]:
                before = len(events)
        found = by_request(events)
        assert found.pop(9)[1] in ("cancelled", "length")
        assert found == expected, ready_at
        handed.add(before)
    assert len(handed) > 5
    assert 0 in handed


@pytest.mark.parametrize("depth", ["stage", "all"])
def test_a_text_is_handed_over_to_any_fusion_depth(held, depth):
    held.ready_at = 5
    engine = CpuEngine(SMALL, weights_of(SMALL), threads=2, fusion_depth=depth)
    reference = ReferenceEngine(SMALL, weights_of(SMALL), "cpu")
    assert generate_ids(engine, PROMPTS, 9, Sampling()) == generate_ids(
        reference, PROMPTS, 9, Sampling()
    )
    assert engine.describe()["compiled"]


@pytest.mark.parametrize("length", [7, 15, 16, 17, 33])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_the_cache_handed_over_is_the_one_that_would_have_been_read(held, length, layout):
    """Lengths on both sides of a cache's block; keys are kept rotated in either layout."""
    config = SMALL.with_(max_seq_len=80, n_kv_heads=2, rope_layout=layout)
    prompt = [(7 * i) % 61 for i in range(length)]
    held.ready_at = 4
    engine = CpuEngine(config, weights_of(config))
    text = generate_ids(engine, [prompt], 30, Sampling())
    assert engine.describe()["compiled"]
    assert text == generate_ids(
        ReferenceEngine(config, weights_of(config), "cpu"), [prompt], 30, Sampling()
    )


def test_a_failed_compilation_keeps_the_reference_and_says_why(held):
    held.fails_at = 5
    engine = CpuEngine(SMALL, weights_of(SMALL))
    reference = ReferenceEngine(SMALL, weights_of(SMALL), "cpu")
    assert engine.failed is None
    for n in (9, 0):
        assert generate_ids(engine, PROMPTS, n, Sampling()) == generate_ids(
            reference, PROMPTS, n, Sampling()
        )
    assert engine.failed == "no room on the device"
    assert engine.wait(0) is False
    assert engine.describe()["compiled"] is False


def test_weights_and_reference_go_when_the_form_is_there(held, monkeypatch):
    references = []

    class Watched(ReferenceEngine):
        def __init__(self, *args):
            super().__init__(*args)
            references.append(weakref.ref(self))

    monkeypatch.setattr(engine_module, "ReferenceEngine", Watched)
    held.ready_at = 5
    weights = {name: w.clone() for name, w in weights_of(SMALL).items()}
    tensors = [weakref.ref(w) for w in weights.values()]
    engine = CpuEngine(SMALL, weights)
    del weights
    assert all(tensor() is not None for tensor in tensors)
    generate_ids(engine, PROMPTS, 9, Sampling())
    gc.collect()
    assert len(references) == 1
    assert references[0]() is None
    assert all(tensor() is None for tensor in tensors)
    assert len(generate_ids(engine, PROMPTS, 3, Sampling())) == 3


def test_bfloat16_before_and_after_are_the_same_model(held):
    """What answers first computes with the weights that the compiled form will have."""
    tokens = torch.tensor([PROMPTS[2]])
    rounded = {n: w.bfloat16() if w.dim() == 2 else w for n, w in weights_of(SMALL).items()}
    exact = exact_logits(SMALL, rounded, tokens)
    engine = CpuEngine(SMALL, weights_of(SMALL), dtype="bfloat16")
    assert relative_error(engine.logits(tokens), exact) < 2e-6
    held.ready_at = 1
    engine = make_engine(SMALL, weights_of(SMALL), dtype="bfloat16")
    assert relative_error(engine.logits(tokens), exact) < 2e-6
