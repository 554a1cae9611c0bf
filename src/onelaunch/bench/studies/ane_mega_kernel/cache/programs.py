"""The programs that `bench cache` compiles or reads, here and in processes of their own.

Run as `python -m onelaunch.bench.studies.ane_mega_kernel.cache.programs FOLDER MODEL KIND SEED`, it
prints READY once all is imported, waits for a line, and prints one JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from onelaunch.bench.core.children import READY, together
from onelaunch.bench.core.compiled import compiled_program
from onelaunch.bench.core.weights import random_weights
from onelaunch.bench.studies.ane_mega_kernel.cache.views import ATTENTION, CPU
from onelaunch.compilation.cache import Store
from onelaunch.config import preset
from onelaunch.engines.coreml import coremltools
from onelaunch.engines.coreml.pack import Packed
from onelaunch.engines.coreml.programs import Programs, Wanted
from onelaunch.engines.cpu import program as cpu_program
from onelaunch.errors import RunFailed
from onelaunch.plan import launches, make_plan

MODEL = "stories15m"
SEQUENCE = 64
MODULE = "onelaunch.bench.studies.ane_mega_kernel.cache.programs"

Result = dict[str, Any]


class Case:
    """A program of one kind with the weights of one seed: a layer's, its attention's, which has no
    weights, or the CPU engine's."""

    def __init__(self, model: str, kind: str, seed: int) -> None:
        self.kind = kind
        if kind == CPU:
            self._key = cpu_program.key()
            return
        config = preset(model).with_(n_layers=1, vocab_size=64)
        plan = make_plan(config, 1, SEQUENCE, all_positions=True)
        depth, first = ("stage", "attention") if kind == ATTENTION else (1, "qkv")
        (launch,) = (e for e in launches(plan, depth) if plan.stages[e.first].kind == first)
        self.wanted, self.packed = (
            Wanted(plan, launch),
            Packed(config, random_weights(config, seed)),
        )

    @property
    def key(self) -> str:
        """Made anew each time: the hash of the weights is part of what a look-up takes."""
        return self._key if self.kind == CPU else self.wanted.key(self.packed)

    def get(self, folder: Path) -> Result:
        """Read from the store or compiled: seconds, and what the store and the compiler did."""
        store = Store(folder)
        if self.kind == CPU:
            kept = store.contains(self.key)
            start = time.perf_counter()
            compiled_program(lambda line: None, store)
            seconds = time.perf_counter() - start
            hits = int(kept and not store.damaged)
            compilations = 1 - hits
        else:
            programs = Programs(store)
            start = time.perf_counter()
            path = programs.get(self.wanted, self.packed)
            seconds = time.perf_counter() - start
            shutil.rmtree(path.parent)
            hits, compilations = programs.hits, programs.compilations
        return {
            "seconds": seconds, "hits": hits, "compilations": compilations,
            "damaged": store.damaged, "entries": len(store.entries()),
        }  # fmt: skip

    def contains(self, folder: Path) -> Result:
        """Whether it is kept, and the seconds of looking it up; nothing is read or compiled."""
        store = Store(folder)
        start = time.perf_counter()
        there = store.contains(self.key)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "there": there, "hits": 0, "compilations": 0}


def damage(folder: Path) -> None:
    """Change one byte in the middle of each entry."""
    for path in folder.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def in_processes(folder: Path, model: str, kind: str, seeds: list[int]) -> list[Result]:
    """`get` by a process for each seed, all at once. Raises RunFailed where one fails."""
    command = [sys.executable, "-m", MODULE, str(folder), model, kind]
    ended = together([[*command, str(seed)] for seed in seeds])
    for each in ended:
        if each.reason:
            raise RunFailed(f"a process with a store {each.reason}")
    return [each.output for each in ended]


def _main(folder: str, model: str, kind: str, seed: str) -> Result:
    case = Case(model, kind, int(seed))
    if kind != CPU:
        coremltools("bench cache")
    print(READY, flush=True)
    sys.stdin.readline()
    return case.get(Path(folder))


if __name__ == "__main__":
    print(json.dumps(_main(*sys.argv[1:])))
