"""Texts that grow together: their number, their ends, callbacks, interrupts, processes, threads."""

from __future__ import annotations

import gc
import math
import os
import signal
import threading
import time
import warnings
import weakref

import pytest
import torch

from onelaunch.config import ModelConfig
from onelaunch.engines.cpu import runtime as runtime_module
from onelaunch.engines.engine import Request, Sampling
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import RunFailed
from onelaunch.generation.decode import generate_ids
from tests.engines.cpu.making import make_engine
from tests.engines.suite import SMALL, by_request, run, weights_of

pytestmark = pytest.mark.usefixtures("compiled_program")

DEPTHS = ["auto", "stage"]
ENDLESS = ModelConfig(
    dim=64, n_layers=4, n_heads=4, hidden_dim=96, vocab_size=61, max_seq_len=30_000
)


@pytest.fixture(params=DEPTHS)
def depth(request):
    return request.param


@pytest.fixture
def engine(depth):
    return make_engine(SMALL, weights_of(SMALL), threads=2, fusion_depth=depth)


def many_prompts(n: int) -> list[list[int]]:
    """Of every length up to the whole context, where one token alone has room."""
    generator = torch.Generator().manual_seed(2)
    lengths = [1 + 5 * i % SMALL.max_seq_len for i in range(n)]
    lengths[3] = SMALL.max_seq_len
    return [torch.randint(0, 61, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(1.0, top_k=30, seed=4),
        Sampling(repetition_penalty=1.3),
        Sampling(1.0, top_k=30, seed=4, repetition_penalty=0.7),
        Sampling(presence_penalty=0.5, frequency_penalty=1.5, logit_bias=((25, 2.0), (19, -1.0))),
        Sampling(
            1.0, seed=4, presence_penalty=-1.0, frequency_penalty=-0.5, logit_bias=((7, 3.0),)
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_any_number_of_prompts(engine, n, sampling):
    prompts = many_prompts(max(n, 4))[:n]
    reference = ReferenceEngine(SMALL, weights_of(SMALL), "cpu")
    expected = generate_ids(reference, prompts, 10, sampling)
    texts = generate_ids(engine, prompts, 10, sampling)
    assert texts == expected
    assert [len(t) for t in texts] == [min(10, SMALL.max_seq_len - len(p) + 1) for p in prompts]


def test_stops_end_some_texts_at_once_and_others_later(engine):
    prompts = many_prompts(20)
    free = generate_ids(engine, prompts, 10, Sampling())
    stop = [free[0][0], free[7][-1]]
    expected = [
        text[: next((i for i, token in enumerate(text) if token in stop), len(text))]
        for text in free
    ]
    assert [] in expected
    assert generate_ids(engine, prompts, 10, Sampling(), stop) == expected


def test_a_step_writes_many_tokens_where_nobody_waits(depth):
    engine = make_engine(ENDLESS, weights_of(ENDLESS), threads=1, fusion_depth=depth)
    session = engine.session(2)
    session.submit(Request(0, [1], 2000))
    session.submit(Request(1, [2], 2000))
    first = session.step()
    assert [(event.id, event.finish) for event in first] == [(0, None), (1, None)]
    rest = session.step()
    assert len(rest) > 2
    assert [event.id for event in rest] == sorted(event.id for event in rest)


def test_a_request_joins_within_a_moment_and_leaves_when_cancelled(depth):
    engine = make_engine(ENDLESS, weights_of(ENDLESS), threads=1, fusion_depth=depth)
    expected = run(engine, [Request(1, [2], 5)])[1]
    session = engine.session(2)
    session.submit(Request(0, [1], 20_000))
    for _ in range(3):
        session.step()
    session.submit(Request(1, [2], 5))
    events = session.step()
    assert [event for event in events if event.id == 1]  # its first token ends the step
    while 1 not in by_request(events):
        events += session.step()
    assert by_request(events)[1] == expected
    session.cancel(0)
    assert [(event.id, event.finish) for event in session.step()] == [(0, "cancelled")]
    assert session.step() == []


def test_a_text_that_waits_begins_as_another_ends(depth):
    engine = make_engine(ENDLESS, weights_of(ENDLESS), threads=1, fusion_depth=depth)
    session = engine.session(1)
    session.submit(Request(0, [1], 3))
    session.submit(Request(1, [2], 3))
    ids = [event.id for _ in range(4) for event in session.step()]
    assert ids == [0] * 3 + [1] * 3


def test_a_batch_beyond_the_engines_own_waits():
    engine = make_engine(SMALL, weights_of(SMALL), threads=2)
    requests = [Request(i, [i], 9) for i in range(40)]
    assert run(engine, requests, max_batch=40) == run(engine, requests, max_batch=1)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_ends_a_long_generation_soon(depth, threads):
    """Nobody listens to its tokens, which would take minutes. The time is this process's own, which
    a busy machine hardly stretches."""
    engine = make_engine(ENDLESS, weights_of(ENDLESS), threads=threads, fusion_depth=depth)
    began: list[float] = []

    def interrupt() -> None:
        began.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    # Python ignores an interrupt inside a finalizer, such as those of other tests' engines
    gc.collect()
    timer = threading.Timer(0.2, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        generate_ids(engine, [[1]] * 8, ENDLESS.max_seq_len, Sampling())
    assert time.process_time() - began[0] < 20
    timer.join()
    assert len(generate_ids(engine, [[1]], 3, Sampling())[0]) == 3


def test_two_python_threads_are_served_one_after_the_other(engine):
    prompts = {0: [[1], [7, 7]], 1: [[2, 9, 4]]}
    expected = {i: generate_ids(engine, p, 20, Sampling()) for i, p in prompts.items()}
    found: dict[int, list] = {0: [], 1: []}

    def work(i: int) -> None:
        for _ in range(10):
            found[i].append(generate_ids(engine, prompts[i], 20, Sampling()))

    threads = [threading.Thread(target=work, args=(i,)) for i in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [text] * 10 for i, text in expected.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_generates_the_same(engine):
    expected = generate_ids(engine, [[1], [5, 5]], 15, Sampling())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: that is the test
        child = os.fork()
    if child == 0:
        code = 2
        try:
            code = int(generate_ids(engine, [[1], [5, 5]], 15, Sampling()) != expected)
        finally:
            os._exit(code)
    deadline = time.monotonic() + 120
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if found == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child did not come back")
    assert os.waitstatus_to_exitcode(found[1]) == 0
    assert generate_ids(engine, [[1], [5, 5]], 15, Sampling()) == expected


def test_not_finite_in_one_text_says_where(depth):
    weights = dict(weights_of(SMALL))
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"].clone()
    weights["embed_tokens.weight"][60] = math.nan
    weights["lm_head.weight"] = weights_of(SMALL)["embed_tokens.weight"]
    config = SMALL.with_(tied_embeddings=False)
    engine = make_engine(config, weights, threads=2, fusion_depth=depth)
    assert len(generate_ids(engine, [[1, 2], [4]], 3, Sampling())) == 2
    with pytest.raises(RunFailed, match="position 2 are not finite"):
        generate_ids(engine, [[1, 2], [1, 2, 60]], 3, Sampling())


LONG = ModelConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=48, vocab_size=61, max_seq_len=8192)


def test_a_long_text_equals_the_references_and_leaves_nothing_behind(monkeypatch):
    made = []

    class Watched(runtime_module.CachedSequence):
        def __init__(self, *args):
            super().__init__(*args)
            made.append((weakref.ref(self), self.cache.size))

    monkeypatch.setattr("onelaunch.engines.cpu.session.CachedSequence", Watched)
    weights = weights_of(LONG)
    prompt = torch.randint(0, 61, (8000,), generator=torch.Generator().manual_seed(0)).tolist()
    reference = ReferenceEngine(LONG, weights, "cpu")
    expected = generate_ids(reference, [prompt], 20, Sampling())
    engine = make_engine(LONG, weights, threads=2)
    before = engine._runtime.n_bytes
    assert generate_ids(engine, [prompt], 20, Sampling()) == expected
    assert engine._runtime.n_bytes == before
    ((text, size),) = made
    lanes = engine._runtime.program.lanes
    assert 0 <= size - 2 * 4 * LONG.kv_dim * 8020 <= 2 * 4 * LONG.kv_dim * lanes
    gc.collect()
    assert text() is None


def test_the_last_positions_of_a_context_equal_the_references():
    config = LONG.with_(max_seq_len=1100)
    prompt = torch.randint(0, 61, (1090,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = generate_ids(
        ReferenceEngine(config, weights_of(config), "cpu"), [prompt, [1]], 99, Sampling()
    )
    engine = make_engine(config, weights_of(config), threads=2)
    # a short text first: the rotary tables have to grow
    assert generate_ids(engine, [[1]], 99, Sampling()) == expected[1:]
    assert generate_ids(engine, [prompt, [1]], 99, Sampling()) == expected
    assert len(expected[0]) == 11
