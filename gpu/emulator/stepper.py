"""A device that runs the Python source of Numba's CUDA kernels on the CPU, thread by thread, and
checks them.

Every CUDA thread is a greenlet. It runs until it meets a barrier or ends, then the next thread of
the block has its turn. No two threads run at the same time, and the order of turns is chosen. So a
result can be repeated, and a result that depends on the order shows under another one (`order`).

The stepper reports, as a `KernelFault` that names the kernel, block, thread and line:

- an index out of bounds, of a global, shared or local array; and a negative one, which in a kernel
  is seldom meant, though Numba counts it from the end;
- a barrier at which some threads of a block wait while others wait at another barrier, or have left
  the kernel: hardware lets threads go that have ended, so in the emulator of CUDA C++ `checked`
  reports these, and here every launch does;
- threads that wait for each other for ever, at a barrier or by a compare-and-swap that never
  succeeds (a loop that only reads, and waits for another thread to write, never ends here);
- any exception in a thread.

Shared and local memory begins as NaN, and as -1 in arrays of integers. So memory that was not
initialized shows in the result. It does not look for races: `checked` does, for CUDA C++.

Python's integers stand in for integers of every width and do not wrap around. Sums in float32 are
taken in float32. Numba's rule that a float32 and an int64 make a float64 does not hold: here they
make a float32.
"""

import functools
import importlib.util
import itertools
import linecache
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CellType, CodeType, FrameType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from yoso_core.gpu.device import Arguments, Launch, Shape, in_order, record
from yoso_core.gpu.emulator.common import KernelFault, Sizes, launch_sizes, order_here

T = TypeVar("T")

_STOPS = frozenset({"syncthreads", "syncthreads_count", "syncthreads_and", "syncthreads_or", "cas", "compare_and_swap"})
"""Functions in which a thread may wait for others. A kernel that names none of them needs no
greenlets.
"""

_PATIENCE = 1000
"""Turns of a thread whose compare-and-swap fails, before it counts as waiting for ever."""


def missing() -> str | None:
    """Why the stepper cannot run here, and what to install; ``None`` if it can.

    >>> missing() is None or "pip install" in missing()
    True
    """
    for package in ("numba", "greenlet"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package!r} is not installed: pip install {package}"
    return None


class _Fault(RuntimeError):
    """A fault of a thread, before its source line is known."""


@dataclass(frozen=True)
class Step:
    """One event of `Stepper.trace`: a thread is about to run a line, or all threads of a block have
    met at a barrier.
    """

    block: Shape
    thread: Shape | None
    """``None`` at a barrier, which all threads have reached."""
    line: int
    text: str
    """The text of the line."""
    shared: dict[str, NDArray[Any]]
    """At a barrier, copies of the block's shared arrays, by their names in the kernel."""


class Stepper:
    """A `Device` with NumPy arrays. Its kernels are functions under `numba.cuda.jit`, or plain
    functions written like them.

    Parameters
    ----------
    max_shared : bytes of shared memory for a block; Numba has 48 KiB on every GPU.
    max_table : bytes that a launcher may take for a table in global memory.

    >>> from numba import cuda
    >>> @cuda.jit
    ... def reverse(x):
    ...     copy = cuda.shared.array(4, x.dtype)
    ...     i = cuda.threadIdx.x
    ...     copy[i] = x[i]
    ...     cuda.syncthreads()
    ...     x[i] = copy[3 - i]
    >>> x = np.arange(4.0)
    >>> stepper = Stepper()
    >>> stepper.launch(reverse, grid=(1,), block=(4,), args=(x,))
    >>> x
    array([3., 2., 1., 0.])

    A trace tells each step:

    >>> steps = stepper.trace(reverse, grid=(1,), block=(4,), args=(x,))
    >>> steps[0].thread, steps[0].line > 0
    ((0, 0, 0), True)
    >>> [step.shared["copy"] for step in steps if step.thread is None]
    [array([3., 2., 1., 0.])]
    """

    def __init__(self, max_shared: int = 48 << 10, max_table: int = 64 << 20) -> None:
        self.xp: ModuleType = np
        self.max_shared, self.max_table = max_shared, max_table

    def empty(self, shape: Shape, dtype: Any) -> NDArray[Any]:
        """A new array of NaN, or of -1 for integers: an entry that no kernel writes shows."""
        return _poisoned(shape, dtype)

    def zeros(self, shape: Shape, dtype: Any) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def launch(self, kernel: Any, grid: Sizes, block: Sizes, args: Arguments, shared: int = 0) -> None:
        """Run a kernel to its end. Raises `KernelFault` for a fault of the kernel, and for a launch
        that a GPU would refuse.
        """
        self._execute(kernel, grid, block, args, shared, None)

    def trace(self, kernel: Any, grid: Sizes, block: Sizes, args: Arguments, shared: int = 0) -> list[Step]:
        """Run a kernel as `launch` does, and return what happened: every line that a thread ran and
        every barrier, in their order.
        """
        steps: list[Step] = []
        self._execute(kernel, grid, block, args, shared, steps)
        return steps

    def _execute(self, kernel: Any, grid: Sizes, block: Sizes, args: Arguments, shared: int, steps: list[Step] | None) -> None:
        name = getattr(kernel, "py_func", kernel).__name__
        grid_dim, block_dim = launch_sizes(name, grid, block, shared, self.max_shared)
        execution = _Execution(kernel, grid_dim, block_dim, args, shared=shared, max_shared=self.max_shared, steps=steps)
        record(Launch("stepped", execution.name, grid_dim, block_dim, shared))
        execution.run_blocks()


def _poisoned(shape: Any, dtype: Any) -> NDArray[Any]:
    """An array whose bits are all 1: NaN in floats, -1 in signed integers, the largest number in
    unsigned ones.
    """
    x = np.empty(shape, dtype)
    x.reshape(-1).view(np.uint8).fill(0xFF)
    return x


@functools.cache
def _dtype(given: Any) -> np.dtype[Any]:
    """A NumPy dtype, from a dtype or a Numba type."""
    from numba import types
    from numba.np import numpy_support

    return numpy_support.as_dtype(given) if isinstance(given, types.Type) else np.dtype(given)


class CheckedArray:
    """A NumPy array as a kernel sees it. Every index must be in bounds, and integers are read as
    Python's.

    Fewer indices than dims give a part of the array, as a view.

    >>> CheckedArray(np.zeros((2, 3)), "x")[1, 3]
    Traceback (most recent call last):
    ...
    IndexError: x: index (1, 3) is out of bounds for the shape (2, 3)
    """

    __slots__ = ("data", "dtype", "name", "read", "shape")

    def __init__(self, data: NDArray[Any], name: str) -> None:
        self.data, self.name = data, name
        self.shape, self.dtype = data.shape, data.dtype
        self.read: Callable[[Any], Any] = data.item if data.dtype.kind in "iub" else data.__getitem__

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        if type(index) is tuple and len(index) == len(self.shape):
            if min(index) < 0:
                raise self._out_of_bounds(index)
            try:
                return self.read(index)
            except IndexError:
                raise self._out_of_bounds(index) from None
        return _checked(self.data[self._leading(index)], self.name)

    def __setitem__(self, index: Any, value: Any) -> None:
        if type(index) is not tuple or min(index) < 0:
            index = self._leading(index)
        try:
            self.data[index] = value
        except IndexError:
            raise self._out_of_bounds(index) from None

    def _leading(self, index: Any) -> tuple[int, ...]:
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) > len(self.shape) or not all(0 <= i < n for i, n in zip(indices, self.shape, strict=False)):
            raise self._out_of_bounds(index)
        return indices

    def _out_of_bounds(self, index: Any) -> IndexError:
        return IndexError(f"{self.name}: index {index} is out of bounds for the shape {self.shape}")


class CheckedVector(CheckedArray):
    """The same for one dim, where an index is a number. It is twice as fast."""

    __slots__ = ("_size",)

    def __init__(self, data: NDArray[Any], name: str) -> None:
        super().__init__(data, name)
        self._size = data.size

    def __getitem__(self, index: Any) -> Any:
        if 0 <= index < self._size:
            return self.read(index)
        raise self._out_of_bounds(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if not 0 <= index < self._size:
            raise self._out_of_bounds(index)
        self.data[index] = value


def _checked(data: NDArray[Any], name: str) -> CheckedArray:
    return CheckedVector(data, name) if data.ndim == 1 else CheckedArray(data, name)


def _argument(x: Any, name: str) -> Any:
    if isinstance(x, np.ndarray) and x.ndim:
        return _checked(x, name)
    if isinstance(x, np.integer | np.bool_):
        return x.item()
    if isinstance(x, bool | int | float | np.floating):
        return x
    raise TypeError(f"{name}: a Numba kernel takes arrays and numbers, got {type(x).__name__}")


class Atomic:
    """`cuda.atomic`. Threads take turns, so each operation is a plain read and write. It returns
    the old entry.
    """

    def __init__(self, give_way: Callable[[], None]) -> None:
        self._give_way = give_way

    def _update(self, array: Any, index: Any, new: Callable[[Any], Any]) -> Any:
        old = array[index]
        array[index] = new(old)
        return old

    def add(self, array: Any, index: Any, value: Any) -> Any:
        old = array[index]  # without `_update`, since this one is in inner loops
        array[index] = old + value
        return old

    def sub(self, array: Any, index: Any, value: Any) -> Any:
        return self._update(array, index, lambda old: old - value)

    def max(self, array: Any, index: Any, value: Any) -> Any:
        return self._update(array, index, lambda old: max(old, value))

    def min(self, array: Any, index: Any, value: Any) -> Any:
        return self._update(array, index, lambda old: min(old, value))

    def and_(self, array: Any, index: Any, value: Any) -> Any:
        return self._update(array, index, lambda old: old & value)

    def or_(self, array: Any, index: Any, value: Any) -> Any:
        return self._update(array, index, lambda old: old | value)

    def xor(self, array: Any, index: Any, value: Any) -> Any:
        return self._update(array, index, lambda old: old ^ value)

    def exch(self, array: Any, index: Any, value: Any) -> Any:
        return self._update(array, index, lambda old: value)

    def cas(self, array: Any, index: Any, old: Any, value: Any) -> Any:
        found = array[index]
        if found == old:
            array[index] = value
        else:
            self._give_way()
        return found

    def compare_and_swap(self, array: Any, old: Any, value: Any) -> Any:
        found = array[0]
        if found == old:
            array[0] = value
        else:
            self._give_way()
        return found


class Dim3:
    """`threadIdx` and the like."""

    __slots__ = ("x", "y", "z")

    def __init__(self, x: int, y: int, z: int) -> None:
        self.x, self.y, self.z = x, y, z

    def __iter__(self) -> Iterator[int]:
        return iter((self.x, self.y, self.z))


class Cuda:
    """The module ``cuda`` as a kernel sees it while the stepper runs it. The indices are those of
    the thread whose turn it is.
    """

    warpsize = 32

    def __init__(self, execution: "_Execution", grid: Shape, block: Shape) -> None:
        self.gridDim, self.blockDim = Dim3(*grid), Dim3(*block)
        self.blockIdx = self.threadIdx = Dim3(0, 0, 0)
        self.atomic = Atomic(execution.give_way)
        self.shared = SimpleNamespace(array=execution.shared_array)
        self.local = SimpleNamespace(array=lambda shape, dtype: _checked(_poisoned(shape, _dtype(dtype)), "a local array"))
        self.const = SimpleNamespace(array_like=lambda x: _checked(x, "a constant array"))
        self.syncthreads = execution.syncthreads
        self.syncthreads_count: Callable[[Any], int] = lambda predicate: sum(execution.vote(predicate))
        self.syncthreads_and: Callable[[Any], int] = lambda predicate: int(all(execution.vote(predicate)))
        self.syncthreads_or: Callable[[Any], int] = lambda predicate: int(any(execution.vote(predicate)))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"cuda.{name}: the stepper has barriers, atomics, shared, local and constant arrays, and no {name}")

    def grid(self, ndim: int) -> Any:
        at = tuple(b * n + t for b, n, t in zip(self.blockIdx, self.blockDim, self.threadIdx, strict=True))
        return at[0] if ndim == 1 else at[:ndim]

    def gridsize(self, ndim: int) -> Any:
        size = tuple(g * b for g, b in zip(self.gridDim, self.blockDim, strict=True))
        return size[0] if ndim == 1 else size[:ndim]

    def threadfence(self) -> None:
        """Nothing to do: threads take turns, so each sees what the others have written."""

    threadfence_block = threadfence_system = threadfence


class _Execution:
    """One launch: copies of the kernel's functions, the memory of the current block, and the turns
    of its threads.

    `run_blocks` goes through the blocks. `run_one_by_one` or `run_in_turns` go through the threads
    of a block, and `run_thread` runs one of them.
    """

    def __init__(
        self, kernel: Any, grid: Shape, block: Shape, args: Arguments, *, shared: int, max_shared: int, steps: list[Step] | None
    ) -> None:
        from numba import cuda

        self.numba_cuda = cuda
        self.cuda = Cuda(self, grid, block)
        self.codes: set[CodeType] = set()
        self.copies: dict[int, Any] = {}
        self.function = self.copy(kernel)
        self.name: str = self.function.__name__
        names = self.function.__code__.co_varnames[: self.function.__code__.co_argcount]
        values = in_order(args, names, self.name)
        if len(values) != len(names):
            raise TypeError(f"args: {self.name} takes {len(names)} arguments, got {len(values)}")
        self.args = [_argument(x, name) for x, name in zip(values, names, strict=True)]
        self.blocks = [Dim3(x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(grid)))]
        self.threads = [Dim3(x, y, z) for z, y, x in itertools.product(*(range(n) for n in reversed(block)))]
        self.shared, self.max_shared = shared, max_shared
        self.steps = steps
        chosen = order_here("forward")
        self.reverse = chosen == "reverse"
        self.random = np.random.default_rng(chosen) if not isinstance(chosen, str) else None

    # A kernel finds the names that it uses (the module numba.cuda, device functions) in its
    # globals, or in the cells of a function around it. A copy of the function gets stand-ins for
    # them, so that no other launch sees a change.

    def copy(self, function: Any) -> Any:
        function = getattr(function, "py_func", function)
        if id(function) in self.copies:
            return self.copies[id(function)]
        code, own_globals, around = function.__code__, dict(function.__globals__), function.__closure__ or ()
        cells = tuple(CellType() for _ in around)
        twin = FunctionType(code, own_globals, function.__name__, function.__defaults__, cells)
        self.copies[id(function)] = twin
        self.codes.add(code)
        for name in own_globals.keys() & code.co_names:
            own_globals[name] = self.stand_in(own_globals[name])
        for cell, given in zip(cells, around, strict=True):
            cell.cell_contents = self.stand_in(given.cell_contents)
        return twin

    def stand_in(self, x: Any) -> Any:
        if x is self.numba_cuda:
            return self.cuda
        return self.copy(x) if hasattr(x, "py_func") else x

    # The memory of a block.

    def shared_array(self, shape: Any, dtype: Any) -> CheckedArray:
        """`cuda.shared.array`. Every call in the kernel's source has an array of its own. Shape 0
        is the dynamic memory of the launch, which all such calls share.
        """
        frame, dtype = sys._getframe(1), _dtype(dtype)
        if shape == 0:
            whole = self.shared // dtype.itemsize * dtype.itemsize
            return _checked(self.dynamic[:whole].view(dtype), f"the dynamic shared array of line {frame.f_lineno}")
        call = frame.f_code, frame.f_lasti
        if call not in self.static:
            self.static[call] = _checked(_poisoned(shape, dtype), f"the shared array of line {frame.f_lineno}")
            taken = self.shared + sum(x.data.nbytes for x in self.static.values())
            if taken > self.max_shared:
                raise _Fault(f"{taken:,} bytes of shared memory are needed, a block here has {self.max_shared:,}")
        return self.static[call]

    # Blocks, threads and their turns.

    def run_blocks(self) -> None:
        never_stops = self.steps is None and not any(_STOPS.intersection(code.co_names) for code in self.codes)
        run_block = self.run_one_by_one if never_stops else self.run_in_turns
        previous_trace = sys.gettrace()
        try:
            for block in self.ordered(self.blocks):
                self.cuda.blockIdx = block
                self.dynamic: NDArray[Any] = _poisoned(self.shared, np.uint8)
                self.static: dict[tuple[CodeType, int], CheckedArray] = {}
                run_block()
        except Exception as error:
            raise self.fault(error) from error
        finally:
            if self.steps is not None:
                sys.settrace(previous_trace)

    def ordered(self, items: list[T]) -> list[T]:
        if self.random is not None:
            return [items[i] for i in self.random.permutation(len(items))]
        return items[::-1] if self.reverse else items

    def run_one_by_one(self) -> None:
        for thread in self.ordered(self.threads):
            self.run_thread(thread)

    def run_thread(self, thread: Dim3) -> None:
        self.cuda.threadIdx = thread
        if self.steps is not None:
            sys.settrace(self.on_call)
        with np.errstate(all="ignore"):  # a GPU has infinity and NaN, and no warnings
            self.function(*self.args)

    def run_in_turns(self) -> None:
        """Rounds from barrier to barrier, in which each thread has a turn.

        A thread that arrives at a barrier switches to the next thread itself (`arrive`). The last
        thread, and a thread that ends, come back here. In the first round all come back, since a
        greenlet that another greenlet starts would begin on top of its stack.
        """
        from greenlet import getcurrent, greenlet

        self.hub = getcurrent()
        turns = [greenlet(functools.partial(self.run_thread, thread)) for thread in self.threads]
        self.votes: list[bool] = []
        self.started = False
        try:
            while True:
                self.arrived = 0
                self.take_turns(self.ordered(turns))
                if self.arrived == 0:
                    return
                if self.arrived < len(turns):
                    ended = next(thread for thread, turn in zip(self.threads, turns, strict=True) if turn.dead)
                    self.cuda.threadIdx = ended
                    raise _Fault(
                        f"divergent barrier: {self.first_here()}, and thread {tuple(ended)} has ended without it; hardware lets it go, "
                        "but every thread of a block should meet the same barriers"
                    )
                self.ballot, self.votes = self.votes, []
                if self.steps is not None:
                    self.tell_barrier()
        finally:
            for turn in turns:
                if not turn.dead:  # a fault has left it waiting
                    turn.throw()

    def take_turns(self, turns: list[Any]) -> None:
        """Go on until every thread has arrived at a barrier or ended. Threads whose
        compare-and-swap failed have another turn after the others.
        """
        for _ in range(_PATIENCE):
            self.retrying: list[Any] = []
            queue = iter(turns)
            self.queue = queue if self.started else iter(())
            for turn in queue:
                turn.switch()
            self.started, turns = True, self.retrying
            if not turns:
                return
        others = f", while {self.first_here()}" if self.arrived else ""
        raise _Fault(f"never ends: the compare-and-swap at line {self.retry_line} never succeeds{others}")

    def syncthreads(self) -> None:
        self.arrive(sys._getframe(1))

    def vote(self, predicate: Any) -> list[bool]:
        """A barrier that gives every thread the answers of all threads."""
        self.votes.append(bool(predicate))
        self.arrive(sys._getframe(2))
        return self.ballot

    def arrive(self, frame: FrameType) -> None:
        thread = self.cuda.threadIdx
        if self.arrived == 0:
            self.barrier, self.first = (frame.f_code, frame.f_lasti), (thread, frame)
        elif (frame.f_code, frame.f_lasti) != self.barrier:
            raise _Fault(f"divergent barrier: {self.first_here()}, and thread {tuple(thread)} waits at line {frame.f_lineno}")
        self.arrived += 1
        next(self.queue, self.hub).switch()
        self.cuda.threadIdx = thread

    def give_way(self) -> None:
        """A compare-and-swap of this thread has failed: let the others run first."""
        from greenlet import getcurrent

        thread = self.cuda.threadIdx
        self.retrying.append(getcurrent())
        self.retry_line = sys._getframe(2).f_lineno
        next(self.queue, self.hub).switch()
        self.cuda.threadIdx = thread

    def first_here(self) -> str:
        thread, frame = self.first
        return f"thread {tuple(thread)} waits at line {frame.f_lineno}"

    # Faults and traces.

    def fault(self, error: Exception) -> KernelFault:
        """The error with its source line, the innermost one in the kernel or a device function."""
        file, line, trace = None, None, error.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            if code in self.codes:
                file, line = Path(code.co_filename).name, trace.tb_lineno
            trace = trace.tb_next
        what = str(error) if isinstance(error, _Fault) else f"{type(error).__name__}: {error}"
        block, thread = tuple(self.cuda.blockIdx), tuple(self.cuda.threadIdx)
        return KernelFault(self.name, what, block=block, thread=thread, file=file, line=line)

    def on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self.on_line if frame.f_code in self.codes else None

    def on_line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.tell(frame, tuple(self.cuda.threadIdx), {})
        return self.on_line

    def tell_barrier(self) -> None:
        frame = self.first[1]
        mine = [self.dynamic, *(x.data for x in self.static.values())]
        shared = {
            name: x.data.copy()
            for name, x in frame.f_locals.items()
            if isinstance(x, CheckedArray) and any(np.may_share_memory(x.data, memory) for memory in mine)
        }
        self.tell(frame, None, shared)

    def tell(self, frame: FrameType, thread: Shape | None, shared: dict[str, NDArray[Any]]) -> None:
        if self.steps is not None:
            text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            self.steps.append(Step(tuple(self.cuda.blockIdx), thread, frame.f_lineno, text, shared))
