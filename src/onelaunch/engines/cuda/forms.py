"""A form: how many launches a forward takes, with which tiles; and the forward that it binds to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onelaunch.config import ModelConfig
from onelaunch.engines.cuda.blocking import Blocking
from onelaunch.engines.cuda.pack import PackedModel
from onelaunch.engines.cuda.program import TIMEOUT_NS, BoundForward, FusedForward, Shape

STAGED = "staged"
"""The name of one kernel per stage among the forms; the others are fusion depths."""


@dataclass(frozen=True)
class Form:
    """name: STAGED or a fusion depth; blockings: by kind of stage, what is left out is the rule's;
    programs: CTAs of a launch that holds several stages, None for one kernel per stage."""

    name: str
    blockings: Mapping[str, Blocking]
    programs: int | None = None


def bind(
    config: ModelConfig,
    packed: PackedModel,
    shape: Shape,
    form: Form,
    timeout_ns: int = TIMEOUT_NS,
) -> BoundForward:
    """The forward of one shape in a form. `timeout_ns`: how long a wait in a kernel may take."""
    if form.name == STAGED:
        return BoundForward(config, packed, shape, form.blockings)
    return FusedForward(config, packed, shape, form.blockings, form.name, form.programs, timeout_ns)
