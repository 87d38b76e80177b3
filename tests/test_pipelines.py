"""transformers' pipelines with a model of ours: a batch of texts of unequal lengths gives what each
gives alone.
"""

import os
import socket
from typing import Any

import pytest
import torch
from hub_support import TEXTS, tiny, words, write_bpe
from model_support import close
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import cached_file

from yoso_core.model import YosoForMaskedLM, YosoModel
from yoso_core.model.filling import fill_mask
from yoso_core.model.tokenizer import load_tokenizer

WAYS: dict[str, dict[str, Any]] = {"expectation": {}, "sampled": {"use_expectation": False}}
UNEQUAL = [TEXTS[0], "Few words.", TEXTS[1], "A", TEXTS[2]]

every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_bpe(tmp_path_factory.mktemp("bpe")))


def alone_and_together(task: str, model: Any, tokenizer: Any, texts: list[str], **options: Any) -> tuple[list[Any], list[Any]]:
    """Results of texts one by one, and of one padded batch."""
    run = pipeline(task, model=model, tokenizer=tokenizer)
    assert run.model is model
    lengths = {len(tokenizer(text)["input_ids"]) for text in texts}
    assert len(lengths) > 1
    return [run(text, **options) for text in texts], run(texts, batch_size=len(texts), **options)


def probabilities(model: Any, tokenizer: Any, *texts: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt")).logits[0].softmax(-1)


@every_way
def test_fill_mask(way: str, tokenizer: Any) -> None:
    model = tiny("YosoForMaskedLM", **WAYS[way])
    texts = ["Paris is the <mask> of France.", "A <mask>.", "The quick brown fox <mask> over the lazy dog."]
    alone, together = alone_and_together("fill-mask", model, tokenizer, texts)
    for text, one, of_batch in zip(texts, alone, together, strict=True):
        ids = tokenizer(text)["input_ids"]
        expected = probabilities(model, tokenizer, text)[ids.index(tokenizer.mask_token_id)].topk(5)
        for found in (one, of_batch):
            assert [row["token"] for row in found] == expected.indices.tolist()
            assert [row["score"] for row in found] == pytest.approx(expected.values.tolist(), abs=1e-5)


@every_way
def test_text_classification(way: str, tokenizer: Any) -> None:
    model = tiny("YosoForSequenceClassification", num_labels=3, id2label={0: "a", 1: "b", 2: "c"}, **WAYS[way])
    alone, together = alone_and_together("text-classification", model, tokenizer, UNEQUAL, top_k=None)
    for text, one, of_batch in zip(UNEQUAL, alone, together, strict=True):
        expected = dict(zip("abc", probabilities(model, tokenizer, text).tolist(), strict=True))
        for found in (one, of_batch):
            assert {row["label"]: row["score"] for row in found} == pytest.approx(expected, abs=1e-5)


@every_way
def test_token_classification(way: str, tokenizer: Any) -> None:
    model = tiny("YosoForTokenClassification", num_labels=4, **WAYS[way])
    alone, together = alone_and_together("token-classification", model, tokenizer, UNEQUAL, ignore_labels=[])
    for text, one, of_batch in zip(UNEQUAL, alone, together, strict=True):
        expected = probabilities(model, tokenizer, text)[1:-1].max(-1)
        for found in (one, of_batch):
            assert [row["entity"] for row in found] == [f"LABEL_{label}" for label in expected.indices.tolist()]
            assert [float(row["score"]) for row in found] == pytest.approx(expected.values.tolist(), abs=1e-5)
            assert [row["word"] for row in found] == tokenizer.tokenize(text)
            assert "".join(text[row["start"] : row["end"]] for row in found) == text.replace(" ", "")


@every_way
def test_zero_shot_classification(way: str, tokenizer: Any) -> None:
    """A text is paired with a sentence for every label, and the pairs, of unequal lengths, make one
    batch.
    """
    labels = {0: "contradiction", 1: "neutral", 2: "entailment"}
    model = tiny(
        "YosoForSequenceClassification", num_labels=3, id2label=labels, label2id={name: i for i, name in labels.items()}, **WAYS[way]
    )
    run = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    candidates = ["France", "a lazy dog", "words"]
    scores = []
    for candidate in candidates:
        with torch.no_grad():
            scores.append(model(**tokenizer(TEXTS[0], f"This example is {candidate}.", return_tensors="pt")).logits[0, 2])
    expected = dict(zip(candidates, torch.stack(scores).softmax(0).tolist(), strict=True))
    for found in (run(TEXTS[0], candidates), run(TEXTS[0], candidates, batch_size=3)):
        assert dict(zip(found["labels"], found["scores"], strict=True)) == pytest.approx(expected, abs=1e-5)


@every_way
def test_feature_extraction(way: str, tokenizer: Any) -> None:
    model = tiny("YosoModel", **WAYS[way])
    alone, together = alone_and_together("feature-extraction", model, tokenizer, UNEQUAL, return_tensors=True)
    for text, one, of_batch in zip(UNEQUAL, alone, together, strict=True):
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**batch).last_hidden_state
        close(one, expected)
        close(of_batch[:, : expected.shape[1]], expected)


def test_there_is_no_pipeline_for_questions() -> None:
    """transformers 5 took it out, so the head is used by hand below."""
    assert "question-answering" not in PIPELINE_REGISTRY.get_supported_tasks()


@every_way
def test_question_answering(way: str, tokenizer: Any) -> None:
    """The best span of a text, in a padded batch of questions as alone."""
    model = tiny("YosoForQuestionAnswering", **WAYS[way])
    pairs = [("Where is Paris?", TEXTS[0]), ("What?", "A dog."), ("What jumps over the lazy dog?", TEXTS[2])]

    def spans(inputs: dict[str, torch.Tensor]) -> list[tuple[int, int, float]]:
        with torch.no_grad():
            out = model(**inputs)
        found = []
        for start, end, mask in zip(out.start_logits, out.end_logits, inputs["attention_mask"], strict=True):
            n = int(mask.sum())
            score = (start[:n, None] + end[None, :n]).masked_fill(torch.ones(n, n).tril(-1).bool(), -torch.inf)
            best = int(score.argmax())
            found.append((best // n, best % n, score.max().item()))
        return found

    together = spans(dict(tokenizer([q for q, _ in pairs], [t for _, t in pairs], padding=True, return_tensors="pt")))
    for (question, text), (start, end, score) in zip(pairs, together, strict=True):
        ((alone_start, alone_end, alone_score),) = spans(dict(tokenizer(question, text, return_tensors="pt")))
        assert (start, end) == (alone_start, alone_end)
        assert score == pytest.approx(alone_score, abs=1e-4)


def test_left_padding_needs_positions(tokenizer: Any) -> None:
    """Pipelines give none, so a tokenizer that pads on the left changes results: the first token
    must stand at row 2.
    """
    model = tiny("YosoModel")
    right = words(tokenizer, TEXTS[0], "Few words.")
    tokenizer.padding_side = "left"
    try:
        left = words(tokenizer, TEXTS[0], "Few words.")
    finally:
        tokenizer.padding_side = "right"
    n = int(left["attention_mask"][1].sum())
    positions = (left["attention_mask"].cumsum(-1) + 1).clamp(min=2)
    with torch.no_grad():
        expected = model(**right).last_hidden_state[1, :n]
        assert (model(**left).last_hidden_state[1, -n:] - expected).abs().max() > 1e-2
        close(model(**left, position_ids=positions).last_hidden_state[1, -n:], expected)


# The published model

PUBLISHED = "uw-madison/yoso-4096"

# Its model card: the answers to one sentence.
CARD = {" capital": 0.024274500086903572, " Republic": 0.022863076999783516, " French": 0.01383623294532299,
        " Paris": 0.013550693169236183, " President": 0.011591030284762383}  # fmt: skip


@pytest.fixture(scope="module")
def published() -> str:
    if cached_file(PUBLISHED, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False) is None:
        if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
            pytest.skip(f"{PUBLISHED} was not fetched before, and HF_HUB_OFFLINE is set")
        try:
            socket.create_connection(("huggingface.co", 443), timeout=3).close()
        except OSError as error:
            pytest.skip(f"{PUBLISHED} was not fetched before, and the hub cannot be reached: {error}")
    return PUBLISHED


@pytest.mark.hub
def test_published_model_answers_as_its_card(published: str) -> None:
    model, tokenizer = YosoForMaskedLM.from_pretrained(published).eval(), load_tokenizer(published)
    (found,) = fill_mask(model, tokenizer, "Paris is the [MASK] of France.")
    assert {filling.token_str: filling.score for filling in found} == pytest.approx(CARD, rel=1e-3)
    assert [filling.token for filling in found] == [812, 3497, 1515, 2201, 270]
    assert found[0].sequence == "Paris is the capital of France."
    run = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    assert [row["token"] for row in run("Paris is the <mask> of France.")] == [812, 3497, 1515, 2201, 270]


# transformers' tests/models/yoso/test_modeling_yoso.py: the first three numbers of the first three
# tokens.
HIDDEN = [[-0.0611, 0.1242, 0.0840], [0.0280, -0.0048, 0.1125], [0.0106, 0.0226, 0.0751]]
LOGITS = [[-2.1313, -3.7285, -2.2407], [-2.7047, -3.3314, -2.6408], [0.0629, -2.5166, -0.3356]]
LONG_LOGITS = [[-2.3914, -4.3742, -5.0956], [-4.0988, -4.2384, -7.0406], [-3.1427, -3.7192, -6.6800]]


@pytest.mark.hub
def test_published_model_gives_the_published_numbers(published: str) -> None:
    base, model = YosoModel.from_pretrained(published).eval(), YosoForMaskedLM.from_pretrained(published).eval()
    short, long = torch.arange(6)[None], torch.arange(4096)[None]
    with torch.no_grad():
        hidden = base(short).last_hidden_state
        logits = model(short).logits
        long_logits = model.cls(model.yoso(long).last_hidden_state[:, :3])
    assert (hidden.shape, logits.shape) == ((1, 6, 768), (1, 6, 50265))
    for got, expected in ((hidden, HIDDEN), (logits, LOGITS), (long_logits, LONG_LOGITS)):
        torch.testing.assert_close(got[0, :3, :3], torch.tensor(expected), rtol=1e-4, atol=1e-4)
