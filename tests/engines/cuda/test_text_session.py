"""A session that writes in launches, over a writer that runs on the host: what it hands on, and
when."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from onelaunch.engines.cuda.decoding import STOP_IDS, sampling
from onelaunch.engines.cuda.decoding.session import MAX_SECONDS
from onelaunch.engines.cuda.decoding.text import Ended, Row, Text
from onelaunch.engines.cuda.decoding.text_session import FIRST_TOKENS, TextSession
from onelaunch.engines.engine import Request, Sampling, TokenEvent
from onelaunch.errors import EngineTimeout, RunFailed
from tests.engines.suite import SMALL, by_request

LONG = SMALL.with_(max_seq_len=200)


def following(token):
    return (7 * token + 3) % LONG.vocab_size


def words(tokens):
    """With a logprob of -0.5 each."""
    bits = int(np.float32(-0.5).view(np.int32))
    return np.array([bits << 32 | token for token in tokens], dtype=np.int64)


class HostWriter:
    """Its launches write at once all but the last of each row's tokens; that comes with the end."""

    def __init__(self, token_seconds=None, fails_at=None):
        self.token_seconds, self.fails_at = token_seconds, fails_at
        self.stop, self.launches, self.flying, self.closed = {}, [], None, False
        self.prepared = {}

    def prepare(self, row, slot, request, limit):
        self.stop[row] = request.stop_ids[:STOP_IDS]
        self.prepared[row] = slot

    def launch(self, rows):
        assert [row.slot for row in rows] == [self.prepared[i] for i in range(len(rows))]
        assert self.flying is None, "a launch is under way"
        assert len({row.slot for row in rows}) == len(rows)
        self.launches.append(list(rows))
        self.flying = [self.written(i, row) for i, row in enumerate(rows)]

    def go_on(self, n):
        assert all(how == sampling.FULL for _, how in self.ended)
        self.launch(
            [
                Row(row.slot, tokens[-1], row.position + row.n, n, row.first + row.n)
                for row, (tokens, _) in zip(self.launches[-1], self.ended, strict=True)
            ]
        )

    def written(self, i, row):
        token, tokens = row.token, []
        for _ in range(row.n):
            token = following(token)
            if token in self.stop.get(i, ()):
                return tokens, sampling.STOPPED
            tokens.append(token)
        return tokens, sampling.FULL

    def wait_for_one(self, rows):
        assert self.flying is not None

    def ends_within(self, seconds):
        assert self.flying is not None
        return True

    def arrived(self, row, first=0):
        tokens = self.flying[row][0][first:-1]
        return tokens, [-0.5] * len(tokens)

    def finish(self, firsts):
        flying, self.flying = self.flying, None
        self.ended = flying
        if self.fails_at == len(self.launches):
            raise EngineTimeout("a text timed out")
        return [
            Ended(words(tokens[first:]), how)
            for first, (tokens, how) in zip(firsts, flying, strict=True)
        ]

    def close(self):
        self.closed = True


class HostReading:
    """A prompt that is read in chunks; `read` gets the first token of each, a list of those of
    prompts that are read together, up to `at_once`."""

    def __init__(self, ids, chunk, read, at_once=1):
        self.chunks, self.read = [ids[i : i + chunk] for i in range(0, len(ids), chunk)], read
        self.at_once, self.short = at_once, len(self.chunks) == 1

    def step(self, others=()):
        if others:
            self.read.append([each.chunks.pop(0)[0] for each in (self, *others)])
        elif self.chunks:
            self.read.append(self.chunks.pop(0)[0])
        return not self.chunks

    def reads_with(self, other, prompts):
        return prompts <= self.at_once and self.short and other.short


class HostSource:
    def __init__(self, writer, chunk=512, at_once=1):
        self.kept, self.drew, self.made, self.chunk = [], [], writer, chunk
        self.at_once = at_once
        self.read, self.slots = [], []

    def writer(self, draws, prompt):
        if self.made is None:
            raise RunFailed("no compiler")
        self.drew.append(draws)
        return self.made

    def begin(self, prompt_ids, slot):
        self.kept.append(prompt_ids)
        self.slots.append(slot)
        return HostReading(prompt_ids, self.chunk, self.read, self.at_once)

    def close(self):
        self.kept = None


class Others:
    """Answers a request with one token."""

    def __init__(self):
        self.events = []

    def submit(self, request):
        self.events.append(TokenEvent(request.id, 5, None, "length"))

    def step(self, seconds):
        events, self.events = self.events, []
        return events

    def cancel(self, id):
        self.events = [TokenEvent(id, None, None, "cancelled")]

    def close(self):
        pass


def session_of(writer, max_len=200, max_batch=1, failed=None, chunk=512):
    source = HostSource(writer, chunk)
    session = TextSession(
        LONG, source, Others, nullcontext, max_batch, max_len, torch.bfloat16, failed
    )  # fmt: skip
    return session, source.kept


def expected(prompt, n):
    tokens = [prompt[-1]]
    for _ in range(n):
        tokens.append(following(tokens[-1]))
    return tokens[1:]


def all_of(session, steps=100):
    events = []
    for _ in range(steps):
        events += session.step()
        if events and events[-1].finish is not None:
            return events
    raise AssertionError("it does not end")


@pytest.mark.parametrize("token_seconds", [None, 1e-3, 1e-5])
@pytest.mark.parametrize("new", [1, 2, FIRST_TOKENS, 40, 120])
def test_tokens_come_in_order_however_many_a_launch_writes(new, token_seconds):
    writer = HostWriter(token_seconds)
    session, kept = session_of(writer)
    prompt = [4, 9, 2]
    session.submit(Request(0, prompt, new, logprobs=True))
    events = all_of(session)
    assert [event.token for event in events] == expected(prompt, new)
    assert [event.finish for event in events] == [None] * (new - 1) + ["length"]
    assert all(event.logprob == -0.5 for event in events)
    assert kept == [prompt[:-1]]
    assert sum(row.n for (row,) in writer.launches) == new
    # each goes on where the one before ended
    at = 0
    for (row,) in writer.launches:
        assert (row.token, row.position) == ([*prompt, *expected(prompt, new)][2 + at], 2 + at)
        at += row.n
    assert session.step() == []


def test_the_first_token_does_not_wait_for_its_launch():
    writer = HostWriter()
    session, _ = session_of(writer)
    session.submit(Request(0, [1], 50))
    assert len(session.step()) == FIRST_TOKENS - 1
    assert writer.flying is not None
    # the next launch is under way before the tokens of the last are handed on
    assert len(session.step()) == 1
    assert writer.flying is not None


@pytest.mark.parametrize("ids", [1, 40])
def test_a_stop_id_ends_it(ids):
    prompt, stop = [8], expected([8], 11)[10]
    more = [i for i in range(LONG.vocab_size) if i not in expected([8], 11)]
    writer = HostWriter()
    session, _ = session_of(writer)
    session.submit(Request(0, prompt, 60, stop_ids=(*more[: ids - 1], stop)))
    events = all_of(session)
    assert [event.token for event in events] == [*expected(prompt, 10), None]
    assert events[-1].finish == "stop"
    session.submit(Request(1, prompt, 3))
    assert [event.token for event in all_of(session)] == expected(prompt, 3)


def test_drawn_and_penalised_ones_grow_beside_others():
    session, _ = session_of(HostWriter(1e-3), max_batch=2)
    session.submit(Request(0, [1], 20))
    session.submit(Request(1, [2], 4, Sampling(1.0)))
    session.submit(Request(2, [3], 20, Sampling(repetition_penalty=1.3)))
    session.submit(Request(3, [3], 0))
    events = []
    while {event.id for event in events if event.finish} != {0, 1, 2, 3}:
        events += session.step()
    for id, n in ((0, 20), (1, 4), (2, 20)):
        tokens = [event.token for event in events if event.id == id]
        assert tokens == expected([id + 1], n)
    assert session._source.drew == [False, True]


def test_texts_follow_one_another_each_by_its_writer():
    writer = HostWriter(1e-3)
    session, _ = session_of(writer)
    for i, how in enumerate((Sampling(), Sampling(1.0), Sampling(), Sampling(0.5))):
        session.submit(Request(i, [1, i + 1], 12, how))
    events = []
    while sum(event.finish is not None for event in events) < 4:
        events += session.step()
    for i in range(4):
        assert [event.token for event in events if event.id == i] == expected([1, i + 1], 12)
    assert session._source.drew == [False, True]
    # a text's random numbers go on where the launch before stopped
    before = 0
    for (row,) in writer.launches:
        assert row.first == before % 12
        before += row.n


def test_one_that_is_cancelled_makes_room_at_once():
    writer = HostWriter()
    session, _ = session_of(writer)
    session.submit(Request(0, [1], 50))
    session.submit(Request(1, [2], 5))
    session.submit(Request(2, [2], 5))
    session.step()
    session.cancel(0)
    session.cancel(2)
    session.cancel(7)
    events = []
    while not any(event.id == 1 and event.finish for event in events):
        events += session.step()
    assert [event for event in events if event.id == 0] == [TokenEvent(0, None, None, "cancelled")]
    assert [event.token for event in events if event.id == 1] == expected([2], 5)
    assert [event.finish for event in events if event.id == 2] == ["cancelled"]
    session.close()
    assert writer.closed


def test_a_prompt_that_fills_the_context_has_one_token_more():
    session, _ = session_of(HostWriter(), max_len=10)
    session.submit(Request(0, list(range(1, 11)), 50))
    assert len(all_of(session)) == 1


def test_a_wait_that_timed_out_is_raised():
    session, _ = session_of(HostWriter(fails_at=2))
    session.submit(Request(0, [1], 50))
    with pytest.raises(EngineTimeout):
        all_of(session)
    session.close()


@pytest.mark.parametrize("token_seconds", [None, 1e-3, 1e-4])
def test_several_join_and_leave(token_seconds):
    writer = HostWriter(token_seconds)
    session, _ = session_of(writer, max_batch=3)
    lengths = {0: 30, 1: 3, 2: 11, 3: 25, 4: 1, 5: 8}
    prompts = {i: [1, 5 * i + 2] for i in lengths}
    for i in (0, 1, 2, 3):
        session.submit(Request(i, prompts[i], lengths[i]))
    events = session.step()
    assert {event.id for event in events} == {0, 1, 2}  # there is room for three
    for i in (4, 5):
        session.submit(Request(i, prompts[i], lengths[i]))
    while sum(event.finish is not None for event in events) < len(lengths):
        events += session.step()
    for i, n in lengths.items():
        tokens = [event.token for event in events if event.id == i]
        assert tokens == expected(prompts[i], n)
    assert max(len(rows) for rows in writer.launches) == 3
    assert session.step() == []


def test_one_of_several_is_cancelled_while_a_launch_goes_on():
    writer = HostWriter()
    session, _ = session_of(writer, max_batch=2)
    for i in (0, 1, 2):
        session.submit(Request(i, [i + 1], 20))
    events = session.step()
    session.cancel(0)
    while sum(event.finish is not None for event in events) < 3:
        events += session.step()
    assert [event.token for event in events if event.id == 1] == expected([2], 20)
    assert [event.token for event in events if event.id == 2] == expected([3], 20)
    cancelled = [event for event in events if event.id == 0]
    assert cancelled[-1] == TokenEvent(0, None, None, "cancelled")
    assert [event.token for event in cancelled[:-1]] == expected([1], 20)[: len(cancelled) - 1]


class SlowWriter(HostWriter):
    """Its launches write two tokens of each row each time that their end is waited for."""

    there = 0

    def launch(self, rows):
        super().launch(rows)
        self.there = 1

    def ends_within(self, seconds):
        assert seconds <= 0.01
        self.there += 2
        return self.there >= max(len(tokens) for tokens, _ in self.flying)

    def arrived(self, row, first=0):
        tokens = self.flying[row][0][first : self.there]
        return tokens, [-0.5] * len(tokens)


def test_tokens_of_the_last_launch_are_handed_on_as_they_come():
    writer = SlowWriter()
    session, _ = session_of(writer, max_batch=2)
    session.submit(Request(0, [5], 16))
    session.submit(Request(1, [9], 15))
    steps = []
    while sum(event.finish is not None for step in steps for event in step) < 2:
        steps.append(session.step())
    counts = [[sum(event.id == id for event in step) for id in (0, 1)] for step in steps]
    # the first launch's first tokens, its others with its end, then what has come of the last one
    assert counts == [[1, 1], [7, 7], [3, 3], [2, 2], [2, 2], [1, 0]]
    assert [len(launch) for launch in writer.launches] == [2, 2]


@pytest.mark.parametrize("token_seconds", [None, 1e-5])
def test_the_others_are_written_between_the_chunks_of_a_prompt(token_seconds):
    writer = HostWriter(token_seconds)
    session, _ = session_of(writer, max_batch=2, chunk=10)
    session.submit(Request(0, [1], 150))
    events = session.step(1e-4)
    prompt = list(range(48))  # of which 47 are read
    session.submit(Request(1, prompt, 20))
    read, written = session._source.read, []
    while not any(event.id == 1 for event in events):
        before, launches = len(read), len(writer.launches)
        events += session.step()
        assert len(read) - before <= 1
        if len(read) > before and len(read) < 5:
            (launched,) = writer.launches[launches:]
            written += [row.n for row in launched]
    assert read == [0, 10, 20, 30, 40]
    assert len(written) == 4
    assert 0 < max(written) <= FIRST_TOKENS
    while sum(event.finish is not None for event in events) < 2:
        events += session.step()
    assert [event.token for event in events if event.id == 0] == expected([1], 150)
    assert [event.token for event in events if event.id == 1] == expected(prompt, 20)


@pytest.mark.parametrize(("seconds", "steps"), [(60.0, 1), (0.0, 5)])
def test_a_prompt_is_read_for_as_long_as_a_step_may_take_where_none_grows(seconds, steps):
    session, _ = session_of(HostWriter(), chunk=10)
    prompt = list(range(48))
    session.submit(Request(0, prompt, 20))
    events = []
    for number in range(1, steps + 1):
        events += session.step(seconds)
        assert bool(events) == (number == steps)
    assert session._source.read == [0, 10, 20, 30, 40]
    while events[-1].finish is None:
        events += session.step()
    assert [event.token for event in events] == expected(prompt, 20)


def test_one_that_is_cancelled_while_its_prompt_is_read_leaves_at_once():
    session, _ = session_of(HostWriter(), max_batch=2, chunk=10)
    session.submit(Request(0, [1], 150))
    events = session.step()
    session.submit(Request(1, list(range(48)), 20))
    session.submit(Request(2, [2], 20))  # there is no room for it
    while not session._source.read:
        events += session.step()
    session.cancel(1)
    while sum(event.finish is not None for event in events) < 3:
        events += session.step()
    assert session._source.read == [0]
    assert session._source.slots == [0, 1, 1]
    assert [event for event in events if event.id == 1] == [TokenEvent(1, None, None, "cancelled")]
    assert [event.token for event in events if event.id == 0] == expected([1], 150)
    assert [event.token for event in events if event.id == 2] == expected([2], 20)


def test_prompts_that_can_be_are_read_together():
    source = HostSource(HostWriter(1e-3), chunk=4, at_once=3)
    session = TextSession(LONG, source, Others, nullcontext, 6, 200, torch.bfloat16, None)
    # one of them is of two chunks, and takes its turns alone
    prompts = [[i, 20, 21] for i in range(4)] + [[9, *range(30, 36)], [5, 20, 21]]
    for i, prompt in enumerate(prompts):
        session.submit(Request(i, prompt, 7))
    events = []
    while len([event for event in events if event.finish]) < len(prompts):
        events += session.step()
    together, *alone = source.read
    assert together == [0, 1, 2]
    assert sorted(alone) == [3, 5, 9, 33]
    for i, prompt in enumerate(prompts):
        tokens = [event.token for event in events if event.id == i]
        assert tokens == expected(prompt, 7)
    session.close()


def test_a_text_that_ends_does_not_wait_for_the_next_prompt():
    """Its last tokens come before more than one chunk is read."""
    session, _ = session_of(HostWriter(), chunk=10)
    session.submit(Request(0, [1], 6))
    session.submit(Request(1, list(range(48)), 20))
    events = session.step()
    while not any(event.finish for event in events):
        events += session.step()
    assert [event.token for event in events] == expected([1], 6)
    assert session._source.read == [0]
    while sum(event.finish is not None for event in events) < 2:
        events += session.step()
    assert [event.token for event in events if event.id == 1] == expected(list(range(48)), 20)


def test_where_no_writer_can_be_made_the_others_write():
    errors = []
    session, _ = session_of(None, failed=errors.append)
    for i, how in enumerate((Sampling(), Sampling(1.0))):
        session.submit(Request(i, [1], 5, how))
    events = session.step()
    assert {event.id: event.token for event in events} == {0: 5, 1: 5}
    session.submit(Request(2, [1], 5))
    assert [event.token for event in session.step()] == [5]
    assert [str(error) for error in errors] == ["no compiler"]


def test_who_asks_for_one_launch_gets_the_error():
    def failed(error):
        raise error

    session, _ = session_of(None, failed=failed)
    session.submit(Request(0, [1], 5))
    with pytest.raises(RunFailed, match="no compiler"):
        session.step()


def test_what_has_arrived_ends_where_the_launch_does():
    """Behind a launch's last word there may be anything."""
    text = object.__new__(Text)
    text._written = np.array([[5, 6, -1, 9, 0, 0], [7, 0, 0, 0, 0, 0]])
    text._limits = [4, 1]
    assert text.arrived(0)[0] == [5, 6]
    assert text.arrived(0, 1)[0] == [6]
    assert text.arrived(0, 2)[0] == []
    assert text.arrived(1)[0] == [7]
    assert text.arrived(1, 1)[0] == []


class GoingOn(HostWriter):
    """Counts the launches that no row was prepared for."""

    def __init__(self, token_seconds):
        super().__init__(token_seconds)
        self.went_on = 0

    def go_on(self, n):
        self.went_on += 1
        super().go_on(n)


def test_a_launch_that_none_joins_or_leaves_goes_on_from_the_one_before():
    writer = GoingOn(MAX_SECONDS / 10)  # launches of ten tokens
    session, _ = session_of(writer, max_batch=3)
    requests = [Request(0, [5], 95), Request(1, [9], 61), Request(2, [3], 120)]
    for request in requests:
        session.submit(request)
    events, steps = [], 0
    while len(by_request(events)) < 3:
        events += session.step()
        steps += 1
        if steps == 12:
            session.cancel(2)
    for request in requests[:2]:
        tokens = expected(request.prompt_ids, request.max_new_tokens)
        assert by_request(events)[request.id] == (tokens, "length")
    got, finish = by_request(events)[2]
    assert finish == "cancelled"
    assert got == expected([3], 120)[: len(got)]
    assert 4 <= writer.went_on < len(writer.launches) - 2
    rows = [row for launch in writer.launches for row in launch if row.slot == 0]
    assert [row.first for row in rows] == [sum(r.n for r in rows[:i]) for i in range(len(rows))]
    assert [row.position for row in rows] == [row.first for row in rows]
