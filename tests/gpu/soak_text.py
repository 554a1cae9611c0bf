"""Texts without end: sessions of every form, requests of many kinds that join, leave and are
cancelled at random, every token and logprob compared with those that the request had alone. Part of
tests/soak.py."""

from __future__ import annotations

import faulthandler
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from onelaunch.bench.core.record import Row
from onelaunch.config import preset
from onelaunch.engines.cuda.engine import CudaEngine
from onelaunch.engines.engine import Request, Sampling, Session
from tests.engines.suite import weights_of

MODEL = "stories15m"
CONFIG = preset(MODEL)
GENERATIONS = 10_000
FORMS = (("text", 1), ("text", 8), ("text", 64), ("stage", 1), ("stage", 8), ("stage", 64))
"""Depth and sequences at once of the sessions."""
KINDS = (
    Sampling(),
    Sampling(0.9, top_k=40, top_p=0.9, seed=5),
    Sampling(1.2, min_p=0.02, seed=6),
    Sampling(0.0, repetition_penalty=1.3),
)
REQUESTS = 24  # of each form
CANCELLED = 0.05
PATIENCE = 120  # seconds without progress that end the process, saying where it stood


class Found(NamedTuple):
    """What a request gave: its tokens and their logprobs, and how it ended."""

    tokens: tuple[tuple[int | None, float | None], ...]
    finish: str


class Runner:
    """A session, its requests, and what each gave alone."""

    def __init__(self, engine: CudaEngine, at_once: int, choose: random.Random) -> None:
        self.session: Session = engine.session(at_once)
        self.at_once, self._choose = at_once, choose
        self.requests = [self._request() for _ in range(REQUESTS)]
        self._open: dict[int, tuple[int, list[Any]]] = {}
        self._next = 0
        self.expected = [self._alone(i) for i in range(REQUESTS)]

    def _request(self) -> Request:
        choose = self._choose
        length, new = choose.choice((1, 7, 32, 33, 150)), choose.choice((1, 5, 16, 60))
        prompt = [choose.randrange(CONFIG.vocab_size) for _ in range(length)]
        return Request(0, prompt, new, choose.choice(KINDS), logprobs=choose.random() < 0.5)

    def _alone(self, which: int) -> Found:
        self.submit(which)
        while True:
            for _, found in self.step():
                return found

    def submit(self, which: int) -> None:
        """One more of its requests."""
        self._open[self._next] = which, []
        self.session.submit(replace(self.requests[which], id=self._next))
        self._next += 1

    def cancel(self) -> None:
        """One that is under way, if there is one."""
        if self._open:
            number = self._choose.choice(list(self._open))
            self.session.cancel(number)
            del self._open[number]

    @property
    def n_open(self) -> int:
        """How many are under way."""
        return len(self._open)

    def step(self) -> list[tuple[int, Found]]:
        """Those that ended: which they were, and what they gave."""
        ended = []
        for event in self.session.step():
            if event.id not in self._open:
                continue  # cancelled
            which, events = self._open[event.id]
            events.append(event)
            if event.finish is not None:
                del self._open[event.id]
                tokens = tuple((each.token, each.logprob) for each in events)
                ended.append((which, Found(tokens, event.finish)))
        return ended


def generations(n: int = GENERATIONS, say: Callable[[str], None] = print) -> Row:
    """Run them; raises EngineTimeout where one was given up."""
    choose = random.Random(0)
    weights = weights_of(CONFIG)
    started = time.monotonic()
    wrong: Counter[str] = Counter()
    done: Counter[str] = Counter()
    cancelled = 0
    for depth, at_once in FORMS:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        name = f"{depth} {at_once}"
        runner = Runner(CudaEngine(CONFIG, weights, "cuda", fusion_depth=depth), at_once, choose)
        submitted = 0
        share = -(-n // len(FORMS))
        while done[name] < share:
            while submitted < share and runner.n_open < 2 * at_once and choose.random() < 0.7:
                runner.submit(choose.randrange(REQUESTS))
                submitted += 1
            if choose.random() < CANCELLED and runner.n_open:
                runner.cancel()
                cancelled += 1
                submitted -= 1
            for which, found in runner.step():
                done[name] += 1
                wrong[name] += found != runner.expected[which]
            if done[name] % 100 == 0:
                faulthandler.dump_traceback_later(PATIENCE, exit=True)
        runner.session.close()
        say(f"text: {name}: {done[name]:,} generations, {wrong[name]} wrong")
    faulthandler.cancel_dump_traceback_later()
    total = sum(done.values())
    notes: dict[str, Any] = {
        "forms": dict(done),
        "cancelled": cancelled,
        "seconds": round(time.monotonic() - started, 1),
        "wrong": {name: count for name, count in wrong.items() if count},
    }
    return Row(f"{MODEL} generations", total - sum(wrong.values()), n=total, notes=notes)
