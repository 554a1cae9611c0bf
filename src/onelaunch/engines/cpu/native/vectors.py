"""Vectors, raw memory and atomics for Numba: LLVM instructions that Python lacks.

An address is an int64 in bytes; nothing here is bounds-checked. `LANES` floats make a vector: what
the host's widest registers hold, and LLVM splits them where it must.
"""

from __future__ import annotations

import math
import os
import platform
from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic, models, register_model

# `build` sets these before Numba reads this module; they are constants of the program.
LANES = int(os.environ.get("ONELAUNCH_LANES", "4"))
REGISTERS = int(os.environ.get("ONELAUNCH_REGISTERS", "16"))

LOCALITY_L1, LOCALITY_L2, LOCALITY_ONCE = 3, 2, 0
"""Where LLVM's prefetch intrinsic puts a line; ONCE: it is read once, and should take no other
line's place in the caches beyond L1. Every target has the intrinsic: prefetcht0, t1 and nta on x86,
pldl1keep, pldl2keep and pldl1strm on ARM, and nothing where there is no such instruction."""

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_F32 = ir.FloatType()
VECTOR_IR = ir.VectorType(_F32, LANES)
_VECTOR_I32 = ir.VectorType(_I32, LANES)


# everything is compiled for raw addresses: no array, no exception, no reference count
compiled = njit(
    error_model="numpy",
    fastmath={"contract", "nsz"},
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
)


class Vector(types.Type):
    """`LANES` float32 in a register."""

    def __init__(self) -> None:
        super().__init__(name=f"Vector{LANES}")


VECTOR = Vector()


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Any) -> None:
        super().__init__(manager, fe_type, VECTOR_IR)


def pointer(builder: ir.IRBuilder, address: ir.Value, to: ir.Type) -> ir.Value:
    """An address as a typed pointer."""
    return builder.inttoptr(address, to.as_pointer())


def load_vector(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """LANES float32 from an address of any alignment."""
    return builder.load(pointer(builder, address, VECTOR_IR), align=4)


def load_bfloat16(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """LANES bfloat16 as float32: their bits are a float32's upper half."""
    narrow = ir.VectorType(_I16, LANES)
    bits = builder.load(pointer(builder, address, narrow), align=2)
    wide = builder.zext(bits, _VECTOR_I32)
    return builder.bitcast(builder.shl(wide, constant_i32(16)), VECTOR_IR)


def constant(value: float) -> ir.Constant:
    return ir.Constant(VECTOR_IR, [value] * LANES)


def constant_i32(value: int) -> ir.Constant:
    return ir.Constant(_VECTOR_I32, [value] * LANES)


def broadcast(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A scalar in every lane."""
    one = builder.insert_element(ir.Constant(VECTOR_IR, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, _VECTOR_I32([0] * LANES))


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a b + c, in one instruction where the host has one."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    suffix = f"v{LANES}f32" if isinstance(a.type, ir.VectorType) else "f32"
    name = f"llvm.fmuladd.{suffix}"
    intrinsic_function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(intrinsic_function, [a, b, c])


def call_intrinsic(builder: ir.IRBuilder, name: str, *values: ir.Value) -> ir.Value:
    """An LLVM intrinsic whose arguments and result have one type."""
    kind = ir.FunctionType(values[0].type, [value.type for value in values])
    intrinsic_function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(intrinsic_function, list(values))


def prefetch(builder: ir.IRBuilder, address: ir.Value, locality: int, write: bool = False) -> None:
    """Prefetch the cache line at an address, which may lie outside of what is allocated."""
    kind = ir.FunctionType(ir.VoidType(), [_I8.as_pointer(), _I32, _I32, _I32])
    name = "llvm.prefetch.p0"
    intrinsic_function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    rest = [_I32(int(write)), _I32(locality), _I32(1)]
    builder.call(intrinsic_function, [pointer(builder, address, _I8), *rest])


def fold(builder: ir.IRBuilder, vectors: list[ir.Value]) -> list[ir.Value]:
    """The sum of each vector's lanes, side by side in as few vectors as hold them.

    Neighbours are added first, whichever vectors stand together: a sum's roundings do not depend
    on the company it is taken in.
    """
    lanes_each = LANES
    width = LANES
    while lanes_each > 1:
        if len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [_add_neighbours(builder, a, b, width) for a, b in pairs]
        else:
            vectors = [_add_neighbours(builder, vectors[0], None, width)]
            width //= 2
        lanes_each //= 2
    return vectors


def _add_neighbours(builder: ir.IRBuilder, a: ir.Value, b: ir.Value | None, width: int) -> ir.Value:
    span = 2 * width if b is not None else width
    other = b if b is not None else a
    masks = [
        ir.Constant(ir.VectorType(_I32, span // 2), list(range(start, span, 2))) for start in (0, 1)
    ]
    even, odd = (builder.shuffle_vector(a, other, mask) for mask in masks)
    return builder.fadd(even, odd)


# ---- memory


@intrinsic
def load(typingctx, address):
    """LANES float32."""
    return VECTOR(types.int64), lambda context, builder, sig, args: load_vector(builder, args[0])


@intrinsic
def store(typingctx, address, vector):
    def code(context, builder, sig, args):
        target = pointer(builder, args[0], VECTOR_IR)
        builder.store(args[1], target, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, VECTOR), code


@intrinsic
def load_halves(typingctx, address):
    """LANES bfloat16 as float32."""
    return VECTOR(types.int64), lambda context, builder, sig, args: load_bfloat16(builder, args[0])


@intrinsic
def prefetch_to_write(typingctx, address):
    """Ask for a cache line that will be written."""

    def code(context, builder, sig, args):
        prefetch(builder, args[0], LOCALITY_L1, write=True)
        return context.get_dummy_value()

    return types.void(types.int64), code


def _scalar(result: types.Type, kind: ir.Type) -> tuple[Any, Any]:
    """How a scalar is read from and written to an address."""

    @intrinsic
    def read(typingctx, address):
        def code(context, builder, sig, args):
            return builder.load(pointer(builder, args[0], kind))

        return result(types.int64), code

    @intrinsic
    def write(typingctx, address, value):
        def code(context, builder, sig, args):
            value = context.cast(builder, args[1], sig.args[1], result)
            builder.store(value, pointer(builder, args[0], kind))
            return context.get_dummy_value()

        return types.void(types.int64, value), code

    return read, write


get_f32, put_f32 = _scalar(types.float32, _F32)
get_f64, put_f64 = _scalar(types.float64, ir.DoubleType())
get_i64, put_i64 = _scalar(types.int64, _I64)
get_i32, put_i32 = _scalar(types.int32, _I32)


@compiled
def field(table, index):
    """A field of a table of int64."""
    return get_i64(table + 8 * index)


# ---- arithmetic


@intrinsic
def square_root(typingctx, value):
    def code(context, builder, sig, args):
        return call_intrinsic(builder, "llvm.sqrt.f32", args[0])

    return types.float32(types.float32), code


@intrinsic
def square_roots(typingctx, a):
    """The square root of each lane."""

    def code(context, builder, sig, args):
        return call_intrinsic(builder, f"llvm.sqrt.v{LANES}f32", args[0])

    return VECTOR(VECTOR), code


@intrinsic
def splat(typingctx, value):
    """A float in every lane."""
    return VECTOR(types.float32), lambda context, builder, sig, args: broadcast(builder, args[0])


def _binary(instruction: str) -> Any:
    @intrinsic
    def operation(typingctx, a, b):
        def code(context, builder, sig, args):
            return getattr(builder, instruction)(*args)

        return VECTOR(VECTOR, VECTOR), code

    return operation


add, subtract, multiply, divide = (_binary(name) for name in ("fadd", "fsub", "fmul", "fdiv"))


@intrinsic
def fma(typingctx, a, b, c):
    """a b + c."""

    def code(context, builder, sig, args):
        return multiply_add(builder, *args)

    return VECTOR(VECTOR, VECTOR, VECTOR), code


@intrinsic
def maximum(typingctx, a, b):
    """The larger of each lane; a NaN loses."""

    def code(context, builder, sig, args):
        return call_intrinsic(builder, f"llvm.maxnum.v{LANES}f32", *args)

    return VECTOR(VECTOR, VECTOR), code


@intrinsic
def sum_lanes(typingctx, a):
    def code(context, builder, sig, args):
        return builder.extract_element(fold(builder, [args[0]])[0], _I32(0))

    return types.float32(VECTOR), code


@intrinsic
def largest_lane(typingctx, a):
    def code(context, builder, sig, args):
        kind = ir.FunctionType(_F32, [VECTOR_IR])
        name = f"llvm.vector.reduce.fmax.v{LANES}f32"
        intrinsic_function = builder.module.globals.get(name) or ir.Function(
            builder.module, kind, name
        )
        return builder.call(intrinsic_function, args)

    return types.float32(VECTOR), code


def _lanes_before(builder: ir.IRBuilder, n: ir.Value) -> ir.Value:
    """Which lanes are numbered below n, an int64."""
    index = _VECTOR_I32(list(range(LANES)))
    n = builder.trunc(n, _I32)
    limit = builder.insert_element(ir.Constant(_VECTOR_I32, ir.Undefined), n, _I32(0))
    limit = builder.shuffle_vector(limit, limit, _VECTOR_I32([0] * LANES))
    return builder.icmp_signed("<", index, limit)


@intrinsic
def first_lanes(typingctx, a, n):
    """The first n lanes, zero in the others."""

    def code(context, builder, sig, args):
        return builder.select(_lanes_before(builder, args[1]), args[0], constant(0.0))

    return VECTOR(VECTOR, types.int64), code


@intrinsic
def lanes_from(typingctx, a, n, other):
    """The lanes from the n-th on; those of `other` before."""

    def code(context, builder, sig, args):
        return builder.select(_lanes_before(builder, args[1]), args[2], args[0])

    return VECTOR(VECTOR, types.int64, VECTOR), code


@intrinsic
def transpose(typingctx, source, source_row, to, to_row):
    """LANES vectors at source + i source_row, stored the other way round at to + i to_row."""

    def code(context, builder, sig, args):
        source, source_row, to, to_row = args
        rows = [
            load_vector(builder, builder.add(source, builder.mul(source_row, _I64(i))))
            for i in range(LANES)
        ]
        # interleaving the first half with the second, log2(LANES) times
        masks = [
            _VECTOR_I32([at // 2 + LANES * (at % 2) for at in range(start, start + LANES)])
            for start in (0, LANES)
        ]
        n = LANES
        while n > 1:
            pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
            rows = [builder.shuffle_vector(a, b, mask) for a, b in pairs for mask in masks]
            n //= 2
        for i, row in enumerate(rows):
            at = builder.add(to, builder.mul(to_row, _I64(i)))
            builder.store(row, pointer(builder, at, VECTOR_IR), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), code


# exp(r) on [-ln 2 / 2, ln 2 / 2]: the polynomial of Cephes' expf (S. Moshier), 2 ulp with its
# reduction; beyond the bounds the result is 0 or the largest power of two times exp(r).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_LARGEST, _SMALLEST = 88.0, -87.0


@intrinsic
def exp(typingctx, a):
    """e to the power of each lane."""

    def code(context, builder, sig, args):
        x = call_intrinsic(builder, f"llvm.minnum.v{LANES}f32", args[0], constant(_LARGEST))
        n = builder.fmul(x, constant(1.0 / math.log(2.0)))
        n = call_intrinsic(builder, f"llvm.rint.v{LANES}f32", n)
        n = call_intrinsic(builder, f"llvm.maxnum.v{LANES}f32", n, constant(-126.0))
        minus_n = builder.fneg(n)
        r = multiply_add(builder, minus_n, constant(_LN2_HIGH), x)
        r = multiply_add(builder, minus_n, constant(_LN2_LOW), r)
        value = constant(_EXP[0])
        for coefficient in _EXP[1:]:
            value = multiply_add(builder, value, r, constant(coefficient))
        value = multiply_add(builder, value, builder.fmul(r, r), builder.fadd(r, constant(1.0)))
        power = builder.add(builder.fptosi(n, _VECTOR_I32), constant_i32(127))
        scale = builder.bitcast(builder.shl(power, constant_i32(23)), VECTOR_IR)
        small = builder.fcmp_ordered("<", args[0], constant(_SMALLEST))
        return builder.select(small, constant(0.0), builder.fmul(value, scale))

    return VECTOR(VECTOR), code


# ---- between threads


@intrinsic
def atomic_get(typingctx, address):
    def code(context, builder, sig, args):
        return builder.load_atomic(pointer(builder, args[0], _I64), "acquire", 8)

    return types.int64(types.int64), code


@intrinsic
def atomic_put(typingctx, address, value):
    def code(context, builder, sig, args):
        builder.store_atomic(args[1], pointer(builder, args[0], _I64), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def atomic_add(typingctx, address, value):
    """Adds; returns what was there before."""

    def code(context, builder, sig, args):
        return builder.atomic_rmw("add", pointer(builder, args[0], _I64), args[1], "acq_rel")

    return types.int64(types.int64, types.int64), code


@intrinsic
def compare_and_swap(typingctx, address, expected, value):
    """Store `value` where `expected` is; return whether it was."""

    def code(context, builder, sig, args):
        target = pointer(builder, args[0], _I64)
        result = builder.cmpxchg(target, args[1], args[2], "acq_rel", "acquire")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), code


_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


@intrinsic
def pause(typingctx):
    """Tell the core that it spins."""

    def code(context, builder, sig, args):
        machine = platform.machine().lower()
        if machine in _X86:
            _call_void(builder, "llvm.x86.sse2.pause")
        elif machine in _ARM:
            _call_void(builder, "llvm.aarch64.hint", _I32(1))  # yield
        return context.get_dummy_value()

    return types.void(), code


def _call_void(builder: ir.IRBuilder, name: str, *values: ir.Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    intrinsic_function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(intrinsic_function, values)


# ---- what the host process lends


@intrinsic
def call2(typingctx, function, a, b):
    """Call the C function int64 f(int64, int64) at an address."""

    def code(context, builder, sig, args):
        kind = ir.FunctionType(_I64, [_I64, _I64])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64), code
