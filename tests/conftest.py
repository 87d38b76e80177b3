"""What every test finds: a home folder and a terminal of the tests' own, its share of the cores,
and kernels that one worker compiles for all.

This module is read before NumPy and torch are loaded, in every process of pytest-xdist. What it
puts into the environment reaches the processes that tests start.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".pytest_cache" / "kept"
"""The tests' home folder. It stays between runs: compiled kernels and font lists are in it."""


# ---------------------------------------------------------------- the environment

OF_TERMINALS = (
    *("TERM", "COLORTERM", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "PY_COLORS"),
    *("TTY_COMPATIBLE", "TTY_INTERACTIVE", "TERMINAL_WIDTH", "GITHUB_ACTIONS", "JUPYTER_COLUMNS", "JUPYTER_LINES"),
)
"""What rich, typer, click and pytest go by."""

OF_THE_HOME_FOLDER = (
    *("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "MPLCONFIGDIR", "MATPLOTLIBRC", "MPLBACKEND"),
    *("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_PATH", "PYTHONSTARTUP", "YOSO_CORE_CACHE"),
)


def take_a_home_of_our_own() -> None:
    """No test reads the settings of the one who runs it, and none writes into that home folder."""
    hub = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    os.environ.setdefault("HF_HOME", str(Path(hub) / "huggingface"))  # what was fetched once is not fetched again
    for name in OF_THE_HOME_FOLDER:
        os.environ.pop(name, None)
    KEPT.mkdir(parents=True, exist_ok=True)
    os.environ["HOME"] = str(KEPT)


def take_a_share_of_the_cores() -> None:
    """The tests' tensors are so small that waking a thread of torch or BLAS takes longer than its
    work; a test that needs such threads asks for them. The kernels here share their work between
    two, as they do on any machine.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


if loaded := {"numpy", "torch", "numba", "matplotlib"} & set(sys.modules):
    raise pytest.UsageError(f"{', '.join(sorted(loaded))}: loaded before tests/conftest.py could set the environment")
take_a_home_of_our_own()
take_a_share_of_the_cores()


@pytest.fixture(scope="session", autouse=True)
def _a_terminal_of_our_own() -> Iterator[None]:
    """Only while tests run: what pytest itself prints looks as the reader has asked for."""
    with pytest.MonkeyPatch.context() as patch:
        for name in OF_TERMINALS:
            patch.delenv(name, raising=False)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One for each core that this process may use; each takes up to 2 GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // 2_000_000_000))


# ---------------------------------------------------------------- once for all workers

Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, make)``: the file of that name, which one worker has made for all of this run;
    the others wait for it.
    """
    own = tmp_path_factory.getbasetemp()
    together = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def file(name: str, make: Callable[[Path], None]) -> Path:
        with FileLock(together / f"{name}.lock"):
            if not (together / name).exists():
                make(together / f"{name}.part")
                (together / f"{name}.part").replace(together / name)
        return together / name

    return file


@pytest.fixture(scope="session", autouse=True)
def _a_kernel_is_compiled_once() -> Iterator[None]:
    """Of workers that need the same kernel of `yoso_core.cpu` one compiles it; the others wait and
    load it from disk.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    from yoso_core.cpu import compiling

    compile_or_load = compiling.compile_or_load

    def one_at_a_time(function: Callable[..., Any], signature: Any) -> Any:
        with FileLock(KEPT / f"{function.__module__}.{function.__qualname__}.lock"):
            return compile_or_load(function, signature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "compile_or_load", one_at_a_time)
        yield


# ---------------------------------------------------------------- the quick part of the suite

TELLING = ("kernel", "op", "variant", "head", "launcher")
"""Parameters of which every value counts: each is tried once in the quick part."""

QUICK = pytest.StashKey[list[pytest.Item]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "of each test function one case for every kernel, operation, variant and head; nothing that is marked slow"
    parser.addoption("--quick", action="store_true", help=about)


def quick_part(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """One of several cases is the middle one: those of the registry begin with no rows at all and
    end with thousands.
    """
    alike: dict[tuple[str, ...], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            given = getattr(getattr(item, "callspec", None), "params", {})
            told = (
                str(getattr(given[name], "op", "")) + str(getattr(given[name], "name", given[name])) for name in TELLING if name in given
            )
            alike.setdefault((item.nodeid.partition("[")[0], *told), []).append(item)
    return [cases[len(cases) // 2] for cases in alike.values()]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[QUICK] = chosen = quick_part(items)
    if config.getoption("quick"):
        kept = {id(item) for item in chosen}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
        items[:] = [item for item in items if id(item) in kept]


# ---------------------------------------------------------------- hypothesis

# The first example of a property may compile a kernel, which takes seconds: no deadline on one
# example.
settings.register_profile("kernels", parent=settings(), deadline=None)
settings.load_profile("kernels")
