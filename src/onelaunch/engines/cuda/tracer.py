"""Record the times of the tiles of one launch, and delay tiles in tests.

A kernel is handed a `Tracer`: a field that is None leaves out what it is for, and without any
nothing of this is in the kernel, not even a parameter. A tile is known by its stage and its number
in it.

A record is RECORD int64 words: nanoseconds of the device's clock when the tile began, when what it
waited for was there, and when it had ended and published it; then its multiprocessor << 32 | its
CTA. One thread writes them, to a place that is the tile's own: tile t of stage s, of which each
but the last has at most T tiles, has record 1 + s T + t. Record 0 is the clock of the interpreter,
which has no other: it counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
RECORD = 4
BEGAN, READY, ENDED, WHERE = range(RECORD)
_BEGAN_WORD, _READY_WORD = tl.constexpr(BEGAN), tl.constexpr(READY)
_ENDED_WORD, _WHERE_WORD = tl.constexpr(ENDED), tl.constexpr(WHERE)
_RECORD = tl.constexpr(RECORD)


class Tracer(NamedTuple):
    """records: (1 + tiles, RECORD), int64, and MAX_TILES of a stage, a constexpr; seed: (1,),
    int32, of the delays."""

    records: Any = None
    MAX_TILES: Any = None
    seed: Any = None


_CLOCK = tl.constexpr("""
{
  .reg .pred p;
  .reg .u32 i;
  .reg .u64 now;
  mov.u32 i, %tid.x;
  setp.ne.u32 p, i, 0;
  @p bra DONE_${:uid};
  mov.u64 now, %globaltimer;
  st.global.u64 [$1], now;
DONE_${:uid}:
  mov.u32 $0, 0;
}
""")
_WHERE = tl.constexpr("""
{
  .reg .pred p;
  .reg .u32 i, program;
  .reg .u64 where;
  mov.u32 i, %tid.x;
  setp.ne.u32 p, i, 0;
  @p bra DONE_${:uid};
  mov.u32 i, %smid;
  mov.u32 program, %ctaid.x;
  mov.b64 where, {program, i};
  st.global.u64 [$1], where;
DONE_${:uid}:
  mov.u32 $0, 0;
}
""")
# Each warp sleeps for a time of its own, half of them for none: what is missing may be a barrier of
# one program's warps. The mixing is that of MurmurHash3; 11 bits of it are nanoseconds.
_SLEEP = tl.constexpr("""
{
  .reg .pred p;
  .reg .u32 h, i;
  mov.u32 i, %tid.x;
  shr.u32 i, i, 5;
  mad.lo.u32 h, i, 0x9E3779B9, $1;
  shr.u32 i, h, 16;
  xor.b32 h, h, i;
  mul.lo.u32 h, h, 0x85EBCA6B;
  shr.u32 i, h, 13;
  xor.b32 h, h, i;
  mul.lo.u32 h, h, 0xC2B2AE35;
  shr.u32 i, h, 16;
  xor.b32 h, h, i;
  and.b32 i, h, 1;
  setp.eq.u32 p, i, 0;
  shr.u32 h, h, 21;
  @!p bra DONE_${:uid};
  nanosleep.u32 h;
DONE_${:uid}:
  mov.u32 $0, 0;
}
""")


@triton.jit
def began(tracer, stage, tile_id):
    """The tile loads its weights next, then waits."""
    if tracer.records is not None:
        at = _record(tracer, stage, tile_id) + _WHERE_WORD
        if INTERPRETED:
            tl.store(at, tl.program_id(0).to(tl.int64))
        else:
            tl.inline_asm_elementwise(
                _WHERE,
                "=r,l",
                [at.to(tl.int64, bitcast=True)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        _stamp(tracer, stage, tile_id, _BEGAN_WORD)


@triton.jit
def ready(tracer, stage, tile_id):
    """What the tile waited for is there."""
    if tracer.records is not None:
        _stamp(tracer, stage, tile_id, _READY_WORD)


@triton.jit
def ended(tracer, stage, tile_id):
    """The tile has ended, and published it to those who wait for it."""
    if tracer.records is not None:
        _stamp(tracer, stage, tile_id, _ENDED_WORD)


@triton.jit
def ended_unpublished(tracer, stage, tile_id):
    """The tile has ended, and no other waits for it."""
    if tracer.records is not None:
        tl.debug_barrier()
        _stamp(tracer, stage, tile_id, _ENDED_WORD)


@triton.jit
def delay(tracer, stage, tile_id, PLACE: tl.constexpr):
    """Where there is a seed, sleep for up to about 2 us, by the seed, the tile and the place."""
    if tracer.seed is not None and not INTERPRETED:
        number = ((tl.load(tracer.seed) * 4 + PLACE) * 1021 + stage) * 65599 + tile_id
        tl.inline_asm_elementwise(_SLEEP, "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _record(tracer, stage, tile_id):
    return tracer.records + _RECORD * (1 + stage * tracer.MAX_TILES + tile_id)


@triton.jit
def _stamp(tracer, stage, tile_id, WORD: tl.constexpr):
    at = _record(tracer, stage, tile_id) + WORD
    if INTERPRETED:
        now = tl.load(tracer.records) + 1
        tl.store(tracer.records, now)
        tl.store(at, now)
    else:
        tl.inline_asm_elementwise(
            _CLOCK, "=r,l", [at.to(tl.int64, bitcast=True)], dtype=tl.int32, is_pure=False, pack=1
        )
