"""rms-norm: our RMSNorm in all its forms against every peer, shape by shape.

On a GPU, in bfloat16: kernels only (`4096x64 full gpu`), host-inclusive (`4096x64 full host`), and
peak memory (`4096x64 memory`). On a CPU, in float32: host-inclusive times of the plain form against
PyTorch's; there is no kernel there to be measured.

Nobody is timed on a wrong result: each contender's is first held against float64.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

import torch

from onelaunch.bench.core.record import Row, Say, percentiles
from onelaunch.bench.core.timing import copy_bandwidth, synchronizer
from onelaunch.bench.peers.rms_norm import (
    Contender,
    Norm,
    has_kernel,
    ours,
    ours_in_place,
    peers,
    torch_may_run_quack,
)
from onelaunch.bench.studies.block_row import findings as rms_norm_findings
from onelaunch.bench.studies.block_row.norm_cell import (
    PASSES,
    Cell,
    bytes_moved,
    each_reason_once,
    host_times,
    kernel_times,
    peak_bytes,
)
from onelaunch.bench.studies.block_row.rms_norm import views as rms_norm_views
from onelaunch.errors import RunFailed
from onelaunch.operators.devices import multiprocessors
from onelaunch.operators.rms_norm.plan import backward_plan, forward_plan

UNIT = "us"
table, draw = rms_norm_views.table, rms_norm_views.draw
findings = rms_norm_findings.findings

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
PRECOMPILERS = 14
PRECOMPILE_SECONDS = 240.0
# Two of Liger within this are one: which of them is named would be chance.
ALIKE = 1.01


@dataclass
class _Session:
    """What all shapes of one run share; `failed` collects what of ours could not be timed."""

    device: torch.device
    dtype: torch.dtype
    contenders: Sequence[Contender]
    say: Say
    notes: dict[str, object]
    bandwidth: float | None = None
    failed: list[str] = field(default_factory=list)

    def rows_of(
        self, cell: Cell, kind: str, times: dict[str, dict[str, list[float]]]
    ) -> Iterator[Row]:
        """The rows of one shape, one a pass; says the shape's line."""
        words = []
        for pass_, by_name in times.items():
            case = f"{cell.shape} {pass_} {kind}"
            if "ours" not in by_name:
                self.failed.append(case)
                continue
            row = row_of(case, by_name, {c.name for c in self.contenders if c.form})
            if kind == "gpu":
                self._add_floor(row, cell, pass_)
            row.notes |= self.notes
            words.append(_in_words(row, pass_))
            yield row
        self.say(f"{cell.shape} {kind}: {'; '.join(words) or 'nothing timed'}")

    def _add_floor(self, row: Row, cell: Cell, pass_: str) -> None:
        if self.bandwidth is None:
            return
        moved = bytes_moved(cell.rows, cell.columns, pass_, cell.dtype.itemsize)
        row.floor = float(f"{moved / self.bandwidth / 1e3:.4g}")
        row.notes["copy_share"] = round(row.floor / row.ours, 4)
        row.notes["in_cache"] = cell.in_cache(pass_)


def run(device: str, quick: bool, say: Say) -> Iterator[Row]:
    """Time every shape; yields rows, microseconds a call unless a row names another unit."""
    place = torch.device(device)
    on_gpu = has_kernel(place, say)
    say = each_reason_once(say)
    contenders = [*ours(), *peers(place, say)]
    if on_gpu:
        yield from _on_gpu(place, contenders, quick, say)
    else:
        yield from _on_cpu(place, contenders, quick, say)


def _on_gpu(
    device: torch.device, contenders: Sequence[Contender], quick: bool, say: Say
) -> Iterator[Row]:
    shapes = GPU_QUICK if quick else GPU_SHAPES
    host_shapes = [s for s in HOST_SHAPES if s in shapes] if quick else HOST_SHAPES
    precompile(device, sorted({*shapes, *host_shapes}, reverse=True), say)
    bandwidth = copy_bandwidth(device)
    say(f"copy on the device: {bandwidth:,.0f} GB/s, read and written")
    notes: dict[str, object] = {
        "dtype": "bfloat16",
        "copy_GBps": round(bandwidth, 1),
        "torch_may_run_quack": torch_may_run_quack(),
    }
    if notes["torch_may_run_quack"]:
        say("PyTorch may run QuACK's kernels as its own; TORCH_DISABLE_NATIVE_JIT=1 forbids it")
    session = _Session(device, torch.bfloat16, contenders, say, notes, bandwidth)
    stream = torch.cuda.Stream(device)
    every = list(dict.fromkeys((*shapes, *host_shapes)))
    for done, (rows, columns) in enumerate(every, start=1):
        say(f"[{done}/{len(every)}] {rows}x{columns}")
        norms = {c.name: c.fresh() for c in contenders}
        found: list[Row] = []
        with torch.cuda.stream(stream):
            cell = Cell(rows, columns, session.dtype, device)
            backward = backward_norms(contenders, norms, say)
            if (rows, columns) in shapes:
                found += _kernel_rows(session, cell, norms, backward)
            if (rows, columns) in host_shapes:
                found += _host_rows(session, cell, norms, backward, HOST_CALLS, HOST_SAMPLES)
            if (rows, columns) in MEMORY_SHAPES:
                found += _memory_rows(session, cell, norms)
        del cell, norms, backward
        torch.cuda.empty_cache()
        yield from found
    _raise_if_failed(session)


def _on_cpu(
    device: torch.device, contenders: Sequence[Contender], quick: bool, say: Say
) -> Iterator[Row]:
    # The forms differ in their kernels alone.
    contenders = [c for c in contenders if c.name == "ours" or not c.form]
    notes: dict[str, object] = {
        "dtype": "float32",
        "kernel": "none: the plain form",
        "threads": torch.get_num_threads(),
    }
    session = _Session(device, torch.float32, contenders, say, notes)
    for rows, columns in CPU_QUICK if quick else CPU_SHAPES:
        cell = Cell(rows, columns, session.dtype, device)
        norms = {c.name: c.fresh() for c in contenders}
        backward = backward_norms(contenders, norms, say)
        estimate = 5.0 + rows * columns / 200
        repeats = max(3, round(CPU_SAMPLE_US / estimate))
        yield from _host_rows(session, cell, norms, backward, repeats, HOST_SAMPLES)
    _raise_if_failed(session)


def backward_norms(
    contenders: Sequence[Contender], norms: Mapping[str, Norm], say: Say
) -> dict[str, Norm]:
    """`norms` as the backward pass alone needs them, called again and again on one graph."""
    found = dict(norms)
    for contender in contenders:
        try:
            found[contender.name] = contender.fresh_backward() or norms[contender.name]
        except Exception as error:
            say(f"  backward passes without {contender.name}: {type(error).__name__}: {error}")
            del found[contender.name]
    return found


def _kernel_rows(
    session: _Session, cell: Cell, norms: Mapping[str, Norm], backward: Mapping[str, Norm]
) -> list[Row]:
    times = {}
    for pass_ in PASSES:
        there = backward if pass_ == "backward" else norms
        times[pass_] = kernel_times(cell, pass_, session.contenders, there, SAMPLES, session.say)
        # a graph's memory is its own until this
        torch.cuda.empty_cache()
    rows = list(session.rows_of(cell, "gpu", times))
    for row in rows:
        row.notes["plan"] = _plans(cell)
        row.notes |= against_liger_row(row, cell.rows, cell.columns)
    return rows


def _host_rows(
    session: _Session,
    cell: Cell,
    norms: Mapping[str, Norm],
    backward: Mapping[str, Norm],
    repeats: int,
    samples: int,
) -> list[Row]:
    siblings = {c.name for c in session.contenders if c.sibling}
    times = {}
    for pass_ in PASSES:
        there = backward if pass_ == "backward" else norms
        alone = {name: norm for name, norm in there.items() if name not in siblings}
        times[pass_] = host_times(
            cell, pass_, session.contenders, alone, repeats, samples, session.say
        )
    rows = list(session.rows_of(cell, "host", times))
    for row in rows:
        row.notes["calls_per_sample"] = repeats
    return rows


def _memory_rows(session: _Session, cell: Cell, norms: Mapping[str, Norm]) -> list[Row]:
    """Peak extra bytes of one forward and backward pass. The floor is y, dX and dW; `planned` is
    that and the partials that the plan speaks of."""
    peaks: dict[str, float] = {}
    in_place = ours_in_place()
    for name, norm in {**norms, in_place.name: in_place.fresh()}.items():
        try:
            peaks[name] = peak_bytes(cell, norm)
        except Exception as error:
            session.say(f"  {cell.shape} memory without {name}: {type(error).__name__}: {error}")
    if "ours" not in peaks:
        session.failed.append(f"{cell.shape} memory")
        return []
    forms = {in_place.name, *(c.name for c in session.contenders if c.form)}
    size = session.dtype.itemsize
    plan = backward_plan(cell.rows, cell.columns, size, multiprocessors(session.device))
    outputs = (2 * cell.rows + 1) * cell.columns * size
    planned = outputs + 4 * plan.partials * cell.columns
    row = Row(
        f"{cell.shape} memory",
        peaks["ours"],
        peers={name: peak for name, peak in peaks.items() if name not in forms},
        floor=outputs,
        notes={
            **session.notes,
            "unit": "bytes",
            "planned": planned,
            "forms": {n: p for n, p in peaks.items() if n in forms and n != "ours"},
            "partials": plan.partials,
        },
    )
    session.say(
        f"{row.case}: {row.ours:,.0f} bytes more at the height; outputs and gradients are "
        f"{outputs:,.0f}, with partials {planned:,.0f}"
    )
    return [row]


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
            name: [float(f"{v:.4g}") for v in percentiles(list(times[name]))] for name in row.peers
        }
    return row


def against_liger_row(row: Row, rows: int, columns: int) -> dict[str, float]:
    """The source's own measure: by how many percent ours, and Liger by the source's rule, takes
    less time than Liger's row path; beside it what the source saw on its device."""
    base = row.peers.get("liger row")
    if not base:
        return {}
    found = {"percent_of_liger_row": 100 * (row.ours / base - 1)}
    if "liger source" in row.peers:
        found["liger_source_percent"] = 100 * (row.peers["liger source"] / base - 1)
    pass_ = row.case.split()[1]
    published = rms_norm_views.PUBLISHED.get(pass_, {}).get((rows, columns))
    if published is not None:
        found["published_percent"] = published
    return {name: round(value, 1) for name, value in found.items()}


def precompile(device: torch.device, shapes: Sequence[Shape], say: Say) -> None:
    """Fill the compilers' caches on disk, many processes at once; nothing is timed meanwhile."""
    # What a kernel is tuned to while others use the GPU must not be kept: compiled code is.
    _set_inductor()
    workers = min(PRECOMPILERS, len(shapes), os.cpu_count() or 1)
    say(f"compiling for {len(shapes)} shapes in {workers} processes")
    context = multiprocessing.get_context("spawn")
    pool = None
    try:
        pool = ProcessPoolExecutor(workers, context, _leave_interrupts_to_the_parent)
        work = [pool.submit(_warm, str(device), rows, columns) for rows, columns in shapes]
        for done in as_completed(work, PRECOMPILE_SECONDS):
            done.result()
        pool.shutdown()
    except BaseException as error:
        if pool is not None:
            _stop(pool)
        if not isinstance(error, Exception):
            raise
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, TimeoutError):
            reason = f"not done after {PRECOMPILE_SECONDS:.0f} s"
        say(f"compiling ahead failed ({reason}); it is done shape by shape")


def _stop(pool: ProcessPoolExecutor) -> None:
    """End a pool's processes at once: a compiler does not look whether it is still wanted."""
    processes = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _warm(device: str, rows: int, columns: int) -> None:
    """Run every contender once on one shape."""
    torch.set_num_threads(1)
    _set_inductor()
    place = torch.device(device)
    cell = Cell(rows, columns, torch.bfloat16, place, sets=1)
    for contender in [*ours(), *peers(place, lambda line: None)]:
        try:
            norm = contender.fresh()
            for pass_ in ("forward", "full"):
                cell.call(pass_, norm)(0)
            if (again := contender.fresh_backward()) is not None:
                cell.call("backward", again)(0)
        except Exception:
            continue  # it fails again, and is said, where it is timed
    synchronizer(place)()


def _set_inductor() -> None:
    from torch._inductor import config

    config.autotune_local_cache = False
    config.compile_threads = 1


def _plans(cell: Cell) -> dict[str, str]:
    facts = (cell.rows, cell.columns, cell.dtype.itemsize, multiprocessors(cell.device))
    return {
        name: f"{p.kernel}, {p.rows_per_tile} rows a tile, {p.warps} warps, grid {p.grid}"
        for name, p in (("forward", forward_plan(*facts)), ("backward", backward_plan(*facts)))
    }


def _in_words(row: Row, pass_: str) -> str:
    words = f"{pass_} {row.ours:,.2f} us"
    if "best_peer" in row.notes:
        best = row.notes["best_peer"]
        words += f" ({row.notes['ratio']:.2f} of {best}'s time)"
    return words


def _raise_if_failed(session: _Session) -> None:
    if session.failed:
        raise RunFailed(f"ours could not be timed: {', '.join(session.failed)}")
