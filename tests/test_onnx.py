"""Models that leave as ONNX files, run by onnxruntime at other shapes than the exported ones."""

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from model_support import TINY, WAYS, close, enliven, ids, lively
from torch import Tensor, nn

import yoso_core
from yoso_core import reference
from yoso_core.model import YosoAttentionOptions, enable_yoso_attention, plain
from yoso_core.reference.hashing import LAYOUTS, Layout

onnx, onnxruntime = (pytest.importorskip(name, reason=f"{name} is not installed") for name in ("onnx", "onnxruntime"))
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The feature will be removed:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Constant folding - Only steps=1:UserWarning"),  # of padding
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of checks of shapes
]

HEADS = {
    "YosoModel": "last_hidden_state",
    "YosoForMaskedLM": "logits",
    "YosoForPreTraining": "prediction_logits",
    "YosoForSequenceClassification": "logits",
    "YosoForMultipleChoice": "logits",
    "YosoForTokenClassification": "logits",
    "YosoForQuestionAnswering": "start_logits",
}
"""Every head, and the first of its outputs."""

both_exporters = pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])

BATCH, N = 2, 7
OTHER_SHAPES = [(3, 19), (1, 1), (2, 24)]


class Session:
    """An exported model, run by onnxruntime."""

    def __init__(
        self, model: nn.Module, inputs: dict[str, Tensor], exporter: str, path: Path, output: str = "out", sizes: tuple[int, ...] = (0, 1)
    ) -> None:
        """``sizes`` are the dims whose sizes are free."""
        if exporter == "dynamo":
            free: dict[int, Any] = dict.fromkeys(sizes, torch.export.Dim.DYNAMIC)
            shapes = {"kwargs": inputs, "dynamic_shapes": dict.fromkeys(inputs, free), "external_data": False, "verbose": False}
        else:
            free = {size: f"size_{size}" for size in sizes}
            shapes = {"dynamic_axes": dict.fromkeys([*inputs, output], free), "input_names": list(inputs), "dynamo": False}
        args = () if exporter == "dynamo" else tuple(inputs.values())
        torch.onnx.export(model.eval(), args, path, output_names=[output], **shapes)
        self.graph = onnx.load(path).graph
        onnx.checker.check_model(onnx.load(path), full_check=True)
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(self.session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])


def batch(*shape: int, seed: int = 0) -> dict[str, Tensor]:
    """Words and padding; the last row has the most of it."""
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, ..., shape[-1] // 2 + 1 :] = 0
    return {"input_ids": ids(*shape, seed=seed).masked_fill(mask == 0, 1), "attention_mask": mask}


def exports() -> Iterator[Any]:
    """Every head by both exporters in both modes. The new exporter takes many seconds: only one of
    its cases is in every run of the tests.
    """
    for head, way, exporter in product(HEADS, ("expectation", "sampled"), ("dynamo", "torchscript")):
        short = exporter == "torchscript" or (head, way) == ("YosoForMaskedLM", "sampled")
        yield pytest.param(head, way, exporter, marks=() if short else pytest.mark.long)


@pytest.mark.parametrize(("head", "way", "exporter"), list(exports()))
def test_every_head_gives_the_same_at_other_shapes(head: str, way: str, exporter: str, tmp_path: Path) -> None:
    # One layer: where it is sampled, a bit that rounding flips in it would spread in the second.
    model = lively(head, use_expectation=way == "expectation", num_hidden_layers=1)
    choices = (2,) if head == "YosoForMultipleChoice" else ()
    session = Session(model, batch(BATCH, *choices, N), exporter, tmp_path / "model.onnx", HEADS[head], (0, 1 + len(choices)))
    assert {node.domain for node in session.graph.node} <= {"", "ai.onnx"}
    for seed, (rows, tokens) in enumerate(OTHER_SHAPES):
        inputs = batch(rows, *choices, tokens, seed=seed)
        with torch.no_grad():
            expected = model(**inputs)[HEADS[head]]
        got = session(inputs)
        if expected.shape[:2] == (rows, tokens):  # what stands at padding has no meaning
            got, expected = (x[inputs["attention_mask"] == 1] for x in (got, expected))
        close(got, expected)


@pytest.mark.parametrize("way", WAYS)
def test_convolution_types_positions_and_planes(way: str, tmp_path: Path) -> None:
    model = lively("YosoForSequenceClassification", num_hidden_layers=1, type_vocab_size=2, conv_window=5, **WAYS[way])

    def inputs(rows: int, tokens: int) -> dict[str, Tensor]:
        positions = torch.arange(3, 3 + tokens).expand(rows, tokens)
        return batch(rows, tokens) | {"token_type_ids": positions % 2, "position_ids": positions.clone()}

    session = Session(model, inputs(BATCH, N), "torchscript", tmp_path / "model.onnx", "logits")
    with torch.no_grad():
        close(session(inputs(3, 19)), model(**inputs(3, 19)).logits)


def test_attentions_leave_as_well(tmp_path: Path) -> None:
    model = lively("YosoModel", num_hidden_layers=1, output_attentions=True)
    session = Session(model, batch(BATCH, N), "torchscript", tmp_path / "model.onnx", "last_hidden_state")
    inputs = batch(3, 19)
    _, got = session.session.run(None, {name: x.numpy() for name, x in inputs.items()})
    close(torch.from_numpy(got), model(**inputs).attentions[0].detach())


class Attention(nn.Module):
    """Attention with fixed hashes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return yoso_core.yoso_attention(query, key, value, **self.options)


def vectors(*leading: int, seed: int = 0, **dims: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*leading, size, generator=generator) for name, size in dims.items()}


@pytest.mark.parametrize(
    ("num_hash", "tau", "dim", "exporter"),
    [
        (9, 4, 16, "torchscript"),
        (3, 13, 5, "torchscript"),
        pytest.param(9, 4, 16, "dynamo", marks=pytest.mark.long),
        pytest.param(3, 13, 5, "dynamo", marks=pytest.mark.long),
    ],
)
def test_sampled_attention_has_the_buckets_of_the_library(num_hash: int, tau: int, dim: int, exporter: str, tmp_path: Path) -> None:
    signs = torch.from_numpy(reference.sample_signs(num_hash, tau, dim, batch_shape=(2,), rng=0))
    attention = Attention(num_hash=num_hash, hash_code_len=tau, signs=signs, normalize_output=False)
    session = Session(attention, vectors(3, 2, 9, query=dim, key=dim, value=4), exporter, tmp_path / "attention.onnx", sizes=(0, 2))
    inputs = vectors(1, 2, 33, query=dim, key=dim, value=4, seed=1)
    inputs["key"][..., :20, :] = inputs["query"][..., :20, :]
    close(session(inputs), attention(**inputs), tolerance=1e-6)


@both_exporters
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_bit_for_bit_those_of_the_reference(exporter: str, layout: Layout, tmp_path: Path) -> None:
    num_hash, tau, dim = 7, 9, 40
    signs = reference.sample_signs(num_hash, tau, dim, layout=layout, rng=0)

    class Hash(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain.fast_hash(x, torch.from_numpy(signs), num_hash, tau, layout)

    session = Session(Hash(), vectors(3, x=dim), exporter, tmp_path / "hash.onnx", sizes=(0,))
    x = vectors(1001, x=dim, seed=1)
    assert np.array_equal(session(x).numpy(), reference.fast_hash(x["x"].numpy(), signs, num_hash, tau, layout=layout))


@both_exporters
def test_rows_without_a_key_are_zeros_and_what_is_not_finite_stays_visible(exporter: str, tmp_path: Path) -> None:
    attention = Attention(num_hash=1, hash_code_len=6, signs=torch.from_numpy(reference.sample_signs(1, 6, 8, rng=0)))
    session = Session(attention, vectors(2, 9, query=8, key=8, value=8), exporter, tmp_path / "attention.onnx", sizes=(1,))
    inputs = vectors(2, 20, query=8, key=8, value=8)
    inputs["key"][:, :9] = inputs["query"][:, :9]
    got, expected = session(inputs), attention(**inputs)
    assert (expected == 0).all(dim=-1).any()
    assert (expected != 0).any()
    close(got, expected)
    inputs["query"][0, 2, 3], inputs["key"][1, 1, 1] = torch.nan, torch.inf
    got, expected = session(inputs), attention(**inputs)
    assert expected[1].isnan().all()
    assert torch.equal(got.isnan(), expected.isnan())


@pytest.mark.long
@pytest.mark.parametrize("way", ["expectation", "sampled"])
def test_bert_with_yoso_attention(way: str, tmp_path: Path) -> None:
    """Not by the old exporter: it cannot call transformers' BERT, whatever its attention."""
    sizes = {name: TINY[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")}
    model = transformers.BertModel(transformers.BertConfig(**sizes, num_hidden_layers=1), add_pooling_layer=False)
    enliven(model)
    enable_yoso_attention(YosoAttentionOptions(num_hash=4, hash_code_len=3, use_expectation=way == "expectation"), model=model.eval())
    session = Session(model, batch(BATCH, N), "dynamo", tmp_path / "bert.onnx", "last_hidden_state")
    inputs = batch(3, 19)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    kept = inputs["attention_mask"] == 1
    close(session(inputs)[kept], expected[kept])


@both_exporters
def test_a_model_in_training_is_refused_where_its_hashes_would_be_drawn(exporter: str, tmp_path: Path) -> None:
    model = lively("YosoModel", use_expectation=False).train()
    more = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False} if exporter == "torchscript" else {"verbose": False}
    with pytest.raises(Exception, match=r"signs: a graph needs fixed hashes; .*model\.eval\(\)"):
        torch.onnx.export(model, (), tmp_path / "model.onnx", kwargs=batch(BATCH, N), dynamo=exporter == "dynamo", **more)


def test_the_lines_of_the_documentation_export_check_and_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "onnx.md").read_text("utf-8")
    (program,) = re.findall(r"(?ms)^```python\n(.*?)^```$", text)
    assert len(program.splitlines()) <= 24
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "onnx.md", "exec"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["yoso.onnx"]
