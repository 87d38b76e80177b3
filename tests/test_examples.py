"""The examples in docstrings run, and every public function has one."""

import doctest
import importlib
import inspect
from typing import Any

import pytest
import support
from test_house import modules

PUBLIC = ("yoso_core", "yoso_core.reference", "yoso_core.model", "yoso_core.gpu", "yoso_core.gpu.emulator")


def with_examples() -> list[str]:
    return sorted(name.removesuffix(".__init__") for name, path in modules().items() if ">>> " in path.read_text("utf-8"))


@pytest.mark.parametrize("name", with_examples())
def test_examples_run(name: str) -> None:
    if name.startswith("yoso_core.gpu."):
        support.need("emulated", "stepped")
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0, "see what doctest has printed"


def test_a_wrong_example_is_found() -> None:
    """The test above could not fail if it were not."""
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(example, out=lambda text: None).failed == 1


def public_functions() -> list[Any]:
    found = []
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in module.__all__:
            x = getattr(module, name)
            if inspect.isfunction(x) and (x.__module__ or "").startswith("yoso_core"):
                found.append(pytest.param(x, id=f"{package}.{name}"))
    return found


@pytest.mark.parametrize("function", public_functions())
def test_a_public_function_has_an_example(function: Any) -> None:
    assert ">>> " in (function.__doc__ or "")
