"""What fusion-depth times, and what its record says of it, whatever the device.

Each round has its own least squares of time = a + b calls, so that b is the price of a call; where
the first layers of a model are timed alone, also of time = a + b layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from onelaunch.bench.core.record import Row
from onelaunch.bench.core.rounds import Samples, digest, fit, ratio, ratio_of_medians
from onelaunch.bench.core.settled import Settled
from onelaunch.config import ModelConfig
from onelaunch.plan import launches, make_plan

LAYERS = 12
DEPTHS = (1, 2, 4, LAYERS)
MOST_TOKENS = 128
ONE_LAYER = "one layer"

Ranges = list[tuple[int, int]]
"""The stages of each call: from the first up to, not including, the last."""


@dataclass(frozen=True)
class Block:
    """LAYERS layers of one block each, `size` hidden columns or heads wide, on so many tokens."""

    part: Literal["ffn", "attention"]
    dim: int
    size: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.dim}/{self.size}{' heads' if self.part == 'attention' else ''}"

    @property
    def case(self) -> str:
        return f"{self.part} {self.dim}/{self.size} 1x{self.tokens}"

    @property
    def config(self) -> ModelConfig:
        """A configuration with as little as possible of what is not run."""
        ffn = self.part == "ffn"
        return ModelConfig(
            dim=self.dim,
            n_layers=LAYERS,
            n_heads=1 if ffn else self.size,
            head_dim=16 if ffn else self.dim // self.size,
            hidden_dim=self.size if ffn else 16,
            vocab_size=64,
            max_seq_len=MOST_TOKENS,
        )

    @property
    def stages(self) -> int:
        """Stages of a layer."""
        return 2 if self.part == "ffn" else 3


FFNS = (
    Block("ffn", 64, 128, 1),
    Block("ffn", 128, 256, 1),
    Block("ffn", 288, 768, 1),
    Block("ffn", 288, 768, 128),
    Block("ffn", 768, 2048, 1),
)
QUICK_FFNS = (FFNS[0], FFNS[2])


@dataclass
class Case:
    """One forward: by name of the way, the stages of each of its calls.

    `less` names ways that do less than the others. `layers` says of those that hold nothing but the
    first layers, in one call, how many; `halves` names the way that takes the same layers by
    halves. `notes` go into the rows of some ways. `reset` are calls before each forward, not timed.
    """

    name: str
    model: str
    tokens: int
    ways: dict[str, Ranges]
    less: tuple[str, ...] = ()
    layers: dict[str, int] = field(default_factory=dict)
    halves: dict[str, str] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    reset: Ranges = field(default_factory=list)

    @property
    def whole(self) -> list[str]:
        """The ways that do the whole work."""
        return [name for name in self.ways if name not in self.less]


class How(NamedTuple):
    """How a case's calls were made: in words, and as notes of its rows."""

    words: str
    notes: dict[str, Any]


def block_ways(stages: int, with_embed: bool = False) -> dict[str, Ranges]:
    """The calls of LAYERS layers of so many stages, behind embed: one layer, then all of them by
    stages and by layers a call. `with_embed` puts embed into the first call."""
    last = 1 + stages * LAYERS
    ways: dict[str, Ranges] = {
        ONE_LAYER: [(1, 1 + stages)],
        "stage": [(i, i + 1) for i in range(1, last)],
    }
    for depth in DEPTHS:
        name = "all" if depth == LAYERS else str(depth)
        step = stages * depth
        ways[name] = [(i, min(i + step, last)) for i in range(1, last, step)]
    if with_embed:
        ways = {name: [(0, first[1]), *rest] for name, (first, *rest) in ways.items()}
    return ways


def model_ways(config: ModelConfig, depths: Sequence[str | int]) -> dict[str, Ranges]:
    """The calls of a whole model at some depths."""
    plan = make_plan(config)
    return {str(d): [(each.first, each.last) for each in launches(plan, d)] for d in depths}


def rows_of(
    case: Case,
    samples: Samples,
    how: How,
    peers: Samples | None = None,
    alone: Mapping[str, Settled] | None = None,
) -> Iterator[Row]:
    """A row of each way; the price of a call from the ways that do the whole work, and that of a
    layer from those that hold the first ones. `peers` did the whole work, in the same rounds;
    `alone` too, not in these rounds."""
    by_name = {name: settled.samples for name, settled in (alone or {}).items()}
    calls = {name: len(ranges) for name, ranges in case.ways.items()}
    notes: dict[str, Any] = {"model": case.model, "tokens": case.tokens, **how.notes}
    for name, values in samples.items():
        what = name if name in case.less else f"depth {name}"
        row = Row.of(f"{case.name} {what}, {how.words}", values)
        row.notes = {**notes, "depth": name, "calls": calls[name], **case.notes.get(name, {})}
        if name in case.whole:
            others = {"stage": samples["stage"], **(peers or {}), **by_name}
            row.peers = {other: statistics.median(each) for other, each in others.items()}
            row.notes["speed_against_stage"] = round(ratio(samples["stage"], values), 4)
            row.notes["speed_of_all"] = round(ratio(values, samples["all"]), 4)
            if peers:
                speeds = {peer: ratio(each, values) for peer, each in peers.items()}
                speeds |= {peer: ratio_of_medians(each, values) for peer, each in by_name.items()}
                row.notes["speed_against"] = {p: round(speed, 4) for p, speed in speeds.items()}
            if alone:
                row.notes["host"] = {name: settled.note() for name, settled in alone.items()}
        if name in case.layers:
            row.notes["layers"] = case.layers[name]
        if name in case.halves:
            halves = samples[case.halves[name]]
            row.notes["halves"] = digest(halves) | {"calls": calls[case.halves[name]]}
            row.notes["speed_against_halves"] = round(ratio(halves, values), 4)
            row.notes["speed_against_whole"] = round(ratio(samples["half"], values), 4)
        yield row
    counts = {"call": {way: calls[way] for way in case.whole}, "layer": case.layers}
    for of, by_way in counts.items():
        if by_way:  # time = rest + price x count over some ways, in every round
            rounds = zip(*(samples[way] for way in by_way), strict=True)
            points = list(by_way.values())
            rests, prices = zip(*(fit(points, times) for times in rounds), strict=True)
            row = Row.of(f"{case.name} price of a {of}, {how.words}", prices)
            row.notes = {**notes, f"price_of_a_{of}": True, "rest": digest(rests)}
            row.notes["points"] = sorted(set(points))
            yield row
