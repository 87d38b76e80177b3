"""The emulator as a `Device` for launchers."""

import ctypes
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from yoso_core.gpu.cupy_kernels import source
from yoso_core.gpu.device import Arguments, Array, CudaKernel, KernelText, Launch, Shape, in_order, record
from yoso_core.gpu.emulator import build
from yoso_core.gpu.emulator.common import MAX_THREADS, KernelFault, Order, Sizes, checked_order, launch_sizes, order_here
from yoso_core.gpu.emulator.source_lines import source_lines
from yoso_core.gpu.emulator.traffic import Tally, Totals, checks, is_counted, is_counting, log_traffic, tallies

MAX_SHARED = 1 << 20
"""More than any GPU has."""

_flavour: ContextVar[str] = ContextVar("flavour", default="plain")


@contextmanager
def build_for(flavour: str) -> Iterator[None]:
    """Build the kernels that are launched in the body for a sanitizer. The sanitizer's library must
    be in the process from its start.
    """
    token = _flavour.set(flavour)
    try:
        yield
    finally:
        _flavour.reset(token)


# The runtime has one set of fibers, so one launch runs at a time.
_running = threading.Lock()

T = TypeVar("T")


FIRST_LOOK, LOOKS, SOON = 0.25, 0.02, 0.002
"""Seconds before a launch is first looked at; between two looks; between two when a thread was seen
to go round and round, or when the launch shall end.
"""

ONCE_MORE = 20.0
"""Seconds in which a launch that failed is to show more of its fault."""


class _Late(Exception):
    """A launch has taken longer than it may."""

    def __init__(self, fault: KernelFault | None = None) -> None:
        super().__init__(fault)
        self.fault = fault


def _watched(run: Callable[[], T], request: "_Request", look: Callable[[], int], timeout: float | None) -> T:
    """The result of ``run()``, which another thread runs, while this one looks at the kernel now
    and then. Signals reach the main thread alone, and only while it runs Python: so an exception of
    a handler comes through here, and stops the kernel.

    A handler that launches a kernel waits for the thread that runs that one, not for itself.
    """
    done: Future[T] = Future()

    def in_thread() -> None:
        try:
            done.set_result(run())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=in_thread, name="yoso_core emulator", daemon=True)
    end = None if timeout is None else time.monotonic() + timeout
    thread.start()
    try:
        pause = FIRST_LOOK
        while not wait([done], pause if end is None else min(pause, max(end - time.monotonic(), 0))).done:
            if end is not None and time.monotonic() >= end:
                raise _Late
            pause = SOON if look() else LOOKS
        return done.result()
    except BaseException as error:
        if done.done():
            raise
        request.stop = 1
        _join(thread, look)
        stopped = done.exception()
        if isinstance(stopped, KernelFault):
            if isinstance(error, _Late):
                raise _Late(stopped.of(f"has not ended in {timeout:g} s")) from None
            error.add_note(str(stopped))
        raise


def _join(thread: threading.Thread, look: Callable[[], int]) -> None:
    """Wait for a launch that is to end. Whoever interrupts this, too, waits for it."""
    while thread.is_alive():
        try:
            look()
            thread.join(SOON)
        except BaseException:  # the first one is on its way already
            continue


class _Range(ctypes.Structure):
    """An array of a launch: `Range` in `runtime.cpp`."""

    _fields_ = (
        ("host", ctypes.c_void_p),
        ("bytes", ctypes.c_ulonglong),
        ("offset", ctypes.c_ulonglong),
        ("name", ctypes.c_char_p),
        ("element", ctypes.c_uint),
        ("read_only", ctypes.c_int),
        ("argument", ctypes.c_void_p),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("memory", ctypes.c_int),
    )


class _Request(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("max_shared", ctypes.c_uint),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_ulonglong),
        ("ranges", ctypes.POINTER(_Range)),
        ("num_ranges", ctypes.c_int),
        ("constants", ctypes.POINTER(build.Constant)),
        ("checked", ctypes.c_int),
        ("counted", ctypes.c_int),
        ("rehearsed", ctypes.c_int),
        ("stop", ctypes.c_int),
    )


class _Fault(ctypes.Structure):
    _fields_ = (
        ("message", ctypes.c_char * 512),
        ("block", ctypes.c_uint * 3),
        ("thread", ctypes.c_uint * 3),
        ("in_thread", ctypes.c_int),
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int),
        ("image", ctypes.c_char_p),
        ("offset", ctypes.c_ulonglong),
        ("other_offset", ctypes.c_ulonglong),
        ("is_vague", ctypes.c_int),
        ("column", ctypes.c_int),
    )


class _VagueFault(Exception):
    """A fault of which the build that counts could tell more."""

    def __init__(self, fault: KernelFault) -> None:
        super().__init__(fault)
        self.fault = fault


class Emulator:
    """A `Device` that runs CUDA C++ kernels on the CPU, one thread at a time.

    Parameters
    ----------
    max_shared : bytes of shared memory for a block; by default those of an H100.
    max_table : bytes that a launcher may take for a table in global memory.
    order : the order of blocks and threads, ``"forward"``, ``"reverse"`` or a seed. The context
        manager `order` overrides it.
    timeout : seconds after which a launch is ended, with a `KernelFault` that says where it was.

    It can be made anywhere. `launch` raises ``RuntimeError`` if `missing` gives a reason.

    >>> from yoso_core.gpu import KernelText
    >>> text = '''
    ... extern "C" __global__ void block_sum(const float* x, float* sum) {
    ...   __shared__ float part[64];
    ...   const int i = threadIdx.x;
    ...   part[i] = x[blockIdx.x * 64 + i];
    ...   for (int stride = 32; stride > 0; stride /= 2) {
    ...     __syncthreads();
    ...     if (i < stride) part[i] += part[i + stride];
    ...   }
    ...   if (i == 0) sum[blockIdx.x] = part[0];
    ... }'''
    >>> emulator = Emulator()
    >>> x, total = np.ones(128, np.float32), emulator.empty((2,), np.float32)
    >>> emulator.launch(KernelText(text, "block_sum"), grid=(2,), block=(64,), args=(x, total))
    >>> total
    array([64., 64.], dtype=float32)
    """

    xp: ModuleType = np

    def __init__(
        self, max_shared: int = 227 * 1024, max_table: int = 256 << 20, *, order: Order = "forward", timeout: float | None = None
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout: got {timeout!r}, must be a positive number of seconds, or None")
        if not 0 <= max_shared <= MAX_SHARED:
            raise ValueError(f"max_shared: got {max_shared}, must be from 0 to {MAX_SHARED}")
        self.max_shared, self.max_table, self.order, self.timeout = max_shared, max_table, checked_order(order), timeout

    def empty(self, shape: Shape, dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def zeros(self, shape: Shape, dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    def launch(
        self,
        kernel: CudaKernel | KernelText,
        grid: Sizes,
        block: Sizes,
        args: Arguments,
        shared: int = 0,
        *,
        constants: Mapping[str, Array] | None = None,
    ) -> None:
        """Run a kernel to its end.

        The kernel works on copies of the arrays. They go back when it has ended well: after a
        fault, or a Ctrl-C, the arrays are as they were. What the kernel prints is printed when it
        ends, well or not.

        Parameters
        ----------
        grid, block : one to three sizes, or an int.
        args : for a pointer, a C-contiguous array of its type or ``None``; for anything else, a
            NumPy scalar of exactly its type. A pointer to a type of two bytes that the kernel
            defines takes float16, or uint16 with the bits of bfloat16.
        shared : bytes of dynamic shared memory.
        constants : for ``__constant__`` variables that have no value in the text, by their names:
            arrays of their types and sizes, for this launch. To read one that has none is a fault.

        Raises
        ------
        TypeError, ValueError : an argument does not fit its parameter, or the number of arguments
            is wrong.
        KernelFault : a GPU would refuse the launch, or the kernel has a fault.
        RuntimeError : there is no compiler, or it refuses the kernel.
        """
        flavour = _flavour.get()
        if is_counted():
            if flavour != "plain":
                raise RuntimeError(f"count_traffic and checked do not work in a run for the {flavour} sanitizer")
            reason = build.missing_for_counting()
            if reason:
                raise RuntimeError(reason)
            flavour = "counted"
        function, library = _function(kernel, flavour)
        sizes = launch_sizes(function.name, grid, block, shared, self.max_shared, function.max_threads or MAX_THREADS)
        arguments = _Arguments(function, in_order(args, function.parameter_names, function.name))
        record(Launch("emulated", function.name, *sizes, shared))
        try:
            counted = self._run(function, library, sizes, arguments, constants or {}, shared, checks(), flavour, self.timeout)
        except _Late as late:
            raise late.fault or KernelFault(function.name, f"has not ended in {self.timeout:g} s") from None
        except _VagueFault as vague:
            if flavour == "plain" and build.missing_for_counting() is None:
                # The arrays are as they were: once more, with an eye on every access.
                function, library = _function(kernel, "counted")
                arguments = _Arguments(function, arguments.given)
                with suppress(_Late):
                    self._run(function, library, sizes, arguments, constants or {}, shared, 0, "counted", ONCE_MORE, rehearsed=True)
            raise vague.fault from None
        if counted:
            log_traffic(function.name, *sizes, str(library.path), counted)

    def _run(
        self,
        function: build.Function,
        library: build.Library,
        sizes: tuple[Shape, Shape],
        arguments: "_Arguments",
        constants: Mapping[str, Array],
        shared: int,
        checked: int,
        flavour: str,
        timeout: float | None,
        rehearsed: bool = False,
    ) -> tuple[list[Tally], Totals] | None:
        chosen = order_here(self.order)
        request = _Request(
            call=function.call,
            args=ctypes.cast(arguments.pointers, ctypes.c_void_p),
            grid=sizes[0],
            block=sizes[1],
            shared=shared,
            max_shared=self.max_shared,
            order={"forward": 0, "reverse": 1}.get(chosen, 2) if isinstance(chosen, str) else 2,
            seed=0 if isinstance(chosen, str) else int(chosen),
            ranges=arguments.ranges,
            num_ranges=len(arguments.ranges),
            constants=library.constants,
            checked=checked,
            counted=is_counting(),
            rehearsed=rehearsed,
        )
        values = _values_of_constants(function.name, library, constants)
        launch, printed = library.loaded.cuda_emulator_run, ""
        launch.restype = ctypes.POINTER(_Fault)

        def run() -> tuple[list[Tally], Totals] | None:
            nonlocal printed
            while not _running.acquire(timeout=LOOKS):
                if request.stop:
                    raise KernelFault(function.name, "was stopped before it began")
            try:
                for constant in library.each_constant():
                    value = values.get(constant.named.name.decode())
                    constant.is_set = value is not None
                    if value is not None:
                        ctypes.memmove(constant.begin, value.ctypes.data, constant.bytes)
                fault = launch(ctypes.byref(request))
                printed = _printed(library.loaded)
                if fault:
                    raise _kernel_fault(function, fault.contents, arguments.null)
                return tallies(library.loaded) if request.counted else None
            finally:
                _running.release()

        try:
            if flavour in ("address", "thread"):
                return run()
            return _watched(run, request, library.loaded.cuda_emulator_look, timeout)
        finally:
            if printed:
                sys.stdout.write(printed)


def _values_of_constants(kernel: str, library: build.Library, constants: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays, checked against the variables that they are for."""
    there = {constant.named.name.decode(): constant for constant in library.each_constant()}
    values = {}
    for name, given in constants.items():
        if name not in there:
            raise ValueError(f"constants: {kernel} has no __constant__ {name!r} without a value; it has {', '.join(there) or 'none'}")
        value, constant = np.ascontiguousarray(given), there[name]
        entries = constant.bytes // constant.entry.component
        if not _fits(constant.entry, value.dtype) or value.nbytes != constant.bytes:
            raise TypeError(
                f"constants: {name} is {entries} of {_dtype_name(constant.entry)}, got an array of {value.dtype} of shape {value.shape}"
            )
        values[name] = value
    return values


def _printed(library: ctypes.CDLL) -> str:
    """What the last launch has printed."""
    missing = ctypes.c_ulonglong()
    library.cuda_emulator_printed.restype = ctypes.c_char_p
    text = str(library.cuda_emulator_printed(ctypes.byref(missing)).decode(errors="replace"))
    return text + f"[{missing.value:,} more calls of printf]\n" if missing.value else text


def _function(kernel: CudaKernel | KernelText, flavour: str) -> tuple[build.Function, build.Library]:
    if isinstance(kernel, KernelText):
        name = kernel.name.partition("<")[0]
        if re.search(rf"\btemplate\s*<[^;{{}}]*>[^;{{}}]*\b__global__\b[^;{{}}]*?\b{re.escape(name)}\s*\(", kernel.text):
            raise ValueError(f'kernel: {name} is a template: write an extern "C" kernel that calls what it does, as a __device__ function')
    kernels = source.kernels_in(kernel.file) if isinstance(kernel, CudaKernel) else ()
    kernels = kernels if kernel.name in kernels else (*kernels, kernel.name)
    library = build.load(kernel.file, source.source_of(kernel), kernels, source.options(kernel), flavour)
    if kernel.name not in library.functions:
        macros = " ".join(f"{name}={value}" for name, value in kernel.defines)
        there = ", ".join(sorted({*library.functions, *source.KERNEL.findall(source.source_of(kernel))} - {kernel.name}))
        raise ValueError(
            f"kernel: {kernel.file} has no kernel {kernel.name!r} when compiled with {macros or 'no macros'}"
            + (f"; it has {there}" if there else "")
        )
    return library.functions[kernel.name], library


class _Arguments:
    """The arguments of one launch as the runtime reads them, checked against the kernel's
    parameters.
    """

    def __init__(self, function: build.Function, args: Sequence[Any]) -> None:
        parameters = function.parameters
        if len(args) != len(parameters):
            raise TypeError(f"{function.name} takes {len(parameters)} arguments, got {len(args)}")
        self.given = args  # alive as long as the kernel runs
        self.values = [self._value(function, i, argument) for i, argument in enumerate(args)]
        self.pointers = (ctypes.c_void_p * max(len(self.values), 1))(*(value.ctypes.data for value in self.values))
        self.null = [_parameter_name(function, i) for i, x in enumerate(args) if x is None]
        arrays = [(i, x) for i, x in enumerate(args) if isinstance(x, np.ndarray)]
        self.ranges = (_Range * len(arrays))(*(self._range(function, i, x) for i, x in arrays))

    def _range(self, function: build.Function, i: int, x: Array) -> _Range:
        at = x.ctypes.data
        return _Range(
            host=at,
            bytes=x.nbytes,
            offset=at - _origin(x),
            name=_parameter_name(function, i).encode(),
            element=function.parameters[i].size,
            read_only=not x.flags.writeable,
            argument=self.values[i].ctypes.data,
        )

    @staticmethod
    def _value(function: build.Function, i: int, argument: Any) -> Array:
        """The bytes of one argument, as an array of one entry. For a pointer it is the address."""
        parameter, name = function.parameters[i], f"{function.name}: argument {i}, {_parameter_name(function, i)}"
        if not parameter.is_pointer:
            expected = _dtype_name(parameter)
            if not isinstance(argument, np.generic):
                raise TypeError(f"{name}: got {_kind_of(argument)}, must be a NumPy scalar of type {expected}")
            if not _fits(parameter, argument.dtype):
                raise TypeError(f"{name}: got a {argument.dtype} scalar, must be {expected}")
            return np.array([argument])
        if argument is None:
            return np.zeros(1, np.uintp)
        if not isinstance(argument, np.ndarray):
            raise TypeError(f"{name}: got {_kind_of(argument)}, must be an array of {_dtype_name(parameter)}, or None for a null pointer")
        if not _fits(parameter, argument.dtype):
            raise TypeError(f"{name}: got an array of {argument.dtype}, must be {_dtype_name(parameter)}")
        if not argument.flags.c_contiguous:
            raise ValueError(f"{name}: the array is not C-contiguous; pass numpy.ascontiguousarray of it")
        if argument.size and argument.ctypes.data % parameter.alignment:
            raise ValueError(f"{name}: the array's address is no multiple of {parameter.alignment}, as {_dtype_name(parameter)} needs it")
        return np.array([argument.ctypes.data], np.uintp)


def _origin(x: Array) -> int:
    """The start of the memory that an array is a view of. On a GPU it is a multiple of 512."""
    while isinstance(x.base, np.ndarray):
        x = x.base
    return int(x.ctypes.data)


def _parameter_name(function: build.Function, i: int) -> str:
    return function.parameter_names[i] if len(function.parameter_names) == len(function.parameters) else f"number {i}"


def _kind_of(argument: Any) -> str:
    return f"an array of {argument.dtype}" if isinstance(argument, np.ndarray) else f"{argument!r} ({type(argument).__name__})"


def _dtype_name(parameter: build.Parameter) -> str:
    kind = parameter.kind.decode()
    if kind == "V":
        return "float16 or uint16" if parameter.size == 2 else "any dtype"
    if kind == "b":
        return "bool"
    name = {"f": "float", "i": "int", "u": "uint"}[kind] + str(8 * parameter.component)
    return name if parameter.size == parameter.component else f"{name} in vectors of {parameter.size // parameter.component}"


def _fits(parameter: build.Parameter, dtype: np.dtype[Any]) -> bool:
    kind = parameter.kind.decode()
    if kind == "V":
        return parameter.size != 2 or dtype in (np.float16, np.uint16)
    return dtype.kind == kind and dtype.itemsize == parameter.component


# The end of the text before an index: a name, members of it, and indices.
_INDEXED = re.compile(r"[A-Za-z_]\w*(?:\s*(?:\.|->)\s*[A-Za-z_]\w*|\s*\[[^\[\]]*\])*\s*$")
_INDEX = re.compile(r"index (-?\d+) in an array of type '.*?\[(\d+)\]")


def _index_message(message: str, line: str, column: int) -> str:
    """The message with the name of the array, which is found before the end of an index in a line.

    >>> _index_message("index 17 in an array of type 'float [17]'", "  x = As[0][i + 1];", 17)
    'As[0][17] is used, As[0] has 17 entries'
    """
    opened, depth = column - 1, 1  # of the bracket that is open there
    while depth and opened > 0:
        opened -= 1
        depth += (line[opened : opened + 1] == "]") - (line[opened : opened + 1] == "[")
    array, found = _INDEXED.search(line[:opened]), _INDEX.match(message)
    if not array or not found:
        return message
    name = array[0].strip()
    return f"{name}[{found[1]}] is used, {name} has {found[2]} entr{'y' if found[2] == '1' else 'ies'}"


def _kernel_fault(function: build.Function, fault: _Fault, null: Sequence[str]) -> KernelFault | _VagueFault:
    """``null``: the names of the parameters that are null pointers."""
    message, source_line = fault.message.decode(errors="replace"), None
    if fault.file:
        source_line = (fault.file.decode(), int(fault.line))
    elif fault.image:
        found = source_lines(fault.image.decode(), [fault.offset, fault.other_offset])
        source_line, other = found[fault.offset], found[fault.other_offset]
        if fault.other_offset and other:
            message += f" at {other[0]}:{other[1]}"
    file, line = source_line or (None, None)
    if fault.column and source_line:
        message = _index_message(message, function.lines.get(source_line, ""), fault.column)
    thread = tuple(fault.thread) if fault.in_thread else None
    if "null pointer" in message and null:
        message += f" (None was passed for {', '.join(null)})"
    block = tuple(fault.block) if fault.in_thread or not fault.is_vague else None
    made = KernelFault(function.name, message, block=block, thread=thread, file=file, line=line)
    return _VagueFault(made) if fault.is_vague else made
