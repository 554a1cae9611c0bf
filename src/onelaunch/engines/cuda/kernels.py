"""The two kernels: one stage in a launch, or any range of a forward's stages.

Stages are handed to them as tuples (stages/common.py): a kernel's code is made of the tiles that it
is launched with.

`stage_kernel` runs one tile a CTA. A product's tile may have a warm-up pass: it is computed once,
of whatever is there and stored nowhere, while the launch before still runs, so that its
instructions and weights are near when its inputs are there. How many passes there are is no
constant, or the compiler would write the tile twice.

In `forward_kernel` a CTA takes every P-th tile of the stages' tiles in their order, P being the
number of CTAs, and before each waits for the row tiles that it reads (plan/tiles.py proves that
this ends, for any P). The range of stages, rows, and the numbers of tiles are run-time arguments:
every fusion depth and length is the same binary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from onelaunch.engines.cuda import sync
from onelaunch.engines.cuda.stages import TILES, common
from onelaunch.engines.cuda.stages.common import Launched, Run
from onelaunch.engines.cuda.sync import AFTER, DEPENDENT, Wait, end, publish
from onelaunch.engines.cuda.tracer import began, ended_unpublished, ready

_WITHIN_SEQUENCES = tl.constexpr(common.WITHIN_SEQUENCES)
_LOGIT_ROWS = tl.constexpr(common.LOGIT_ROWS)
_COUNTERS, _GAVE_UP = tl.constexpr(sync.COUNTERS), tl.constexpr(sync.GAVE_UP)
_OF_STAGE = tl.constexpr(1 << sync.ROW_TILE_BITS)

# $1 address, $2 bytes, a multiple of 16
_INTO_L2 = tl.constexpr("""
{
  .reg .pred p;
  .reg .u32 i;
  mov.u32 i, %tid.x;
  setp.eq.u32 p, i, 0;
  @p setp.gt.s32 p, $2, 0;
  @p cp.async.bulk.prefetch.L2.global [$1], $2;
  mov.u32 $0, 0;
}
""")


@triton.jit
def _let_next_begin(MODE: tl.constexpr):
    """The next launch may be scheduled; it waits for this one's end before it reads."""
    if MODE == DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def _prefetch(later_ptr, later_bytes):
    """Ask for this CTA's share of what the stage after the next one reads, its weights, into the
    L2."""
    if later_ptr is not None:
        share = tl.cdiv(tl.cdiv(later_bytes, 16), tl.num_programs(0)) * 16
        first = tl.program_id(0) * share
        tl.inline_asm_elementwise(
            _INTO_L2,
            "=r,l,r",
            [
                later_ptr.to(tl.int64, bitcast=True) + first,
                tl.minimum(share, later_bytes - first),
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _row_tiles(cut: tl.constexpr, n_rows, sequence, logit_rows):
    """The number of row tiles of a stage."""
    if cut.rows_of == _WITHIN_SEQUENCES:
        return n_rows // sequence * tl.cdiv(sequence, cut.BM)
    elif cut.rows_of == _LOGIT_ROWS:
        return tl.cdiv(logit_rows, cut.BM)
    else:
        return tl.cdiv(n_rows, cut.BM)


def _name(specialization: Any) -> str:
    """The name of a kernel of one stage in a profiler: by its tile."""
    tile: str = specialization.constants["tile"].__name__
    return tile.removesuffix("_tile") + "_kernel"


# One binary for every length. The ids are the caller's, aligned as they come.
@triton.jit(
    do_not_specialize=("n_rows", "sequence", "logit_rows"),
    do_not_specialize_on_alignment=("ids_ptr",),
    repr=_name,
)
def stage_kernel(
    tile,
    operands,
    cut,
    residual,
    ids_ptr,
    logits_ptr,
    x_desc,
    w_desc,
    n_rows,
    sequence,
    logit_rows,
    passes,
    later_ptr,
    later_bytes,
    BACKWARDS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    MODE: tl.constexpr,
):
    """One stage, as a `Stage` has it. ids, logits and the descriptors are None where it has none,
    `passes` without a warm-up pass, later_ptr where nothing is prefetched. BACKWARDS, the last tile
    is the first CTA's; PERSISTENT, each CTA goes through many tiles in one pipeline."""
    # of embed not before its end: the next kernel reads weights before it waits, and what ran
    # before this launch may have written them
    if ids_ptr is None:
        _let_next_begin(MODE)
    _prefetch(later_ptr, later_bytes)
    tile_id = tl.program_id(0)
    if BACKWARDS:
        tile_id = tl.num_programs(0) - 1 - tile_id
    if PERSISTENT:
        if MODE == DEPENDENT:
            gdc_wait()
        row_tiles = _row_tiles(cut, n_rows, sequence, logit_rows)
        tiles = row_tiles * cut.COLUMN_TILES
        for tile_id in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            tile(
                tile_id,
                operands,
                Run(residual, None, logits_ptr, x_desc, w_desc, n_rows, sequence, logit_rows, 0),
                Launched(AFTER, 1),
            )
    elif passes is None:
        tile(
            tile_id,
            operands,
            Run(residual, ids_ptr, logits_ptr, x_desc, w_desc, n_rows, sequence, logit_rows, 0),
            Launched(MODE, 1),
        )
    else:
        for number in tl.range(0, passes, num_stages=1):
            real = (number + 1) // passes
            tile(
                tile_id,
                operands,
                Run(residual, None, None, x_desc, w_desc, n_rows * real, sequence, logit_rows, 0),
                Launched(MODE, real),
            )
    if ids_ptr is not None:
        _let_next_begin(MODE)


@triton.jit
def _first_tile(after, tiles):
    """The number of this CTA's first tile of the next stage, where `after` was that of one with so
    many tiles."""
    ctas = tl.num_programs(0)
    return (after + ctas - tiles % ctas) % ctas


@triton.jit
def _rows_read(row_tile, stage, run):
    """The first and the last row of x, or of what else it reads, that a row tile reads."""
    cut: tl.constexpr = stage.cut
    if cut.rows_of == _WITHIN_SEQUENCES:  # its sequence, all up to its own
        tiles = tl.cdiv(run.sequence, cut.BM)
        first = row_tile // tiles * run.sequence
        end = tl.minimum((row_tile % tiles + 1) * cut.BM, run.sequence)
        return first, first + end - 1
    elif cut.rows_of == _LOGIT_ROWS:
        first = row_tile * cut.BM
        last = tl.minimum(first + cut.BM, run.logit_rows) - 1
        return tl.load(stage.operands.of + first), tl.load(stage.operands.of + last)
    else:
        first = row_tile * cut.BM
        return first, tl.minimum(first + cut.BM, run.n_rows) - 1


@triton.jit
def _row_tile_of(row, cut: tl.constexpr, BM, run):
    """The row tile, of BM rows, that has a row."""
    if cut.rows_of == _WITHIN_SEQUENCES:
        tiles = tl.cdiv(run.sequence, BM)
        return row // run.sequence * tiles + row % run.sequence // BM
    else:
        return row // BM


@triton.jit
def _run_stage(first_tile, stage, number, run, launch, tracer, MODE: tl.constexpr):
    """This CTA's tiles of one stage, `number` in the forward, as far as it is in the launch's
    range; returns its first tile of the next one."""
    cut: tl.constexpr = stage.cut
    read: tl.constexpr = cut.read
    read_first: tl.constexpr = cut.read_first
    row_tiles = _row_tiles(cut, run.n_rows, run.sequence, run.logit_rows)
    inside = (number >= launch[0]) & (number < launch[1])
    tiles = tl.where(inside, row_tiles * cut.COLUMN_TILES, 0)
    sync_ptr, counter_row, done, timeout_ns = launch[2], launch[3], launch[4], launch[5]
    counters = sync_ptr + _COUNTERS
    for tile_id in tl.range(first_tile, tiles, tl.num_programs(0), num_stages=1):
        began(tracer, number, tile_id)
        # of the tiles with logits row tile first: see head_tile
        if cut.rows_of == _LOGIT_ROWS:
            row_tile = tile_id % row_tiles
        else:
            row_tile = tile_id // cut.COLUMN_TILES
        if read is None:
            ready(tracer, number, tile_id)
            stage.tile(tile_id, stage.operands, run, Launched(AFTER, 1))
        else:
            first_row, last_row = _rows_read(row_tile, stage, run)
            if read_first is None:
                first = _row_tile_of(first_row, read, read.BM, run)
                last = _row_tile_of(last_row, read, read.BM, run)
            else:
                BM = tl.where(run.layer == 0, read_first.BM, read.BM)
                first = _row_tile_of(first_row, read, BM, run)
                last = _row_tile_of(last_row, read, BM, run)
            stage.tile(
                tile_id,
                stage.operands,
                run,
                Wait(
                    MODE,
                    counters + (number - 1) * counter_row + first,
                    last - first + 1,
                    done * read.COLUMN_TILES,
                    sync_ptr,
                    _GAVE_UP + (number - 1) * _OF_STAGE + first,
                    timeout_ns,
                    tracer,
                    number,
                    tile_id,
                ),
            )
        if cut.waited_for:
            publish(counters + number * counter_row + row_tile, tracer, number, tile_id, MODE)
        else:
            ended_unpublished(tracer, number, tile_id)
    return _first_tile(first_tile, tiles)


# one binary for every length and every range of stages
_RUN_TIME = (
    "n_rows", "sequence", "logit_rows", "row_tiles", "first_stage", "last_stage", "ends",
    "timeout_ns",
)  # fmt: skip


@triton.jit(do_not_specialize=_RUN_TIME, do_not_specialize_on_alignment=("ids_ptr",))
def forward_kernel(
    embed,
    of_layer,
    head,
    residual,
    ids_ptr,
    logits_ptr,
    sync_ptr,
    tracer,
    n_rows,
    sequence,
    logit_rows,
    row_tiles,
    first_stage,
    last_stage,
    ends,
    timeout_ns,
    LAYERS: tl.constexpr,
    PER_LAYER: tl.constexpr,
    MODE: tl.constexpr,
):
    """Stages first_stage up to, not including, last_stage: 0 is embed, then the PER_LAYER of each
    layer, then head, where its tile is not None. `ends` is 1 in the last launch of a forward. Each
    layer has a qkv of its own: some rows may be in the next layer while others still read this
    one's keys. row_tiles: counters of a stage. timeout_ns: how long a wait waits. tracer:
    tracer.py."""
    head_stage: tl.constexpr = 1 + PER_LAYER * LAYERS
    done = tl.load(sync_ptr, cache_modifier=".cg") + 1
    launch = (first_stage, last_stage, sync_ptr, row_tiles, done, timeout_ns)
    tile = _run_stage(
        tl.program_id(0),
        embed,
        0,
        Run(residual, ids_ptr, logits_ptr, None, None, n_rows, sequence, logit_rows, 0),
        launch,
        tracer,
        MODE,
    )
    first_layer = tl.maximum(first_stage - 1, 0) // PER_LAYER
    last_layer = (tl.minimum(last_stage, head_stage) - 1 + PER_LAYER - 1) // PER_LAYER
    for layer in tl.range(first_layer, last_layer, num_stages=1):
        wide_layer = tl.full([], 1, tl.int64) * layer
        for i in tl.static_range(PER_LAYER):
            tile = _run_stage(
                tile,
                of_layer[i],
                1 + PER_LAYER * layer + i,
                Run(residual, None, None, None, None, n_rows, sequence, logit_rows, wide_layer),
                launch,
                tracer,
                MODE,
            )
    if head.tile is not None:
        tile = _run_stage(
            tile,
            head,
            head_stage,
            Run(residual, None, logits_ptr, None, None, n_rows, sequence, logit_rows, 0),
            launch,
            tracer,
            MODE,
        )
    if ends > 0:
        end(sync_ptr, tracer, MODE)


@cache
def settle_names() -> None:
    """Have Triton name the tiles and the functions here, in the order of these modules.

    What Triton 3.6 finds a kernel by in its store depends on whether the functions that it calls
    had a name before: processes that compile in other orders would not find each other's kernels.
    """
    for function in (*TILES, *tuple(globals().values())):
        getattr(function, "cache_key", None)
