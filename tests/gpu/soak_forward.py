"""Forwards without end: shapes, forms, graphs and launches in random order, every logit compared on
the device; and delays of many seeds. Part of tests/soak.py."""

from __future__ import annotations

import faulthandler
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onelaunch.bench.core.record import Row
from onelaunch.config import preset
from onelaunch.engines.cuda.pack import PackedModel, pack
from onelaunch.engines.cuda.program import BoundForward, FusedForward, Shape
from tests.gpu.fuzzing import CASES, CUDA, Fuzzed

MODEL = "stories15m"
FORWARDS, SEEDS = 100_000, 1_000
SHAPES = (
    (1, 256), (1, 255), (2, 100), (4, 64), (8, 32), (3, 77),
    (1, 128), (1, 31), (1, 16), (1, 1), (4, 100), (16, 16),
    (1, 1024), (2, 600),
)  # fmt: skip
CONFIG = preset(MODEL).with_(max_seq_len=max(sequence for _, sequence in SHAPES))
FORMS: dict[str, range] = {  # which of the shapes run in it
    "all": range(14),
    "half": range(0, 14, 2),
    "staged": range(0, 14, 4),
}
TEXTS = 4  # of each shape, so that what the forward before left is wrong
LAUNCHED = 0.1  # how many of the forwards are no graphs: launching them takes longer than running
LOOK = 1_000  # forwards between two looks at what was counted
PATIENCE = 120  # seconds without progress that end the process, saying where it stood


class Runner(NamedTuple):
    """A forward of a shape in a form, its texts, and the logits that it first gave of each, as
    int32. `calls` are its graph and its launches."""

    name: str
    bound: BoundForward
    calls: tuple[Callable[[], None], Callable[[], None]]
    texts: Tensor
    got: Tensor
    expected: list[Tensor]


def consecutive(n: int = FORWARDS, say: Callable[[str], None] = print) -> Row:
    """Run them; raises EngineTimeout where one was given up."""
    faulthandler.dump_traceback_later(5 * PATIENCE, exit=True)
    try:
        started = time.monotonic()
        pool = _pool()
        made = time.monotonic() - started
        say(f"forward: {len(pool)} forms and shapes in {made:.0f} s")
        apart = _apart(pool)
        started = time.monotonic()
        wrong, counts = _run(pool, n, say)
        seconds = time.monotonic() - started
    finally:
        faulthandler.cancel_dump_traceback_later()
    notes: dict[str, Any] = {
        "forms": dict(counts),
        "shapes": [f"{batch}x{sequence}" for batch, sequence in SHAPES],
        "seconds": round(seconds, 1),
        "seconds_to_make": round(made, 1),
        "wrong": wrong,
        "forms_apart": apart,
    }
    return Row(
        f"{MODEL} forwards of {len(SHAPES)} shapes", n - sum(wrong.values()), n=n, notes=notes
    )


def delayed(seeds: int = SEEDS, say: Callable[[str], None] = print) -> Row:
    """Every case of the fuzz with so many seeds."""
    started = time.monotonic()
    wrong: dict[str, int] = {}
    for name, case in CASES.items():
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        found = Fuzzed(case).wrong(range(1, seeds + 1))
        if found:
            wrong[name] = len(found)
        say(f"forward: delays, {name}: {len(found)} of {seeds} wrong {found[:5] or ''}")
    faulthandler.cancel_dump_traceback_later()
    n = seeds * len(CASES)
    notes = {
        "seeds": seeds,
        "cases": list(CASES),
        "seconds": round(time.monotonic() - started, 1),
        "wrong": wrong,
    }
    return Row("forwards with random delays", n - sum(wrong.values()), n=n, notes=notes)


def _pool() -> list[Runner]:
    config = CONFIG
    generator = torch.Generator(device=CUDA).manual_seed(0)
    weights = {
        name: 1 + 0.1 * noise if len(shape) == 1 else 2 * noise / shape[-1] ** 0.5
        for name, shape in config.weight_shapes().items()
        for noise in [torch.randn(shape, device=CUDA, generator=generator)]
    }
    packed = pack(config, weights, torch.bfloat16, CUDA)
    pool = []
    for form, numbers in FORMS.items():
        for number in numbers:
            pool.append(_runner(form, packed, number))
    return pool


def _runner(form: str, packed: PackedModel, number: int) -> Runner:
    config, (batch, sequence) = CONFIG, SHAPES[number]
    shape = Shape(batch, sequence, True, torch.bfloat16)
    bound = (
        BoundForward(config, packed, shape, {})
        if form == "staged"
        else FusedForward(config, packed, shape, {}, form)
    )
    generator = torch.Generator(device=CUDA).manual_seed(number)
    size = TEXTS, batch * sequence
    texts = torch.randint(config.vocab_size, size, device=CUDA, generator=generator).int()
    bound.buffers.tokens.copy_(texts[0])
    graph = bound.captured()
    got = bound.buffers.logits.view(torch.int32)
    expected = []
    for text in texts:
        bound.buffers.tokens.copy_(text)
        graph.replay()
        expected.append(got.clone())
    bound.check()
    assert not any(torch.equal(expected[0], other) for other in expected[1:])
    assert bound.buffers.logits.isfinite().all()
    name = f"{form} {batch}x{sequence}"
    return Runner(name, bound, (graph.replay, bound.run), texts, got, expected)


def _apart(pool: list[Runner]) -> list[str]:
    """Runners whose first logits are not those of the first form with the shape."""
    firsts: dict[str, Runner] = {}
    found = []
    for runner in pool:
        first = firsts.setdefault(runner.name.split()[1], runner)
        if not all(map(torch.equal, first.expected, runner.expected)):
            found.append(runner.name)
    return found


def _run(
    pool: list[Runner], n: int, say: Callable[[str], None]
) -> tuple[dict[str, int], Counter[str]]:
    """How many were wrong, and how many there were, by runner and way."""
    choose = random.Random(0)
    wrong = torch.zeros(len(pool), dtype=torch.int64, device=CUDA)
    counters = wrong.unbind()
    counts: Counter[str] = Counter()
    for number in range(1, n + 1):
        which = choose.randrange(len(pool))
        runner, text = pool[which], choose.randrange(TEXTS)
        launched = choose.random() < LAUNCHED
        runner.bound.buffers.tokens.copy_(runner.texts[text])
        runner.got.fill_(-1)  # NaN
        runner.calls[launched]()
        counters[which].add_(torch.ne(runner.got, runner.expected[text]).any())
        counts[f"{runner.name.split()[0]} {'launched' if launched else 'graph'}"] += 1
        if number % LOOK == 0 or number == n:
            faulthandler.dump_traceback_later(PATIENCE, exit=True)
            for each in pool:
                each.bound.check()
            if number % (10 * LOOK) == 0:
                say(f"forward: {number:,} forwards, {int(wrong.sum())} wrong")
    found = {runner.name: int(count) for runner, count in zip(pool, counters, strict=True) if count}
    return found, counts
