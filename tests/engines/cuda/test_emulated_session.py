"""Sessions whose launches run on a CPU (emulator.h): what the host hands to the kernels, and what
it reads of theirs. Prompts have one token, so that no prompt has to be read."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from onelaunch.engines.cuda import nvrtc
from onelaunch.engines.cuda.blocking import H200
from onelaunch.engines.cuda.decoding import grids, sessions, text, text_session
from onelaunch.engines.cuda.decoding.sessions import Sessions
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.engine import Request, Sampling
from tests.engines.cuda.test_emulated_text import compiled as compiled
from tests.engines.cuda.test_emulated_text import pytestmark as pytestmark
from tests.engines.suite import SMALL, exact_logits, weights_of

CONFIG = SMALL.with_(
    dim=64, n_layers=1, n_heads=4, head_dim=16, n_kv_heads=2, hidden_dim=84, vocab_size=90,
    max_seq_len=24,
)  # fmt: skip
BY = (
    Sampling(),
    Sampling(0.9, seed=3),
    Sampling(1.1, top_p=0.9, seed=4),
    Sampling(1.2, 20, 0.9, 0.01, seed=5),
    Sampling(repetition_penalty=1.4),
    Sampling(1.0, top_p=0.8, seed=6, repetition_penalty=1.2),
)


class Event:
    def __init__(self, **options):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 4.0


class HostPrompts:
    def __init__(self, *parts):
        pass

    def calls(self, n, with_logits, together=False):
        return []

    def begin(self, prompt_ids, cache, slot, with_logits):
        assert not prompt_ids
        return self

    def step(self, others=()):
        return True

    def reads_with(self, other, prompts):
        return False


class Functions:
    """In the place of NVRTC and the driver: the emulated kernel of the macros."""

    def __init__(self, compiled):
        self.compiled, self.launches = compiled, []

    def code(self, source, macros, arch, store):
        return macros

    def function(self, macros, name, device, shared_bytes):
        assert name == ("write_texts" if "SEQUENCES" in macros else "write_text")
        return Function(self, self.compiled(macros))


class Function:
    def __init__(self, functions, library):
        self.functions, self.library = functions, library

    def launch(self, ctas, threads, arguments):
        assert threads == 32 * (grids.WARPS + 4)
        kinds = nvrtc.INT, nvrtc.FLOAT, nvrtc.UINT, nvrtc.LONG
        of = {kind: [] for kind in kinds}
        structures, places = arguments.places[:2], arguments.places[2:]
        for place in places:
            of[type(place)].append(place.value)
        ints = [*of[nvrtc.INT], *[0] * (10 - len(of[nvrtc.INT]))]
        fractions = of[nvrtc.FLOAT] or [0.0, 1.0, 0.0, 1.0]
        (epoch,), (timeout_ns,) = of[nvrtc.UINT], of[nvrtc.LONG]
        self.library.run_text(
            *map(ctypes.byref, structures), (ctypes.c_int * 10)(*ints),
            (ctypes.c_float * 4)(*fractions), ctypes.c_uint(epoch),
            ctypes.c_ulonglong(50 * timeout_ns), ctas, ctypes.c_uint(len(self.functions.launches)),
            None,
        )  # fmt: skip
        self.functions.launches.append(ctas)


class Made:
    def __init__(self, sessions):
        self.sessions = sessions

    def session(self, max_batch, length):
        return self.sessions.session(max_batch, length, nullcontext, None)


@pytest.fixture
def made(compiled, monkeypatch):
    """Sessions of an emulated GPU of so many multiprocessors."""
    functions = Functions(compiled)
    monkeypatch.setattr(nvrtc, "compiled", functions.code)
    monkeypatch.setattr(nvrtc, "Function", functions.function)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(sessions, "Prompts", HostPrompts)
    monkeypatch.setattr(sessions, "why_not", lambda *case: None)

    def make(multiprocessors, dtype=torch.bfloat16):
        limits = replace(H200, multiprocessors=multiprocessors)
        for module in (text, sessions):
            monkeypatch.setattr(module, "limits_of", lambda device: limits)
        weights = weights_of(CONFIG)
        packed = pack(CONFIG, weights, dtype, torch.device("cpu"))
        return Made(Sessions(CONFIG, packed, "text", None, print, meanwhile=False))

    make.functions = functions
    return make


def written(session, requests):
    """Ids and logprobs of each request, which all end as they should."""
    for request in requests:
        session.submit(request)
    ids, logprobs, left = {}, {}, len(requests)
    for _ in range(300):
        for event in session.step(0.004):
            assert event.error is None
            ids.setdefault(event.id, []).append(event.token)
            logprobs.setdefault(event.id, []).append(event.logprob)
            left -= event.finish is not None
        if not left:
            return {i: (ids[i], logprobs[i]) for i in ids}
    raise AssertionError("no end")


def requests_of(n, new=12):
    return [Request(i, [7 * i % 90], new, BY[i % len(BY)], logprobs=True) for i in range(n)]


def check(request, ids, logprobs):
    """Logprobs are the model's, within bfloat16's error; greedy tokens are among the best."""
    logits = exact_logits(CONFIG, weights_of(CONFIG), torch.tensor([[*request.prompt_ids, *ids]]))
    exact = logits[0, :-1].log_softmax(-1)
    chosen = exact.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert (torch.tensor(logprobs).double() - chosen).norm() <= 0.1 * len(ids) ** 0.5
    if request.sampling == Sampling():
        assert bool((exact.max(-1).values - chosen < 0.1).all())


@pytest.mark.parametrize(
    ("multiprocessors", "at_once"),
    [
        pytest.param(3, 1, marks=pytest.mark.extended),
        pytest.param(2, 5, marks=pytest.mark.extended),
        pytest.param(2, 20, marks=pytest.mark.extended),
        (3, 3),
        pytest.param(3, 12, marks=pytest.mark.extended),
    ],
)
def test_sessions_write_what_was_requested(made, multiprocessors, at_once):
    """One after another, together, or some waiting for others: each the same."""
    requests = requests_of(at_once if at_once > 12 else 6)
    make = made(multiprocessors)
    grid = grids.grid_for(CONFIG, torch.bfloat16, at_once, multiprocessors)
    session = make.session(at_once, 16)
    together = written(session, requests)
    session.close()
    assert set(made.functions.launches) == {grid.groups * grid.ctas}
    for request in requests:
        ids, logprobs = together[request.id]
        assert len(ids) == 12
        check(request, ids, logprobs)
    session = make.session(at_once, 16)
    for request in requests[:: max(1, len(requests) // 6)]:
        assert written(session, [request])[request.id] == together[request.id]
    session.close()
    assert len({tuple(ids) for ids, _ in together.values()}) >= len(requests) - 2


@pytest.mark.extended
def test_stop_ids_and_lengths(made):
    session = made(2).session(3, 16)
    plain = [replace(request, sampling=Sampling()) for request in requests_of(3)]
    whole = written(session, plain)
    stop = whole[1][0][4]
    first = whole[1][0].index(stop)
    changed = [
        plain[0],
        replace(plain[1], stop_ids=(91, stop)),
        replace(plain[2], max_new_tokens=1),
    ]
    ended = written(session, changed)
    assert ended[0] == whole[0]
    assert ended[1][0] == [*whole[1][0][:first], None]
    assert ended[2][0] == whole[2][0][:1]
    # a slot's random numbers and history are the next request's
    again = [replace(request, sampling=BY[5]) for request in plain]
    assert written(session, again) == written(session, again)
    session.close()


@pytest.mark.parametrize("at_once", [pytest.param(1, marks=pytest.mark.extended), 3])
def test_many_launches_write_what_few_do(made, at_once, monkeypatch):
    """Also those that go on from the one before."""
    went_on = []
    go_on = text.Text.go_on

    def counted(self, n):
        went_on.append(n)
        go_on(self, n)

    monkeypatch.setattr(text.Text, "go_on", counted)
    monkeypatch.setattr(Event, "elapsed_time", lambda self, other: 20.0)  # ms of each launch
    requests = requests_of(at_once, 24)
    if at_once > 1:
        requests[1] = replace(requests[1], max_new_tokens=17)
    texts = []
    for seconds in (1e-9, 10.0):  # of a launch: two tokens or so, all
        monkeypatch.setattr(text_session, "MAX_SECONDS", seconds)
        session = made(2).session(at_once, 40)
        texts.append(written(session, requests))
        session.close()
    assert texts[0] == texts[1]
    assert len(went_on) >= 5
