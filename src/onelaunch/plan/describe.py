"""A plan as plain data, for `onelaunch inspect` and JSON files."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from onelaunch.plan.kinds import NO_LAYER
from onelaunch.plan.launches import launches
from onelaunch.plan.stages import Plan, Stage, add_totals


def describe(plan: Plan, depth: str | int | None = None) -> dict[str, Any]:
    """Return sizes, totals and a line per stage kind; with a fusion depth, its launches too.

    Layers whose stages cost the same share their lines: `layers` is then (first, last) and the
    figures are of one layer. Bytes and operations are integers. Raises BadInput for an invalid
    depth.
    """
    data: dict[str, Any] = {
        "batch": plan.batch,
        "sequence": plan.sequence,
        "past": plan.past,
        "weight_itemsize": plan.weight_itemsize,
        "activation_itemsize": plan.activation_itemsize,
        "totals": plan.totals._asdict(),
        "stages": _stage_lines(plan),
    }
    if depth is not None:
        data["launches"] = [
            {
                **launch._asdict(),
                **add_totals(plan.stages[launch.first : launch.last])._asdict(),
            }
            for launch in launches(plan, depth)
        ]
    return data


def _stage_lines(plan: Plan) -> list[dict[str, Any]]:
    layers = [tuple(group) for _, group in groupby(plan.stages, key=lambda stage: stage.layer)]
    lines: list[dict[str, Any]] = []
    for _, group in groupby(layers, key=_cost):
        equal = list(group)
        first, last = equal[0][0].layer, equal[-1][0].layer
        span = None if first == NO_LAYER else [first, last]
        lines += [
            {"kind": stage.kind, "layers": span, **stage.totals._asdict()} for stage in equal[0]
        ]
    return lines


def _cost(layer: tuple[Stage, ...]) -> tuple[object, ...]:
    return tuple((stage.kind, stage.totals) for stage in layer)
