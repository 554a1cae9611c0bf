"""A session of the chain over prompts and kernels that run on the host: who reads, who grows, and
when."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from onelaunch.engines.cuda.decoding import sampling
from onelaunch.engines.cuda.decoding import session as session_module
from onelaunch.engines.cuda.decoding.prefill import Prompts
from onelaunch.engines.cuda.decoding.session import GRAPH_TOKENS, CudaSession
from onelaunch.engines.cuda.pack import pack
from onelaunch.engines.engine import Request, Sampling, TokenEvent
from tests.engines.suite import SMALL, by_request, weights_of

LONG = SMALL.with_(max_seq_len=200)
CHUNK = 4


def following(token):
    return (7 * token + 3) % LONG.vocab_size


def expected(prompt, n):
    tokens = [prompt[-1]]
    for _ in range(n):
        tokens.append(following(tokens[-1]))
    return tokens[1:]


class HostReading:
    def __init__(self, prompts, prompt_ids):
        self.prompts, self.ids, self.first = prompts, prompt_ids, 0

    def step(self, others=()):
        assert not others
        assert self.first < len(self.ids)
        self.first += CHUNK
        self.prompts.read.append(self.ids[0])
        return self.first >= len(self.ids)

    def reads_with(self, other, prompts):
        return False  # as where logits are wanted

    @property
    def logits(self):
        assert self.first >= len(self.ids)
        return torch.eye(LONG.vocab_size)[following(self.ids[-1])][None]


class HostPrompts:
    """Writes down the first token of the prompt of which a chunk is read, and where keys go."""

    def __init__(self):
        self.read, self.at = [], []

    def calls(self, n, with_logits):
        return []

    def begin(self, prompt_ids, cache, slot, with_logits):
        assert with_logits
        self.at.append(cache[:, :, slot].data_ptr())
        return HostReading(self, prompt_ids)


class HostChain:
    def __init__(self, config, packed, memory, rows, context, seen):
        self.memory, self.rows, self.calls = memory, rows, [self.grow]

    def sample(self):
        slot = self.memory.slots[0]
        self.choose(slot, self.memory.logits[0].argmax())

    def grow(self):
        for slot in self.memory.slots[: self.rows]:
            if self.memory.whole[slot, sampling.FINISH] == sampling.GROWING:
                last = self.memory.tokens[slot, self.memory.whole[slot, sampling.COUNT] - 1]
                self.choose(slot, following(last))

    def choose(self, slot, token):
        whole, memory = self.memory.whole[slot], self.memory
        memory.tokens[slot, whole[sampling.COUNT]] = token
        whole[sampling.COUNT] += 1
        if whole[sampling.COUNT] >= whole[sampling.LIMIT]:
            whole[sampling.FINISH] = sampling.FULL
        memory.progress[slot] = whole[[sampling.COUNT, sampling.FINISH]]


def test_what_is_compiled_first_penalises_what_comes_later(monkeypatch):
    """A chain that is made before the first prompt is read has the table of that session."""
    compiled = []
    monkeypatch.setattr(session_module, "compile_together", compiled.extend)
    packed = pack(LONG, weights_of(LONG), torch.float32, torch.device("cpu"))
    session = CudaSession(
        LONG, packed, HostPrompts(), nullcontext, max_batch=1, max_len=64, log=print
    )
    session._state()
    session._device = torch.device("cuda")  # as far as compiling goes
    monkeypatch.setattr(torch, "zeros", partial(zeros_on_host, torch.zeros))
    request = Request(0, [3], 4, Sampling(repetition_penalty=1.3))
    session.compilation(request)()
    (sample,) = (c for c in compiled if c.kernel.__name__ == "sample_kernel")
    assert any(argument is session._seen for argument in sample.arguments)
    assert session._seen is not None


def zeros_on_host(zeros, *shape, device=None, **options):
    return zeros(*shape, **options)


@pytest.fixture
def session_of(monkeypatch):
    monkeypatch.setattr(session_module, "TokenChain", HostChain)
    packed = pack(LONG, weights_of(LONG), torch.float32, torch.device("cpu"))

    def make(max_batch, max_len=200):
        prompts = HostPrompts()
        session = CudaSession(
            LONG, packed, prompts, nullcontext, max_batch, max_len, lambda line: None
        )  # fmt: skip
        return session, prompts

    return make


class HostMany(HostChain):
    """Rows whose last tokens, and their positions, the session has placed."""

    @staticmethod
    def forward(config, packed, rows):
        buffers = SimpleNamespace(
            tokens=torch.zeros(rows, dtype=torch.int64),
            positions=torch.zeros(rows, dtype=torch.int32),
        )
        return SimpleNamespace(buffers=buffers)

    def __init__(self, config, packed, memory, forward, context, seen):
        self.memory, self.buffers, self.calls = memory, forward.buffers, [self.grow]

    def grow(self):
        tokens, memory = self.buffers.tokens, self.memory
        for row, slot in enumerate(memory.slots[: len(tokens)]):
            if memory.whole[slot, sampling.FINISH] == sampling.GROWING:
                tokens[row] = following(tokens[row])
                self.choose(slot, tokens[row])


class TogetherPrompts(HostPrompts):
    """Reads all that wait together, without their logits."""

    def calls(self, n, with_logits, together=False):
        assert together
        return []

    def begin(self, prompt_ids, cache, slot, with_logits):
        assert not with_logits
        return TogetherReading(self, prompt_ids)


class TogetherReading(HostReading):
    def step(self, others=()):
        self.prompts.read.append([each.ids[:1] for each in (self, *others)])
        return True

    def reads_with(self, other, prompts):
        return prompts <= 4


def test_many_prompts_are_read_together_up_to_their_last_tokens(monkeypatch):
    monkeypatch.setattr(session_module, "ManyRows", HostMany)
    packed = pack(LONG, weights_of(LONG), torch.float32, torch.device("cpu"))
    prompts = TogetherPrompts()
    session = CudaSession(LONG, packed, prompts, nullcontext, 12, 200, lambda line: None)
    requests = [Request(id, [id + 20, id + 5], 9 + id) for id in range(6)]
    requests += [Request(6, [33], 30), Request(7, [34, 35], 3), Request(8, [1, 2], 0)]
    for request in requests:
        session.submit(request)
    events = []
    while len(by_request(events)) < len(requests):
        events += session.step()
    assert prompts.read == [
        [[20], [21], [22], [23]], [[24], [25], [], [34]],
    ]  # fmt: skip
    for request in requests:
        tokens = expected(request.prompt_ids, request.max_new_tokens)
        assert by_request(events)[request.id] == (tokens, "length")
    # the slots of some that have ended are others' now
    later = [Request(id, [id, id + 1], 12) for id in range(10, 25)]
    for request in later:
        session.submit(request)
    events = []
    while len(by_request(events)) < len(later):
        events += session.step()
    for request in later:
        assert by_request(events)[request.id] == (expected(request.prompt_ids, 12), "length")


def tokens_of(events, id):
    return [event.token for event in events if event.id == id and event.token is not None]


def long_prompt(first, chunks):
    return [first, *range(2, 1 + CHUNK * chunks)]


def test_the_others_grow_between_the_chunks_of_a_prompt(session_of):
    session, prompts = session_of(2)
    prompt = long_prompt(50, 5)
    session.submit(Request(0, [9], 99))
    events = session.step()
    assert tokens_of(events, 0) == expected([9], 1)
    session.submit(Request(1, prompt, 20))
    for chunks in range(1, 6):
        events += (more := session.step())
        assert prompts.read == [9, *[50] * chunks]
        assert len(tokens_of(more, 0)) == GRAPH_TOKENS
        assert bool(tokens_of(more, 1)) == (chunks == 5)
    while len(by_request(events)) < 2:
        events += session.step()
    assert by_request(events) == {
        0: (expected([9], 99), "length"),
        1: (expected(prompt, 20), "length"),
    }


def test_a_prompt_is_read_without_a_pause_where_none_grows(session_of):
    session, prompts = session_of(2)
    prompt = long_prompt(50, 5)
    session.submit(Request(0, prompt, 9))
    assert tokens_of(session.step(60.0), 0) == expected(prompt, 1)
    assert prompts.read == [50] * 5


def test_a_step_does_not_read_for_longer_than_it_may(session_of):
    session, prompts = session_of(2)
    prompt = long_prompt(50, 3)
    session.submit(Request(0, prompt, 9))
    assert [session.step(0.0) for _ in range(2)] == [[], []]
    assert prompts.read == [50] * 2
    assert tokens_of(session.step(0.0), 0) == expected(prompt, 1)


def test_short_prompts_join_together_where_none_grows(session_of, monkeypatch):
    monkeypatch.setattr(session_module, "MAX_SECONDS", 0.0)
    session, prompts = session_of(4)
    for id in range(3):
        session.submit(Request(id, [id + 20], 9))
    session.submit(Request(3, long_prompt(50, 2), 9))
    events = session.step()
    assert prompts.read == [20, 21, 22, 50]
    assert [(event.id, event.token) for event in events] == [
        (id, following(id + 20)) for id in range(3)
    ]


@pytest.mark.parametrize(
    ("max_seconds", "reads"),
    [
        (60.0, [[50], [20, 21, 50], [50]]),  # no more than one chunk of a long prompt
        (0.0, [[50], [20], [21], [50], [50]]),  # no more than one chunk
    ],
)
def test_those_that_join_take_turns_for_so_long(session_of, monkeypatch, max_seconds, reads):
    session, prompts = session_of(4)
    session.submit(Request(0, [9], 199))
    session.step()
    monkeypatch.setattr(session_module, "MAX_SECONDS", max_seconds)
    requests = [Request(1, long_prompt(50, 3), 9), Request(2, [20], 9), Request(3, [21], 9)]
    for request in requests:
        session.submit(request)
    events = []
    for expected_reads in reads:
        before = len(prompts.read)
        events += (more := session.step())
        assert prompts.read[before:] == expected_reads
        assert tokens_of(more, 0)
    while len(by_request(events)) < 3:
        events += session.step()
    for request in requests:
        assert tokens_of(events, request.id) == expected(request.prompt_ids, 9)


def test_one_that_is_cancelled_while_its_prompt_is_read_leaves_at_once(session_of):
    session, prompts = session_of(2)
    session.submit(Request(0, [9], 99))
    events = session.step()
    session.submit(Request(1, long_prompt(50, 9), 9))
    session.submit(Request(2, [20], 9))  # there is no room for it
    events += session.step()
    session.cancel(1)
    events += session.step()
    assert [event for event in events if event.id == 1] == [TokenEvent(1, None, None, "cancelled")]
    assert tokens_of(events, 2)[:1] == expected([20], 1)
    assert prompts.at[1] == prompts.at[2] != prompts.at[0]
    while len(by_request(events)) < 3:
        events += session.step()
    assert prompts.read == [9, 50, 20]
    assert tokens_of(events, 0) == expected([9], 99)
    assert tokens_of(events, 2) == expected([20], 9)
    assert session.step() == []


def test_none_is_read_after_the_end(session_of):
    session, prompts = session_of(1)
    session.submit(Request(0, long_prompt(50, 9), 9))
    session.step(0.0)
    session.close()
    assert session.step() == []
    assert prompts.read == [50]


def test_the_kernels_of_a_prompt_are_compiled_when_its_length_is_new():
    packed = pack(LONG, weights_of(LONG), torch.float32, torch.device("cpu"))
    prompts = Prompts(LONG, packed, chunk=32)
    first, later = 6, 7  # which stores keys and values by a kernel of its own
    assert len(prompts.calls(32, with_logits=True)) == first + 1
    assert prompts.calls(32, with_logits=True) == []
    assert len(prompts.calls(3, with_logits=False)) == first
    # chunks of 32, 32 and 32 positions, and of 32, 32 and 16
    assert len(prompts.calls(96, with_logits=False)) == later
    assert len(prompts.calls(80, with_logits=True)) == later + 1
    assert prompts.calls(0, with_logits=False) == []
