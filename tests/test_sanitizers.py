"""Every CUDA C++ kernel under AddressSanitizer and ThreadSanitizer, beside planted faults that they
must find.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Once
from support import Case, as_dtype, build, with_every_kernel

from yoso_core import registry
from yoso_core.gpu.cupy_kernels import source
from yoso_core.gpu.emulator import Report, sanitized, sanitizers

KINDS: tuple[sanitizers.Kind, ...] = ("address", "thread")


def needs(kind: sanitizers.Kind) -> pytest.MarkDecorator:
    reason = sanitizers.missing(kind)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


# name -> the sanitizer that must find it, the body of the kernel, what is found, the lines that are
# named, and a body without the fault

FAULTS: dict[str, tuple[sanitizers.Kind, str, str, set[int], str]] = {
    "past_the_end": ("address", "out[i + 1] = x[i];", "heap-buffer-overflow", {2}, "out[i] = x[i];"),
    "before_the_start": ("address", "out[i] = x[i - 2];", "heap-buffer-overflow", {2}, "out[i] = i < 2 ? 0 : x[i - 2];"),
    "past_static_shared_memory": (
        "address",
        "s[i + 1] = x[i];\n__syncthreads();\nout[i] = s[i];",
        "use-after-poison",
        {2},
        "s[i] = x[i];\n__syncthreads();\nout[i] = s[i];",
    ),
    "past_dynamic_shared_memory": (
        "address",
        "dynamic[i + 1] = x[i];\n__syncthreads();\nout[i] = x[i];",
        "use-after-poison",
        {2},
        "dynamic[i] = x[i];\n__syncthreads();\nout[i] = dynamic[i];",
    ),
    "past_local_memory": (
        "address",
        "volatile float local[4];\nfor (int j = 0; j <= 4; ++j) local[j] = x[i];\nout[i] = local[i % 4];",
        "stack-buffer-overflow",
        {3},
        "volatile float local[4];\nfor (int j = 0; j < 4; ++j) local[j] = x[i];\nout[i] = local[i % 4];",
    ),
    "missing_barrier": (
        "thread",
        "s[i] = x[i];\n\nout[i] = s[63 - i];",
        "data race",
        {2, 4},
        "s[i] = x[i];\n__syncthreads();\nout[i] = s[63 - i];",
    ),
    "missing_second_barrier": (
        "thread",
        "float v = x[i];\nfor (int h = 1; h < 64; h *= 2) {\ns[i] = v;\n__syncthreads();\nv += s[i ^ h];\n}\nout[i] = v;",
        "data race",
        {4, 6},
        "float v = x[i];\nfor (int h = 1; h < 64; h *= 2) {\ns[i] = v;\n__syncthreads();\nv += s[i ^ h];\n__syncthreads(); }\nout[i] = v;",
    ),
    "a_vote_is_no_barrier": (
        "thread",
        "s[i] = x[i];\n__ballot_sync(~0u, 1);\nout[i] = s[i ^ 1];",
        "data race",
        {2, 4},
        "s[i] = x[i];\n__syncwarp();\nout[i] = s[i ^ 1];",
    ),
    "addition_that_is_not_atomic": ("thread", "out[0] += x[i];", "data race", {2}, "atomicAdd(&out[0], x[i]);"),
    "blocks_that_share": (
        "thread",
        "__syncthreads();\nout[i] += x[i];",
        "data race",
        {3},
        "__syncthreads();\nif (blockIdx.x == 0) out[i] += x[i];",
    ),
}

PLANTED = """
import numpy as np
from yoso_core.gpu import KernelText
from yoso_core.gpu.emulator import Emulator
parameters = "const float* x, float* out"
for name, body in kernels.items():
    memory = "extern __shared__ float dynamic[]; __shared__ float s[64];"
    text = f'extern "C" __global__ void {name}({parameters}) {{ {memory} const int i = threadIdx.x;\\n{body} }}'
    x, out = np.ones(64, np.float32), np.zeros(64, np.float32)
    Emulator().launch(KernelText(text, name, file=name + ".cu"), (2 if name.startswith("blocks") else 1,), (64,), (x, out), 256)
"""


def run_planted(kind: sanitizers.Kind) -> list[Report]:
    kernels = {name: fault[1] for name, fault in FAULTS.items() if fault[0] == kind}
    return sanitized(kind, PLANTED, kernels={**kernels, **{f"{name}_clean": FAULTS[name][4] for name in kernels}})


EMULATED = [kernel for kernel in registry.KERNELS if kernel.where == "emulated"]
CASES = (
    Case(17, 137, 40, 20, 3, 8, mask="masked"),
    Case(65, 137, 40, 40, 1, 1, leading=()),  # so many to a bucket that every loop over tiles goes round again
    Case(7, 33, 7, 33, 5, 13, "float16", mask="fully", kind="repeated"),
)

# bfloat16 would need torch in the child, where the sanitizer watches its threads too; float16 takes
# the same way through the kernels.
EVERY_KERNEL = """
import pathlib, yoso_core
from yoso_core.gpu.device import launches
with launches() as made:
    for op, variant, inputs in calls:
        getattr(yoso_core, op)(**inputs, variant=variant)
pathlib.Path(launched).write_text(" ".join(sorted({launch.kernel for launch in made})))
"""


def run_every_kernel(kind: sanitizers.Kind, launched: Path) -> list[Report]:
    calls: list[Any] = []
    for kernel in EMULATED:
        for case in CASES if kernel.op != "yoso_attention" else CASES[:1]:  # whose kernels are those of other operations
            for variant in with_every_kernel(kernel, case):
                inputs = {name: as_dtype(x, case.dtype) for name, x in build(kernel.op, variant).items()}
                calls.append((kernel.op, kernel.name, inputs))
    return sanitized(kind, EVERY_KERNEL, calls=calls, launched=str(launched))


@dataclass(frozen=True)
class Runs:
    """Processes under a sanitizer; each runs once for all workers."""

    once: Once

    def planted(self, kind: sanitizers.Kind) -> list[Report]:
        file = self.once(f"planted-{kind}", lambda path: path.write_bytes(pickle.dumps(run_planted(kind))))
        return pickle.loads(file.read_bytes())

    def every_kernel(self, kind: sanitizers.Kind) -> tuple[list[Report], list[str]]:
        """What was found, and the names of the kernels that have run."""

        def run(path: Path) -> None:
            launched = path.with_suffix(".launched")
            reports = run_every_kernel(kind, launched)
            path.write_bytes(pickle.dumps((reports, launched.read_text("utf-8").split())))

        return pickle.loads(self.once(f"kernels-{kind}", run).read_bytes())


@pytest.fixture(scope="module")
def runs(once: Once) -> Runs:
    return Runs(once)


def by_sanitizer(names: Sequence[str]) -> list[Any]:
    """Every kernel in one process for each sanitizer; that of threads takes a minute and a half."""
    return [
        pytest.param(kind, name, marks=[needs(kind), *([pytest.mark.long] if kind == "thread" else [])]) for kind in KINDS for name in names
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(fault[0])) for name, fault in FAULTS.items()])
def test_planted_fault_is_found(name: str, runs: Runs) -> None:
    kind, _, what, lines, _ = FAULTS[name]
    reports = [report for report in runs.planted(kind) if report.kernel == name]
    assert {report.kind for report in reports} == {what}
    assert {line for report in reports for line in report.source_lines} == {(f"{name}.cu", line) for line in lines}
    assert all((report.file, report.line) == report.source_lines[0] for report in reports)
    assert f"{name} {name}.cu:{min(lines)}" in "".join(report.text for report in reports)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in KINDS])
def test_nothing_is_found_without_a_fault(kind: sanitizers.Kind, runs: Runs) -> None:
    assert [str(report) for report in runs.planted(kind) if report.kernel.endswith("_clean")] == []


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kernel"), by_sanitizer([kernel for file in source.FILES for kernel in source.kernels_in(file)]))
def test_kernel_is_clean(kind: sanitizers.Kind, kernel: str, runs: Runs) -> None:
    reports, launched = runs.every_kernel(kind)
    assert [str(report) for report in reports if report.kernel == kernel] == []
    assert kernel in launched, "the cases here do not launch it"


@pytest.mark.skipif(sanitizers.missing("address") is not None, reason=sanitizers.missing("address") or "")
def test_code_that_fails() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)the code has failed under the address sanitizer, exit code 1:.*ValueError: 7"):
        sanitized("address", "raise ValueError(x)", x=7)
    with pytest.raises(RuntimeError, match=r"has not ended in 1 s"):
        sanitized("address", "import time; time.sleep(60)", timeout=1)


def test_sanitizers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match='kind: got \'memory\', must be "address" or "thread"'):
        sanitized("memory", "")  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setenv("CXX", "no-such-compiler")
        with pytest.raises(RuntimeError, match="CXX=no-such-compiler names no program"):
            sanitized("thread", "")
    with monkeypatch.context() as patched:
        patched.setattr(sanitizers, "_preloaded", lambda compiler, kind: f"{compiler[0]} has no lib{kind}")
        with pytest.raises(RuntimeError, match="has no libthread"):
            sanitized("thread", "")
