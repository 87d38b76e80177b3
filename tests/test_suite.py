"""The suite itself: what its quick part covers."""

from typing import Any

import pytest
from conftest import QUICK, quick_part

from yoso_core import registry
from yoso_core.operations import OPERATIONS

HEADS = {
    "YosoModel",
    "YosoForMaskedLM",
    "YosoForPreTraining",
    "YosoForSequenceClassification",
    "YosoForMultipleChoice",
    "YosoForTokenClassification",
    "YosoForQuestionAnswering",
}


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> list[Any]:
    modules = {item.path for item in request.session.items}
    if modules != set(request.path.parent.glob("test_*.py")):
        pytest.skip("only a part of the suite was collected")
    return request.config.stash[QUICK]


def values(items: list[Any], name: str) -> set[Any]:
    return {item.callspec.params[name] for item in items if hasattr(item, "callspec") and name in item.callspec.params}


def test_the_quick_part_has_every_kernel_operation_and_head(quick: list[Any]) -> None:
    kernels = values([item for item in quick if item.path.name == "test_registry.py"], "kernel")
    assert {kernel for kernel in registry.KERNELS if not kernel.definition} <= kernels
    assert set(OPERATIONS) <= values(quick, "op")
    assert values(quick, "head") >= HEADS


def test_the_quick_part_is_one_case_of_each_and_nothing_slow(request: pytest.FixtureRequest) -> None:
    items = request.session.items
    chosen = quick_part(items)
    assert {item.nodeid.partition("[")[0] for item in chosen} == {
        item.nodeid.partition("[")[0] for item in items if item.get_closest_marker("slow") is None
    }
    assert len({id(item) for item in chosen}) == len(chosen)
    assert quick_part(chosen) == chosen
