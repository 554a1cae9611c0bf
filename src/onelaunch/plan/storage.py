"""Buffers that may share storage, because no moment needs both.

This holds where every stage ends before the next begins. A program that lets neighbouring stages
overlap gives each buffer storage of its own.
"""

from __future__ import annotations

from typing import NamedTuple

from onelaunch.plan.check import PlanError
from onelaunch.plan.stages import Plan

# Bytes: two lines of a CPU's cache, one of a GPU's.
ALIGNMENT = 128

Interval = tuple[int, int]
"""First and last stage, both included, that need a buffer's content."""


class Storage(NamedTuple):
    """Where each buffer begins, in bytes, in one piece of storage of `nbytes` bytes."""

    offsets: dict[str, int]
    nbytes: int


def lifetimes(plan: Plan) -> dict[str, list[Interval]]:
    """For each scratch or output buffer, from each write to the last read of what it wrote.

    An output's last version stays to the end. Inputs and caches are the caller's and are left out.
    """
    kept = {buffer.name: buffer.kept for buffer in plan.buffers if not buffer.given}
    lives: dict[str, list[Interval]] = {name: [] for name in kept}
    for index, stage in enumerate(plan.stages):
        for access in stage.reads:
            if lives.get(access.buffer):
                lives[access.buffer][-1] = (lives[access.buffer][-1][0], index)
        for access in stage.writes:
            if access.buffer in lives:
                lives[access.buffer].append((index, index))
    for name, spans in lives.items():
        if kept[name] and spans:
            spans[-1] = (spans[-1][0], len(plan.stages) - 1)
    return lives


def assign_storage(plan: Plan, alignment: int = ALIGNMENT) -> Storage:
    """Offsets, multiples of `alignment`, for every scratch and output buffer.

    First fit, the largest first: each goes to the lowest place that is free whenever it lives.
    """
    lives = lifetimes(plan)
    sizes = {buffer.name: buffer.nbytes for buffer in plan.buffers if buffer.name in lives}
    offsets: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        others = [other for other in offsets if _meet(lives[name], lives[other])]
        offset = 0
        for other in sorted(others, key=lambda other: offsets[other]):
            if offset + sizes[name] <= offsets[other]:
                break
            end = offsets[other] + sizes[other]
            offset = max(offset, -(-end // alignment) * alignment)
        offsets[name] = offset
    nbytes = max((offsets[name] + sizes[name] for name in offsets), default=0)
    return Storage(offsets, nbytes)


def check_storage(plan: Plan, storage: Storage) -> None:
    """Raise PlanError where a buffer has no place, lies outside, or on another while both live."""
    lives = lifetimes(plan)
    spans: dict[str, Interval] = {}
    for name in lives:
        if name not in storage.offsets:
            raise PlanError(f"buffer {name} has no storage")
        first = storage.offsets[name]
        spans[name] = (first, first + plan.buffer(name).nbytes - 1)
        if first < 0 or spans[name][1] >= storage.nbytes:
            raise PlanError(f"buffer {name} lies outside the {storage.nbytes} bytes of storage")
    names = sorted(spans)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            if _meet([spans[name]], [spans[other]]) and _meet(lives[name], lives[other]):
                raise PlanError(f"buffers {name} and {other} share storage while both are needed")


def _meet(some: list[Interval], others: list[Interval]) -> bool:
    return any(a[0] <= b[1] and b[0] <= a[1] for a in some for b in others)
