"""Requests with options that the kernels do not have: over two sessions of the reference engine."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from onelaunch.engines.cuda.decoding.options import OptionsByPyTorch, check_kernels, without_kernel
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.engine import Request, Sampling
from onelaunch.engines.reference import ReferenceEngine
from onelaunch.errors import BadInput
from tests.engines.suite import SMALL, by_request, finished, run, weights_of

PLAIN = [
    Request(0, [3, 5], 6, logprobs=True),
    Request(1, [3, 5], 6, Sampling(1.0, top_k=9, seed=2, repetition_penalty=1.3)),
]
OPTIONS = {
    "presence_penalty=0.5": Request(2, [3, 5], 6, Sampling(presence_penalty=0.5)),
    "frequency_penalty=-2.0": Request(3, [3, 5], 6, Sampling(1.0, frequency_penalty=-2.0)),
    "logit_bias={5: -1.0}": Request(4, [3, 5], 6, Sampling(logit_bias=((5, -1.0),))),
    "top_logprobs=3": Request(5, [3, 5], 6, top_logprobs=3),
}


class Case:
    """The requests of either session, and how many have been made for options."""

    def __init__(self):
        self.engine = ReferenceEngine(SMALL, weights_of(SMALL), "cpu")
        self.own, self.others = self.noting([]), []
        self.session = OptionsByPyTorch(SMALL, self.own, self.other)

    def noting(self, ids):
        session = self.engine.session(4)
        submit = session.submit
        session.ids = ids
        session.submit = lambda request: (ids.append(request.id), submit(request))
        return session

    def other(self):
        self.others.append(self.noting([]))
        return self.others[-1]


@pytest.fixture
def case():
    made = Case()
    yield made
    made.session.close()


def test_options_are_pytorchs_and_the_rest_is_the_kernels(case):
    requests = [PLAIN[0], *OPTIONS.values(), PLAIN[1]]
    for request in PLAIN:
        case.session.submit(request)
    events = case.session.step()
    assert case.others == [], "made where no request has options"
    for request in OPTIONS.values():
        case.session.submit(request)
    while len(by_request(events)) < len(requests):
        events += case.session.step()
    assert case.own.ids == [0, 1]
    (other,) = case.others
    assert other.ids == [2, 3, 4, 5]
    for request in requests:
        assert by_request(events)[request.id] == run(case.engine, [request])[request.id]
    assert {len(event.top) for event in events if event.id == 5 and event.token is not None} == {3}
    case.session.submit(PLAIN[1])
    assert case.own.ids == [0, 1, 1]
    assert finished(case.session, 1) == run(case.engine, [PLAIN[1]])
    assert case.session.step() == []


def test_cancel_reaches_whoever_writes(case):
    penalised = OPTIONS["presence_penalty=0.5"]
    for request in (PLAIN[0], penalised):
        case.session.submit(request)
    for id in (0, 2, 2, 7):
        case.session.cancel(id)
    events = case.session.step()
    assert [(event.id, event.finish) for event in events] == [(0, "cancelled"), (2, "cancelled")]


def test_a_bad_request_makes_nothing(case):
    for request in (Request(0, [], 3, top_logprobs=1), Request(0, [1], 3, top_logprobs=21)):
        with pytest.raises(BadInput):
            case.session.submit(request)
    assert case.others == case.own.ids == []


def test_options_by_name():
    for request in PLAIN:
        assert without_kernel(request) is None
        check_kernels(request)
    for name, request in OPTIONS.items():
        assert without_kernel(request) == name
        with pytest.raises(
            BadInput, match=r"^.*: the CUDA kernels do not have it; .*'auto'"
        ) as error:
            check_kernels(request)
        assert str(error.value).startswith(name)


def sessions_of_kernels():
    pytest.importorskip("triton")
    from onelaunch.engines.cuda.decoding.session import CudaSession
    from onelaunch.engines.cuda.decoding.text_session import TextSession

    packed = pack(SMALL, weights_of(SMALL), torch.float32, torch.device("cpu"))
    yield CudaSession(SMALL, packed, None, nullcontext, 2, 24, print)
    yield TextSession(SMALL, None, None, nullcontext, 2, 24, torch.float32, print)


def test_what_has_kernels_alone_refuses_them():
    for session in sessions_of_kernels():
        for name, request in OPTIONS.items():
            with pytest.raises(BadInput) as error:
                session.submit(request)
            assert str(error.value).startswith(f"{name}: the CUDA kernels")
        session.submit(PLAIN[0])
        session.submit(PLAIN[1])
