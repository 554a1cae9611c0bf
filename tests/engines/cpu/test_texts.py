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
from onelaunch.engines.engine import Sampling
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import RunFailed
from tests.engines.cpu.making import make_engine
from tests.engines.suite import SMALL, weights_of

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


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=30, seed=4)], ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 40])
def test_any_number_of_prompts(engine, n, sampling):
    prompts = many_prompts(max(n, 4))[:n]
    reference = ReferenceEngine(SMALL, weights_of(SMALL), "cpu")
    expected = reference.generate(prompts, 10, sampling)
    events: dict[int, list[int | str]] = {i: [] for i in range(n)}
    texts = engine.generate(
        prompts,
        10,
        sampling,
        on_token=lambda i, token: events[i].append(token),
        on_end=lambda i: events[i].append("end"),
    )
    assert texts == expected
    assert events == {i: [*text, "end"] for i, text in enumerate(expected)}
    assert [len(t) for t in texts] == [min(10, SMALL.max_seq_len - len(p) + 1) for p in prompts]


def test_stops_end_some_texts_at_once_and_others_later(engine):
    prompts = many_prompts(20)
    free = engine.generate(prompts, 10, Sampling())
    stop = [free[0][0], free[7][-1]]
    expected = [
        text[: next((i for i, token in enumerate(text) if token in stop), len(text))]
        for text in free
    ]
    assert [] in expected
    events: dict[int, list[int | str]] = {i: [] for i in range(20)}
    texts = engine.generate(
        prompts,
        10,
        Sampling(),
        lambda i, token: events[i].append(token),
        stop,
        lambda i: events[i].append("end"),
    )
    assert texts == expected
    assert events == {i: [*text, "end"] for i, text in enumerate(expected)}


def test_texts_in_company_take_turns(engine):
    order: list[int] = []
    engine.generate([[1], [2], [3]], 4, Sampling(), lambda i, token: order.append(i))
    assert order == [0, 1, 2] * 4


def test_nothing_to_generate_ends_every_text_as_the_reference_does(engine):
    reference = ReferenceEngine(SMALL, weights_of(SMALL), "cpu")
    for made in (reference, engine):
        ended: list[int] = []
        assert made.generate([[1], [2]], 0, Sampling(), on_end=ended.append) == [[], []]
        assert ended == [0, 1], made


@pytest.mark.parametrize("error", [BrokenPipeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["on_token", "on_end"])
def test_an_exception_in_a_callback_ends_the_run_there(engine, where, error):
    expected = engine.generate([[1], [2]], 5, Sampling())
    calls: list[int] = []

    def fail(index: int, *token: int) -> None:
        calls.append(index)
        if len(calls) == 2:
            raise error

    with pytest.raises(error):
        engine.generate([[1], [2]], 5, Sampling(), **{where: fail})
    assert len(calls) == 2, "nothing is heard after it"
    assert engine.generate([[1], [2]], 5, Sampling()) == expected


@pytest.mark.parametrize("call", ["generate", "logits"])
def test_a_callback_cannot_call_its_own_engine(engine, call):
    def again(index: int, token: int) -> None:
        if call == "generate":
            engine.generate([[1]], 1, Sampling())
        else:
            engine.logits(torch.zeros(1, 1, dtype=torch.int64))

    with pytest.raises(RuntimeError, match="at work"):
        engine.generate([[1]], 3, Sampling(), again)
    assert len(engine.generate([[1]], 3, Sampling())[0]) == 3


def test_a_callback_may_call_another_engine(engine):
    other = make_engine(SMALL, weights_of(SMALL, 1), threads=2)
    expected, inner = engine.generate([[1]], 4, Sampling()), other.generate([[5]], 3, Sampling())
    seen = []

    def ask(index: int, token: int) -> None:
        seen.append(other.generate([[5]], 3, Sampling()))

    assert engine.generate([[1]], 4, Sampling(), ask) == expected
    assert seen == [inner] * 4


@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupt_ends_a_long_generation_soon(depth, threads):
    """Nobody listens to its tokens, which would take minutes. The time is this process's own, which
    a busy machine hardly stretches."""
    engine = make_engine(ENDLESS, weights_of(ENDLESS), threads=threads, fusion_depth=depth)
    began: list[float] = []

    def interrupt() -> None:
        began.append(time.process_time())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.2, interrupt)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1]] * 8, ENDLESS.max_seq_len, Sampling())
    assert time.process_time() - began[0] < 20
    timer.join()
    assert len(engine.generate([[1]], 3, Sampling())[0]) == 3


def test_two_python_threads_are_served_one_after_the_other(engine):
    prompts = {0: [[1], [7, 7]], 1: [[2, 9, 4]]}
    expected = {i: engine.generate(p, 20, Sampling()) for i, p in prompts.items()}
    found: dict[int, list] = {0: [], 1: []}

    def work(i: int) -> None:
        for _ in range(10):
            found[i].append(engine.generate(prompts[i], 20, Sampling()))

    threads = [threading.Thread(target=work, args=(i,)) for i in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [text] * 10 for i, text in expected.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_generates_the_same(engine):
    expected = engine.generate([[1], [5, 5]], 15, Sampling())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: that is the test
        child = os.fork()
    if child == 0:
        code = 2
        try:
            code = int(engine.generate([[1], [5, 5]], 15, Sampling()) != expected)
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
    assert engine.generate([[1], [5, 5]], 15, Sampling()) == expected


def test_not_finite_in_one_text_says_where(depth):
    weights = dict(weights_of(SMALL))
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"].clone()
    weights["embed_tokens.weight"][60] = math.nan
    weights["lm_head.weight"] = weights_of(SMALL)["embed_tokens.weight"]
    config = SMALL.with_(tied_embeddings=False)
    engine = make_engine(config, weights, threads=2, fusion_depth=depth)
    assert len(engine.generate([[1, 2], [4]], 3, Sampling())) == 2
    with pytest.raises(RunFailed, match="position 2 are not finite"):
        engine.generate([[1, 2], [1, 2, 60]], 3, Sampling())


LONG = ModelConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=48, vocab_size=61, max_seq_len=8192)


def test_a_long_text_equals_the_references_and_leaves_nothing_behind(monkeypatch):
    made = []

    class Watched(runtime_module.CachedText):
        def __init__(self, *args):
            super().__init__(*args)
            made.append((weakref.ref(self), self.cache.size))

    monkeypatch.setattr("onelaunch.engines.cpu.engine.CachedText", Watched)
    weights = weights_of(LONG)
    prompt = torch.randint(0, 61, (8000,), generator=torch.Generator().manual_seed(0)).tolist()
    reference = ReferenceEngine(LONG, weights, "cpu")
    expected = reference.generate([prompt], 20, Sampling())
    engine = make_engine(LONG, weights, threads=2)
    before = engine._runtime.n_bytes
    assert engine.generate([prompt], 20, Sampling()) == expected
    assert engine._runtime.n_bytes == before
    ((text, size),) = made
    lanes = engine._runtime.program.lanes
    assert 0 <= size - 2 * 4 * LONG.kv_dim * 8020 <= 2 * 4 * LONG.kv_dim * lanes
    gc.collect()
    assert text() is None


def test_the_last_positions_of_a_context_equal_the_references():
    config = LONG.with_(max_seq_len=1100)
    prompt = torch.randint(0, 61, (1090,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = ReferenceEngine(config, weights_of(config), "cpu").generate(
        [prompt, [1]], 99, Sampling()
    )
    engine = make_engine(config, weights_of(config), threads=2)
    # a short text first: the rotary tables have to grow
    assert engine.generate([[1]], 99, Sampling()) == expected[1:]
    assert engine.generate([prompt, [1]], 99, Sampling()) == expected
    assert len(expected[0]) == 11
