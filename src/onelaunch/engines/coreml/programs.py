"""ML Programs compiled where the store has none: emitted, converted, saved.

A program's key is of what it states, of what builds it, and of its weights: after an update it is
another program. One of a stage without weights (attention) is the same for every layer and update.
What is kept is the package's folder as one file.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Literal

from onelaunch.compilation.cache import Store, program_key
from onelaunch.engines.coreml.backward import emit_backward
from onelaunch.engines.coreml.emit import Taps, emit, save
from onelaunch.engines.coreml.pack import Packed
from onelaunch.plan import Launch, Plan

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
SUFFIX = ".mlpackage"
WHAT = "an ML Program"
_SOURCES = ("emit.py", "backward.py", "norm.py", "pack.py")


@dataclass(frozen=True)
class Wanted:
    """A program: of a launch of a plan, forward or backward, with these taps."""

    plan: Plan
    launch: Launch
    taps: Taps = "none"
    direction: Direction = "forward"

    @property
    def weights(self) -> tuple[str, ...]:
        """The canonical names of those that are constants in it."""
        stages = self.plan.stages[self.launch.first : self.launch.last]
        return tuple(dict.fromkeys(name for stage in stages for name in stage.weights))

    def key(self, packed: Packed) -> str:
        """The key in a store of compiled programs; nothing is compiled."""
        plan, stages = self.plan, self.plan.stages[self.launch.first : self.launch.last]
        states = {
            "config": plan.config.to_dict(), "batch": plan.batch, "sequence": plan.sequence,
            "stages": [stage.code if self.weights else stage.kind for stage in stages],
            "taps": self.taps, "direction": self.direction,
        }  # fmt: skip
        program = json.dumps(states, sort_keys=True).encode("ascii") + _sources()
        weights = self._buffers(packed) if self.weights else None
        return program_key(program, {"coremltools": metadata.version("coremltools")}, weights)

    def _buffers(self, packed: Packed) -> Iterator[memoryview]:
        for name in self.weights:
            yield packed.unpacked(name).numpy().data.cast("B")


@cache
def _sources() -> bytes:
    here = Path(__file__).parent
    return b"\0".join((here / name).read_bytes() for name in _SOURCES)


class Programs:
    """Packages on disk for as long as this lives, compiled or taken from a store. Counts what it
    did: compilations and their seconds, hits."""

    def __init__(self, store: Store | None = None) -> None:
        self.compilations = self.hits = 0
        self.compile_seconds = 0.0
        self._store = store
        self._folder = tempfile.TemporaryDirectory(prefix="onelaunch-coreml-")

    def get(
        self, wanted: Wanted, packed: Packed, path: Path | None = None, keep: bool = True
    ) -> Path:
        """The path of the program, `path` unless None; the caller may remove it. One that is
        compiled here goes into the store where it is to `keep`."""
        path = path or Path(tempfile.mkdtemp(dir=self._folder.name)) / f"program{SUFFIX}"
        key = None if self._store is None else wanted.key(packed)
        if self._store is not None and key is not None and self._store.contains(key):
            kept = self._store.get(key)
            if kept is not None and _unfold(kept, path):
                self.hits += 1
                return path
            self._store.remove(key)
        start = time.perf_counter()
        make = emit if wanted.direction == "forward" else emit_backward
        save(make(wanted.plan, wanted.launch, packed, wanted.taps), path)
        seconds = time.perf_counter() - start
        self.compilations += 1
        self.compile_seconds += seconds
        if self._store is not None and key is not None and keep:
            about: dict[str, str | float] = {"what": WHAT, "seconds": seconds}
            self._store.put(key, _fold(path), about)
        return path


def _fold(path: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(path, arcname=".")
    return buffer.getvalue()


def _unfold(data: bytes, path: Path) -> bool:
    """Unfold a package. Returns whether it was one."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            archive.extractall(path, filter="data")
    except (tarfile.TarError, OSError):
        return False
    return True
