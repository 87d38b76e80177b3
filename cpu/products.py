"""Products of small matrices, at the speed of the machine's multiply-add units.

``target[r] += sum_t weight[r, t] vector[t]``, with the sums of a few rows in registers: for each
term, a few vectors of lanes are loaded once and each is multiplied by a few weights.

All three operands are flat arrays, and the caller gives the *offsets*, where in them the rows
begin: as an array, or as one number where they lie that far apart. So the rows may be packed in a
tile or scattered over a head, and any operand may be read as its own transpose.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils, config
from numba.extending import overload

from yoso_core.cpu.compiling import MERGED, helper
from yoso_core.cpu.lanes import LANES, Lanes, intrinsic, loaded, transposed

TERM_BLOCK = 128
"""Terms that are added up by themselves before they join the target: sums of sums round less."""


def has_wide_registers(features: str | None) -> bool:
    """Whether code has AVX-512 that is compiled for ``features``, such as ``"+avx2,+fma"``, or for
    this processor where they are ``None``.
    """
    return get_host_cpu_features().get("avx512f", False) if features is None else "+avx512f" in features.split(",")


WIDE_REGISTERS = has_wide_registers(config.CPU_FEATURES)  # type: ignore[attr-defined]
"""Whether a register holds sixteen floats, and there are 32 of them. Sums are kept in registers, so
this decides how many at a time.
"""


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _lanes_at(builder: Any, pointer: Any) -> Any:
    return builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, LANES).as_pointer())


def _offset(context: Any, builder: Any, offsets_type: Any, offsets: Any, row: Any) -> Any:
    if isinstance(offsets_type, types.Integer):
        return builder.mul(row, context.cast(builder, offsets, offsets_type, types.intp))
    return builder.load(builder.gep(_data(context, builder, offsets_type, offsets), [row]))


def _word(number: int) -> Any:
    return ir.Constant(ir.IntType(types.intp.bitwidth), number)  # type: ignore[attr-defined]


@intrinsic
def zeros(typingctx: Any, like: Any, count: Any) -> Any:
    """A tuple of ``count``, a constant, lanes of zeros, of the dtype of the array ``like``."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    sums = types.UniTuple(Lanes(like.dtype), count.literal_value)
    return sums(like, count), lambda context, builder, signature, args: ir.Constant(context.get_value_type(sums), None)


@intrinsic
def some_of(typingctx: Any, offsets: Any, first: Any, last: Any, count: Any) -> Any:
    """The offsets of rows ``first, first + 1, ...``: ``count`` of them, a constant. Past ``last``
    that row is repeated.
    """
    if not isinstance(count, types.IntegerLiteral):
        return None
    chosen = types.UniTuple(types.intp, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start, end = (context.cast(builder, args[i], signature.args[i], types.intp) for i in (1, 2))
        result = ir.Constant(context.get_value_type(chosen), ir.Undefined)
        for u in range(count.literal_value):
            row = builder.add(start, _word(u))
            row = builder.select(builder.icmp_signed("<", row, end), row, end)
            result = builder.insert_value(result, _offset(context, builder, offsets, args[0], row), u)
        return result

    return chosen(offsets, first, last, count), codegen


@intrinsic
def offset_of(typingctx: Any, offsets: Any, row: Any) -> Any:
    """Where a row begins: ``offsets[row]``, or ``row * offsets`` where that is a number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _offset(context, builder, offsets, args[0], context.cast(builder, args[1], signature.args[1], types.intp))

    return types.intp(offsets, row), codegen


@intrinsic
def transpose(typingctx: Any, source: Any, offsets: Any, shift: Any, target: Any, at: Any, step: Any) -> Any:
    """Sixteen rows of 16 entries, transposed: ``source[offsets[t] + shift + c]`` to
    ``target[at + c * step + t]``.
    """
    if len(offsets) != LANES:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        itemsize = source.dtype.bitwidth // 8
        shift_, at_, step_ = (context.cast(builder, args[i], signature.args[i], types.intp) for i in (2, 4, 5))
        start = builder.gep(_data(context, builder, source, args[0]), [shift_])
        end = builder.gep(_data(context, builder, target, args[3]), [at_])
        rows = [
            loaded(builder, _lanes_at(builder, builder.gep(start, [builder.extract_value(args[1], t)])), itemsize) for t in range(LANES)
        ]
        for c, row in enumerate(transposed(builder, rows)):
            builder.store(row, _lanes_at(builder, builder.gep(end, [builder.mul(step_, _word(c))]))).align = itemsize
        return context.get_dummy_value()

    return types.void(source, offsets, shift, target, at, step), codegen


@intrinsic
def combine(typingctx: Any, sums: Any, weights: Any, offsets: Any, term: Any, vectors: Any, at: Any) -> Any:
    """``sums[u * V + v] + weights[offsets[u] + term] * vectors[at + 16 v]`` for every offset ``u``,
    with ``V = len(sums) / len(offsets)``.
    """
    at_once = len(sums) // len(offsets)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        itemsize = weights.dtype.bitwidth // 8
        term_, at_ = (context.cast(builder, args[i], signature.args[i], types.intp) for i in (3, 5))
        weight_data, vector_data = (_data(context, builder, signature.args[i], args[i]) for i in (1, 4))
        start = builder.gep(vector_data, [at_])
        vector = [loaded(builder, _lanes_at(builder, builder.gep(start, [_word(v * LANES)])), itemsize) for v in range(at_once)]
        name = f"llvm.fmuladd.v{LANES}f{weights.dtype.bitwidth}"
        fused = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector[0].type, [vector[0].type] * 3), name)
        undefined, nowhere = ir.Constant(vector[0].type, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        result = args[0]
        for u in range(len(offsets)):
            scalar = builder.load(builder.gep(builder.gep(weight_data, [builder.extract_value(args[2], u)]), [term_]))
            weight = builder.shuffle_vector(builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0)), undefined, nowhere)
            for v in range(at_once):
                i = u * at_once + v
                result = builder.insert_value(result, builder.call(fused, [weight, vector[v], builder.extract_value(args[0], i)]), i)
        return result

    return sums(sums, weights, offsets, term, vectors, at), codegen


def _pointers(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Of every sum in ``target``, for the arguments ``(target, offsets, shift, sums)``."""
    target, offsets, _, sums = signature.args
    data, shift = _data(context, builder, target, args[0]), context.cast(builder, args[2], signature.args[2], types.intp)
    starts = [builder.gep(data, [builder.add(builder.extract_value(args[1], u), shift)]) for u in range(len(offsets))]
    return [_lanes_at(builder, builder.gep(start, [_word(v * LANES)])) for start in starts for v in range(len(sums) // len(offsets))]


@intrinsic
def write_to(typingctx: Any, target: Any, offsets: Any, shift: Any, sums: Any) -> Any:
    """``target[offsets[u] + shift + 16 v] = sums[u * V + v]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for i, pointer in enumerate(_pointers(context, builder, signature, args)):
            builder.store(builder.extract_value(args[3], i), pointer).align = target.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(target, offsets, shift, sums), codegen


@intrinsic
def add_to(typingctx: Any, target: Any, offsets: Any, shift: Any, sums: Any) -> Any:
    """``target[offsets[u] + shift + 16 v] += sums[u * V + v]``. An offset that stands twice
    counts once.
    """
    itemsize = target.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = _pointers(context, builder, signature, args)
        before = [loaded(builder, pointer, itemsize) for pointer in pointers]
        for i, pointer in enumerate(pointers):
            builder.store(builder.fadd(before[i], builder.extract_value(args[3], i)), pointer).align = itemsize
        return context.get_dummy_value()

    return types.void(target, offsets, shift, sums), codegen


def _columns(rows_at_once: int, vectors_at_once: int) -> Callable[..., Any]:
    """`product` for as many vectors of lanes, so many rows at a time."""
    count = rows_at_once * vectors_at_once

    @helper
    def columns(
        target,
        target_offsets,
        target_at,
        weights,
        weight_offsets,
        weight_at,
        term_offsets,
        vectors,
        vector_offsets,
        vector_at,
        rows,
        terms,
        fresh,
    ):
        for first in range(0, rows, rows_at_once):
            here = some_of(target_offsets, first, rows - 1, rows_at_once)
            there = some_of(weight_offsets, first, rows - 1, rows_at_once)
            for block in range(0, terms, TERM_BLOCK):
                sums = zeros(target, count)
                for t in range(block, min(block + TERM_BLOCK, terms)):
                    weight, vector = weight_at + offset_of(term_offsets, t), vector_at + offset_of(vector_offsets, t)
                    sums = combine(sums, weights, there, weight, vectors, vector)
                if fresh and block == 0:
                    write_to(target, here, target_at, sums)
                else:
                    add_to(target, here, target_at, sums)

    return columns


def _widths(dtype: Any) -> tuple[Any, ...]:
    """`_columns` for four, two and one vector of lanes (or as many as there are registers for), and
    how many the first takes.
    """
    held = (16 if WIDE_REGISTERS else 4) * 4 // (dtype.bitwidth // 8)
    most = min(4, max(1, held // 4))
    return most, *(_columns(max(2, min(4, held // vectors)), vectors) for vectors in (most, min(2, most), 1))


def product(
    target,
    target_offsets,
    weights,
    weight_offsets,
    term_offsets,
    vectors,
    vector_offsets,
    rows,
    terms,
    width,
    target_at=0,
    weight_at=0,
    vector_at=0,
    fresh=False,
):
    """``target[r, c] += sum_t weight[r, t] vector[t, c]`` for ``r < rows``, ``t < terms`` and
    ``c < width``, a multiple of 16, where

    - ``target[r, c]`` is ``target[target_at + target_offsets[r] + c]``,
    - ``weight[r, t]`` is ``weights[weight_at + weight_offsets[r] + term_offsets[t]]``,
    - ``vector[t, c]`` is ``vectors[vector_at + vector_offsets[t] + c]``.

    Offsets that are a number, say 64, stand for ``0, 64, 128, ...``. ``fresh``: the target is
    written, not added to. Terms are added in order, `TERM_BLOCK` at a time from zero.

    For kernels only, with keyword arguments, which cost nothing.
    """
    raise NotImplementedError


@overload(product, jit_options=MERGED)
def _product(
    target,
    target_offsets,
    weights,
    weight_offsets,
    term_offsets,
    vectors,
    vector_offsets,
    rows,
    terms,
    width,
    target_at=0,
    weight_at=0,
    vector_at=0,
    fresh=False,
):
    most, wide, double, single = _widths(target.dtype)

    def product(
        target,
        target_offsets,
        weights,
        weight_offsets,
        term_offsets,
        vectors,
        vector_offsets,
        rows,
        terms,
        width,
        target_at=0,
        weight_at=0,
        vector_at=0,
        fresh=False,
    ):
        full = width - width % (most * LANES)
        for c in range(0, full, most * LANES):
            wide(
                target=target,
                target_offsets=target_offsets,
                target_at=target_at + c,
                weights=weights,
                weight_offsets=weight_offsets,
                weight_at=weight_at,
                term_offsets=term_offsets,
                vectors=vectors,
                vector_offsets=vector_offsets,
                vector_at=vector_at + c,
                rows=rows,
                terms=terms,
                fresh=fresh,
            )
        if width - full >= 2 * LANES:
            double(
                target=target,
                target_offsets=target_offsets,
                target_at=target_at + full,
                weights=weights,
                weight_offsets=weight_offsets,
                weight_at=weight_at,
                term_offsets=term_offsets,
                vectors=vectors,
                vector_offsets=vector_offsets,
                vector_at=vector_at + full,
                rows=rows,
                terms=terms,
                fresh=fresh,
            )
            full += 2 * LANES
        if full < width:
            single(
                target=target,
                target_offsets=target_offsets,
                target_at=target_at + full,
                weights=weights,
                weight_offsets=weight_offsets,
                weight_at=weight_at,
                term_offsets=term_offsets,
                vectors=vectors,
                vector_offsets=vector_offsets,
                vector_at=vector_at + full,
                rows=rows,
                terms=terms,
                fresh=fresh,
            )

    return product


@helper
def dot_products(target, target_offsets, weights, weight_offsets, weight_at, vectors, vector_offsets, rows, terms):
    """`product` of one vector of lanes, with consecutive terms, where the target is written.

    Even terms are added up by themselves, and odd ones: with `WIDE_REGISTERS` four sums are too few
    to keep the multiply-add units busy.
    """
    for first in range(0, rows, 4):
        here, there = some_of(target_offsets, first, rows - 1, 4), some_of(weight_offsets, first, rows - 1, 4)
        even, odd = zeros(target, 4), zeros(target, 4)
        for t in range(0, terms - 1, 2):
            even = combine(even, weights, there, weight_at + t, vectors, offset_of(vector_offsets, t))
            odd = combine(odd, weights, there, weight_at + t + 1, vectors, offset_of(vector_offsets, t + 1))
        if terms % 2:
            even = combine(even, weights, there, weight_at + terms - 1, vectors, offset_of(vector_offsets, terms - 1))
        write_to(target, here, 0, even)
        add_to(target, here, 0, odd)
