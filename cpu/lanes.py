"""Sixteen numbers side by side: the vector type that the CPU kernels are written in.

LLVM vectorizes a plain loop when it can prove that nothing overlaps; on these kernels it often
cannot, and then they run ten times slower. So they say what they mean: ``a = load(x, i)`` takes
sixteen consecutive entries, ``a + b`` adds them lane by lane, ``store(x, i, a)`` puts them back.
LLVM maps this onto whatever the machine has: one register with AVX-512, two with AVX2, four with
NEON or SSE. Lane by lane these are ordinary IEEE operations, so the bits do not depend on the
machine.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, overload, register_model

LANES = 16

intrinsic: Any = extending.intrinsic
"""Untyped on purpose: Numba's annotation is that of the function that generates code, not of the
one that kernels call.
"""

_INT16, _INT32 = ir.IntType(16), ir.IntType(32)


class Lanes(types.Type):
    """Numba's name for sixteen values of one scalar type."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_value_type(), LANES))


def _splat(builder: Any, scalar: Any) -> Any:
    vector = ir.VectorType(scalar.type, LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, LANES), None))


def _indices(context: Any, builder: Any, index_type: Any, index: Any) -> list[Any]:
    """An integer or a tuple of integers of any width as a list of machine words."""
    is_tuple: bool = isinstance(index_type, types.BaseTuple)
    given = zip(index_type, cgutils.unpack_tuple(builder, index), strict=True) if is_tuple else [(index_type, index)]
    return [context.cast(builder, value, value_type, types.intp) for value_type, value in given]


def _address(context: Any, builder: Any, array_type: Any, array: Any, indices: list[Any]) -> Any:
    """Address of an entry. The step along the last axis is known to be one entry, which spares the
    kernels a multiplication each time.
    """
    struct = context.make_array(array_type)(context, builder, array)
    strides = cgutils.unpack_tuple(builder, struct.strides, array_type.ndim)
    strides[-1] = ir.Constant(strides[-1].type, array_type.dtype.bitwidth // 8)
    shape = cgutils.unpack_tuple(builder, struct.shape, array_type.ndim)
    return cgutils.get_item_pointer2(context, builder, struct.data, shape, strides, "A", indices)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, indices: list[Any]) -> tuple[Any, int]:
    """Address of the first lane, as a pointer to a vector, and the alignment that is certain."""
    vector = ir.VectorType(context.get_data_type(array_type.dtype), LANES)
    address = _address(context, builder, array_type, array, indices)
    return builder.bitcast(address, vector.as_pointer()), array_type.dtype.bitwidth // 8


def loaded(builder: Any, pointer: Any, align: int) -> Any:
    """What stands at a pointer, for intrinsics; ``align`` in bytes."""
    value = builder.load(pointer)
    value.align = align
    return value


@intrinsic
def load(typingctx: Any, array: Any, index: Any) -> Any:
    """Sixteen entries from ``array[index]`` on along the last axis, which must be contiguous.
    ``index`` is an integer or a tuple.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, align = _pointer(context, builder, signature.args[0], args[0], _indices(context, builder, signature.args[1], args[1]))
        return loaded(builder, pointer, align)

    return Lanes(array.dtype)(array, index), codegen


@intrinsic
def store(typingctx: Any, array: Any, index: Any, lanes: Any) -> Any:
    """Write sixteen lanes to ``array[index]`` and on; of integers the low bits, where those of the
    array are narrower.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, align = _pointer(context, builder, signature.args[0], args[0], _indices(context, builder, signature.args[1], args[1]))
        wanted = pointer.type.pointee
        narrower = isinstance(array.dtype, types.Integer) and wanted.element.width < args[2].type.element.width
        builder.store(builder.trunc(args[2], wanted) if narrower else args[2], pointer).align = align
        return context.get_dummy_value()

    return types.void(array, index, lanes), codegen


# Numbers that are stored in half precision. Neither NumPy nor Numba computes with them, so kernels
# see their bits: int16 are those of float16, uint16 those of bfloat16. They are widened to float32
# where they are read, and rounded to nearest, ties to even, where they are written.


def float_type(stored: Any) -> Any:
    """Numba's type of what is computed with numbers of a stored type."""
    return types.float32 if stored in (types.int16, types.uint16) else stored


def _shaped(like: Any, scalar: Any) -> Any:
    """A scalar type, or lanes of it where ``like`` has lanes."""
    return ir.VectorType(scalar, LANES) if isinstance(like, ir.VectorType) else scalar


def _widened(builder: Any, value: Any, stored: Any) -> Any:
    """One number or lanes, as they are computed with."""
    if stored == types.int16:
        return builder.fpext(builder.bitcast(value, _shaped(value.type, ir.HalfType())), _shaped(value.type, ir.FloatType()))
    if stored == types.uint16:
        wide = _shaped(value.type, _INT32)
        return builder.bitcast(builder.shl(builder.zext(value, wide), _each(wide, 16)), _shaped(value.type, ir.FloatType()))
    return value


def _rounded(builder: Any, value: Any, stored: Any) -> Any:
    """The opposite."""
    if stored == types.int16:
        return builder.bitcast(builder.fptrunc(value, _shaped(value.type, ir.HalfType())), _shaped(value.type, _INT16))
    if stored == types.uint16:
        wide = _shaped(value.type, _INT32)
        bits = builder.bitcast(value, wide)
        last = builder.and_(builder.lshr(bits, _each(wide, 16)), _each(wide, 1))
        nearest = builder.lshr(builder.add(bits, builder.add(last, _each(wide, 0x7FFF))), _each(wide, 16))
        not_a_number = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(not_a_number, _each(wide, 0x7FC0), nearest), _shaped(value.type, _INT16))
    return value


def _each(shape: Any, number: int) -> Any:
    """A constant, in every lane."""
    return ir.Constant(shape, [number] * LANES if isinstance(shape, ir.VectorType) else number)


@intrinsic
def read(typingctx: Any, array: Any, index: Any) -> Any:
    """`load`, of numbers that may be stored in half precision."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, align = _pointer(context, builder, signature.args[0], args[0], _indices(context, builder, signature.args[1], args[1]))
        return _widened(builder, loaded(builder, pointer, align), array.dtype)

    return Lanes(float_type(array.dtype))(array, index), codegen


@intrinsic
def read_one(typingctx: Any, array: Any, index: Any) -> Any:
    """``array[index]``, likewise; the last axis must be contiguous."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        indices = _indices(context, builder, signature.args[1], args[1])
        return _widened(builder, builder.load(_address(context, builder, signature.args[0], args[0], indices)), array.dtype)

    return float_type(array.dtype)(array, index), codegen


@intrinsic
def write(typingctx: Any, array: Any, index: Any, lanes: Any) -> Any:
    """`store`, to numbers that may be stored in half precision."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, align = _pointer(context, builder, signature.args[0], args[0], _indices(context, builder, signature.args[1], args[1]))
        builder.store(_rounded(builder, args[2], array.dtype), pointer).align = align
        return context.get_dummy_value()

    return types.void(array, index, lanes), codegen


@intrinsic
def write_one(typingctx: Any, array: Any, index: Any, number: Any) -> Any:
    """``array[index] = number``, likewise; the last axis must be contiguous."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        indices = _indices(context, builder, signature.args[1], args[1])
        builder.store(_rounded(builder, args[2], array.dtype), _address(context, builder, signature.args[0], args[0], indices))
        return context.get_dummy_value()

    return types.void(array, index, float_type(array.dtype)), codegen


@intrinsic
def prefetch(typingctx: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of ``array[index]``, which is needed soon. No more than a hint."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = _address(context, builder, signature.args[0], args[0], _indices(context, builder, signature.args[1], args[1]))
        byte = ir.IntType(8).as_pointer()
        function_type = ir.FunctionType(ir.VoidType(), [byte, _INT32, _INT32, _INT32])
        hint = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        to_read, near, of_data = (ir.Constant(_INT32, value) for value in (0, 3, 1))
        builder.call(hint, [builder.bitcast(address, byte), to_read, near, of_data])
        return context.get_dummy_value()

    return types.void(array, index), codegen


@intrinsic
def fill(typingctx: Any, scalar: Any) -> Any:
    """The same number in every lane."""
    return Lanes(scalar)(scalar), lambda context, builder, signature, args: _splat(builder, args[0])


@intrinsic
def fill_from(typingctx: Any, array: Any, index: Any) -> Any:
    """``array[index]`` in every lane; the last axis of ``array`` must be contiguous."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        indices = _indices(context, builder, signature.args[1], args[1])
        return _splat(builder, builder.load(_address(context, builder, signature.args[0], args[0], indices)))

    return Lanes(array.dtype)(array, index), codegen


def _lanewise(floats: str, integers: str) -> Any:
    @intrinsic
    def instruction(typingctx: Any, a: Any, b: Any) -> Any:
        name = floats if isinstance(a.dtype, types.Float) else integers
        return a(a, b), lambda context, builder, signature, args: getattr(builder, name)(*args)

    return instruction


_add, _sub, _mul, _or = _lanewise("fadd", "add"), _lanewise("fsub", "sub"), _lanewise("fmul", "mul"), _lanewise("", "or_")
_div = _lanewise("fdiv", "sdiv")


def _operator(symbol: Callable[..., Any], instruction: Any) -> None:
    def typed(a, b):
        return (lambda a, b: instruction(a, b)) if isinstance(a, Lanes) and a == b else None

    overload(symbol)(typed)


for _symbol, _instruction in (
    (operator.add, _add),
    (operator.sub, _sub),
    (operator.mul, _mul),
    (operator.truediv, _div),
    (operator.or_, _or),
):
    _operator(_symbol, _instruction)


def _llvm_function(builder: Any, name: str, vector: Any, arguments: int) -> Any:
    scalar = "f32" if isinstance(vector.element, ir.FloatType) else "f64"
    function_type = ir.FunctionType(vector, [vector] * arguments)
    return cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{LANES}{scalar}")


def _llvm_lanewise(name: str, arguments: int) -> Any:
    def typed(a: Any, *rest: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.call(_llvm_function(builder, name, args[0].type, arguments), args)

        return a(a, *rest), codegen

    if arguments == 1:
        return intrinsic(lambda typingctx, a: typed(a))
    return intrinsic(lambda typingctx, a, b, c: typed(a, b, c))


absolute = _llvm_lanewise("fabs", 1)
square_root = _llvm_lanewise("sqrt", 1)
multiply_add = _llvm_lanewise("fmuladd", 3)
"""``a * b + c``, fused into one rounding where the machine has the instruction; never used where
bits are promised.
"""


@intrinsic
def weight_where_positive(typingctx: Any, lanes: Any, weight: Any) -> Any:
    """int32 lanes: ``weight`` where a lane is above zero, 0 elsewhere (NaN is not above zero)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        positive = builder.fcmp_ordered(">", args[0], ir.Constant(args[0].type, None))
        return builder.select(positive, _splat(builder, args[1]), ir.Constant(ir.VectorType(_INT32, LANES), None))

    return Lanes(types.int32)(lanes, types.int32), codegen


@intrinsic
def count_where_equal(typingctx: Any, count: Any, lanes: Any, number: Any) -> Any:
    """int32 lanes ``count``, one more where ``lanes`` equals ``number``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        equal = builder.icmp_signed("==", args[1], _splat(builder, args[2]))
        return builder.add(args[0], builder.zext(equal, args[0].type))

    return count(count, lanes, lanes.dtype), codegen


@intrinsic
def to_index(typingctx: Any, lanes: Any) -> Any:
    """Integer lanes as machine words."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = ir.VectorType(context.get_value_type(types.intp), LANES)
        if args[0].type == wide:
            return args[0]
        return builder.sext(args[0], wide) if signature.args[0].dtype.signed else builder.zext(args[0], wide)

    return Lanes(types.intp)(lanes), codegen


@intrinsic
def to_float(typingctx: Any, lanes: Any, like: Any) -> Any:
    """int32 lanes as floats of the type of the scalar ``like``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(args[0], ir.VectorType(args[1].type, LANES))

    return Lanes(like)(lanes, like), codegen


@intrinsic
def where_less(typingctx: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """``yes`` in the lanes where ``a < b``, ``no`` in the others (and where either is NaN)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return yes(a, b, yes, no), codegen


@intrinsic
def all_at_most(typingctx: Any, lanes: Any, limit: Any) -> Any:
    """Whether every lane is ``<= limit``; a NaN is not."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        within = builder.fcmp_ordered("<=", args[0], _splat(builder, args[1]))
        bits = builder.bitcast(within, ir.IntType(LANES))
        return builder.icmp_unsigned("==", bits, ir.Constant(ir.IntType(LANES), (1 << LANES) - 1))

    return types.boolean(lanes, lanes.dtype), codegen


def _by_halves(join: Callable[[Any, Any, Any], Any]) -> Any:
    """All lanes in one, as a tree of halves: the same on every machine."""

    def typed(typingctx: Any, lanes: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            value, width = args[0], LANES
            while width > 1:
                width //= 2
                low, high = (
                    builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(_INT32, width), [start + lane for lane in range(width)]))
                    for start in (0, width)
                )
                value = join(builder, low, high)
            return builder.extract_element(value, ir.Constant(_INT32, 0))

        return lanes.dtype(lanes), codegen

    return intrinsic(typed)


total = _by_halves(lambda builder, low, high: builder.fadd(low, high))
"""The sum of the lanes."""

largest = _by_halves(lambda builder, low, high: builder.select(builder.fcmp_ordered("<", low, high), high, low))
"""The largest of the lanes; a NaN may be lost."""


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 rows of 16 lanes as 16 columns, for intrinsics.

    Four rounds of shuffles: round ``s`` swaps the off-diagonal ``s x s`` blocks of every
    ``2s x 2s`` block. The largest comes first: it moves whole registers, where these hold 8 lanes.
    """
    rows, mask_type = list(rows), ir.VectorType(_INT32, LANES)
    for step in (8, 4, 2, 1):
        upper = ir.Constant(mask_type, [lane if not lane & step else LANES + lane - step for lane in range(LANES)])
        lower = ir.Constant(mask_type, [lane + step if not lane & step else LANES + lane for lane in range(LANES)])
        for r in range(LANES):
            if not r & step:
                a, b = rows[r], rows[r + step]
                rows[r], rows[r + step] = builder.shuffle_vector(a, b, upper), builder.shuffle_vector(a, b, lower)
    return rows


@intrinsic
def load_transposed(typingctx: Any, array: Any, index: Any, tile: Any, start: Any) -> Any:
    """`read` 16 rows of 16 entries from ``array[*index]`` on and store them to ``tile[start:]`` as
    16 columns, one row of the tile each.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array_type, index_type, tile_type = signature.args[0], signature.args[1], signature.args[2]
        indices = _indices(context, builder, index_type, args[1])
        rows = []
        for r in range(LANES):
            at = [*indices[:-2], builder.add(indices[-2], ir.Constant(indices[-2].type, r)), indices[-1]]
            pointer, align = _pointer(context, builder, array_type, args[0], at)
            rows.append(_widened(builder, loaded(builder, pointer, align), array_type.dtype))
        rows = transposed(builder, rows)
        start = context.cast(builder, args[3], signature.args[3], types.intp)
        for r in range(LANES):
            at = [builder.add(start, ir.Constant(start.type, r * LANES))]
            pointer, align = _pointer(context, builder, tile_type, args[2], at)
            builder.store(rows[r], pointer).align = align
        return context.get_dummy_value()

    return types.void(array, index, tile, start), codegen
