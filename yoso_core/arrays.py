"""The caller's kind of array: recognized on the way in, handed back on the way out.

A framework is looked at only if the caller has already imported it, so `import yoso_core` loads
NumPy alone.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any
"""A `numpy.ndarray`, a `torch.Tensor` or a `cupy.ndarray`."""

_LIBRARY_NAME = {"numpy": "NumPy array", "torch": "torch tensor", "cupy": "CuPy array"}


def library_of(x: object) -> str | None:
    """``"numpy"``, ``"torch"`` or ``"cupy"``; ``None`` for anything that is no array of theirs."""
    if isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray):
        return "numpy"
    for library, array_type in (("torch", "Tensor"), ("cupy", "ndarray")):
        module = sys.modules.get(library)
        if module is not None and isinstance(x, getattr(module, array_type, ())):
            return library
    return None


@dataclass(frozen=True)
class Caller:
    """Whose arrays these are: what the result must be again."""

    library: str
    device: str
    """``"cpu"``, ``"cuda:0"``, ..."""

    @property
    def kind(self) -> str:
        """``"cpu"``, ``"cuda"``, or whatever else torch names."""
        return self.device.partition(":")[0]

    @property
    def num_threads(self) -> int | None:
        """torch's own thread count for its tensors; ``None`` leaves it to the kernels."""
        return int(sys.modules["torch"].get_num_threads()) if self.library == "torch" else None

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """The caller's array as NumPy, sharing a CPU array's memory; torch's half types are widened
        to float32, since NumPy lacks one.
        """
        if self.library == "numpy":
            return np.asarray(x)
        if self.library == "cupy":
            return x.get()
        torch = sys.modules["torch"]
        x = x.detach()
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()
        elif x.is_neg():
            x = x.resolve_neg()
        return x.numpy() if self.device == "cpu" else x.cpu().numpy()

    def from_numpy(self, result: np.ndarray[Any, Any], like: Array | None = None) -> Array:
        """A fresh NumPy result as the caller's kind of array on the caller's device, in the dtype
        of ``like`` if one is given.
        """
        if self.library == "numpy":
            return result if like is None else result.astype(like.dtype, copy=False)
        if self.library == "cupy":
            cupy = sys.modules["cupy"]
            with cupy.cuda.Device(int(self.device.partition(":")[2])):
                return cupy.asarray(result if like is None else result.astype(like.dtype, copy=False))
        tensor = sys.modules["torch"].from_numpy(np.ascontiguousarray(result))
        return (tensor if like is None else tensor.to(like.dtype)).to(self.device)


def device_of(x: Array, library: str | None) -> str:
    if library == "numpy":
        return "cpu"
    return str(x.device) if library == "torch" else f"cuda:{x.device.id}"


def one_caller(required: Mapping[str, Array], **optional: Array | None) -> Caller:
    """The single library and device that all arrays given share, each by the name of its argument;
    an optional one may be ``None``.

    Raises
    ------
    TypeError : an argument is no array, or two are of different libraries.
    ValueError : two are on different devices, or one asks for gradients that a plain array function
        cannot give.
    """
    first = first_library = first_device = ""
    for name, x in (*required.items(), *((name, x) for name, x in optional.items() if x is not None)):
        library = library_of(x)
        if library is None:
            raise TypeError(f"{name}: need a NumPy array, a torch tensor or a CuPy array, got {type(x).__name__}")
        if library == "torch":
            _check_tensor(name, x)
        device = device_of(x, library)
        if not first:
            first, first_library, first_device = name, library, device
        elif library != first_library:
            raise TypeError(
                f"{name}: a {_LIBRARY_NAME[library]}, but {first} is a {_LIBRARY_NAME[first_library]}; "
                "give all arrays in one library (torch.from_numpy and Tensor.numpy convert)"
            )
        elif device != first_device:
            raise ValueError(f"{name}: on {device}, but {first} is on {first_device}; move them to one device")
    if not first:
        raise TypeError("need at least one array")
    return Caller(first_library, first_device)


def is_transformed() -> bool:
    """Whether this runs under a transform of `torch.func`, or where tensors can carry forward-mode
    derivatives.
    """
    torch = sys.modules["torch"]
    return bool(torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0)


def has_tangent(x: object) -> bool:
    """Whether a tensor carries a forward-mode derivative."""
    torch = sys.modules["torch"]
    forward_ad = torch.autograd.forward_ad
    return isinstance(x, torch.Tensor) and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def of_a_program(*arguments: object) -> bool:
    """Whether torch records or transforms what happens to a tensor among the arguments: under
    `torch.compile`, `torch.export`, `torch.jit.trace`, `torch.func` and dispatch modes, with dual
    tensors, and for tensors without numbers of their own (fake ones, and those on the meta device).
    """
    torch = sys.modules.get("torch")
    tensors = [] if torch is None else [x for x in arguments if isinstance(x, torch.Tensor) and not x.is_nested]
    if torch is None or not tensors:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed() or torch._C._len_torch_dispatch_stack():
        return True
    plain = torch.Tensor.__torch_dispatch__
    return all(x.is_meta for x in tensors) or any(type(x).__torch_dispatch__ is not plain for x in tensors)


def check_dense(name: str, x: Array) -> None:
    """Refuse tensors that are no plain blocks of numbers: sparse and nested ones."""
    if x.is_nested:
        raise TypeError(f"{name}: need a dense tensor, got a nested one; pad it (torch.nested.to_padded_tensor), and mask the padding")
    if x.layout != sys.modules["torch"].strided:
        raise TypeError(f"{name}: need a dense tensor, got layout {x.layout}")


def _check_tensor(name: str, x: Array) -> None:
    torch = sys.modules["torch"]
    check_dense(name, x)
    if has_tangent(x):
        raise NotImplementedError(f"{name}: carries a forward-mode derivative; the function of that name in yoso_core passes it on")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: requires gradients, and this function does not record them; call it under torch.no_grad() or pass {name}.detach()"
        )
