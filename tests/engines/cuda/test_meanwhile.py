"""A session in which another one writes while kernels are compiled: over two of the reference
engine."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from contextlib import nullcontext

import pytest
import torch

from onelaunch.engines.cuda.decoding.meanwhile import Meanwhile
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.engine import Request
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from tests.engines.suite import SMALL, weights_of

REQUESTS = [Request(i, [3 + i, 5], 6) for i in range(3)]


class Case:
    """Requests that find kernels compiled or not."""

    def __init__(self):
        self.engine = ReferenceEngine(SMALL, weights_of(SMALL))
        self.lines, self.asked, self.others = [], [], []
        self.compiled = Future()
        self.own = self.engine.session(2)
        self.session = Meanwhile(
            SMALL, self.own, self.other, self.compiling, self.lines.append, timeout=0.01
        )

    def other(self):
        self.others.append(self.engine.session(2))
        return self.others[-1]

    def compiling(self, request):
        self.asked.append(request.id)
        return self.compiled

    def run(self):
        events = []
        for _ in range(100):
            more = self.session.step()
            if not more:
                return events
            events += more
        raise AssertionError("no end")


@pytest.fixture
def case():
    made = Case()
    yield made
    made.session.close()


def tokens(events, id):
    return [event.token for event in events if event.id == id]


@pytest.fixture(scope="module")
def expected():
    session = ReferenceEngine(SMALL, weights_of(SMALL)).session(3)
    for request in REQUESTS:
        session.submit(request)
    events = []
    while more := session.step():
        events += more
    return {request.id: tokens(events, request.id) for request in REQUESTS}


def test_compiled_kernels_write_and_nothing_else_is_made(case, expected):
    case.compiled.set_result(None)
    case.session.submit(REQUESTS[0])
    assert tokens(case.run(), 0) == expected[0]
    assert case.others == case.lines == []


def test_what_is_begun_by_the_other_ends_there_and_what_comes_later_does_not(case, expected):
    case.session.submit(REQUESTS[0])
    events = case.session.step()
    assert events
    assert len(case.others) == len(case.lines) == 1
    case.compiled.set_result(None)
    case.session.submit(REQUESTS[1])  # while it writes
    assert case.session._sessions.of_other == {0, 1}
    events += case.run()
    case.session.submit(REQUESTS[2])
    assert case.asked == [0, 1, 2]
    assert case.session._sessions.of_other == set()
    events += case.run()
    for request in REQUESTS:
        assert tokens(events, request.id) == expected[request.id]
    assert {event.id for event in events if event.finish} == {0, 1, 2}


def test_an_error_is_the_sessions(case, expected):
    case.compiled.set_exception(OSError("no compiler"))
    case.session.submit(REQUESTS[0])
    assert tokens(case.run(), 0) == expected[0]
    assert case.others == []


def test_cancel_reaches_whoever_writes(case):
    case.session.submit(REQUESTS[0])
    for id in (0, 7):
        case.session.cancel(id)
    assert [(event.id, event.finish) for event in case.run()] == [(0, "cancelled")]
    case.compiled.set_result(None)
    case.session.submit(REQUESTS[1])
    case.session.cancel(1)
    assert [(event.id, event.finish) for event in case.run()] == [(1, "cancelled")]


def test_bad_requests_compile_nothing(case):
    with pytest.raises(BadInput):
        case.session.submit(Request(0, [], 3))
    assert case.asked == []


class Compiles:
    """A session whose requests need something compiled, or nothing."""

    def __init__(self, compile):
        self.compile = compile

    def compilation(self, request):
        return self.compile


def test_what_was_begun_before_is_there_first():
    pytest.importorskip("triton")
    from onelaunch.engines.cuda.decoding.sessions import Sessions

    packed = pack(SMALL, weights_of(SMALL), torch.float32, torch.device("cpu"))
    sessions = Sessions(SMALL, packed, "auto", None, print, meanwhile=True)
    go, nothing = threading.Event(), Compiles(None)
    assert sessions._begin(nothing, nullcontext, REQUESTS[0]).done()
    first = sessions._begin(Compiles(lambda: go.wait(10)), nullcontext, REQUESTS[0])
    second = sessions._begin(nothing, nullcontext, REQUESTS[1])
    assert not first.done()
    assert not second.done()
    go.set()
    second.result(timeout=10)
    assert first.done()
    assert sessions._begin(nothing, nullcontext, REQUESTS[2]).done()
