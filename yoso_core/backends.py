"""What a kernel can run on: what it needs there, and how the caller's arrays get to it and back."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, Literal

import numpy as np

from yoso_core.arrays import Array, Caller

Likes = Sequence[Array | None]
"""For each result of a kernel the argument whose dtype it has, if any."""


@dataclass(frozen=True)
class Backend:
    """One *where* of a variant's name ``<where>:<algorithm>``."""

    name: str
    about: str
    device: Literal["cpu", "cuda"]
    """Whose arrays it works on."""
    automatic: bool
    """May be chosen where the caller names no variant."""
    missing: Callable[[], str | None]
    """Why nothing runs here, with what to do about it; ``None`` where it does. Asked once."""
    call: Callable[[Callable[..., Any], Caller, Mapping[str, Any], Likes], tuple[Array, ...]]
    """Call a kernel with the caller's arrays, by name; its results as the caller's arrays."""

    def takes(self, caller: Caller) -> bool:
        """Whether a caller who names a variant here may hand in these arrays. NumPy arrays are
        copied to the GPU and back, openly.
        """
        return self.device == caller.kind or (self.device == "cuda" and caller.library == "numpy")


def _each(view: Callable[[Array], Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: view(x) if hasattr(x, "dtype") else x for name, x in arguments.items()}


def _handed_back(back: Callable[[Caller, Any, Array | None], Array], caller: Caller, found: Any, likes: Likes) -> tuple[Array, ...]:
    """What a kernel returned, one array or a tuple of several, each by ``back``."""
    results = found if len(likes) > 1 else (found,)
    return tuple(back(caller, x, like) for x, like in zip(results, likes, strict=True))


# On the host, in NumPy and Numba.


def _not_installed(package: str, remedy: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"the package {package!r} is not installed: {remedy}"
    return None


def _missing_cpu() -> str | None:
    remedy = "pip install numba"
    if reason := _not_installed("numba", remedy):
        return reason
    try:
        from numba import config
    except ImportError as error:  # Numba refuses a NumPy that is newer than it knows
        return f"numba cannot be imported ({error}): {remedy}"
    if getattr(config, "DISABLE_JIT", False):
        return "Numba compiles nothing here (NUMBA_DISABLE_JIT): unset it, or go on with the NumPy variants"
    return None


def _call_numpy(function: Callable[..., Any], caller: Caller, arguments: Mapping[str, Any], likes: Likes) -> tuple[Array, ...]:
    return _handed_back(Caller.from_numpy, caller, function(**_each(caller.to_numpy, arguments)), likes)


# Compiled kernels. A bfloat16 travels as its bits, since neither NumPy nor CuPy has the type.


def _bits_numpy(caller: Caller) -> Callable[[Array], np.ndarray[Any, Any]]:
    if caller.library == "numpy":
        return lambda x: np.require(x, requirements="A")  # a CUDA kernel reads no number from an odd address
    torch = sys.modules["torch"]

    def view(x: Array) -> np.ndarray[Any, Any]:
        x = x.detach()
        if x.dtype == torch.bfloat16:
            return np.asarray(x.view(torch.int16).numpy().view(np.uint16))
        return np.asarray(x.resolve_neg().numpy())

    return view


def _back_from_bits(caller: Caller, result: Any, like: Array | None) -> Array:
    if caller.library == "numpy":
        return result
    torch = sys.modules["torch"]
    if result.dtype == np.uint16:
        return torch.from_numpy(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(result))


def _call_cpu(function: Callable[..., Any], caller: Caller, arguments: Mapping[str, Any], likes: Likes) -> tuple[Array, ...]:
    found = function(**_each(_bits_numpy(caller), arguments), num_threads=caller.num_threads)
    return _handed_back(_back_from_bits, caller, found, likes)


def _call_emulated(function: Callable[..., Any], caller: Caller, arguments: Mapping[str, Any], likes: Likes) -> tuple[Array, ...]:
    from yoso_core.gpu.emulator import Emulator

    return _handed_back(_back_from_bits, caller, function(Emulator(), **_each(_bits_numpy(caller), arguments)), likes)


def _call_stepped(function: Callable[..., Any], caller: Caller, arguments: Mapping[str, Any], likes: Likes) -> tuple[Array, ...]:
    from yoso_core.gpu.emulator.stepper import Stepper

    return _handed_back(_back_from_bits, caller, function(Stepper(), **_each(_bits_numpy(caller), arguments)), likes)


def _cupy_view(caller: Caller) -> Callable[[Array], Array]:
    import cupy

    if caller.library != "torch":
        return cupy.asarray  # a NumPy array is copied to the GPU here
    torch = sys.modules["torch"]

    def view(x: Array) -> Array:
        x = x.detach().resolve_neg()
        if x.dtype == torch.bfloat16:
            return cupy.from_dlpack(x.view(torch.int16)).view(np.uint16)
        if x.dtype == torch.bool:
            return cupy.from_dlpack(x.view(torch.uint8))
        return cupy.from_dlpack(x)

    return view


def _back_from_cupy(caller: Caller, result: Any, like: Array | None) -> Array:
    if caller.library == "cupy":
        return result
    if caller.library == "numpy":
        return result.get()
    torch = sys.modules["torch"]
    if result.dtype == np.uint16:
        return torch.from_dlpack(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(result)


def _callers_stream(caller: Caller) -> AbstractContextManager[tuple[int, int]]:
    from yoso_core.gpu.streams import callers_stream

    return callers_stream(caller.library, int(caller.device.partition(":")[2]) if caller.kind == "cuda" else None)


def _call_on_cuda(make: str) -> Callable[[Callable[..., Any], Caller, Mapping[str, Any], Likes], tuple[Array, ...]]:
    module, device = make.split(":")

    def call(function: Callable[..., Any], caller: Caller, arguments: Mapping[str, Any], likes: Likes) -> tuple[Array, ...]:
        with _callers_stream(caller) as (index, stream):
            on_gpu = getattr(importlib.import_module(module), device)(index, stream)
            found = function(on_gpu, **_each(_cupy_view(caller), arguments))
            # Handed back while the caller's stream is current. Elsewhere CuPy would record an event
            # on its own stream and make the caller's wait for it, which no CUDA graph can capture.
            return _handed_back(_back_from_cupy, caller, found, likes)

    return call


_CUDA_REMEDY = "pip install 'yoso-core[cuda12]' (or [cuda13], as the driver has it)"


def _missing_cuda() -> str | None:
    remedy = _CUDA_REMEDY
    if reason := _not_installed("cupy", remedy):
        return reason
    try:
        import cupy
    except ImportError as error:
        return f"cupy cannot be imported ({error}): {remedy}"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no NVIDIA GPU that CUDA can use ({str(error).partition(':')[0]}): it needs a driver as new as CuPy's CUDA"
    if count == 0:
        return "no NVIDIA GPU"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # whatever its loader raises: each release another
        return f"NVRTC, the compiler of CUDA, was not found ({error}): {remedy}"
    from cuda.pathfinder import find_nvidia_header_directory  # which CuPy asks too

    if find_nvidia_header_directory("cudart") is None:
        return f"CUDA's headers were not found, and CuPy compiles no kernel without: {remedy}, or name a CUDA toolkit in CUDA_PATH"
    return None


def _missing_numba_cuda() -> str | None:
    if reason := _missing_cuda() or _not_installed("numba", "pip install numba"):
        return reason
    try:
        from numba import config, cuda
    except Exception as error:  # whatever the packages below it raise
        return f"numba.cuda cannot be imported ({error}): {_CUDA_REMEDY}"
    if getattr(config, "ENABLE_CUDASIM", False):
        return "Numba simulates CUDA here (NUMBA_ENABLE_CUDASIM): unset it, or take the stepped variants"
    return None if cuda.is_available() else "Numba finds no CUDA (`numba -s` says why): pip install 'yoso-core[cuda12]' (or [cuda13])"


def _missing_emulator() -> str | None:
    from yoso_core.gpu import emulator

    return emulator.missing()


def _missing_stepper() -> str | None:
    if reason := _not_installed("numba", "pip install numba"):
        return reason
    from yoso_core.gpu.emulator import stepper

    return stepper.missing()


_ALL = (
    Backend("numpy", "the reference", "cpu", True, lambda: None, _call_numpy),
    Backend("cpu", "Numba", "cpu", True, _missing_cpu, _call_cpu),
    Backend(
        "cupy",
        "CUDA C++ on a GPU",
        "cuda",
        True,
        _missing_cuda,
        _call_on_cuda("yoso_core.gpu.cupy_kernels.cuda:CupyDevice"),
    ),
    Backend(
        "numba_cuda",
        "Numba CUDA on a GPU",
        "cuda",
        True,
        _missing_numba_cuda,
        _call_on_cuda("yoso_core.gpu.numba_kernels.cuda:NumbaCuda"),
    ),
    Backend("emulated", "the same CUDA C++, run on the CPU", "cpu", False, _missing_emulator, _call_emulated),
    Backend("stepped", "the same Numba CUDA, stepped through on the CPU", "cpu", False, _missing_stepper, _call_stepped),
)

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}


@cache
def missing(where: str) -> str | None:
    """Why nothing runs on a backend, or ``None``. A package that breaks while it is looked at takes
    its own backend down, and no other.
    """
    try:
        return BACKENDS[where].missing()
    except Exception as error:
        return f"what it needs could not be looked at ({type(error).__name__}: {error})"


def wait(caller: Caller, where: str) -> None:
    """For timing: until the GPU has done what the caller's stream holds, if a GPU was involved."""
    if caller.kind == "cuda" or BACKENDS[where].device == "cuda":
        import cupy

        with _callers_stream(caller):
            cupy.cuda.get_current_stream().synchronize()


def gpu_report() -> dict[str, str]:
    """What a GPU needs, and what of it was found: GPUs, driver, CUDA, and the packages, each with
    its version or with what is wrong.
    """
    found = {"GPU": missing("cupy") or ""}
    if importlib.util.find_spec("cupy") is not None:
        try:
            import cupy
        except Exception as error:
            return found | {"CuPy": str(error)}
        runtime = cupy.cuda.runtime
        driver = runtime.driverGetVersion()
        found |= {"CuPy": cupy.__version__, "driver": f"for CUDA {_cuda_version(driver)}" if driver else "none found"}
        if missing("cupy") is None:
            names = [runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())]
            found["GPU"] = ", ".join(names)
            found["NVRTC"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    else:
        found["CuPy"] = "not installed"
    for package, name in (("numba", "Numba"), ("numba-cuda", "numba-cuda")):
        try:
            found[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
