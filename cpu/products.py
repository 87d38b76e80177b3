"""Products of small matrices, at the speed of the machine's multiply-add units.

``target[r] += sum_t weight[r, t] vector[t]`` with 16 or so lanes of sums in registers: for each
term, a few vectors of lanes are loaded once and each is multiplied by a few weights. All three
operands are flat arrays in which the caller says where things stand, so the rows may lie packed in
a tile or scattered over a head, and any of them may be read as its own transpose.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import overload

from yoso_core.cpu.compiling import OPTIONS, helper
from yoso_core.cpu.lanes import LANES, Lanes, intrinsic

TERM_BLOCK = 128
"""Terms that are added up by themselves before they join the target: sums of sums round less."""


WIDE_REGISTERS = get_host_cpu_features().get("avx512f", False)
"""Whether a register holds sixteen floats, and there are 32 of them. Sums are kept in registers, so
this decides how many at a time.
"""


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _lanes_at(builder: Any, pointer: Any) -> Any:
    return builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, LANES).as_pointer())


def _load(builder: Any, pointer: Any, itemsize: int) -> Any:
    value = builder.load(pointer)
    value.align = itemsize
    return value


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
def some_of(typingctx: Any, places: Any, first: Any, last: Any, count: Any) -> Any:
    """``places[first], places[first + 1], ...``, ``count`` of them, a constant; past ``last`` that
    one again.
    """
    if not isinstance(count, types.IntegerLiteral):
        return None
    chosen = types.UniTuple(types.intp, count.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = _data(context, builder, places, args[0])
        start, end = (context.cast(builder, args[i], signature.args[i], types.intp) for i in (1, 2))
        result = ir.Constant(context.get_value_type(chosen), ir.Undefined)
        for u in range(count.literal_value):
            index = builder.add(start, _word(u))
            index = builder.select(builder.icmp_signed("<", index, end), index, end)
            result = builder.insert_value(result, builder.load(builder.gep(data, [index])), u)
        return result

    return chosen(places, first, last, count), codegen


@intrinsic
def transpose(typingctx: Any, source: Any, places: Any, shift: Any, target: Any, at: Any, step: Any) -> Any:
    """Sixteen rows of 16 entries, ``source[places[t] + shift + c]``, crosswise: to
    ``target[at + c * step + t]``.

    Four rounds of shuffles: each interleaves the first half of the rows with the second, and after
    four every entry is in its place.
    """
    if len(places) != LANES:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        itemsize = source.dtype.bitwidth // 8
        shift_, at_, step_ = (context.cast(builder, args[i], signature.args[i], types.intp) for i in (2, 4, 5))
        start = builder.gep(_data(context, builder, source, args[0]), [shift_])
        end = builder.gep(_data(context, builder, target, args[3]), [at_])
        rows = [_load(builder, _lanes_at(builder, builder.gep(start, [builder.extract_value(args[1], t)])), itemsize) for t in range(LANES)]
        halves = [[lane // 2 + lane % 2 * LANES + half for lane in range(LANES)] for half in (0, LANES // 2)]
        masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), half) for half in halves]
        for _ in range(4):
            rows = [builder.shuffle_vector(rows[t], rows[t + LANES // 2], mask) for t in range(LANES // 2) for mask in masks]
        for c, row in enumerate(rows):
            builder.store(row, _lanes_at(builder, builder.gep(end, [builder.mul(step_, _word(c))]))).align = itemsize
        return context.get_dummy_value()

    return types.void(source, places, shift, target, at, step), codegen


@intrinsic
def combine(typingctx: Any, sums: Any, weights: Any, places: Any, term: Any, vectors: Any, at: Any) -> Any:
    """``sums[u * V + v] + weights[places[u] + term] * vectors[at + 16
    v]`` for every place ``u`` and ``V = len(sums) / len(places)``.
    """
    at_once = len(sums) // len(places)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        itemsize = weights.dtype.bitwidth // 8
        term_, at_ = (context.cast(builder, args[i], signature.args[i], types.intp) for i in (3, 5))
        weight_data, vector_data = (_data(context, builder, signature.args[i], args[i]) for i in (1, 4))
        start = builder.gep(vector_data, [at_])
        vector = [_load(builder, _lanes_at(builder, builder.gep(start, [_word(v * LANES)])), itemsize) for v in range(at_once)]
        name = f"llvm.fmuladd.v{LANES}f{weights.dtype.bitwidth}"
        fused = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector[0].type, [vector[0].type] * 3), name)
        undefined, nowhere = ir.Constant(vector[0].type, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        result = args[0]
        for u in range(len(places)):
            scalar = builder.load(builder.gep(builder.gep(weight_data, [builder.extract_value(args[2], u)]), [term_]))
            weight = builder.shuffle_vector(builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0)), undefined, nowhere)
            for v in range(at_once):
                i = u * at_once + v
                result = builder.insert_value(result, builder.call(fused, [weight, vector[v], builder.extract_value(args[0], i)]), i)
        return result

    return sums(sums, weights, places, term, vectors, at), codegen


def _pointers(context: Any, builder: Any, signature: Any, args: Any) -> list[Any]:
    """Of every sum in ``target``, for the arguments ``(target, places, shift, sums)``."""
    target, places, _, sums = signature.args
    data, shift = _data(context, builder, target, args[0]), context.cast(builder, args[2], signature.args[2], types.intp)
    starts = [builder.gep(data, [builder.add(builder.extract_value(args[1], u), shift)]) for u in range(len(places))]
    return [_lanes_at(builder, builder.gep(start, [_word(v * LANES)])) for start in starts for v in range(len(sums) // len(places))]


@intrinsic
def write_to(typingctx: Any, target: Any, places: Any, shift: Any, sums: Any) -> Any:
    """``target[places[u] + shift + 16 v] = sums[u * V + v]``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for i, pointer in enumerate(_pointers(context, builder, signature, args)):
            builder.store(builder.extract_value(args[3], i), pointer).align = target.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(target, places, shift, sums), codegen


@intrinsic
def add_to(typingctx: Any, target: Any, places: Any, shift: Any, sums: Any) -> Any:
    """``target[places[u] + shift + 16 v] += sums[u * V + v]``. A place that stands twice counts
    once.
    """
    itemsize = target.dtype.bitwidth // 8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointers = _pointers(context, builder, signature, args)
        before = [_load(builder, pointer, itemsize) for pointer in pointers]
        for i, pointer in enumerate(pointers):
            builder.store(builder.fadd(before[i], builder.extract_value(args[3], i)), pointer).align = itemsize
        return context.get_dummy_value()

    return types.void(target, places, shift, sums), codegen


def _columns(rows_at_once: int, vectors_at_once: int) -> Callable[..., Any]:
    """`product` for as many vectors of lanes, so many rows at a time."""
    count = rows_at_once * vectors_at_once

    @helper
    def columns(target, target_rows, target_at, weights, weight_rows, weight_terms, vectors, vector_rows, vector_at, rows, terms, fresh):
        for first in range(0, rows, rows_at_once):
            here = some_of(target_rows, first, rows - 1, rows_at_once)
            there = some_of(weight_rows, first, rows - 1, rows_at_once)
            for block in range(0, terms, TERM_BLOCK):
                sums = zeros(target, count)
                for t in range(block, min(block + TERM_BLOCK, terms)):
                    sums = combine(sums, weights, there, weight_terms[t], vectors, vector_rows[t] + vector_at)
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


def product(target, target_rows, target_at, weights, weight_rows, weight_terms, vectors, vector_rows, vector_at, rows, terms, width, fresh):
    """``target[r, c] += sum_t weight[r, t] vector[t, c]`` for ``r < rows``, ``t < terms`` and
    ``c < width``, a multiple of 16, where

    - ``target[r, c]`` is ``target[target_rows[r] + target_at + c]``,
    - ``weight[r, t]`` is ``weights[weight_rows[r] + weight_terms[t]]``,
    - ``vector[t, c]`` is ``vectors[vector_rows[t] + vector_at + c]``.

    ``fresh``: the target is written, not added to. Terms are added in order, `TERM_BLOCK` at a time
    from zero. For kernels only.
    """
    raise NotImplementedError


# Merged into its caller, with every array named in every call: a call proper, or a tuple of arrays,
# counts references to each array up and down, 300 cycles in all, where a 64 x 64 x 64 product takes
# 8,200.
@overload(product, jit_options={**OPTIONS, "forceinline": True})  # type: ignore[typeddict-item]
def _product(
    target, target_rows, target_at, weights, weight_rows, weight_terms, vectors, vector_rows, vector_at, rows, terms, width, fresh
):
    most, wide, double, single = _widths(target.dtype)

    def product(
        target, target_rows, target_at, weights, weight_rows, weight_terms, vectors, vector_rows, vector_at, rows, terms, width, fresh
    ):
        full = width - width % (most * LANES)
        for c in range(0, full, most * LANES):
            wide(
                target,
                target_rows,
                target_at + c,
                weights,
                weight_rows,
                weight_terms,
                vectors,
                vector_rows,
                vector_at + c,
                rows,
                terms,
                fresh,
            )
        if width - full >= 2 * LANES:
            double(
                target,
                target_rows,
                target_at + full,
                weights,
                weight_rows,
                weight_terms,
                vectors,
                vector_rows,
                vector_at + full,
                rows,
                terms,
                fresh,
            )
            full += 2 * LANES
        if full < width:
            single(
                target,
                target_rows,
                target_at + full,
                weights,
                weight_rows,
                weight_terms,
                vectors,
                vector_rows,
                vector_at + full,
                rows,
                terms,
                fresh,
            )

    return product


@helper
def dot_products(target, target_rows, weights, weight_rows, shift, vectors, vector_rows, rows, terms):
    """`product` of one vector of lanes, with consecutive terms: ``weight[r, t]`` is
    ``weights[weight_rows[r] + shift + t]``; the target is written. Sums over even and over odd
    terms, so that there are enough of them to keep the multiply-add units busy.
    """
    for first in range(0, rows, 4):
        here, there = some_of(target_rows, first, rows - 1, 4), some_of(weight_rows, first, rows - 1, 4)
        even, odd = zeros(target, 4), zeros(target, 4)
        for t in range(0, terms - 1, 2):
            even = combine(even, weights, there, shift + t, vectors, vector_rows[t])
            odd = combine(odd, weights, there, shift + t + 1, vectors, vector_rows[t + 1])
        if terms % 2:
            even = combine(even, weights, there, shift + terms - 1, vectors, vector_rows[terms - 1])
        write_to(target, here, 0, even)
        add_to(target, here, 0, odd)
