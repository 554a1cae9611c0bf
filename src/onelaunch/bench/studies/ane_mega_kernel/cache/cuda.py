"""cache on a GPU: Triton's store of the CUDA engine's kernels, one kernel per stage.

A kernel has no weights in it: they are its arguments. So other weights stand for an update, and the
answer differs from the study's. `ours` is seconds until the first logits of an engine are there;
its process's start, imports and opening the device are not counted. Logits whose bits differ from
the first engine's are wrong.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onelaunch.bench.core import triton_store
from onelaunch.bench.core.children import together
from onelaunch.bench.core.record import Row
from onelaunch.bench.studies.ane_mega_kernel.cache import views
from onelaunch.bench.studies.ane_mega_kernel.cache.programs import MODEL, Result
from onelaunch.bench.studies.ane_mega_kernel.cache.views import CUT, CUT_LAUNCHER, HIT, MISS
from onelaunch.errors import RunFailed

CHILD = (sys.executable, "-m", "onelaunch.bench.studies.ane_mega_kernel.cache.cuda_child")
TIMEOUT_SECONDS = 120.0
REPEATS = 2
MOST_APART = 0.05
"""Of logits in bfloat16 from PyTorch's."""
DAMAGES: Mapping[str, Callable[[Path], list[Path]]] = {
    CUT: triton_store.binaries, CUT_LAUNCHER: triton_store.launchers,
}  # fmt: skip
"""The files of a store, the first of which is cut in half."""


@dataclass(frozen=True)
class _Kept:
    """The results of the first process: how many kernels a forward has, the digest of each seed's
    logits, and how far the first's are from PyTorch's."""

    kernels: int
    digests: Mapping[int, str]
    apart: float


def run(device: str, quick: bool) -> Iterator[Row]:
    """Every case; yields rows. Raises RunFailed where an engine gives wrong logits, or none, with
    nothing damaged and nothing kept."""
    with tempfile.TemporaryDirectory(prefix="onelaunch-cache-") as name:
        yield from _rows(Path(name), device, quick)


def _rows(folder: Path, device: str, quick: bool) -> Iterator[Row]:
    store = folder / "kept"
    (first,) = _processes([store], device, [0, 0, 1])
    kept = _read(first)
    cold = [first[0]] + ([] if quick else _processes([folder / "empty"], device, [0])[0])
    yield _row(kept, views.EMPTY, MISS, cold)
    yield _row(kept, views.SAME, HIT, [first[1]], in_memory=True)
    yield _row(kept, views.UPDATED, HIT, [first[2]], seed=1, in_memory=True)
    others = [_processes([store], device, [0])[0][0] for _ in range(1 if quick else REPEATS)]
    yield _row(kept, views.OTHER, HIT, others)
    (updated,) = _processes([store], device, [1])
    yield _row(kept, views.OTHER_UPDATED, HIT, updated, seed=1)
    if not quick:
        yield _at_once(kept, folder / "at once", device)
    for what, files in DAMAGES.items():
        if files(store):
            yield _damaged(kept, store, device, what)


def _processes(folders: Sequence[Path], device: str, seeds: Sequence[int]) -> list[list[Result]]:
    """The results of a process for each folder, by seed; of one that died, the reason."""
    command = [*CHILD, MODEL, device, *map(str, seeds)]
    environments = [triton_store.environment(each) for each in folders]
    results = []
    for ended in together([command] * len(folders), environments, TIMEOUT_SECONDS):
        died = {
            "seconds": ended.seconds, "compilations": 0, "hits": 0, "digest": "", "apart": None,
            "error": f"the process {ended.reason}",
        }  # fmt: skip
        results.append(ended.output or [died] * len(seeds))
    return results


def _read(first: list[Result]) -> _Kept:
    """Read the results of the first process. Raises RunFailed where others could not be compared
    with it."""
    for each in first:
        if each["error"]:
            raise RunFailed(f"nothing kept, nothing damaged: {each['error']}")
        if each["apart"] is None or each["apart"] > MOST_APART:
            raise RunFailed(f"nothing damaged, and {_logits(each)}")
    if not first[0]["compilations"]:
        raise RunFailed("nothing kept, and Triton compiled nothing")
    digests = {0: first[0]["digest"], 1: first[2]["digest"]}
    return _Kept(first[0]["compilations"], digests, first[0]["apart"])


def _row(
    kept: _Kept,
    what: str,
    expected: str,
    results: list[Result],
    seed: int = 0,
    in_memory: bool = False,
) -> Row:
    """`in_memory`: what is a hit there is not read again."""
    n, read = len(results), 0 if in_memory else kept.kernels
    wanted = (read, 0) if expected == HIT else (0, kept.kernels)
    errors = [each["error"] for each in results if each["error"]]
    wrong = sum(not each["error"] and each["digest"] != kept.digests[seed] for each in results)
    hits, compilations = (sum(each[key] for each in results) for key in ("hits", "compilations"))
    found = f"{hits} read, {compilations} compiled"
    found += f", {wrong} of {n} with wrong logits" if wrong else ""
    found += f", {len(errors)} of {n} failed" if errors else ""
    row = Row.of(f"{views.NAMES[views.KERNELS]}, {what}", [each["seconds"] for each in results])
    row.notes = {
        "kind": views.KERNELS, "what": what, "expected": expected, "found": found,
        "as_expected": wrong == len(errors) == 0
        and all((each["hits"], each["compilations"]) == wanted for each in results),
        "compilations": compilations, "kernels": kept.kernels, "errors": errors,
        "wrong": wrong, "failed": len(errors),
    }  # fmt: skip
    return row


def _at_once(kept: _Kept, folder: Path, device: str) -> Row:
    """Two processes do not wait for each other: both may compile. A third finds every kernel."""
    results = [each[0] for each in _processes([folder, folder], device, [0])]
    there = triton_store.entries(folder)
    row = _row(kept, views.AT_ONCE, MISS, results)
    after = _row(kept, views.OTHER, HIT, _processes([folder], device, [0])[0])
    right = row.notes["wrong"] == row.notes["failed"] == 0
    row.notes |= {
        "expected": "whole entries",
        "found": f"{row.notes['found']}; {there} kept; a third process: {after.notes['found']}",
        "as_expected": right and there == kept.kernels and after.notes["as_expected"],
    }
    return row


def _damaged(kept: _Kept, store: Path, device: str, what: str) -> Row:
    """The first of some files cut in half in a copy of a store. A file with other code is not
    tried: undetected, that may write anywhere, and never end."""
    with tempfile.TemporaryDirectory(dir=store.parent) as name:
        copy = triton_store.copied(store, Path(name) / "copy")
        path = DAMAGES[what](copy)[0]
        triton_store.cut(path)
        content = path.read_bytes()
        ((result,),) = _processes([copy], device, [0])
        still = path.is_file() and path.read_bytes() == content
    row = _row(kept, what, MISS, [result])
    anew = not still and result["compilations"] == (what == CUT)
    outcome = f"{_logits(result)}, undamaged {kept.apart:.2%}"
    if result["error"]:
        outcome = result["error"]
    elif result["digest"] == kept.digests[0]:
        outcome = "the same logits"
    row.notes |= {
        "found": f"{row.notes['found']}; {'damaged still' if still else 'whole again'}",
        "as_expected": anew and row.notes["wrong"] == row.notes["failed"] == 0,
        "outcomes": [f"{path.stem}, {len(content):,} bytes: {outcome}"],
    }
    return row


def _logits(result: Result) -> str:
    apart = result["apart"]
    return "logits that are no numbers" if apart is None else f"logits {apart:.2%} from PyTorch's"
