"""Compiles ahead of the timing, in several processes: each runs every contender once on some of the
shapes, so that the compilers' caches on disk are filled. Nothing is timed meanwhile.

Run as `python -m onelaunch.bench.studies.block_row.compile_ahead JSON`, of a device and shapes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

import torch

from onelaunch.bench.core.children import READY, together
from onelaunch.bench.core.record import Log
from onelaunch.bench.core.timing import synchronizer
from onelaunch.bench.peers.rms_norm import ours, peers
from onelaunch.bench.studies.block_row.norm_cell import Cell, make

MODULE = "onelaunch.bench.studies.block_row.compile_ahead"
PROCESSES = 14
SECONDS = 240.0


def precompile(device: torch.device, shapes: Sequence[tuple[int, int]], log: Log) -> None:
    """Fill the compilers' caches; a line says where that fails."""
    _set_inductor()
    workers = min(PROCESSES, len(shapes), os.cpu_count() or 1)
    log(f"compiling for {len(shapes)} shapes in {workers} processes")
    shares = (json.dumps([str(device), shapes[i::workers]]) for i in range(workers))
    try:
        ended = together([[sys.executable, "-m", MODULE, share] for share in shares],
                         timeout=SECONDS)  # fmt: skip
        reasons = [each.reason for each in ended if each.reason]
    except OSError as error:
        reasons = [str(error)]
    if reasons:
        log(f"compiling ahead failed ({reasons[0]}); it is done shape by shape")


def _set_inductor() -> None:
    """What a kernel is tuned to while others use the GPU must not be kept: compiled code is."""
    from torch._inductor import config

    config.autotune_local_cache = False
    config.compile_threads = 1


def warm(device: torch.device, rows: int, columns: int) -> None:
    """Run every contender once on one shape. What fails fails again, with a line, where it is
    timed."""
    cell = Cell(rows, columns, torch.bfloat16, device, sets=1)
    for contender in (*ours(), *peers(device, lambda line: None)):
        try:
            ((_, norm, backward),) = make([contender], lambda line: None)
            for pass_ in ("forward", "full"):
                cell.call(pass_, norm)(0)
            if contender.repeatable and backward:
                cell.call("backward", backward)(0)
        except Exception:
            continue
    synchronizer(device)()


def main() -> None:
    device, shapes = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    _set_inductor()
    print(READY, flush=True)
    sys.stdin.readline()
    for rows, columns in shapes:
        warm(torch.device(device), rows, columns)
    print("true")


if __name__ == "__main__":
    main()
