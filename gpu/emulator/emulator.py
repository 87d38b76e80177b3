"""The emulator as a `Device` for launchers."""

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from yoso_core.gpu.cupy_kernels import source
from yoso_core.gpu.device import Arguments, Array, CudaKernel, KernelText, Launch, Shape, in_order, record
from yoso_core.gpu.emulator import build
from yoso_core.gpu.emulator.common import MAX_THREADS, KernelFault, Order, checked_order, launch_sizes, order_here
from yoso_core.gpu.emulator.source_lines import source_lines
from yoso_core.gpu.emulator.traffic import Tally, Totals, checks, is_counted, log_traffic, tallies

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


def _interruptible(run: Callable[[], T], stop: Callable[[], object]) -> T:
    """The result of ``run()``. Signals reach the main thread alone, and only while it runs Python:
    so there another thread runs the kernel, and an exception of a handler calls ``stop()``.

    A handler that launches a kernel waits for that thread, not for itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return run()
    done: Future[T] = Future()

    def in_thread() -> None:
        try:
            done.set_result(run())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=in_thread, name="yoso_core emulator", daemon=True)
    thread.start()
    try:
        return done.result()
    except BaseException:
        stop()
        thread.join()
        raise


class _Range(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("origin", ctypes.c_void_p), ("name", ctypes.c_char_p))


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
        ("checked", ctypes.c_int),
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
    )


class Emulator:
    """A `Device` that runs CUDA C++ kernels on the CPU, one thread at a time.

    Parameters
    ----------
    max_shared : bytes of shared memory for a block; by default those of an H100.
    max_table : bytes that a launcher may take for a table in global memory.
    order : the order of blocks and threads, ``"forward"``, ``"reverse"`` or a seed. The context
        manager `order` overrides it.

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

    def __init__(self, max_shared: int = 227 * 1024, max_table: int = 256 << 20, *, order: Order = "forward") -> None:
        if not 0 <= max_shared <= MAX_SHARED:
            raise ValueError(f"max_shared: got {max_shared}, must be from 0 to {MAX_SHARED}")
        self.max_shared, self.max_table, self.order = max_shared, max_table, checked_order(order)

    def empty(self, shape: Shape, dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def zeros(self, shape: Shape, dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    def launch(self, kernel: CudaKernel | KernelText, grid: Sequence[int], block: Sequence[int], args: Arguments, shared: int = 0) -> None:
        """Run a kernel to its end.

        Parameters
        ----------
        grid, block : one to three sizes.
        args : for a pointer, a C-contiguous array of its type or ``None``; for anything else, a
            NumPy scalar of exactly its type. A pointer to a type of two bytes that the kernel
            defines takes float16, or uint16 with the bits of bfloat16.
        shared : bytes of dynamic shared memory.

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
            checked=checks(),
        )
        launch = library.loaded.cuda_emulator_run
        launch.restype = ctypes.POINTER(_Fault)

        def run(_kept: Any = (arguments, args)) -> tuple[list[Tally], Totals] | None:  # alive as long as the kernel runs
            with _running:
                if fault := launch(ctypes.byref(request)):
                    raise _kernel_fault(function.name, fault.contents)
                return tallies(library.loaded) if flavour == "counted" else None

        record(Launch("emulated", function.name, sizes[0], sizes[1], shared))
        counted = run() if flavour in ("address", "thread") else _interruptible(run, lambda: setattr(request, "stop", 1))
        if counted:
            log_traffic(function.name, *sizes, str(library.path), counted)


def _function(kernel: CudaKernel | KernelText, flavour: str) -> tuple[build.Function, build.Library]:
    kernels = source.kernels_in(kernel.file) if isinstance(kernel, CudaKernel) else ()
    kernels = kernels if kernel.name in kernels else (*kernels, kernel.name)
    library = build.load(kernel.file, source.source_of(kernel), kernels, source.options(kernel), flavour)
    if kernel.name not in library.functions:
        macros = " ".join(f"{name}={value}" for name, value in kernel.defines)
        raise ValueError(f"kernel: {kernel.file} has no kernel {kernel.name!r} when compiled with {macros or 'no macros'}")
    return library.functions[kernel.name], library


class _Arguments:
    """The arguments of one launch as the runtime reads them, checked against the kernel's
    parameters.
    """

    def __init__(self, function: build.Function, args: Sequence[Any]) -> None:
        parameters = function.parameters
        if len(args) != len(parameters):
            raise TypeError(f"{function.name} takes {len(parameters)} arguments, got {len(args)}")
        values = [self._value(function, i, argument) for i, argument in enumerate(args)]
        self._kept = values
        self.pointers = (ctypes.c_void_p * max(len(values), 1))(*(value.ctypes.data for value in values))
        arrays = [(i, x) for i, x in enumerate(args) if isinstance(x, np.ndarray)]
        self.ranges = (_Range * len(arrays))(
            *(_Range(x.ctypes.data, x.ctypes.data + x.nbytes, _origin(x), _parameter_name(function, i).encode()) for i, x in arrays)
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


def _kernel_fault(kernel: str, fault: _Fault) -> KernelFault:
    message, source_line = fault.message.decode(errors="replace"), None
    if fault.file:
        source_line = (fault.file.decode(), int(fault.line))
    elif fault.image:
        found = source_lines(fault.image.decode(), [fault.offset, fault.other_offset])
        source_line, other = found[fault.offset], found[fault.other_offset]
        if fault.other_offset and other:
            message += f" at {other[0]}:{other[1]}"
    file, line = source_line or (None, None)
    thread = tuple(fault.thread) if fault.in_thread else None
    return KernelFault(kernel, message, block=tuple(fault.block), thread=thread, file=file, line=line)
