"""Plans of one block per layer (attention or FFN alone), to measure that block by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from onelaunch.plan.kinds import ATTENTION_BLOCK, FFN_BLOCK
from onelaunch.plan.stages import Access, Plan

Part = Literal["whole", "attention", "ffn"]
_BLOCKS = {"attention": ATTENTION_BLOCK, "ffn": FFN_BLOCK}


def part_of(plan: Plan, part: Part) -> Plan:
    """Return the whole plan, or embed and one block of every layer, with its norm and residual; the
    result is then x. A stage reads what the remaining stages before it have written.

    `check` refuses such a part: it is not the plan of a whole model. Its buffers are the model's.
    """
    if part == "whole":
        return plan
    versions = {buffer.name: 0 for buffer in plan.buffers}
    stages = []
    for stage in plan.stages:
        if stage.kind != "embed" and stage.kind not in _BLOCKS[part]:
            continue
        reads = tuple(_at_version(access, versions) for access in stage.reads)
        for access in stage.writes:
            versions[access.buffer] += 1
        writes = tuple(_at_version(access, versions) for access in stage.writes)
        stages.append(replace(stage, reads=reads, writes=writes))
    return replace(plan, stages=tuple(stages))


def _at_version(access: Access, versions: dict[str, int]) -> Access:
    return access._replace(version=versions[access.buffer])
