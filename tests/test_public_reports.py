"""What people reported of other encoders and other libraries, tried here, in both modes.

CONTRIBUTING has the table of all reports; those that other tests try are not repeated here. Each
docstring names its report.
"""

import copy
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_support import close, gradients, ids, lively
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import yoso_core

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")

both_ways = pytest.mark.parametrize("way", ["expectation", "sampled"])

LABELS: dict[str, dict[str, Tensor]] = {
    "YosoForMaskedLM": {"labels": ids(2, 7, seed=1)},
    "YosoForPreTraining": {"labels": ids(2, 7, seed=1), "sentence_order_label": torch.tensor([0, 1])},
    "YosoForSequenceClassification": {"labels": torch.tensor([0, 1])},
    "YosoForMultipleChoice": {"labels": torch.tensor([0])},
    "YosoForTokenClassification": {"labels": ids(2, 7) % 2},
    "YosoForQuestionAnswering": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
}


def model_of(way: str, head: str = "YosoForMaskedLM", **changes: Any) -> Any:
    return lively(head, use_expectation=way == "expectation", **changes)


@both_ways
@pytest.mark.parametrize("head", LABELS)
def test_every_weight_has_a_gradient(head: str, way: str) -> None:
    """transformers#26356: weights that the loss does not reach stop DistributedDataParallel."""
    model = model_of(way, head).train()
    words = ids(1, 2, 7) if head == "YosoForMultipleChoice" else ids(2, 7)
    model(words, **LABELS[head]).loss.backward()
    assert {name for name, _ in model.named_parameters()} == gradients(model).keys()


@both_ways
def test_one_graph_serves_every_length(way: str) -> None:
    """pytorch#105279: ``torch.compile(dynamic=True)`` compiled again for every length."""
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    model = model_of(way, "YosoModel", num_hidden_layers=1)
    compiled = torch.compile(model, backend=counting, dynamic=True)
    with torch.no_grad():
        for rows, tokens in [(2, 7), (2, 9), (3, 11), (5, 24)]:
            words = ids(rows, tokens)
            close(compiled(words).last_hidden_state, model(words).last_hidden_state)
    assert graphs == 1


@both_ways
def test_a_model_that_ran_can_be_quantized(way: str) -> None:
    """pytorch#48448: ``quantize_dynamic`` failed once the model had run, since it copies it."""
    model = model_of(way)
    before = model(ids(2, 9)).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves quantization to a package of its own
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        got = small(ids(2, 9)).logits
    assert type(small.yoso.encoder.layer[0].attention.self.query) is not nn.Linear
    close(model(ids(2, 9)).logits, before, 0)
    if way == "expectation":  # eight bits turn bits of codes over
        close(got, before.detach(), 0.2)
    assert got.isfinite().all()


@both_ways
def test_a_pruned_model_can_be_copied(way: str) -> None:
    """pytorch#37322: a copy of a pruned module failed. It still does in torch, before
    `prune.remove`.
    """
    model = model_of(way)
    layers = [module for module in model.modules() if type(module) is nn.Linear and module is not model.cls.predictions.decoder]
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=0.3)
    pruned = model(ids(2, 9)).logits
    for layer in layers:
        prune.remove(layer, "weight")
    assert torch.equal(copy.deepcopy(model)(ids(2, 9)).logits, pruned)
    assert sum(int((layer.weight == 0).sum()) for layer in layers) >= 0.3 * sum(layer.weight.numel() for layer in layers) - 1


@both_ways
def test_attributions_by_layer_and_by_embeddings_agree(way: str) -> None:
    """captum#1132: gradients at the embeddings differed between ids and `inputs_embeds`."""
    model = model_of(way, "YosoForSequenceClassification")
    caught: list[Tensor] = []
    words = model.get_input_embeddings()
    hook = words.register_forward_hook(lambda module, inputs, output: caught.append(output))
    by_layer = torch.autograd.grad(model(ids(2, 9)).logits[:, 0].sum(), caught[0])[0]
    hook.remove()
    embedded = words(ids(2, 9)).detach().requires_grad_()
    by_embeddings = torch.autograd.grad(model(inputs_embeds=embedded).logits[:, 0].sum(), embedded)[0]
    assert torch.equal(by_layer, by_embeddings)
    assert by_layer.any()


@both_ways
def test_threads_share_a_model(way: str) -> None:
    """pytorch#128535: custom operators failed when several threads called them."""
    model = model_of(way)
    texts = [ids(1 + seed % 3, 5 + seed, seed=seed) for seed in range(12)]

    def logits(text: Tensor) -> Tensor:
        with torch.no_grad():
            return model(text).logits

    alone = [logits(text) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        for got, expected in zip(threads.map(logits, texts), alone, strict=True):
            assert torch.equal(got, expected)


@both_ways
def test_an_average_of_weights_evaluates_with_the_same_hashes(way: str) -> None:
    """pytorch#84053: buffers of the copy in `AveragedModel` stayed what they were."""
    model = model_of(way)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)).eval()
    average.update_parameters(model)
    assert torch.equal(average(ids(2, 9)).logits, model(ids(2, 9)).logits)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for weight, kept in zip(model.parameters(), by_hand.parameters(), strict=True):
            weight += 0.1
            kept.lerp_(weight, 0.5)
    average.update_parameters(model)
    assert torch.equal(average(ids(2, 9)).logits, by_hand(ids(2, 9)).logits)


@both_ways
def test_a_whole_model_goes_through_a_file(way: str, tmp_path: Path) -> None:
    """transformers#7329: a model that was saved as weights alone could not be put together again;
    the advice was to save the whole.
    """
    model = model_of(way)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(ids(2, 9)).logits, model(ids(2, 9)).logits)
    assert again.cls.predictions.decoder.weight is again.yoso.embeddings.word_embeddings.weight


@both_ways
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Constant folding - Only steps=1:UserWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_exported_model_in_eight_bits(way: str, tmp_path: Path) -> None:
    """onnxruntime#15341: ``quantize_dynamic`` of a file takes float32 in and out, so that is what a
    file must have.
    """
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from onnxruntime.quantization import quantize_dynamic

    model = model_of(way, "YosoForSequenceClassification", num_hidden_layers=1)
    torch.onnx.export(model, (ids(2, 9),), tmp_path / "model.onnx", input_names=["input_ids"], dynamo=False)
    quantize_dynamic(tmp_path / "model.onnx", tmp_path / "small.onnx")
    (got,) = onnxruntime.InferenceSession(tmp_path / "small.onnx").run(None, {"input_ids": ids(2, 9).numpy()})
    expected = model(ids(2, 9)).logits.detach().numpy()
    assert got.dtype == np.float32
    if way == "expectation":
        np.testing.assert_allclose(got, expected, rtol=0, atol=0.2 * max(1, np.abs(expected).max()))


@both_ways
def test_a_key_that_nothing_else_reads(way: str) -> None:
    """pytorch#103749 and pytorch#101967: NaN where a query has no key, and NaN in keys that are
    masked, reached every row.
    """
    x = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    key_mask = torch.ones(2, 1, 9, dtype=torch.bool)
    key_mask[0], key_mask[1, :, 5:] = False, False
    dirty = x.masked_fill(~key_mask[..., None], torch.nan)
    options = {"num_hash": 4, "hash_code_len": 3, "use_expectation": way == "expectation", "rng": 0, "key_mask": key_mask}
    query = x.clone().requires_grad_()
    got = yoso_core.model.yoso_attention(query, dirty, dirty, **options)
    assert not got[0].any()
    assert torch.equal(got, yoso_core.model.yoso_attention(query, x, x, **options))
    got.sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_the_table_of_reports_has_every_report_that_is_tried() -> None:
    (section,) = re.findall(r"(?ms)^## Public reports, tried here\n(.*?)^## ", CONTRIBUTING)
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")][2:]
    assert all(len(row) == 3 for row in rows)
    listed = [report for row in rows for report in re.findall(r"[\w-]+#\d+", row[0])]
    assert len(rows) >= 20
    assert all((Path(__file__).parent / name).exists() for name in re.findall(r"`(test_\w+\.py)`", section))
    assert len(listed) == len(set(listed))
    named = re.findall(r'"""([\w#, -]*?#\d+)', Path(__file__).read_text("utf-8"))
    assert named
    assert {report for names in named for report in re.findall(r"[\w-]+#\d+", names)} <= set(listed)
