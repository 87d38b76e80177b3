"""Each wrong argument to each public function: the promised error, which begins with the argument's
name and says what is needed.
"""

import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import support
import torch

import yoso_core
from yoso_core.operations import OPERATIONS

N_Q, N_K, D, D_V, M, TAU = 3, 4, 5, 2, 2, 3


def good(function: str) -> dict[str, Any]:
    """A call with two batches of two heads that is right in every argument."""
    leading = (2, 2)
    query, key = np.ones((*leading, N_Q, D), np.float32), np.ones((*leading, N_K, D), np.float32)
    value, grad_out = np.ones((*leading, N_K, D_V), np.float32), np.ones((*leading, N_Q, D_V), np.float32)
    codes = {"query_hash_code": np.zeros((*leading, N_Q, M), np.int32), "key_hash_code": np.zeros((*leading, N_K, M), np.int32)}
    masks = {"query_mask": np.ones((*leading, N_Q), bool), "key_mask": np.ones((*leading, N_K), bool)}
    numbers = {"num_hash": M, "hash_code_len": TAU}
    signs, planes = yoso_core.sample_signs(M, TAU, D, rng=0), yoso_core.sample_planes(M, TAU, D, rng=0)
    attention = {"query": query, "key": key, "value": value, **masks}
    weights = {"query_weight": query, "key_weight": key}
    return {
        "hadamard_transform": {"x": np.ones((3, 8), np.float32)},
        "sample_signs": {**numbers, "dim": D, "rng": 0},
        "sample_planes": {**numbers, "dim": D, "rng": 0},
        "fast_hash": {"vectors": query, "signs": signs, **numbers},
        "hyperplane_hash": {"vectors": query, "planes": planes, **numbers},
        "lsh_cumulation": {**codes, "value": value, "hashtable_capacity": 1 << TAU, **masks},
        "lsh_weighted_cumulation": {**codes, **weights, "value": value, "hashtable_capacity": 1 << TAU, **masks},
        "expectation_attention": {**attention, "hash_code_len": TAU},
        "expectation_attention_backward": {"grad_out": grad_out, **attention, "hash_code_len": TAU},
        "lsh_attention_backward": {"grad_out": grad_out, **attention, **codes, "hash_code_len": TAU},
        "yoso_attention": {**attention, **numbers, "signs": signs},
        "variants": {"op": "fast_hash"},
    }[function]


def full(*shape: int, dtype: Any = np.float32, fill: float = 1) -> Any:
    return np.full(shape, fill, dtype)


def codes(*shape: int, fill: int = 0) -> Any:
    return full(*shape, dtype=np.int32, fill=fill)


def signs(*shape: int, fill: int = 1) -> Any:
    return full(*shape, dtype=np.int8, fill=fill)


def kept(*shape: int) -> Any:
    return full(*shape, dtype=bool)


ATTENTIONS = ["expectation_attention", "expectation_attention_backward", "lsh_attention_backward", "yoso_attention"]
CUMULATIONS = ["lsh_cumulation", "lsh_weighted_cumulation"]
WEIGHTED, BACKWARD = CUMULATIONS[1:], ATTENTIONS[1:3]
HASHES, SIGNED = ["fast_hash", "hyperplane_hash"], ["fast_hash", "yoso_attention"]
SAMPLED = ["sample_signs", "sample_planes", "fast_hash", "hyperplane_hash", "yoso_attention"]
CODE_LENGTHS = [*SAMPLED, *ATTENTIONS[:3]]
CODED = [*CUMULATIONS, "lsh_attention_backward"]
MASKED = [*CUMULATIONS, *ATTENTIONS]

TABLE: list[tuple[list[str], str, dict[str, Any], type[Exception], str]] = [
    # functions, what is wrong, changed arguments, the error, what its message begins with
    # Whole numbers
    (SAMPLED, "num_hash 0", {"num_hash": 0}, ValueError, "num_hash: need an integer at least 1, got 0"),
    (SAMPLED, "num_hash -1", {"num_hash": -1}, ValueError, "num_hash: need an integer at least 1, got -1"),
    (SAMPLED, "num_hash a float", {"num_hash": 2.0}, TypeError, "num_hash: need an integer, got float"),
    (SAMPLED, "num_hash a bool", {"num_hash": True}, TypeError, "num_hash: need an integer, got True"),
    (SAMPLED, "num_hash a word", {"num_hash": "2"}, TypeError, "num_hash: need an integer, got str"),
    (SAMPLED, "num_hash None", {"num_hash": None}, TypeError, "num_hash: need an integer, got NoneType"),
    (CODE_LENGTHS, "tau 0", {"hash_code_len": 0}, ValueError, "hash_code_len: need an integer between 1 and 30, got 0"),
    (CODE_LENGTHS, "tau 31", {"hash_code_len": 31}, ValueError, "hash_code_len: need an integer between 1 and 30, got 31"),
    (CODE_LENGTHS, "tau a float", {"hash_code_len": 3.5}, TypeError, "hash_code_len: need an integer, got float"),
    (CODE_LENGTHS, "tau a NumPy bool", {"hash_code_len": np.True_}, TypeError, "hash_code_len: need an integer, got"),
    (SAMPLED[:2], "dim 0", {"dim": 0}, ValueError, "dim: need an integer at least 1, got 0"),
    (SAMPLED[:2], "batch_shape a number", {"batch_shape": 2}, TypeError, "batch_shape: need a tuple of integers, got int"),
    (SAMPLED[:2], "batch_shape a list", {"batch_shape": [2]}, TypeError, "batch_shape: need a tuple of integers, got list"),
    (SAMPLED[:2], "batch_shape negative", {"batch_shape": (2, -1)}, ValueError, "batch_shape: need an integer at least 0, got -1"),
    (CUMULATIONS, "capacity 0", {"hashtable_capacity": 0}, ValueError, "hashtable_capacity: need an integer between 1 and"),
    (CUMULATIONS, "capacity 2**31", {"hashtable_capacity": 2**31}, ValueError, "hashtable_capacity: need an integer between 1 and 10737"),
    (CUMULATIONS, "capacity a float", {"hashtable_capacity": 8.0}, TypeError, "hashtable_capacity: need an integer, got float"),
    # Random draws
    (SAMPLED[:2], "rng a float", {"rng": 0.5}, TypeError, "rng: need a numpy.random.Generator, an int seed or None, got float"),
    (SAMPLED[:2], "rng a bool", {"rng": True}, TypeError, "rng: need a numpy.random.Generator, an int seed or None, got bool"),
    (SAMPLED[:2], "rng negative", {"rng": -1}, ValueError, "rng: need an integer at least 0, got -1"),
    (SAMPLED[:2], "rng of the old kind", {"rng": np.random.RandomState(0)}, TypeError, "rng: need a numpy.random.Generator"),
    (["yoso_attention"], "rng a word", {"signs": None, "rng": "0"}, TypeError, "rng: need a numpy.random.Generator"),
    (["yoso_attention"], "both draws", {"planes": full(D, M * TAU)}, ValueError, "planes: give signs or planes, not both"),
    (SIGNED, "signs of floats", {"signs": full(5, 8)}, TypeError, "signs: need int8 of +1 and -1"),
    (SIGNED, "signs with a zero", {"signs": signs(5, 8, fill=0)}, ValueError, "signs: every entry must be"),
    (SIGNED, "signs with -128", {"signs": signs(5, 8, fill=-128)}, ValueError, "signs: every entry must"),
    (SIGNED, "too few rounds", {"signs": signs(3, 8)}, ValueError, "signs: need shape (*batch, 4, 8)"),
    (SIGNED, "signs for another D", {"signs": signs(5, 16)}, ValueError, "signs: need shape (*batch, 5, 8)"),
    (SIGNED, "signs of 1 dim", {"signs": signs(8)}, ValueError, "signs: need shape (*batch, 4, 8)"),
    (SIGNED, "signs for 3 heads", {"signs": signs(3, 5, 8)}, ValueError, "signs: batch dims (3,) do not"),
    (["hyperplane_hash"], "planes of ints", {"planes": full(D, M * TAU, dtype=np.int64)}, TypeError, "planes: need one of float16"),
    (["hyperplane_hash"], "too few planes", {"planes": full(D, M * TAU - 1)}, ValueError, "planes: need shape (*batch, 5, 6)"),
    (["hyperplane_hash"], "planes for 3 heads", {"planes": full(3, D, M * TAU)}, ValueError, "planes: batch dims (3,) do not broadcast"),
    (["yoso_attention"], "planes too few", {"signs": None, "planes": full(D, 1)}, ValueError, "planes: need shape (*batch, 5, 6)"),
    # Kinds of array
    (["hadamard_transform"], "a list", {"x": [1.0, 2.0]}, TypeError, "x: need a NumPy array, a torch tensor or a CuPy array, got list"),
    (["hadamard_transform"], "masked array", {"x": np.ma.masked_array([1.0, 2.0])}, TypeError, "x: need a NumPy array, a torch tensor"),
    (HASHES, "vectors a list", {"vectors": [[1.0]]}, TypeError, "vectors: need a NumPy array"),
    (ATTENTIONS, "query a list", {"query": [[1.0]]}, TypeError, "query: need a NumPy array"),
    (ATTENTIONS, "key None", {"key": None}, TypeError, "key: need a NumPy array"),
    (MASKED, "value a masked array", {"value": np.ma.masked_array(full(2, 2, N_K, D_V))}, TypeError, "value: need a NumPy array"),
    (MASKED, "key_mask a list", {"key_mask": [True] * N_K}, TypeError, "key_mask: need a NumPy array"),
    (MASKED, "value a tensor", {"value": torch.ones(2, 2, N_K, D_V)}, TypeError, "value: a torch tensor, but"),
    (MASKED, "key_mask a tensor", {"key_mask": torch.ones(2, 2, N_K, dtype=torch.bool)}, TypeError, "key_mask: a torch tensor, but"),
    (["fast_hash"], "signs a tensor", {"signs": torch.ones(3, 1, 8, dtype=torch.int8)}, TypeError, "signs: a torch tensor, but vectors is"),
    (["fast_hash"], "signs None", {"signs": None}, TypeError, "signs: need a NumPy array"),
    # Dtypes
    (["hadamard_transform"], "whole numbers", {"x": full(8, dtype=np.int64)}, TypeError, "x: need one of float16, bfloat16"),
    (["hadamard_transform"], "complex", {"x": full(8, dtype=np.complex64)}, TypeError, "x: need one of float16"),
    (["hadamard_transform"], "long double", {"x": full(8, dtype=np.longdouble)}, TypeError, "x: need one of float16"),
    (["hadamard_transform"], "big-endian", {"x": full(8, dtype=">f4")}, TypeError, "x: need one of float16, bfloat16, float32, float64 in"),
    (["hadamard_transform"], "objects", {"x": full(8, dtype=object)}, TypeError, "x: need one of float16"),
    (HASHES, "vectors of ints", {"vectors": codes(3, D)}, TypeError, "vectors: need one of float16"),
    (ATTENTIONS, "query of bools", {"query": kept(2, 2, N_Q, D)}, TypeError, "query: need one of float16"),
    (ATTENTIONS, "query big-endian", {"query": full(2, 2, N_Q, D, dtype=">f8")}, TypeError, "query: need one of float16"),
    (ATTENTIONS, "key of another dtype", {"key": full(2, 2, N_K, D, dtype=np.float16)}, TypeError, "key: need the dtype of query, float32"),
    (ATTENTIONS, "value in double", {"value": full(2, 2, N_K, D_V, dtype=np.float64)}, TypeError, "value: float64 does not go with query"),
    (CUMULATIONS, "value of ints", {"value": full(2, 2, N_K, D_V, dtype=np.int64)}, TypeError, "value: need one of float16"),
    (BACKWARD, "grad_out in half", {"grad_out": full(2, 2, N_Q, D_V, dtype=np.float16)}, TypeError, "grad_out: need the dtype of value"),
    (CODED, "codes int64", {"query_hash_code": full(2, 2, N_Q, M, dtype=np.int64)}, TypeError, "query_hash_code: need int32 hash codes"),
    (CODED, "codes float", {"key_hash_code": full(2, 2, N_K, M)}, TypeError, "key_hash_code: need int32 hash codes, got float32"),
    (CODED, "codes big-endian", {"key_hash_code": full(2, 2, N_K, M, dtype=">i4")}, TypeError, "key_hash_code: need int32 hash codes"),
    (WEIGHTED, "weight double", {"key_weight": full(2, 2, N_K, D, dtype=np.float64)}, TypeError, "key_weight: need the dtype of value"),
    # Ranks and sizes
    (["hadamard_transform"], "no dims", {"x": np.array(1, np.float32)}, ValueError, "x: need at least 1 dimensions, got shape ()"),
    (["hadamard_transform"], "size 6", {"x": full(2, 6)}, ValueError, "x: need a power of two as last dimension, got shape (2, 6)"),
    (["hadamard_transform"], "size 0", {"x": full(2, 0)}, ValueError, "x: need a power of two as last dimension, got shape (2, 0)"),
    (HASHES, "one dim", {"vectors": full(D)}, ValueError, "vectors: need at least 2 dimensions, got shape (5,)"),
    (HASHES, "d 0", {"vectors": full(3, 0)}, ValueError, "vectors: vectors need at least one coordinate"),
    (ATTENTIONS, "query of one dim", {"query": full(D)}, ValueError, "query: need at least 2 dimensions"),
    (ATTENTIONS, "d 0", {"query": full(2, 2, N_Q, 0), "key": full(2, 2, N_K, 0)}, ValueError, "query: vectors need at least one"),
    (ATTENTIONS, "key of another d", {"key": full(2, 2, N_K, D + 1)}, ValueError, "key: need 5 at axis -1 (d of query)"),
    (ATTENTIONS, "key of other heads", {"key": full(2, 1, N_K, D)}, ValueError, "key: need leading dims (2, 2) (those of query)"),
    (ATTENTIONS, "value of other heads", {"value": full(N_K, D_V)}, ValueError, "value: need leading dims (2, 2) (those of query)"),
    (ATTENTIONS, "value of another n", {"value": full(2, 2, N_K + 1, D_V)}, ValueError, "value: need 4 at axis -2 (n of key)"),
    (BACKWARD, "grad_out of another n", {"grad_out": full(2, 2, N_K, D_V)}, ValueError, "grad_out: need the shape of the output, ("),
    (CUMULATIONS, "value of another n", {"value": full(2, 2, N_K + 1, D_V)}, ValueError, "value: need 4 at axis -2 (n of key_hash_code)"),
    (CUMULATIONS, "value of one dim", {"value": full(N_K)}, ValueError, "value: need at least 2 dimensions"),
    (CUMULATIONS, "other heads", {"value": full(N_K, D_V)}, ValueError, "value: need leading dims (2, 2) (those of the hash codes)"),
    (CODED, "other m", {"key_hash_code": codes(2, 2, N_K, M + 1)}, ValueError, "key_hash_code: need 2 at axis -1 (num_hash of"),
    (CODED, "m 0", {"query_hash_code": codes(2, 2, N_Q, 0)}, ValueError, "query_hash_code: need shape (..., n, num_hash) with"),
    (CODED, "codes of one dim", {"query_hash_code": codes(M)}, ValueError, "query_hash_code: need shape (..., n, num_hash)"),
    (CODED, "codes of other heads", {"key_hash_code": codes(N_K, M)}, ValueError, "key_hash_code: need leading dims (2, 2)"),
    (CODED[2:], "codes of another n", {"query_hash_code": codes(2, 2, 9, M)}, ValueError, "query_hash_code: need 3 at axis -2"),
    (WEIGHTED, "other d_w", {"key_weight": full(2, 2, N_K, D + 1)}, ValueError, "key_weight: need 5 at axis -1 (d_w of query_weight)"),
    (WEIGHTED, "weight of another n", {"query_weight": full(2, 2, 9, D)}, ValueError, "query_weight: need 3 at axis -2"),
    # Codes out of range
    (CODED, "a code too large", {"query_hash_code": codes(2, 2, N_Q, M, fill=8)}, ValueError, "query_hash_code: codes must lie in [0, "),
    (CODED, "a code below 0", {"key_hash_code": codes(2, 2, N_K, M, fill=-1)}, ValueError, "key_hash_code: codes must lie in [0, "),
    # Masks
    (MASKED, "float mask", {"key_mask": full(2, 2, N_K)}, TypeError, "key_mask: need bool or integer with nonzero = keep, got float32"),
    (MASKED, "float query_mask", {"query_mask": full(2, 2, N_Q)}, TypeError, "query_mask: need bool or integer with nonzero = keep"),
    (MASKED, "a mask without heads", {"key_mask": kept(2, N_K)}, ValueError, "key_mask: need 3 dims, each that of key (2, 2, 4) or 1"),
    (MASKED, "a mask of pairs", {"key_mask": kept(2, 2, N_Q, N_K)}, ValueError, "key_mask: need 3 dims"),
    (MASKED, "the other side's mask", {"query_mask": kept(2, 2, N_K)}, ValueError, "query_mask: need 3 dims, each that of query (2, 2, 3)"),
    (MASKED, "a mask of 3 heads", {"key_mask": kept(2, 3, N_K)}, ValueError, "key_mask: need 3 dims, each that of key (2, 2, 4) or 1"),
    # Words
    (BACKWARD, "unknown grad", {"grad": "upper_bound"}, ValueError, "grad: need one of 'lower_bound', 'exact', got 'upper_bound'"),
    (["variants"], "unknown operation", {"op": "softmax"}, ValueError, "op: no operation 'softmax'; there are hadamard_transform"),
]  # fmt: skip

EVERY_ROW = [
    pytest.param(function, changes, error, message, id=f"{function}-{what.replace(' ', '_')}")
    for functions, what, changes, error, message in TABLE
    for function in functions
]
COMPUTE = ["hadamard_transform", *SAMPLED[2:4], *CUMULATIONS, *ATTENTIONS]


@pytest.mark.parametrize("function", [*COMPUTE, "sample_signs", "sample_planes", "variants"])
def test_the_good_call_is_good(function: str) -> None:
    getattr(yoso_core, function)(**good(function))


@pytest.mark.parametrize(("function", "changes", "error", "message"), EVERY_ROW)
def test_a_wrong_argument_is_refused(function: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {**good(function), **changes}
    with pytest.raises(error, match="^" + re.escape(message)):
        getattr(yoso_core, function)(**call)


@pytest.mark.parametrize("function", COMPUTE)
def test_an_unknown_variant_is_refused_with_those_there_are(function: str) -> None:
    known = re.escape(", ".join(v.name for v in yoso_core.variants(function)))
    with pytest.raises(ValueError, match=f"^variant: {function} has no variant 'cpu:magic'; it has {known}$"):
        getattr(yoso_core, function)(**good(function), variant="cpu:magic")


def first_array(call: dict[str, Any]) -> str:
    return next(name for name, x in call.items() if isinstance(x, np.ndarray) and x.dtype == np.float32)


def as_tensors(call: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in call.items()}


@pytest.mark.parametrize("function", [function for function in COMPUTE if function != "yoso_attention"])
def test_a_tensor_that_wants_gradients_is_refused(function: str) -> None:
    call = as_tensors(good(function))
    name = first_array(good(function))
    call[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name}: requires gradients.*torch\.no_grad\(\) or pass {name}\.detach\(\)"):
        getattr(yoso_core, function)(**call)
    with torch.no_grad():
        getattr(yoso_core, function)(**call)


@pytest.mark.parametrize("function", COMPUTE)
def test_a_sparse_tensor_is_refused(function: str) -> None:
    call = as_tensors(good(function))
    name = first_array(good(function))
    call[name] = call[name].to_sparse()
    with pytest.raises(TypeError, match=f"^{name}: need a dense tensor, got layout torch.sparse_coo"):
        getattr(yoso_core, function)(**call)


@pytest.mark.parametrize("function", COMPUTE)
def test_a_device_without_kernels_is_refused(function: str) -> None:
    """On the meta device `yoso_core` gives shapes; this is what checks everything else."""
    call = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in as_tensors(good(function)).items()}
    checked = OPERATIONS[function].function
    with pytest.raises(ValueError, match=f"^{function}: no variant here runs on meta"):
        checked(**call)
    with pytest.raises(ValueError, match=f"^variant: .* of {function} runs on the cpu, the arrays are on meta"):
        checked(**call, variant=support.definition_of(function).name)


@pytest.mark.parametrize("function", COMPUTE[1:])
def test_two_devices_are_refused(function: str) -> None:
    call = as_tensors(good(function))
    second = [name for name, x in call.items() if isinstance(x, torch.Tensor)][1]
    call[second] = call[second].to("meta")
    with pytest.raises(ValueError, match=f"^{second}: on meta, but .* is on cpu; move them to one device"):
        getattr(yoso_core, function)(**call)


@pytest.mark.parametrize("function", COMPUTE)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_a_tensor_of_another_dtype_is_refused(function: str, dtype: torch.dtype) -> None:
    call = as_tensors(good(function))
    name = first_array(good(function))
    call[name] = call[name].to(dtype)
    with pytest.raises(TypeError, match=f"^{name}: need (one of float16, bfloat16, float32, float64|the dtype of)"):
        getattr(yoso_core, function)(**call)


UNCHECKED_CODES = """
import sys
import numpy as np, yoso_core

op, capacity = sys.argv[1], 1 << 8
query_code = np.full((2, 50, 2), [-(2**31), 2**31 - 1], np.int32)
key_code = np.full((2, 80, 2), [capacity, -1], np.int32)
value, weight = np.ones((2, 80, 8), np.float32), np.ones((2, 50, 3), np.float32)
plain = op == "lsh_cumulation"
args = (query_code, key_code, value) if plain else (query_code, weight, key_code, np.ones((2, 80, 3), np.float32), value)
for variant in yoso_core.variants(op):
    if not variant.available or variant.kernel.backend.device != "cpu":
        continue
    for options in ({}, {"oversample": 2}) if plain else ({},):
        print(variant.name, options, flush=True)
        try:
            assert getattr(yoso_core, op)(*args, capacity, validate=False, variant=variant.name, **options).shape == (2, 50, 8)
        except (ValueError, IndexError) as error:
            print(error)
"""


@pytest.mark.parametrize("op", CUMULATIONS)
def test_codes_out_of_range_crash_nothing_when_nobody_checks(op: str) -> None:
    """``validate=False`` takes the caller's word for the codes; a broken word gives a wrong sum or
    an error, never a dead process.
    """
    done = subprocess.run([sys.executable, "-c", UNCHECKED_CODES, op], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"died with {done.returncode} in {done.stdout}{done.stderr}"
