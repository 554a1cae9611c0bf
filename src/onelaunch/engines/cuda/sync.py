"""Synchronization between the tiles of one launch.

A row tile of a phase has a counter, to which each of its tiles adds one when what it wrote can be
seen by others. Counters are never cleared: in epoch e, which counts forwards from 0, a row tile of
c tiles has ended when its counter is (e + 1) c. The epoch lies in the device's memory, so that a
CUDA graph can be replayed; the last CTA of a forward to end moves it on.

Every wait has a timeout. Where one times out it writes which into the status word, and from then on
no wait waits: the launch ends without valid results, and whoever reads them reads the status.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from onelaunch.engines.cuda.tracer import INTERPRETED, delay, ended, ready

# What a forward's sync buffer begins with: int32 words, each alone in its cache line.
LINE = 32
EPOCH, ENDED, STATUS, COUNTERS = 0, LINE, 2 * LINE, 3 * LINE
ROW_TILE_BITS = 18
GAVE_UP = 1 << 30
"""The status word is GAVE_UP, the awaited stage << ROW_TILE_BITS and its row tile, added up."""

# How a tile knows that what it reads has been written: the launch before has ended; or it signals
# so (programmatic dependent launch); or counters of this launch are high enough, read by
# Triton's atomic additions or by NVIDIA's own instructions.
AFTER, DEPENDENT = tl.constexpr(0), tl.constexpr(1)
COUNTED, COUNTED_PTX = tl.constexpr(2), tl.constexpr(3)

_ENDED, _STATUS = tl.constexpr(ENDED), tl.constexpr(STATUS)

# One thread looks at one counter, and goes on by as many as there are threads. Every 64 looks it
# reads the clock and the status.
_WAIT = tl.constexpr("""
{
  .reg .pred p, q;
  .reg .u32 i, n, looks, v;
  .reg .u64 at, start, now;
  mov.u32 i, %tid.x;
  mov.u32 n, %ntid.x;
  mov.u32 v, 0;
NEXT_${:uid}:
  setp.ge.u32 p, i, $2;
  @p bra DONE_${:uid};
  mul.wide.u32 at, i, 4;
  add.u64 at, at, $1;
  mov.u32 looks, 0;
LOOK_${:uid}:
  ld.relaxed.gpu.global.u32 v, [at];
  sub.u32 v, v, $3;
  setp.ge.s32 p, v, 0;
  @p bra THERE_${:uid};
  add.u32 looks, looks, 1;
  and.b32 v, looks, 63;
  setp.ne.u32 p, v, 0;
  @p bra LOOK_${:uid};
  ld.relaxed.gpu.global.u32 v, [$4];
  setp.ne.u32 p, v, 0;
  @p bra DONE_${:uid};
  mov.u64 now, %globaltimer;
  setp.eq.u32 q, looks, 64;
  @q mov.u64 start, now;
  sub.u64 now, now, start;
  setp.lt.u64 p, now, $6;
  @p bra LOOK_${:uid};
  add.u32 v, $5, i;
  atom.relaxed.gpu.global.cas.b32 v, [$4], 0, v;
  bra DONE_${:uid};
THERE_${:uid}:
  ld.acquire.gpu.global.u32 v, [at];
  add.u32 i, i, n;
  bra NEXT_${:uid};
DONE_${:uid}:
  mov.u32 $0, v;
}
""")
_ADD_ONE = tl.constexpr("""
{
  .reg .pred p;
  .reg .u32 i;
  mov.u32 i, %tid.x;
  setp.eq.u32 p, i, 0;
  @p red.release.gpu.global.add.u32 [$1], 1;
  mov.u32 $0, 0;
}
""")
# $1 epoch, $2 CTAs that have ended, $3 CTAs less one
_END = tl.constexpr("""
{
  .reg .pred p;
  .reg .u32 i;
  mov.u32 i, %tid.x;
  setp.ne.u32 p, i, 0;
  @p bra DONE_${:uid};
  atom.acq_rel.gpu.global.inc.u32 i, [$2], $3;
  setp.ne.u32 p, i, $3;
  @p bra DONE_${:uid};
  red.relaxed.gpu.global.add.u32 [$1], 1;
DONE_${:uid}:
  mov.u32 $0, 0;
}
""")
_LOOK = tl.constexpr(500)  # nanoseconds, about, that a look by an atomic addition takes


class Wait(NamedTuple):
    """The counters that a tile of one launch waits for: `count` counters from `counter` on, until
    they have reached `target`; `report` is what the status word is to be of the first;
    `timeout_ns`; then which tile waits (tracer.py)."""

    MODE: Any
    counter: Any
    count: Any
    target: Any
    sync: Any
    report: Any
    timeout_ns: Any
    tracer: Any
    stage: Any
    tile_id: Any


@triton.jit
def wait_for(wait):
    """Go on when what a tile waits for is there, or has timed out."""
    delay(wait.tracer, wait.stage, wait.tile_id, 0)
    if INTERPRETED:
        for i in range(wait.count):  # one CTA runs at a time: what is not there will not come
            if tl.load(wait.counter + i) < wait.target:
                tl.store(wait.sync + _STATUS, wait.report + i)
    elif wait.MODE == COUNTED_PTX:
        tl.inline_asm_elementwise(
            _WAIT,
            "=r,l,r,r,l,r,l",
            [
                wait.counter.to(tl.int64, bitcast=True),
                wait.count,
                wait.target,
                (wait.sync + _STATUS).to(tl.int64, bitcast=True),
                wait.report,
                wait.timeout_ns.to(tl.int64),
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
        tl.debug_barrier()
    else:
        for i in range(wait.count):
            there = tl.atomic_add(wait.counter + i, 0, sem="acquire", scope="gpu")
            looks = 0
            while there - wait.target < 0:
                looks += 1
                if looks >= wait.timeout_ns // _LOOK:
                    tl.atomic_cas(
                        wait.sync + _STATUS, 0, wait.report + i, sem="relaxed", scope="gpu"
                    )
                if tl.atomic_add(wait.sync + _STATUS, 0, sem="relaxed", scope="gpu") != 0:
                    there = wait.target
                else:
                    there = tl.atomic_add(wait.counter + i, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()
    delay(wait.tracer, wait.stage, wait.tile_id, 1)
    ready(wait.tracer, wait.stage, wait.tile_id)


@triton.jit
def publish(counter_ptr, tracer, stage, tile_id, MODE: tl.constexpr):
    """A tile of this row tile has ended."""
    delay(tracer, stage, tile_id, 2)
    if INTERPRETED:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1)
    else:
        tl.debug_barrier()
        if MODE == COUNTED_PTX:
            tl.inline_asm_elementwise(
                _ADD_ONE,
                "=r,l",
                [counter_ptr.to(tl.int64, bitcast=True)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    delay(tracer, stage, tile_id, 3)
    ended(tracer, stage, tile_id)


@triton.jit
def end(sync_ptr, tracer, MODE: tl.constexpr):
    """This CTA has ended; after the last of them comes the next epoch."""
    ctas = tl.num_programs(0)
    delay(tracer, -1, tl.program_id(0), 0)
    if INTERPRETED:
        ended = tl.load(sync_ptr + _ENDED) + 1
        tl.store(sync_ptr + _ENDED, tl.where(ended == ctas, 0, ended))
        tl.store(sync_ptr, tl.load(sync_ptr) + tl.where(ended == ctas, 1, 0))
    else:
        tl.debug_barrier()
        if MODE == COUNTED_PTX:
            tl.inline_asm_elementwise(
                _END,
                "=r,l,l,r",
                [
                    sync_ptr.to(tl.int64, bitcast=True),
                    (sync_ptr + _ENDED).to(tl.int64, bitcast=True),
                    ctas - 1,
                ],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        elif tl.atomic_add(sync_ptr + _ENDED, 1, sem="acq_rel", scope="gpu") == ctas - 1:
            tl.atomic_add(sync_ptr + _ENDED, -ctas, sem="relaxed", scope="gpu")
            tl.atomic_add(sync_ptr, 1, sem="relaxed", scope="gpu")
