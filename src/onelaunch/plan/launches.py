"""Group the stages of a plan into launches, by fusion depth.

| depth | launches |
|---|---|
| stage | every stage alone |
| half | each layer's attention block and its FFN block; embed; head with sample |
| k | k layers each (fewer in the last launch); embed; head with sample |
| all | everything in one launch, with sample if the plan has it |

`half` is two launches per layer, besides embed and head.
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
"""An int is the number of layers per launch."""


class Launch(NamedTuple):
    """The stages `first` to `last`, `last` excluded."""

    name: str
    first: int
    last: int


def launches(plan: Plan, depth: str | int) -> tuple[Launch, ...]:
    """Return the launches of a plan at a fusion depth, in order. Raises as `parse_depth`."""
    parsed = parse_depth(depth, plan.config.n_layers)
    if parsed == "all":
        return (Launch("all", 0, len(plan.stages)),)
    result: list[Launch] = []
    first = 0
    for _, group in groupby(plan.stages, key=lambda stage: _launch_key(stage, parsed)):
        stages = tuple(group)
        result.append(Launch(_name(stages, parsed), first, first + len(stages)))
        first += len(stages)
    return tuple(result)


def parse_depth(text: str | int, n_layers: int) -> Depth:
    """Parse a fusion depth, a name or a number, for a model of `n_layers` layers.

    Raises BadInput for anything else, and for more layers than the model has: a depth of 8 that ran
    as 6 would be recorded as 8. An engine replaces "auto" before the call.
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
    """Return the depths worth comparing, from most launches to one: powers of two, then all layers
    without and with embed and head."""
    powers = [1 << i for i in range(n_layers.bit_length()) if 1 << i < n_layers]
    return ("stage", "half", *powers, n_layers, "all")


def _launch_key(stage: Stage, depth: Depth) -> Hashable:
    """Consecutive stages with the same key share a launch."""
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
