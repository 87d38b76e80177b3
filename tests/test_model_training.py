"""Training with Trainer, on one process and two, with adapters; compiled and exported models; and
what bad input says.
"""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import WAYS, close, config, enliven, gradients, ids, lively
from support import needs_torch_compiler
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainingArguments

from yoso_core import model as ours
from yoso_core.model import YosoForMaskedLM, YosoForSequenceClassification

needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
every_way = pytest.mark.parametrize("way", WAYS)


class Rows(Dataset):
    """A table of tensors, row by row."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: column[i] for name, column in self.columns.items()}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
        "seed": 0,
    }
    return TrainingArguments(**settings | changes)


# A masked LM that learns

WORDS = 12
NO_DROPOUT = {"hidden_dropout_prob": 0.0}


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"w{i}" for i in range(WORDS))]
    level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=level, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


def texts(count: int) -> list[dict[str, list[int]]]:
    """One word, again and again, in lines of 5 to 14: what was masked stands elsewhere in the
    line.
    """
    generator = torch.Generator().manual_seed(0)
    words, lengths = torch.randint(WORDS, (count,), generator=generator), torch.randint(5, 15, (count,), generator=generator)
    encode = tokenizer()
    return [dict(encode(" ".join([f"w{word}"] * n), return_token_type_ids=False)) for word, n in zip(words, lengths, strict=True)]


def loss_falls_by(folder: Path, *, freeze_values: bool = False, steps: int = 120, **settings: Any) -> tuple[float, Trainer]:
    """The mean loss of the first five steps over that of the last thirty."""
    training = {name: settings.pop(name) for name in ("bf16",) if name in settings}
    torch.manual_seed(0)
    small = {
        "vocab_size": 17,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "num_hash": 24,
        "hidden_dropout_prob": 0.0,
    }
    model = YosoForMaskedLM(config(**small | settings))
    if freeze_values:
        for name, weight in model.named_parameters():
            if ".self.value." in name:
                weight.requires_grad_(False).zero_()
    trainer = Trainer(
        model,
        arguments(folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=5e-3, **training),
        train_dataset=texts(512),
        eval_dataset=texts(32),
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3),
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == steps
    return sum(losses[:5]) / 5 / (sum(losses[-30:]) / 30), trainer


@pytest.mark.slow
@needs_accelerate
@every_way
def test_a_masked_lm_learns_with_trainer(way: str, tmp_path: Path) -> None:
    """From the logarithm of the number of words, 2.5, to a sixth and less. Without values to attend
    to it stays above two thirds.
    """
    factor, trainer = loss_falls_by(tmp_path, **WAYS[way])
    assert factor > 6
    assert trainer.evaluate()["eval_loss"] < 1


@pytest.mark.slow
@needs_accelerate
def test_the_text_is_learned_through_attention_alone(tmp_path: Path) -> None:
    assert loss_falls_by(tmp_path, freeze_values=True)[0] < 1.5


@pytest.mark.slow
@needs_accelerate
@pytest.mark.parametrize("way", ["expectation", "sampled"])
def test_a_masked_lm_learns_in_mixed_precision(way: str, tmp_path: Path) -> None:
    seen: set[torch.dtype] = set()
    forward = ours.layers.YosoSelfOutput.forward

    def watched(self: nn.Module, context: Tensor, *rest: Tensor) -> Tensor:
        seen.add(context.dtype)
        return forward(self, context, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours.layers.YosoSelfOutput, "forward", watched)
        factor, trainer = loss_falls_by(tmp_path, bf16=True, conv_window=3, **WAYS[way])
    assert factor > 6
    assert seen == {torch.bfloat16}
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}


# One step in pieces is one step at once


def table(head: str) -> Rows:
    """Eight texts, padded, of which the first say much more about the loss than the others."""
    keep = torch.arange(10) < torch.tensor([10, 9, 10, 3, 2, 4, 2, 3])[:, None]
    words = ids(8, 10).masked_fill(~keep, 1)
    inputs = {"input_ids": words, "attention_mask": keep.long()}
    if head == "YosoForSequenceClassification":
        return Rows(**inputs, labels=torch.linspace(-2, 3, 8))
    labels = (ids(8, 10, seed=1) % 5).masked_fill(~keep, -100)
    order = {"sentence_order_label": torch.arange(8) % 2} if head == "YosoForPreTraining" else {}
    return Rows(**inputs, labels=labels, **order)


SETTINGS: dict[str, dict[str, Any]] = {
    "YosoForMaskedLM": {},
    "YosoForTokenClassification": {"num_labels": 5},
    "YosoForSequenceClassification": {"num_labels": 1},
    "YosoForPreTraining": {},
}


def weights_after(head: str, folder: Path, batch: int, pieces: int, **settings: Any) -> dict[str, Tensor]:
    """After three steps of plain gradient descent over the same eight texts, and how far the first
    went.
    """
    model = lively(head, **SETTINGS[head], **NO_DROPOUT, **settings).double()
    how = arguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=pieces,
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0,
    )
    Trainer(model, how, train_dataset=table(head)).train()
    return {name: weight.detach() for name, weight in model.named_parameters()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.slow
@needs_accelerate
@pytest.mark.parametrize("head", ["YosoForMaskedLM", "YosoForTokenClassification", "YosoForSequenceClassification"])
def test_accumulated_gradients_are_those_of_one_large_batch(head: str, tmp_path: Path) -> None:
    """Although some pieces have more labels than others: every label counts alike."""
    at_once, in_pieces = weights_after(head, tmp_path, 8, 1), weights_after(head, tmp_path, 2, 4)
    start = {name: weight.detach() for name, weight in lively(head, **SETTINGS[head]).double().named_parameters()}
    assert apart(at_once, start) > 1e-2
    assert apart(at_once, in_pieces) < 1e-9


@pytest.mark.slow
@needs_accelerate
@pytest.mark.parametrize("head", ["YosoForMaskedLM", "YosoForTokenClassification"])
def test_the_comparison_sees_a_mean_of_means(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its twin: each piece is divided by its own labels."""
    at_once = weights_after(head, tmp_path, 8, 1)
    monkeypatch.setattr(getattr(ours, head), "accepts_loss_kwargs", False)
    assert apart(at_once, weights_after(head, tmp_path, 2, 4)) > 1e-3


@needs_accelerate
def test_pre_training_in_pieces_weighs_both_losses_alike(tmp_path: Path) -> None:
    """Only the words' labels are counted for a whole step, so both losses are means of the pieces:
    equal pieces give the large batch.
    """
    rows = table("YosoForPreTraining")
    rows.columns["labels"] = ids(8, 10, seed=1).masked_fill(torch.arange(10) >= 2, -100)  # two labels in every text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "table", lambda head: rows)
        at_once, in_pieces = (weights_after("YosoForPreTraining", tmp_path, *split) for split in ((8, 1), (2, 4)))
    assert apart(at_once, in_pieces) < 1e-9


# Two processes

PAIRS = [("YosoForMaskedLM", "sampled"), ("YosoForSequenceClassification", "expectation")]

TWO_PROCESSES = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from model_support import WAYS
from test_model_training import PAIRS, weights_after

torch.set_num_threads(1)
folder = Path(sys.argv[1])
found = {head: weights_after(head, folder, 2, 1, **WAYS[way]) for head, way in PAIRS}
assert dist.get_world_size() == 2
torch.save(found, folder / f"weights{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


@pytest.mark.long
@needs_accelerate
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    """With the same seed they draw the same hashes, which a batch shares, so even a sampled step is
    the same.
    """
    (tmp_path / "train.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py", "."]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launch, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1))
    for head, way in PAIRS:
        one = weights_after(head, tmp_path, 4, 1, **WAYS[way])
        assert apart(first[head], second[head]) == 0
        assert apart(first[head], one) < 1e-9
        assert apart(one, weights_after(head, tmp_path, 2, 1, **WAYS[way])) > 1e-3  # half of the texts teach something else


# Adapters


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="peft is not installed")


@every_way
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # asked by peft
@pytest.mark.parametrize("head", ["YosoForMaskedLM", "YosoForSequenceClassification"])
def test_adapters_on_query_and_value_learn(peft: Any, head: str, way: str, tmp_path: Path) -> None:
    """Only they change; merged, and read from their file, they give the same."""
    labels = {"labels": ids(4, 9, seed=1)} if head == "YosoForMaskedLM" else {"labels": torch.tensor([0, 1, 1, 0])}
    base = lively(head, num_labels=2, **WAYS[way], **NO_DROPOUT)
    untouched = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all("lora" in name and (".query." in name or ".value." in name) for name in trained)
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=0.03)
    model.train()
    torch.manual_seed(0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=ids(4, 9), **labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids(4, 9)).logits
        model.save_pretrained(tmp_path)
        merged = model.merge_and_unload()
        assert isinstance(merged, getattr(ours, head))
        if way == "expectation":  # a rounding may turn a bit of a code over
            close(merged(ids(4, 9)).logits, adapted)
        for name, weight in merged.state_dict().items():
            adapts = name.endswith((".query.weight", ".value.weight"))
            assert torch.equal(weight, untouched[name]) != adapts, name
        again = getattr(ours, head)(base.config).eval()
        again.load_state_dict(untouched)
        close(peft.PeftModel.from_pretrained(again, tmp_path)(input_ids=ids(4, 9)).logits, adapted, 0 if way != "expectation" else 1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("SEQ_CLS", "YosoForSequenceClassification"),
        ("TOKEN_CLS", "YosoForTokenClassification"),
        ("QUESTION_ANS", "YosoForQuestionAnswering"),
    ],
    ids=["sequence", "token", "question"],
)
def test_the_tasks_of_peft_find_the_heads(peft: Any, task: str, head: str) -> None:
    """Their own classes hand on what a head takes, and train its classifier as well."""
    labels = {
        "SEQ_CLS": {"labels": torch.tensor([0, 1])},
        "TOKEN_CLS": {"labels": ids(2, 9) % 2},
        "QUESTION_ANS": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    }[task]
    base = lively(head, num_labels=2)
    expected = base(ids(2, 9), **labels)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type=task, r=2, target_modules=["query", "value"]))
    got = model(input_ids=ids(2, 9), attention_mask=torch.ones(2, 9), **labels)
    close(got.loss, expected.loss, 1e-6)  # new adapters do nothing yet
    got.loss.backward()
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in gradients(model) if "lora_" in name} == {"query", "value"}
    assert any("lora_" not in name for name in gradients(model))
    assert not any("lora_" not in name and "yoso." in name for name in gradients(model))


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")
def test_adapters_learn_under_gradient_checkpointing(peft: Any) -> None:
    model = peft.get_peft_model(lively("YosoForMaskedLM", **NO_DROPOUT), peft.LoraConfig(r=2, target_modules=["query", "value"])).train()
    enliven(model)

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids(2, 9), labels=ids(2, 9, seed=1)).loss.backward()
        return gradients(model)

    right = step()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    again = step()
    assert right.keys() == again.keys()
    for name, grad in right.items():
        close(again[name], grad, 1e-6)


# Compiled and exported

MASK = torch.arange(12) < torch.tensor([12, 7])[:, None]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("way", "masked"),
    [("expectation", True), ("sampled", True), ("planes", True), ("sampled", False)],
    ids=["expectation-padded", "sampled-padded", "planes-padded", "sampled-unmasked"],
)
def test_a_compiled_model_gives_the_same(masked: bool, way: str) -> None:
    """In one graph, for every length."""
    layers = 2 if way == "sampled" and masked else 1  # in one case that a later layer draws hashes of its own
    model = lively("YosoForMaskedLM", conv_window=3, num_hidden_layers=layers, **WAYS[way])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for n in (12, 9):
            inputs = {"input_ids": ids(2, n)} | ({"attention_mask": MASK[:, :n].long()} if masked else {})
            close(compiled(**inputs).logits, model(**inputs).logits, 1e-6)
            torch.testing.assert_close(compiled(**inputs).logits, compiled(**inputs).logits, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_sees_a_changed_setting() -> None:
    model = lively("YosoModel", use_expectation=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        before = compiled(ids(2, 9)).last_hidden_state
        model.config.hash_seed = 6
        after = compiled(ids(2, 9)).last_hidden_state
        close(after, model(ids(2, 9)).last_hidden_state, 1e-6)
    assert (after - before).abs().max() > 1e-3


@needs_torch_compiler
@pytest.mark.slow
@pytest.mark.parametrize("way", ["expectation", "sampled"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_learns_the_same(way: str) -> None:
    """Loss and gradients, with the draws of the same seed."""
    model = lively("YosoForMaskedLM", **WAYS[way], **NO_DROPOUT).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for m in (model, compiled):
        model.zero_grad()
        torch.manual_seed(0)
        loss = m(ids(2, 12), attention_mask=MASK.long(), labels=ids(2, 12, seed=1)).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (loss, right), (compiled_loss, got) = found
    close(compiled_loss, loss, 1e-6)
    assert got.keys() == right.keys()
    for name, grad in right.items():
        close(got[name], grad, 1e-6)


@needs_torch_compiler
@pytest.mark.long
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # in torch's own inductor
def test_inductor_compiles_the_model() -> None:
    """The compiler that people use: it fuses what stands around attention, so roundings differ."""
    model = lively("YosoForMaskedLM", use_expectation=False)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        got = compiled(ids(2, 12), attention_mask=MASK.long()).logits
        close(got, model(ids(2, 12), attention_mask=MASK.long()).logits, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["expectation", "sampled"])
@pytest.mark.parametrize("head", ["YosoForMaskedLM", "YosoForSequenceClassification"])
def test_an_exported_model_gives_the_same(head: str, way: str) -> None:
    """For every batch and length, after a way through a file. In float64, since the exported graph
    was traced with gradients and so scales rows in another order of additions.
    """
    model = lively(head, conv_window=3, num_labels=2, **WAYS[way]).double()
    batch, n = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("n", min=2, max=24)
    shapes = {name: {0: batch, 1: n} for name in ("input_ids", "attention_mask")}
    inputs = {"input_ids": ids(2, 12), "attention_mask": MASK.long()}
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (), inputs, dynamic_shapes=shapes), file)
    exported = torch.export.load(io.BytesIO(file.getvalue())).module()
    with torch.no_grad():
        for shape in ((2, 12), (3, 7), (1, 24)):
            other = {"input_ids": ids(*shape), "attention_mask": (torch.arange(shape[1]) < torch.arange(4, 4 + shape[0])[:, None]).long()}
            close(exported(**other).logits, model(**other).logits, 1e-12)


# Bad input

FLAT, EMBEDS = ids(2, 6), torch.zeros(2, 6, 36)
CHOICES = ids(2, 3, 6)
ONES = torch.ones(2, 6)

BAD_INPUT: dict[str, tuple[str, dict[str, Any], str]] = {
    "too_long": ("YosoModel", {"input_ids": ids(1, 25)}, r"input_ids: 25 tokens are more than max_position_embeddings = 24"),
    "too_long_embeddings": ("YosoModel", {"inputs_embeds": torch.zeros(1, 25, 36)}, r"inputs_embeds: 25 tokens are more than"),
    "word_too_large": ("YosoModel", {"input_ids": FLAT + 61}, r"input_ids: need ids in \[0, 61\), the vocabulary, got 1\d\d|6\d"),
    "word_negative": ("YosoModel", {"input_ids": FLAT - 61}, r"input_ids: need ids in \[0, 61\), the vocabulary, got -"),
    "words_are_floats": ("YosoModel", {"input_ids": FLAT.float()}, r"input_ids: need integers, got torch\.float32"),
    "words_of_one_dim": ("YosoModel", {"input_ids": FLAT[0]}, r"input_ids: need the shape \(batch, n\), got \(6,\)"),
    "words_of_three_dims": ("YosoModel", {"input_ids": CHOICES}, r"input_ids: need the shape \(batch, n\), got \(2, 3, 6\)"),
    "both_inputs": ("YosoModel", {"input_ids": FLAT, "inputs_embeds": EMBEDS}, r"input_ids: give input_ids or inputs_embeds, one of"),
    "no_token": ("YosoModel", {"input_ids": FLAT[:, :0]}, r"input_ids: need at least one token, got none"),
    "no_embedded_token": ("YosoModel", {"inputs_embeds": EMBEDS[:, :0]}, r"inputs_embeds: need at least one token, got none"),
    "no_input": ("YosoModel", {}, r"input_ids: give input_ids or inputs_embeds, one of the two"),
    "embeddings_of_another_width": (
        "YosoModel",
        {"inputs_embeds": EMBEDS[..., 1:]},
        r"inputs_embeds: .*\(batch, n, 36\), got \(2, 6, 35\)",
    ),
    "embeddings_of_two_dims": ("YosoModel", {"inputs_embeds": EMBEDS[0]}, r"inputs_embeds: need the shape .* got \(6, 36\)"),
    "mask_too_short": ("YosoModel", {"input_ids": FLAT, "attention_mask": ONES[:, 1:]}, r"attention_mask: .*\(2, 6\), got \(2, 5\)"),
    "mask_of_one_dim": ("YosoModel", {"input_ids": FLAT, "attention_mask": ONES[0]}, r"attention_mask: .*\(2, 6\), got \(6,\)"),
    "mask_of_three_rows": (
        "YosoModel",
        {"input_ids": FLAT, "attention_mask": torch.ones(3, 6)},
        r"attention_mask: .*\(2, 6\), got \(3, 6\)",
    ),
    "mask_of_three_dims": (
        "YosoModel",
        {"input_ids": FLAT, "attention_mask": ONES[:, None]},
        r"attention_mask: need the shape \(batch, n\) = \(2, 6\), got \(2, 1, 6\)",
    ),
    "mask_for_every_query": (
        "YosoModel",
        {"input_ids": FLAT, "attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.bool)},
        r"attention_mask: need the shape \(batch, n\) = \(2, 6\), got \(2, 1, 6, 6\); a mask that differs from query to query cannot",
    ),
    "additive_mask_of_four_dims": (
        "YosoModel",
        {"input_ids": FLAT, "attention_mask": torch.where(torch.arange(6) < 4, 0.0, -torch.inf).expand(2, 1, 1, 6)},
        r"attention_mask: need 1 for a token and 0 for padding, got other numbers; an additive mask means the opposite",
    ),
    "additive_mask": (
        "YosoModel",
        {"input_ids": FLAT, "attention_mask": torch.where(torch.arange(6) < 4, 0.0, -torch.inf).expand(2, 6)},
        r"attention_mask: need 1 for a token and 0 for padding, got other numbers; an additive mask means the opposite",
    ),
    "additive_mask_of_integers": (
        "YosoModel",
        {"input_ids": FLAT, "attention_mask": torch.where(torch.arange(6) < 4, 0, -10000).expand(2, 6)},
        r"attention_mask: need 1 for a token and 0 for padding",
    ),
    "nan_in_the_mask": ("YosoModel", {"input_ids": FLAT, "attention_mask": ONES * torch.nan}, r"attention_mask: need 1 for a token"),
    "types_too_large": ("YosoModel", {"input_ids": FLAT, "token_type_ids": torch.ones_like(FLAT)}, r"token_type_ids: need ids in \[0, 1\)"),
    "types_of_another_shape": (
        "YosoModel",
        {"input_ids": FLAT, "token_type_ids": FLAT[:, 1:] * 0},
        r"token_type_ids: need the shape \(2, 6\)",
    ),
    "positions_too_large": (
        "YosoModel",
        {"input_ids": FLAT, "position_ids": torch.full_like(FLAT, 26)},
        r"position_ids: need ids in \[0, 26\), the rows of the position table .*got 26",
    ),
    "positions_negative": ("YosoModel", {"input_ids": FLAT, "position_ids": -FLAT}, r"position_ids: need ids in \[0, 26\).*got -"),
    "positions_of_another_shape": (
        "YosoModel",
        {"input_ids": FLAT, "position_ids": torch.arange(6)},
        r"position_ids: need the shape \(2, 6\)",
    ),
    "types_are_floats": ("YosoModel", {"input_ids": FLAT, "token_type_ids": FLAT * 0.0}, r"token_type_ids: need integers, got torch"),
    "positions_are_floats": ("YosoModel", {"input_ids": FLAT, "position_ids": FLAT * 1.0}, r"position_ids: need integers, got torch"),
    "lm_label_too_large": (
        "YosoForMaskedLM",
        {"input_ids": FLAT, "labels": FLAT + 61},
        r"labels: need -100 \(ignored\) or classes in \[0, 61\)",
    ),
    "lm_label_negative": ("YosoForMaskedLM", {"input_ids": FLAT, "labels": FLAT * 0 - 1}, r"labels: need -100 \(ignored\) or .*got -1"),
    "lm_labels_of_another_shape": (
        "YosoForMaskedLM",
        {"input_ids": FLAT, "labels": FLAT[:, 1:]},
        r"labels: need the shape \(2, 6\), got \(2, 5\)",
    ),
    "lm_labels_are_floats": ("YosoForMaskedLM", {"input_ids": FLAT, "labels": FLAT.float()}, r"labels: need integers, got torch\.float32"),
    "order_too_large": (
        "YosoForPreTraining",
        {"input_ids": FLAT, "sentence_order_label": torch.tensor([0, 2])},
        r"sentence_order_label: need -100 \(ignored\) or classes in \[0, 2\), got 2",
    ),
    "order_of_another_shape": (
        "YosoForPreTraining",
        {"input_ids": FLAT, "sentence_order_label": torch.tensor([0])},
        r"sentence_order_label: need the shape \(2,\), got \(1,\)",
    ),
    "class_too_large": (
        "YosoForSequenceClassification",
        {"input_ids": FLAT, "labels": torch.tensor([0, 2])},
        r"labels: need -100 \(ignored\) or classes in \[0, 2\), got 2",
    ),
    "classes_of_another_shape": (
        "YosoForSequenceClassification",
        {"input_ids": FLAT, "labels": torch.tensor([0, 1, 1])},
        r"labels: need the shape \(2,\), got \(3,\)",
    ),
    "several_labels_of_another_shape": (
        "YosoForSequenceClassification",
        {"input_ids": FLAT, "labels": torch.zeros(2, 3)},
        r"labels: for multi_label_classification need the shape \(2, 2\), got \(2, 3\)",
    ),
    "choice_too_large": (
        "YosoForMultipleChoice",
        {"input_ids": CHOICES, "labels": torch.tensor([0, 3])},
        r"labels: need -100 \(ignored\) or classes in \[0, 3\), got 3",
    ),
    "no_choices": ("YosoForMultipleChoice", {"input_ids": FLAT}, r"input_ids: need the shape \(batch, choices, n\), got \(2, 6\)"),
    "no_choices_of_embeddings": (
        "YosoForMultipleChoice",
        {"inputs_embeds": EMBEDS},
        r"inputs_embeds: need the shape \(batch, choices, n, hidden_size\), got \(2, 6, 36\)",
    ),
    "no_input_to_choose_from": ("YosoForMultipleChoice", {}, r"input_ids: give input_ids or inputs_embeds, one of the two"),
    "both_inputs_to_choose_from": (
        "YosoForMultipleChoice",
        {"input_ids": CHOICES, "inputs_embeds": torch.zeros(2, 3, 6, 36)},
        r"input_ids: give input_ids or inputs_embeds, one of the two",
    ),
    "mask_without_choices": (
        "YosoForMultipleChoice",
        {"input_ids": CHOICES, "attention_mask": ONES},
        r"attention_mask: need the shape \(batch, choices, n\) = \(2, 3, 6\), got \(2, 6\)",
    ),
    "token_label_too_large": (
        "YosoForTokenClassification",
        {"input_ids": FLAT, "labels": torch.full_like(FLAT, 2)},
        r"labels: need -100 \(ignored\) or classes in \[0, 2\), got 2",
    ),
    "token_labels_of_another_shape": (
        "YosoForTokenClassification",
        {"input_ids": FLAT, "labels": torch.zeros(2, dtype=torch.long)},
        r"labels: need the shape \(2, 6\), got \(2,\)",
    ),
    "start_without_end": (
        "YosoForQuestionAnswering",
        {"input_ids": FLAT, "start_positions": torch.tensor([0, 1])},
        r"end_positions: give start_positions and end_positions, both or neither",
    ),
    "end_without_start": (
        "YosoForQuestionAnswering",
        {"input_ids": FLAT, "end_positions": torch.tensor([0, 1])},
        r"start_positions: give start_positions and end_positions, both or neither",
    ),
    "answers_of_another_batch": (
        "YosoForQuestionAnswering",
        {"input_ids": FLAT, "start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([1])},
        r"end_positions: need the shape \(2,\), got \(1,\)",
    ),
    "answers_are_floats": (
        "YosoForQuestionAnswering",
        {"input_ids": FLAT, "start_positions": torch.tensor([0.5, 1]), "end_positions": torch.tensor([1, 1])},
        r"start_positions: need integers, got torch\.float32",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case: str) -> None:
    head, inputs, message = BAD_INPUT[case]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        lively(head, num_labels=2)(**inputs)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_labels_must_fit_the_named_problem(problem: str) -> None:
    model = lively("YosoForSequenceClassification", num_labels=3, problem_type=problem)
    with pytest.raises(ValueError, match=rf"^labels: for {problem} need the shape \(2, 3\), got \(2,\)"):
        model(FLAT, labels=torch.tensor([0.0, 1.0]))
    model.config.problem_type = "ranking"
    with pytest.raises(ValueError, match=r"^problem_type: need one of 'regression', .*, got 'ranking'"):
        model(FLAT, labels=torch.zeros(2, 3))
    single = lively("YosoForSequenceClassification", num_labels=3, problem_type="single_label_classification")
    with pytest.raises(TypeError, match=r"^labels: need integers, got torch\.float32"):
        single(FLAT, labels=torch.tensor([0.0, 1.0]))


def test_head_size_must_divide() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads: hidden_size = 36 does not divide into 5 heads"):
        YosoForSequenceClassification(config(num_attention_heads=5))


PASSED: dict[str, Any] = {
    "special_tokens_mask": torch.zeros(2, 6, dtype=torch.long),
    "offset_mapping": torch.zeros(2, 6, 2, dtype=torch.long),
    "length": torch.tensor([6, 6]),
    "overflow_to_sample_mapping": torch.tensor([0, 1]),
    "idx": torch.tensor([3, 4]),
    "example_id": ["a", "b"],
    "use_cache": False,
    "return_loss": True,
    "encoder_hidden_states": None,
    "head_mask": None,
    "past_key_values": None,
}
"""What tokenizers, data sets and trainers add."""

ALL_HEADS = [
    "YosoModel",
    "YosoForMaskedLM",
    "YosoForPreTraining",
    "YosoForSequenceClassification",
    "YosoForMultipleChoice",
    "YosoForTokenClassification",
    "YosoForQuestionAnswering",
]


@pytest.mark.parametrize("head", ALL_HEADS)
def test_what_tokenizers_and_trainers_add_is_ignored(head: str) -> None:
    model, words = lively(head), CHOICES if head == "YosoForMultipleChoice" else FLAT
    with torch.no_grad():
        for got, expected in zip(model(words, **PASSED).to_tuple(), model(words).to_tuple(), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_all_that_a_tokenizer_returns_is_taken() -> None:
    keys = {f"return_{name}": True for name in ("special_tokens_mask", "offsets_mapping", "length", "token_type_ids")}
    given = tokenizer()(["w1 w2 w3", "w4 w5"], padding=True, return_tensors="pt", **keys)
    assert given.keys() >= {"special_tokens_mask", "offset_mapping", "length"}
    model = lively("YosoForMaskedLM")
    plain = {name: given[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model(**given).logits, model(**plain).logits)


@needs_accelerate
def test_a_trainer_may_hand_over_every_column(tmp_path: Path) -> None:
    rows = table("YosoForSequenceClassification")
    rows.columns["idx"] = torch.arange(8)
    how = arguments(tmp_path, max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False)
    assert Trainer(lively("YosoForSequenceClassification", num_labels=1), how, train_dataset=rows).train().global_step == 2


MISSPELT = [
    ("YosoModel", "atention_mask", "attention_mask"),
    ("YosoModel", "attn_mask", "attention_mask"),
    ("YosoForMaskedLM", "attention_masks", "attention_mask"),
    ("YosoForMaskedLM", "token_type_id", "token_type_ids"),
    ("YosoForMaskedLM", "label", "labels"),
    ("YosoForSequenceClassification", "label_ids", "labels"),
    ("YosoForTokenClassification", "positions_ids", "position_ids"),
    ("YosoForMultipleChoice", "input_embeds", "inputs_embeds"),
    ("YosoForQuestionAnswering", "start_position", "start_positions"),
    ("YosoForPreTraining", "sentence_order_labels", "sentence_order_label"),
    ("YosoModel", "output_attention", "output_attentions"),
]


@pytest.mark.parametrize(("head", "name", "meant"), MISSPELT, ids=[name for _, name, _ in MISSPELT])
def test_a_misspelt_argument_is_refused(head: str, name: str, meant: str) -> None:
    words = CHOICES if head == "YosoForMultipleChoice" else FLAT
    with pytest.raises(TypeError, match=f"^{name}: {head} has no such argument; {meant} is probably meant"):
        lively(head)(words, **{name: torch.ones_like(words)})


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("YosoModel", "labels"),
        ("YosoForQuestionAnswering", "labels"),
        ("YosoForMaskedLM", "sentence_order_label"),
        ("YosoForSequenceClassification", "num_items_in_batch"),
        ("YosoForPreTraining", "next_sentence_label"),
        ("YosoModel", "encoder_hidden_states"),
        ("YosoModel", "encoder_attention_mask"),
        ("YosoForMaskedLM", "head_mask"),
        ("YosoForTokenClassification", "past_key_values"),
        ("YosoForMaskedLM", "cu_seq_lens_q"),
    ],
)
def test_an_argument_that_would_change_the_result_is_refused(head: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name}: {head} has no such argument, and would give another result than is meant with it"):
        lively(head)(FLAT, **{name: FLAT})
