"""What a tile of one launch tells of its time, and how a test delays it. Each is in a kernel that
is compiled for it, and in no other.

A program's watch is where the records are, how many there are of a stage, and where the seed of the
delays is; None in the place of the records or of the seed leaves out what it is for. `me` is which
tile it is: the watch, the stage, and the tile's number in it.

A record is RECORD int64 words: nanoseconds of the device's clock when the tile began, when what it
waited for was there, and when it had ended and said so; then its multiprocessor << 32 | its
program. One thread writes them, to a place that is the tile's own: tile t of stage s, of which each
but the last has at most T tiles, has record 1 + s T + t. Record 0 is the clock of the interpreter,
which has no other: it counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
RECORD = 4
BEGAN, READY, ENDED, WHERE = range(RECORD)
_BEGAN, _READY, _ENDED = tl.constexpr(BEGAN), tl.constexpr(READY), tl.constexpr(ENDED)
_WHERE_WORD, _RECORD = tl.constexpr(WHERE), tl.constexpr(RECORD)

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
def began(me):
    """The tile asks for its weights next, then waits."""
    if me[0][0] is not None:
        at = _record(me) + _WHERE_WORD
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
        _stamp(me, _BEGAN)


@triton.jit
def ready(me):
    """What the tile waited for is there."""
    if me[0][0] is not None:
        _stamp(me, _READY)


@triton.jit
def ended(me):
    """The tile has ended, and said so to those who wait for it."""
    if me[0][0] is not None:
        _stamp(me, _ENDED)


@triton.jit
def ended_unsaid(me):
    """The tile has ended, and nobody waits for it."""
    if me[0][0] is not None:
        tl.debug_barrier()
        _stamp(me, _ENDED)


@triton.jit
def delay(me, PLACE: tl.constexpr):
    """Where there is a seed, sleep for up to about 2 us, as it, the tile and the place say."""
    if me[0][2] is not None and not INTERPRETED:
        what = ((tl.load(me[0][2]) * 4 + PLACE) * 1021 + me[1]) * 65599 + me[2]
        tl.inline_asm_elementwise(_SLEEP, "=r,r", [what], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _record(me):
    return me[0][0] + _RECORD * (1 + me[1] * me[0][1] + me[2])


@triton.jit
def _stamp(me, WORD: tl.constexpr):
    at = _record(me) + WORD
    if INTERPRETED:
        now = tl.load(me[0][0]) + 1
        tl.store(me[0][0], now)
        tl.store(at, now)
    else:
        tl.inline_asm_elementwise(
            _CLOCK, "=r,l", [at.to(tl.int64, bitcast=True)], dtype=tl.int32, is_pure=False, pack=1
        )
