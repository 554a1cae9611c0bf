"""Which stages one launch holds: the fusion depth.

| depth | launches |
|---|---|
| stage | every stage alone |
| half | each layer's attention block and its FFN block; embed; head with sample |
| k | k layers, the last launch what is left of them; embed; head with sample |
| all | everything in one, sample included where the plan has it |

`half` is two launches a layer; embed and head count beside them.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from itertools import groupby
from typing import Literal, NamedTuple

from onelaunch.errors import BadInput
from onelaunch.plan.kinds import ATTENTION_BLOCK, NO_LAYER
from onelaunch.plan.stages import Plan, Stage

Depth = Literal["stage", "half", "all"] | int
"""A whole number is layers for each launch."""


class Launch(NamedTuple):
    """The stages from `first` up to, not including, `last`."""

    name: str
    first: int
    last: int


def launches(plan: Plan, depth: str | int) -> tuple[Launch, ...]:
    """The launches of a plan at a fusion depth, in order. Raises BadInput as `parse_depth` does."""
    parsed = parse_depth(depth, plan.config.n_layers)
    if parsed == "all":
        return (Launch("all", 0, len(plan.stages)),)
    found: list[Launch] = []
    first = 0
    for _, group in groupby(plan.stages, key=lambda stage: _together(stage, parsed)):
        stages = tuple(group)
        found.append(Launch(_name(stages, parsed), first, first + len(stages)))
        first += len(stages)
    return tuple(found)


def parse_depth(text: str | int, n_layers: int) -> Depth:
    """The fusion depth of a name or number, for a model of so many layers.

    Raises BadInput for what is none, and for more layers than there are: a depth of 8 that ran as 6
    would be reported as what it was not. "auto" is for an engine to replace before it comes here.
    """
    if text in ("stage", "half", "all"):
        return text  # type: ignore[return-value]
    layers = 0
    if isinstance(text, int) and not isinstance(text, bool):
        layers = text
    elif isinstance(text, str) and re.fullmatch(r"[1-9][0-9]{0,8}", text):
        layers = int(text)
    if not 1 <= layers <= n_layers:
        numbers = "1 layer" if n_layers == 1 else f"a number of layers from 1 to {n_layers}"
        raise BadInput(f"fusion_depth={text!r}: must be stage, half, all or {numbers}")
    return layers


def every_depth(n_layers: int) -> tuple[Depth, ...]:
    """The depths worth comparing, from most launches to one: layers in powers of two, and all
    layers without and with embed and head."""
    powers = [1 << i for i in range(n_layers.bit_length()) if 1 << i < n_layers]
    return ("stage", "half", *powers, n_layers, "all")


def _together(stage: Stage, depth: Depth) -> Hashable:
    """Neighbours with the same answer share a launch."""
    if depth == "stage":
        return stage.code
    if stage.layer == NO_LAYER:
        return "embed" if stage.kind == "embed" else "head"
    if depth == "half":
        return stage.layer, stage.kind in ATTENTION_BLOCK
    assert isinstance(depth, int)
    return stage.layer // depth


def _name(stages: tuple[Stage, ...], depth: Depth) -> str:
    first, last = stages[0], stages[-1]
    if depth == "stage":
        return first.label
    if first.layer == NO_LAYER:
        return " and ".join(stage.kind for stage in stages)
    if depth == "half":
        block = "attention" if first.kind in ATTENTION_BLOCK else "FFN"
        return f"layer {first.layer} {block} block"
    if first.layer == last.layer:
        return f"layer {first.layer}"
    return f"layers {first.layer} to {last.layer}"
