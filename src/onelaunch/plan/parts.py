"""Layers of which one block alone is run, to be looked at by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from onelaunch.plan.kinds import ATTENTION_BLOCK, FFN_BLOCK
from onelaunch.plan.stages import Access, Plan

Part = Literal["whole", "attention", "ffn"]
_BLOCKS = {"attention": ATTENTION_BLOCK, "ffn": FFN_BLOCK}


def part_of(plan: Plan, part: Part) -> Plan:
    """A model's plan as it is, or embed and one block of every layer, with its norm and residual:
    what comes out is x. A stage reads there what the stages before it have left.

    A part is no whole model's plan: `check` refuses it. Its buffers are still the model's.
    """
    if part == "whole":
        return plan
    versions = {buffer.name: 0 for buffer in plan.buffers}
    stages = []
    for stage in plan.stages:
        if stage.kind != "embed" and stage.kind not in _BLOCKS[part]:
            continue
        reads = tuple(_of_version(access, versions) for access in stage.reads)
        for access in stage.writes:
            versions[access.buffer] += 1
        writes = tuple(_of_version(access, versions) for access in stage.writes)
        stages.append(replace(stage, reads=reads, writes=writes))
    return replace(plan, stages=tuple(stages))


def _of_version(access: Access, versions: dict[str, int]) -> Access:
    return access._replace(version=versions[access.buffer])
