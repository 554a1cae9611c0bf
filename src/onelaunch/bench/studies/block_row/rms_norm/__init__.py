"""rms-norm: our RMSNorm in all its forms against every peer, shape by shape.

On a GPU, in bfloat16: kernels only (`4096x64 full gpu`), host-inclusive (`4096x64 full host`), and
peak memory (`4096x64 memory`). On a CPU, in float32: host-inclusive times of the plain form against
PyTorch's; there is no kernel there to be measured.

No contender is timed on a wrong result: each one's is first compared with float64.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from onelaunch.bench.core.record import Log, Row, percentiles, rounded
from onelaunch.bench.core.timing import copy_bandwidth
from onelaunch.bench.peers.rms_norm import (
    Contender,
    has_kernel,
    ours,
    ours_in_place,
    peers,
    torch_may_run_quack,
)
from onelaunch.bench.studies.block_row.compile_ahead import precompile
from onelaunch.bench.studies.block_row.findings import findings
from onelaunch.bench.studies.block_row.norm_cell import (
    PASSES,
    Cell,
    Made,
    bytes_moved,
    each_reason_once,
    host_times,
    kernel_times,
    make,
    peak_bytes,
)
from onelaunch.bench.studies.block_row.rms_norm.views import PUBLISHED, draw, table
from onelaunch.compilation.background import in_a_line
from onelaunch.errors import RunFailed
from onelaunch.operators.devices import multiprocessors
from onelaunch.operators.rms_norm.plan import backward_plan, forward_plan

__all__ = ["UNIT", "draw", "findings", "run", "table"]

UNIT = "us"

Shape = tuple[int, int]

ROWS = (4096, 8192, 16384, 32768)
COLUMNS = (64, 128, 256, 512, 768)
LARGE: tuple[Shape, ...] = (
    (131072, 64),
    (131072, 128),
    (131072, 512),
    (8192, 1024),
    (8192, 2048),
    (8192, 4096),
    (8192, 8192),
    (32768, 4096),
)
GPU_SHAPES: tuple[Shape, ...] = (*((r, c) for c in COLUMNS for r in ROWS), *LARGE)
GPU_QUICK: tuple[Shape, ...] = ((4096, 64), (32768, 128), (16384, 512), (8192, 4096))
HOST_SHAPES: tuple[Shape, ...] = tuple((4096, c) for c in (*COLUMNS, 1024))
MEMORY_SHAPES: tuple[Shape, ...] = (*HOST_SHAPES, (32768, 512), (131072, 512), (8192, 8192))
CPU_SHAPES: tuple[Shape, ...] = tuple((r, c) for c in (64, 256, 768) for r in (256, 1024, 4096))
CPU_QUICK: tuple[Shape, ...] = ((256, 64), (256, 256), (4096, 64), (4096, 256))

SAMPLES = 15
HOST_CALLS, HOST_SAMPLES = 1000, 7
CPU_SAMPLE_US = 20_000.0
# Two of Liger within this are one: which of them is named would be chance.
ALIKE = 1.01


def run(device: str, quick: bool, log: Log) -> Iterator[Row]:
    """Time every shape; yields rows, microseconds a call unless a row names another unit. Raises
    RunFailed at the end where a time of ours is missing."""
    place = torch.device(device)
    on_gpu = has_kernel(place, log)
    log = each_reason_once(log)
    contenders = [*ours(), *peers(place, log)]
    yield from (on_a_gpu if on_gpu else on_a_cpu)(place, contenders, quick, log)


def on_a_gpu(
    device: torch.device, contenders: Sequence[Contender], quick: bool, log: Log
) -> Iterator[Row]:
    shapes = GPU_QUICK if quick else GPU_SHAPES
    host_shapes = [s for s in HOST_SHAPES if s in shapes] if quick else HOST_SHAPES
    precompile(device, sorted({*shapes, *host_shapes}, reverse=True), log)
    bandwidth = copy_bandwidth(device)
    log(f"copy on the device: {bandwidth:,.0f} GB/s, read and written")
    notes: dict[str, object] = {
        "dtype": "bfloat16",
        "copy_GBps": round(bandwidth, 1),
        "torch_may_run_quack": torch_may_run_quack(),
    }
    if notes["torch_may_run_quack"]:
        log("PyTorch may run QuACK's kernels as its own; TORCH_DISABLE_NATIVE_JIT=1 forbids it")
    shaper = Shaper(device, torch.bfloat16, contenders, log, notes, bandwidth)
    stream = torch.cuda.Stream(device)
    every = list(dict.fromkeys((*shapes, *host_shapes)))
    for done, shape in enumerate(every, start=1):
        log(f"[{done}/{len(every)}] {shape[0]}x{shape[1]}")
        with torch.cuda.stream(stream):
            rows = shaper.rows(
                shape,
                kernels=shape in shapes,
                host_calls=HOST_CALLS if shape in host_shapes else 0,
                memory=shape in MEMORY_SHAPES,
            )
        torch.cuda.empty_cache()
        yield from rows
    shaper.check()


def on_a_cpu(
    device: torch.device, contenders: Sequence[Contender], quick: bool, log: Log
) -> Iterator[Row]:
    # The forms differ in their kernels alone.
    contenders = [c for c in contenders if c.name == "ours" or not c.form]
    notes: dict[str, object] = {
        "dtype": "float32",
        "kernel": "none: the plain form",
        "threads": torch.get_num_threads(),
    }
    shaper = Shaper(device, torch.float32, contenders, log, notes)
    for shape in CPU_QUICK if quick else CPU_SHAPES:
        estimate_us = 5.0 + math.prod(shape) / 200
        yield from shaper.rows(shape, host_calls=max(3, round(CPU_SAMPLE_US / estimate_us)))
    shaper.check()


@dataclass
class Shaper:
    """Makes the rows of a shape. `bandwidth`: GB/s of a copy, None where no floor is known.
    `failed` collects the cases in which ours could not be timed."""

    device: torch.device
    dtype: torch.dtype
    contenders: Sequence[Contender]
    log: Log
    notes: dict[str, object]
    bandwidth: float | None = None
    failed: list[str] = field(default_factory=list)

    def rows(
        self, shape: Shape, kernels: bool = False, host_calls: int = 0, memory: bool = False
    ) -> list[Row]:
        """Kernels only; host included, by so many calls a sample, 0 for none; peak memory."""
        cell = Cell(*shape, self.dtype, self.device)
        made = make(self.contenders, self.log)
        rows: list[Row] = []
        if kernels:
            timed = self._timed(
                cell, "gpu", lambda pass_: kernel_times(cell, pass_, made, SAMPLES, self.log)
            )
            for row in timed:
                self._add_floor(row, cell)
                row.notes |= {"plan": _plans(cell), **against_liger_row(row, *shape)}
            rows += timed
        if host_calls:
            # a sibling's host path is another's
            alone = [each for each in made if not each.contender.sibling]
            timed = self._timed(
                cell,
                "host",
                lambda pass_: host_times(cell, pass_, alone, host_calls, HOST_SAMPLES, self.log),
            )
            for row in timed:
                row.notes["calls_per_sample"] = host_calls
            rows += timed
        if memory:
            rows += self._memory(cell, made)
        return rows

    def check(self) -> None:
        """Raise RunFailed where ours could not be timed."""
        if self.failed:
            raise RunFailed(f"ours could not be timed: {', '.join(self.failed)}")

    def _timed(
        self, cell: Cell, kind: str, times: Callable[[str], dict[str, list[float]]]
    ) -> list[Row]:
        """A row for each pass, and one line of them all."""
        rows, words = [], []
        for pass_ in PASSES:
            case, by_name = f"{cell.shape} {pass_} {kind}", times(pass_)
            torch.cuda.empty_cache()  # a graph's memory is its own until this
            if "ours" not in by_name:
                self.failed.append(case)
                continue
            row = row_of(case, by_name, {c.name for c in self.contenders if c.form})
            row.notes |= self.notes
            words.append(f"{pass_} {row.ours:,.2f} us")
            if "best_peer" in row.notes:
                words[-1] += f" ({row.notes['ratio']:.2f} of {row.notes['best_peer']}'s time)"
            rows.append(row)
        self.log(f"{cell.shape} {kind}: {'; '.join(words) or 'nothing timed'}")
        return rows

    def _add_floor(self, row: Row, cell: Cell) -> None:
        if self.bandwidth is not None:
            pass_ = row.case.split()[1]
            moved = bytes_moved(cell.rows, cell.columns, pass_, cell.dtype.itemsize)
            row.floor = rounded(moved / self.bandwidth / 1e3, 4)
            row.notes["copy_share"] = round(row.floor / row.ours, 4)
            row.notes["in_cache"] = cell.in_cache(pass_)

    def _memory(self, cell: Cell, made: Sequence[Made]) -> list[Row]:
        """Peak extra bytes of one forward and backward pass. The floor is y, dX and dW; `planned`
        is that and the plan's partials."""
        peaks: dict[str, float] = {}
        for contender, norm, _ in (*made, *make([ours_in_place()], self.log)):
            try:
                peaks[contender.name] = peak_bytes(cell, norm)
            except Exception as error:
                self.log(f"  {cell.shape} memory without {contender.name}: {in_a_line(error)}")
        case = f"{cell.shape} memory"
        if "ours" not in peaks:
            self.failed.append(case)
            return []
        forms = {ours_in_place().name, *(c.name for c in self.contenders if c.form)}
        size = self.dtype.itemsize
        plan = backward_plan(cell.rows, cell.columns, size, multiprocessors(self.device))
        outputs = (2 * cell.rows + 1) * cell.columns * size
        planned = outputs + 4 * plan.partials * cell.columns
        self.log(
            f"{case}: {peaks['ours']:,.0f} bytes more at the height; outputs and gradients are "
            f"{outputs:,.0f}, with partials {planned:,.0f}"
        )
        notes = {
            **self.notes,
            "unit": "bytes",
            "planned": planned,
            "forms": {n: p for n, p in peaks.items() if n in forms and n != "ours"},
            "partials": plan.partials,
        }
        of_peers = {name: peak for name, peak in peaks.items() if name not in forms}
        return [Row(case, peaks["ours"], peers=of_peers, floor=outputs, notes=notes)]


def row_of(case: str, times: Mapping[str, Sequence[float]], forms: set[str]) -> Row:
    """The record's row of one case: ours by automatic choice, our other forms, the peers. `ratio`
    is to the best peer's time; a variant of Liger that is no better than Liger is not named."""
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    row = Row.of(case, times["ours"])
    row.peers = {name: value for name, value in medians.items() if name not in forms}
    others = {n: round(v, 4) for n, v in medians.items() if n in forms and n != "ours"}
    if others:
        row.notes["forms"] = others
    if row.peers:
        best = min(row.peers, key=row.peers.__getitem__)
        row.notes["ratio"] = round(row.ours / row.peers[best], 4)
        released = best.partition(" ")[0]
        if row.peers.get(released, math.inf) <= ALIKE * row.peers[best]:
            best = released
        row.notes["best_peer"] = best
        row.notes["peers_spread"] = {
            name: [rounded(v, 4) for v in percentiles(times[name])] for name in row.peers
        }
    return row


def against_liger_row(row: Row, rows: int, columns: int) -> dict[str, float]:
    """The source's own measure: by how many percent ours, and Liger by the source's rule, takes
    less time than Liger's row path; and what the source measured on its device."""
    base = row.peers.get("liger row")
    if not base:
        return {}
    percents = {"percent_of_liger_row": 100 * (row.ours / base - 1)}
    if "liger source" in row.peers:
        percents["liger_source_percent"] = 100 * (row.peers["liger source"] / base - 1)
    pass_ = row.case.split()[1]
    published = PUBLISHED.get(pass_, {}).get((rows, columns))
    if published is not None:
        percents["published_percent"] = published
    return {name: round(value, 1) for name, value in percents.items()}


def _plans(cell: Cell) -> dict[str, str]:
    facts = (cell.rows, cell.columns, cell.dtype.itemsize, multiprocessors(cell.device))
    return {
        name: f"{p.kernel}, {p.rows_per_tile} rows a tile, {p.warps} warps, grid {p.grid}"
        for name, p in (("forward", forward_plan(*facts)), ("backward", backward_plan(*facts)))
    }
