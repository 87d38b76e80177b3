# %% [markdown]
# # 13. Five heads, five tasks
#
# **You will be able to** pre-train a small YOSO encoder on text of your own, put each of the five
# heads on it, fine-tune them with transformers' `Trainer`, and say what a score is worth by putting
# a trivial guess beside it.
#
# **Time:** 40 minutes, and 25 for the exercises.
#
# **You need:** tutorial 9.
#
# **Source:** [`yoso_core.model.heads`](../model/heads.py),
# [`yoso_core.model.tokenizer`](../model/tokenizer.py); section 4 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714).

# %%
import ast
import importlib.util
import io
import keyword
import math
import pkgutil
import random
import re
import shutil
import tempfile
import tokenize
import warnings
import zlib
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")  # a notebook without ipywidgets: transformers' progress bars

import numpy as np
import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import Trainer, TrainingArguments

from yoso_core import draw
from yoso_core.model import (
    YosoConfig,
    YosoForMaskedLM,
    YosoForMultipleChoice,
    YosoForQuestionAnswering,
    YosoForSequenceClassification,
    YosoForTokenClassification,
    load_tokenizer,
)

draw.use_look()
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings
transformers.utils.logging.set_verbosity_error()  # no word about heads that start from random numbers: that is the plan
transformers.utils.logging.disable_progress_bar()

STEPS = {"masked LM": 300, "text": 120, "tokens": 100, "questions": 200, "choice": 100}  # of training: more is better, and slower

# %% [markdown]
# ## Text that you have already
#
# Every Python carries a few hundred modules with their documentation inside. That is our data:
# docstrings, and the source around them. `sources` finds a module's text (and that of a package's
# modules) and `docstrings` takes it apart. Nothing is downloaded, and since versions of Python
# differ, so will your numbers, a little.

# %%
MODULES = """
_pydecimal _pyio argparse ast asyncio base64 bdb calendar cmd code collections concurrent configparser contextlib copy csv ctypes
dataclasses datetime _pydatetime difflib dis doctest email enum fileinput fractions ftplib functools gettext gzip heapq hmac html http
imaplib inspect ipaddress json linecache locale logging lzma mailbox mimetypes multiprocessing netrc numbers optparse pathlib pdb pickle
pickletools pkgutil platform plistlib poplib pprint pydoc queue random re sched selectors shelve shlex shutil smtplib socket socketserver
ssl statistics string subprocess tarfile tempfile textwrap threading timeit traceback tracemalloc types typing unittest urllib uuid wave
weakref webbrowser wsgiref xml xmlrpc zipfile zoneinfo
"""


def sources(module):
    """The source texts of a module, and of all modules in it if it is a package; none if this
    Python does not have it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.has_location:  # not there, or frozen into the interpreter
        return
    if source := spec.loader.get_source(module):
        yield source
    for inner in sorted(found.name for found in pkgutil.iter_modules(spec.submodule_search_locations or [])):
        if not inner.startswith(("test", "__main__")):
            yield from sources(f"{module}.{inner}")


def docstrings(source):
    """Every docstring of a source text, with what it belongs to."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (text := ast.get_docstring(node)):
            yield node, text


documents, known = [], set()  # (module, node, docstring), each text once
for module in MODULES.split():
    for source in sources(module):
        for node, text in docstrings(source):
            if text not in known:
                known.add(text)
                documents.append((module, node, text))
print(f"{len(documents):,} docstrings, {sum(len(text) for *_, text in documents):,} characters")

# %% [markdown]
# ## Hold some back, before anything else
#
# A score counts only on text that no model has seen, neither in fine-tuning nor in pre-training. So
# we split *once*, by whole docstrings: two sentences of one docstring are too alike to stand on
# both sides. A checksum decides, so the split is the same on every run.


# %%
def held_out(text):
    return zlib.crc32(text.encode()) % 5 == 0


train_documents = [document for document in documents if not held_out(document[2])]
test_documents = [document for document in documents if held_out(document[2])]
assert not {text for *_, text in train_documents} & {text for *_, text in test_documents}
assert 0.15 < len(test_documents) / len(documents) < 0.25

# %% [markdown]
# ## A tokenizer
#
# YOSO's checkpoints use RoBERTa's byte-level BPE. Ours is trained on the training text in a second
# and knows 1,000 pieces. `load_tokenizer` makes RoBERTa's tokenizer of the two files that the
# `tokenizers` package writes.

# %%
folder = Path(tempfile.mkdtemp())  # for all that this tutorial writes; removed at its end
LONGEST = 80

bpe = ByteLevelBPETokenizer()
special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
bpe.train_from_iterator((text for *_, text in train_documents), vocab_size=1000, special_tokens=special, show_progress=False)
bpe.save_model(str(folder))
tokenizer = load_tokenizer(folder, model_max_length=LONGEST)

pieces = tokenizer("Return the number of bytes written.")
print(tokenizer.convert_ids_to_tokens(pieces.input_ids))
assert tokenizer.decode(pieces.input_ids, skip_special_tokens=True) == "Return the number of bytes written."
assert [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id] == [0, 1, 2]  # as YosoConfig has them

# %% [markdown]
# ## The encoder
#
# One layer of 64 dims, a thousandth of a model that is used in earnest, so that every task below is
# trained in seconds. Two of its settings need a word:
#
# - `use_expectation=True`. A text has at most 80 tokens here, so all its pairs can be weighed
#   exactly, and training without noise is the simplest. At the end every model is scored with
#   sampled attention too, on the same weights.
# - `conv_window=9` adds a depth-wise convolution over the values, 9 tokens wide, to the attention,
#   as in the authors' checkpoints. Attention has to learn which token is a neighbor, the
#   convolution is born with it. Try `None`: the loss then takes far longer to fall.

# %%
config = YosoConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=128,
    max_position_embeddings=LONGEST,
    hash_code_len=8,
    num_hash=64,
    conv_window=9,
    use_expectation=True,
    hidden_dropout_prob=0.0,
    initializer_range=0.1,
)
parameters = sum(weight.numel() for weight in YosoForMaskedLM(config).parameters())
print(f"{parameters:,} parameters")
assert parameters < 127_000_000 / 800  # RoBERTa's size, which YOSO's checkpoints have


def make_trainer(model, rows, collator, steps, batch, learning_rate=4e-3):
    """A Trainer that says nothing and writes nothing."""
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=steps // 10,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=128,
        logging_steps=10,
        seed=13,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


SCORES = {}  # task: trivial guess, model, the same model with sampled attention


def keep_score(task, trivial, score):
    """``score()`` of the trainer's model with the expectation, then with sampled attention. The
    weights are the same.
    """
    model = trainer.model
    exact = score()
    model.config.use_expectation = False
    sampled = score()
    model.config.use_expectation = True
    SCORES[task] = trivial, exact, sampled
    print(f"{task}: {exact:.1%} right on held-out data, {sampled:.1%} with sampled attention, {trivial:.1%} by the trivial guess")


# %% [markdown]
# ## 1. Masked LM: `YosoForMaskedLM`
#
# **Data.** Nothing but text. `DataCollatorForLanguageModeling` masks 30% of the pieces, anew in
# every batch, and puts -100 as the label wherever there is nothing to predict.
#
# **Trivial guess.** The most frequent piece of the training text, everywhere.


# %%
def text_rows(documents):
    """The first 32 pieces of each docstring, if it has more than a few."""
    encoded = tokenizer([text for *_, text in documents], truncation=True, max_length=32).input_ids
    return [{"input_ids": ids} for ids in encoded if len(ids) > 8]


train, test = text_rows(train_documents), text_rows(test_documents)[:400]
masking = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)

transformers.set_seed(13)
trainer = make_trainer(YosoForMaskedLM(config), train, masking, STEPS["masked LM"], batch=32, learning_rate=8e-3)
trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(dim=-1)  # 1,000 scores for each piece need not be kept
trainer.train()

counted = Counter(piece for row in train for piece in row["input_ids"][1:-1])
frequent = counted.most_common(1)[0][0]


def masked_lm_score():
    transformers.set_seed(1)  # masks the same pieces each time
    found = trainer.predict(test)
    asked = found.label_ids != -100
    return (found.predictions == found.label_ids)[asked].mean()


keep_score("masked LM", np.mean([piece == frequent for row in test for piece in row["input_ids"][1:-1]]), masked_lm_score)

# %%
masked = tokenizer("Return the <mask> of bytes written to the <mask>.", return_tensors="pt")
with torch.no_grad():
    best = trainer.model(**masked).logits[masked.input_ids == tokenizer.mask_token_id].topk(3).indices
for place, pieces in enumerate(best, 1):
    print(f"mask {place}:", ", ".join(tokenizer.decode([piece]).strip() for piece in pieces))

# %% [markdown]
# The loss starts near the logarithm of the number of pieces, where all are equally likely, falls to
# what their frequencies alone can give (their *entropy*), and then goes on falling: from there on
# the model reads.

# %%
share = np.array(list(counted.values())) / sum(counted.values())
entropy = -(share * np.log(share)).sum()
steps, losses = zip(*((row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row), strict=True)

figure, axes = draw.picture(width=6.5)
axes.plot(steps, losses, color=draw.BLUE, linewidth=1.5, label="training loss")
axes.axhline(math.log(len(tokenizer)), color=draw.GRAY, linestyle=draw.DASHES, label=f"log {len(tokenizer):,}")
axes.axhline(entropy, color=draw.ORANGE, linestyle=":", linewidth=2, label="entropy of the pieces")
axes.set(title="Pre-training", xlabel="step", ylabel="loss of a masked piece")
axes.grid(True)
axes.legend()
assert np.mean(losses[-3:]) < entropy - 0.2
figure

# %% [markdown]
# **Reuse.** `save_pretrained` writes encoder and head. `from_pretrained` of another class takes the
# encoder, leaves the head out and gives the new head random numbers. That is all there is to
# "fine-tuning a pre-trained model".

# %%
trainer.model.save_pretrained(folder)
pretrained = {name: weight.clone() for name, weight in trainer.model.yoso.state_dict().items()}
padding = transformers.DataCollatorWithPadding(tokenizer)


def fine_tune(kind, rows, collator, steps, batch=16, **labels):
    """A head of this kind on the pre-trained encoder, trained on the rows."""
    transformers.set_seed(13)
    model = kind.from_pretrained(folder, **labels)
    assert all(torch.equal(weight, pretrained[name]) for name, weight in model.yoso.state_dict().items())
    trainer = make_trainer(model, rows, collator, steps, batch)
    trainer.train()
    return trainer


# %% [markdown]
# ## 2. Text classification: `YosoForSequenceClassification`
#
# **Task.** From which module's documentation is a sentence? Six modules and packages.
#
# **Data.** Rows of `input_ids` and one `labels` number. `DataCollatorWithPadding` pads a batch to
# its longest row and makes the `attention_mask`.
#
# **Trivial guess.** The module with most sentences.

# %%
TOPICS = {"asyncio": "asyncio", "_pydecimal": "decimal", "email": "email", "logging": "logging", "unittest": "unittest", "xml": "xml"}
topics = list(TOPICS)


def sentences(text):
    """The sentences of a docstring's prose, of 4 to 40 words; paragraphs with examples are left
    out.
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        if ">>>" not in paragraph:
            found += re.split(r"(?<=[.!?:])\s+(?=[A-Z\"'`(])", " ".join(paragraph.split()))
    return [sentence for sentence in found if 4 <= len(sentence.split()) <= 40]


def topic_rows(documents, seen):
    """Sentences that are new, with their topic."""
    rows = []
    for module, _, text in documents:
        for sentence in sentences(text) if module in topics else []:
            if sentence not in seen:
                seen.add(sentence)
                rows.append({"input_ids": tokenizer(sentence, truncation=True, max_length=48).input_ids, "labels": topics.index(module)})
    return rows


seen = set()
test, train = topic_rows(test_documents, seen), topic_rows(train_documents, seen)
trainer = fine_tune(YosoForSequenceClassification, train, padding, STEPS["text"], batch=32, num_labels=len(topics))


def text_score():
    found = trainer.predict(test)
    return (found.predictions.argmax(axis=-1) == found.label_ids).mean()


frequent = Counter(row["labels"] for row in train).most_common(1)[0][0]
keep_score("text", np.mean([row["labels"] == frequent for row in test]), text_score)

# %%
for sentence in ("Wait until the future is done.", "The handler writes each record to a file.", "Round to the precision of the context."):
    with torch.no_grad():
        logits = trainer.model(**tokenizer(sentence, return_tensors="pt")).logits
    print(f"{sentence:45} {TOPICS[topics[logits.argmax()]]}, {logits.softmax(dim=-1).max():.0%} sure")

# %% [markdown]
# ## 3. Token classification: `YosoForTokenClassification`
#
# **Task.** Which kind of thing is each piece of source code: keyword, name, operator, number,
# string or comment? Python's own `tokenize` says.
#
# **Data.** The first 80 pieces of functions, with a label for each piece: the kind of its first
# character that is no space. Pieces of nothing but space, `<s>` and `</s>` get -100.
# `DataCollatorForTokenClassification` pads the labels with -100 too.
#
# **Trivial guess.** For each piece, the kind that it had most often in training. That is a good
# guess: `(` is nearly always an operator. Not in a string, though, and to know that one must look
# around.

# %%
KINDS = ["keyword", "name", "operator", "number", "string", "comment"]
CODE = "argparse calendar configparser csv dataclasses difflib json logging random shutil textwrap zipfile"


def kind_of(found):
    """The label of a token from `tokenize`, ``None`` for line ends and indentation."""
    name = tokenize.tok_name[found.type]
    if "STRING" in name:  # f-strings have names of their own since Python 3.12
        return KINDS.index("string")
    if name == "NAME":
        return KINDS.index("keyword" if keyword.iskeyword(found.string) else "name")
    return {"OP": KINDS.index("operator"), "NUMBER": KINDS.index("number"), "COMMENT": KINDS.index("comment")}.get(name)


def functions(source):
    """Each function's text (with those inside it), the kind of each of its characters, and its
    docstring.
    """
    lines = io.StringIO(source).readlines()
    begin = np.concatenate([[0], np.cumsum([len(line) for line in lines])])
    kinds = [None] * len(source)
    for found in tokenize.generate_tokens(io.StringIO(source).readline):
        if (kind := kind_of(found)) is not None:
            first, last = (begin[row - 1] + column for row, column in (found.start, found.end))
            kinds[first:last] = [kind] * (last - first)
    done = 0
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for node in sorted(nodes, key=lambda node: node.lineno):
        first, last = begin[node.lineno - 1], begin[node.end_lineno]
        if first >= done:  # else it is inside the one before
            done = last
            yield source[first:last], kinds[first:last], ast.get_docstring(node)


def piece_labels(text, kinds, spans):
    """The label of each piece, which stands in ``text[begin:end]``."""
    labels = []
    for begin, end in spans:
        visible = [kinds[i] for i in range(begin, end) if not text[i].isspace()]
        labels.append(-100 if not visible or visible[0] is None else visible[0])
    return labels


train, test = [], []
for module in CODE.split():
    for source in sources(module):
        for text, kinds, document in functions(source):
            pieces = tokenizer(text, truncation=True, max_length=LONGEST, return_offsets_mapping=True)
            row = {"input_ids": pieces.input_ids, "labels": piece_labels(text, kinds, pieces.offset_mapping)}
            (test if held_out(document or text) else train).append(row)  # on the side where its docstring is

collator = transformers.DataCollatorForTokenClassification(tokenizer)
trainer = fine_tune(YosoForTokenClassification, train, collator, STEPS["tokens"], num_labels=len(KINDS))


def labeled(rows):
    return [(piece, label) for row in rows for piece, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]


had = defaultdict(Counter)
for piece, label in labeled(train):
    had[piece][label] += 1
usual = {piece: kinds.most_common(1)[0][0] for piece, kinds in had.items()}


def token_score():
    found = trainer.predict(test)
    asked = found.label_ids != -100
    return (found.predictions.argmax(axis=-1) == found.label_ids)[asked].mean()


keep_score("tokens", np.mean([usual.get(piece, KINDS.index("name")) == label for piece, label in labeled(test)]), token_score)

# %%
code = 'def close(self, wait=5):\n    """Wait for (all) tasks."""\n    return self.stop(wait)  # and then wait'
pieces = tokenizer(code, return_tensors="pt", return_offsets_mapping=True)
with torch.no_grad():
    kinds = trainer.model(input_ids=pieces.input_ids).logits[0].argmax(dim=-1)
runs = []
for (begin, end), kind in zip(pieces.offset_mapping[0].tolist(), kinds.tolist(), strict=True):
    if code[begin:end].strip():
        if not runs or runs[-1][0] != kind:
            runs.append((kind, begin, end))
        runs[-1] = (kind, runs[-1][1], end)
print(" | ".join(f"{code[begin:end].strip()} ({KINDS[kind]})" for kind, begin, end in runs))

# %% [markdown]
# ## 4. Question answering: `YosoForQuestionAnswering`
#
# **Task.** Find the words of a passage that answer a question. The passage is a function's
# signature and a paragraph of its documentation, and there are three questions: what is the default
# of a parameter, what is returned, what is raised? The same passage has different answers, so the
# model must read the question.
#
# **Data.** `<s> question </s></s> passage </s>`, and where the answer starts and ends, counted in
# pieces: `start_positions` and `end_positions`. Answers are found by construction: we know where
# the signature has the default. `char_to_token` says in which piece a character is.
#
# **Trivial guess.** For each question, the place in the passage that was right most often.


# %%
def signature(node):
    """``name(a, b=1): `` as text, and where in it the default of each parameter stands."""
    arguments = node.args
    parameters = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(parameters) - len(arguments.defaults)) + arguments.defaults + arguments.kw_defaults
    text, places = f"{node.name}(", {}
    for i, (parameter, default) in enumerate(zip(parameters + arguments.kwonlyargs, defaults, strict=True)):
        text += ", " * (i > 0) + parameter.arg
        if default is not None:
            value = ast.unparse(default)
            places[parameter.arg] = len(text) + 1, len(text) + 1 + len(value)
            text += f"={value}"
    return text + "): ", places


def questions(node, document):
    """``(kind, question, passage, first character of the answer, one beyond its last)`` of a
    function.
    """
    head, places = signature(node)
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", document) if ">>>" not in paragraph]
    for name, (begin, end) in places.items():
        yield "default", f"What is the default of {name}?", head + (paragraphs or [""])[0], begin, end
    for paragraph in paragraphs:
        if found := re.search(r"\bReturns? ([^.;:]*[^.;:\s])", paragraph):
            yield "returned", "What is returned?", head + paragraph, len(head) + found.start(1), len(head) + found.end(1)
        raised = list(re.finditer(r"\b[A-Z]\w*(?:Error|Exception|Warning)\b", paragraph))
        if len(raised) == 1:
            yield "raised", "What is raised?", head + paragraph, len(head) + raised[0].start(), len(head) + raised[0].end()


def question_rows(documents):
    """The rows, and of each row: kind, passage, spans of its pieces, and at which piece the
    passage begins.
    """
    rows, about = [], []
    for _, node, text in documents:
        for kind, question, passage, begin, end in questions(node, text) if isinstance(node, ast.FunctionDef) else []:
            pieces = tokenizer(question, passage, truncation="only_second", max_length=LONGEST, return_offsets_mapping=True)
            first, last = (pieces.char_to_token(0, at, sequence_index=1) for at in (begin, end - 1))
            if first is not None and last is not None:  # else it was cut off
                rows.append({"input_ids": pieces.input_ids, "start_positions": first, "end_positions": last})
                about.append((kind, question, passage, pieces.offset_mapping, pieces.sequence_ids().index(1)))
    return rows, about


(train, train_about), (test, about) = question_rows(train_documents), question_rows(test_documents)
trainer = fine_tune(YosoForQuestionAnswering, train, padding, STEPS["questions"])


# %%
def best_span(start, end, begin):
    """The ``(first, last)`` with the largest ``start[first] + end[last]``,
    ``begin <= first <= last``.
    """
    total = np.triu(start[begin:, None] + end[None, begin:]) + np.tril(np.full((len(start) - begin,) * 2, -np.inf), -1)
    first, last = np.unravel_index(total.argmax(), total.shape)
    return int(first) + begin, int(last) + begin


def answers():
    """The span found for every held-out question, and whether it is the right one."""
    starts, ends = trainer.predict(test).predictions
    spans = []
    for row, start, end, (*_, begin) in zip(test, starts, ends, about, strict=True):
        length = len(row["input_ids"]) - 1  # without the last </s> and the padding behind it
        spans.append(best_span(start[:length], end[:length], begin))
    return spans, np.array([span == (row["start_positions"], row["end_positions"]) for span, row in zip(spans, test, strict=True)])


def place(row, about):
    return row["start_positions"] - about[-1], row["end_positions"] - about[-1]


places = defaultdict(Counter)
for row, known_about in zip(train, train_about, strict=True):
    places[known_about[0]][place(row, known_about)] += 1
guesses = {kind: counts.most_common(1)[0][0] for kind, counts in places.items()}
keep_score(
    "questions", np.mean([place(row, of) == guesses[of[0]] for row, of in zip(test, about, strict=True)]), lambda: answers()[1].mean()
)

spans, right = answers()
for kind in guesses:
    mine = np.array([of[0] == kind for of in about])
    print(f"\nWhat is {kind}? {mine.sum()} questions, {right[mine].mean():.0%} answered exactly. Two of them:")
    for i in np.flatnonzero(mine)[:2]:
        _, question, passage, offsets, _ = about[i]
        (first, last), verdict = spans[i], "right" if right[i] else "wrong"
        print(f"  {passage[:80]}...\n    {question} {passage[offsets[first][0] : offsets[last][1]]} ({verdict})")

# %% [markdown]
# ## 5. Multiple choice: `YosoForMultipleChoice`
#
# **Task.** Here is a sentence of a docstring; which of four comes next? One does. The three others
# open docstrings of other modules.
#
# **Data.** Four rows for each question, `<s> sentence </s></s> candidate </s>`, and the number of
# the right one. `DataCollatorForMultipleChoice` makes a batch of shape `(batch, choices, n)`.
#
# **Trivial guess.** The place that was right most often: one in four.


# %%
def pairs_and_openings(documents):
    """``(module, sentence, the next)`` wherever there is a next one, and ``(module, sentence)``
    for the first of each docstring.
    """
    pairs, openings = [], []
    for module, _, text in documents:
        found = sentences(text)
        pairs += [(module, *pair) for pair in pairwise(found)]
        openings += [(module, sentence) for sentence in found[:1]]
    return pairs, openings


def choice_questions(pairs, openings, rng):
    """``(sentence, four candidates, which of them is next)`` for every pair."""
    asked = []
    for module, sentence, following in pairs:
        candidates = [following]
        while len(candidates) < 4:
            other, opening = rng.choice(openings)
            if other != module and opening not in candidates:
                candidates.append(opening)
        rng.shuffle(candidates)
        asked.append((sentence, candidates, candidates.index(following)))
    return asked


def choice_rows(asked):
    rows = []
    for sentence, candidates, label in asked:
        context = tokenizer(sentence, add_special_tokens=False).input_ids[-24:]  # the end of it stands next to the candidate
        second = [tokenizer(candidate, add_special_tokens=False).input_ids[:24] for candidate in candidates]
        rows.append({"input_ids": [[0, *context, 2, 2, *ids, 2] for ids in second], "labels": label})
    return rows


test_pairs, test_openings = pairs_and_openings(test_documents)
train_pairs, train_openings = pairs_and_openings(train_documents)
train_pairs = random.Random(12).sample(train_pairs, 8 * STEPS["choice"])  # no more than are trained on
train_asked = choice_questions(train_pairs, train_openings, random.Random(13))
test_asked = choice_questions(test_pairs, test_openings, random.Random(14))[:800]
train, test = choice_rows(train_asked), choice_rows(test_asked)
collator = transformers.DataCollatorForMultipleChoice(tokenizer)
trainer = fine_tune(YosoForMultipleChoice, train, collator, STEPS["choice"], batch=8)


def choice_score(rows):
    found = trainer.predict(rows)
    return (found.predictions.argmax(axis=-1) == found.label_ids).mean()


frequent = Counter(row["labels"] for row in train).most_common(1)[0][0]
keep_score("choice", np.mean([row["labels"] == frequent for row in test]), lambda: choice_score(test))

# %% [markdown]
# Far above the guess. Before you believe it, ask *what it is a score of*. Give every question the
# sentence of another question: whoever reads the sentence must now be lost.

# %%
contexts = [sentence for sentence, *_ in test_asked]
exchanged = [(context, *rest) for context, (_, *rest) in zip(contexts[1:] + contexts[:1], test_asked, strict=True)]
blind = choice_score(choice_rows(exchanged))
print(f"with a wrong sentence before the candidates: {blind:.1%}")
assert blind > SCORES["choice"][1] - 0.1

# %% [markdown]
# It is hardly lost at all. The model has learned what a first sentence looks like ("Return ...",
# "Test that ...") and takes the candidate that does not look so. Nothing is wrong with the model:
# the *questions* let it do that. The trivial guess did not find out, the exchange did. Exercise 3
# asks fair questions.
#
# ## All five

# %%
trivial, exact, sampled = (np.array(column) for column in zip(*SCORES.values(), strict=True))
print(f"{'':12}{'trivial guess':>15}{'expectation':>15}{'sampled':>15}")
for task, row in SCORES.items():
    print(f"{task:12}" + "".join(f"{share:15.1%}" for share in row))

at = np.arange(len(SCORES))
figure, axes = draw.picture(width=7.5, height=3.8)
looks = {"trivial guess": (draw.GRAY, ""), "expectation": (draw.BLUE, ""), "sampled, 64 hashes": (draw.SKY, "//")}
for i, (values, (label, (color, hatch))) in enumerate(zip((trivial, exact, sampled), looks.items(), strict=True)):
    bars = axes.bar(at + 0.27 * (i - 1), 100 * values, 0.25, color=color, hatch=hatch, edgecolor="white", label=label)
    axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
units = ("pieces", "sentences", "pieces", "exact spans", "of four")
axes.set_xticks(at, [f"{task}\n({unit})" for task, unit in zip(SCORES, units, strict=True)])
axes.set(title="Five heads on held-out data", ylabel="right, %", ylim=(0, 105))
draw.legend_under_title(axes)
figure

# %% [markdown]
# Every head is clearly above its guess, and sampling, which no model was trained with, costs
# little. (Where it costs too much, train on for a while with `config.use_expectation = False`.)

# %%
margin = {"masked LM": 0.06, "text": 0.15, "tokens": 0.08, "questions": 0.15, "choice": 0.2}
for task, (guess, expected, drawn) in SCORES.items():
    assert expected > guess + margin[task], f"{task}: {expected:.3f} does not beat {guess:.3f} clearly"
    assert abs(drawn - expected) < 0.1, f"{task}: {drawn:.3f} sampled is far from {expected:.3f}"
shutil.rmtree(folder)

# %% [markdown]
# ## What to keep
#
# - Pre-train once, save, and let `from_pretrained` of another class put a new head on the encoder.
#   What differs between tasks is the rows: one label, a label for each piece, two positions, four
#   rows and a number.
# - Hold back whole documents, before pre-training. Put a trivial guess beside every score.
# - A high score can be a fault of the questions. Take away what the model should need, and see
#   whether it notices.
#
# This is the last tutorial. The same five classes take the published weights with
# `from_pretrained("uw-madison/yoso-4096")`.
#
# ## Exercise 1: a score that looks at every class
#
# Of the pieces of source code, very few are numbers: a model that never says "number" still has a
# high share of right ones. The *macro F1* treats classes alike. For one class let $t$ be the tokens
# that have the label and get it, $p$ all that get it and $a$ all that have it. Then
# $F_1 = 2t / (p + a)$, and 0 if there are none of either. The macro F1 is the mean over the
# classes. Labels of -100 do not count.


# %% tags=["exercise-1"]
def macro_f1(predicted, labels, num_labels):
    """The mean F1 of ``num_labels`` classes. Two integer arrays of one shape; where ``labels``
    is -100, neither counts.
    """
    raise NotImplementedError("exercise 1 is waiting for you")


# %% tags=["check-1"]
labels = np.array([[0, 0, 0, 1, -100], [0, 0, 0, 2, -100]])
lazy = np.array([[0, 0, 0, 0, 1], [0, 0, 0, 0, 2]])
for predicted, wanted, why in (
    (np.where(labels == -100, 0, labels), 1, "all that counts is right"),
    (lazy, 6 * 2 / 14 / 3, "always class 0: its F1 is 12/14, the others' is 0"),
    (np.where(labels == 2, 1, labels), (1 + 2 / 3) / 3, "2 called 1: the F1 are 1, 2/3 and 0"),
):
    found = macro_f1(predicted, labels, 3)
    assert np.isclose(found, wanted), f"{why}: the mean is {wanted:.4f}, got {found:.4f}"
found = macro_f1(np.array([0, 1]), np.array([0, 1]), 3)
assert np.isclose(found, 2 / 3), f"a class that nobody has and nobody names counts as 0: need {2 / 3:.4f}, got {found:.4f}"
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: answers of a sensible length
#
# `best_span` will take a whole passage for an answer if its ends score well. Write one that also
# obeys a limit: at most `longest` pieces. Scores are any numbers, negative ones too.


# %% tags=["exercise-2"]
def best_short_span(start, end, begin, longest):
    """The ``(first, last)`` of largest ``start[first] + end[last]`` with
    ``begin <= first <= last < first + longest``.
    """
    raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
draws = np.random.default_rng(0)
for n, begin, longest in ((12, 3, 1), (12, 3, 4), (20, 0, 5), (9, 8, 3), (15, 2, 50)) * 10:
    start, end = draws.standard_normal(n) - 3, draws.standard_normal(n) - 3
    allowed = [(i, j) for i in range(begin, n) for j in range(i, min(n, i + longest))]
    wanted = max(allowed, key=lambda span: start[span[0]] + end[span[1]])
    found = tuple(best_short_span(start, end, begin, longest))
    where = f"{n} pieces, the passage from {begin} on, at most {longest}"
    assert found in allowed, f"{where}: {found} is not allowed"
    assert found == wanted, f"{where}: {found} scores {start[found[0]] + end[found[1]]:.3f}, {wanted} scores more"
print("Exercise 2: right.")

# %% [markdown]
# ## Exercise 3: fair questions
#
# Write `fair_questions`: the wrong candidates shall be sentences that *follow* another one too, so
# that only the sentence in front tells which is right. Take them from other modules, all different,
# at random, and put the right one at a random place. The checker then asks the model of section 5.


# %% tags=["exercise-3"]
def fair_questions(pairs, rng):
    """``(sentence, four candidates, which of them is next)`` for every
    ``(module, sentence, following)`` in ``pairs``.
    """
    raise NotImplementedError("exercise 3 is waiting for you")


# %% tags=["check-3"]
asked = fair_questions(test_pairs, random.Random(15))
assert len(asked) == len(test_pairs), f"there are {len(test_pairs)} pairs, and {len(asked)} questions"
followers = defaultdict(set)
for module, _, following in test_pairs:
    followers[following].add(module)
for (module, sentence, following), (context, candidates, label) in zip(test_pairs, asked, strict=True):
    assert context == sentence, f"the question asks for what follows {context!r}, the pair has {sentence!r}"
    assert len(candidates) == len(set(candidates)) == 4, f"need four different candidates, got {candidates}"
    assert candidates[label] == following, f"candidate {label} is {candidates[label]!r}, but {following!r} comes next"
    for wrong in (candidate for candidate in candidates if candidate != following):
        assert wrong in followers, f"{wrong!r} follows no sentence: it gives itself away"
        assert followers[wrong] != {module}, f"{wrong!r} is from the same module, {module}: it might be right"
share = np.bincount([label for *_, label in asked], minlength=4) / len(asked)
assert share.max() < 0.25 + 5 * math.sqrt(0.25 * 0.75 / len(asked)), f"the right one stands at the four places this often: {share.round(2)}"
fair = choice_score(choice_rows(asked[:800]))
assert fair < 0.4, f"the model still has {fair:.0%}: the questions tell the answer"
print(f"Exercise 3: right. The model, which had {SCORES['choice'][1]:.0%}, has {fair:.0%} on fair questions, and a guess has 25%.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** The labels that count are cut out first. A class without any tokens has $p + a =
# 0$ and $t = 0$.


# %% tags=["solution-1"]
def macro_f1(predicted, labels, num_labels):
    counts = labels != -100
    predicted, labels = predicted[counts], labels[counts]
    scores = []
    for kind in range(num_labels):
        true = np.sum((predicted == kind) & (labels == kind))
        scores.append(2 * true / max(np.sum(predicted == kind) + np.sum(labels == kind), 1))
    return np.mean(scores)


# %% [markdown]
# **Exercise 2.** `np.triu` and `np.tril` with a shift cut a band out of the matrix of all sums.
# Here is the plain way.


# %% tags=["solution-2"]
def best_short_span(start, end, begin, longest):
    best, found = -np.inf, None
    for first in range(begin, len(start)):
        last = first + int(np.argmax(end[first : first + longest]))
        if start[first] + end[last] > best:
            best, found = start[first] + end[last], (first, last)
    return found


# %% [markdown]
# **Exercise 3.** The pool of wrong candidates is made of the followers of all pairs. Trained on
# *such* questions this little model stays near 25% for a long time: to compare what two sentences
# are about is a far harder task than to know an opening.


# %% tags=["solution-3"]
def fair_questions(pairs, rng):
    asked = []
    for module, sentence, following in pairs:
        candidates = [following]
        while len(candidates) < 4:
            other, _, wrong = rng.choice(pairs)
            if other != module and wrong not in candidates:
                candidates.append(wrong)
        rng.shuffle(candidates)
        asked.append((sentence, candidates, candidates.index(following)))
    return asked


# %% tags=["wrong-1"]
def macro_f1(predicted, labels, num_labels):
    counts = labels != -100
    return np.mean(predicted[counts] == labels[counts])  # the share of right ones, which forgets rare classes


# %% tags=["wrong-1"]
def macro_f1(predicted, labels, num_labels):
    scores = []
    for kind in range(num_labels):  # tokens without a label count as named
        true = np.sum((predicted == kind) & (labels == kind))
        scores.append(2 * true / max(np.sum(predicted == kind) + np.sum(labels == kind), 1))
    return np.mean(scores)


# %% tags=["wrong-2"]
def best_short_span(start, end, begin, longest):
    first = begin + int(np.argmax(start[begin:]))  # the best first piece need not be that of the best span
    return first, first + int(np.argmax(end[first : first + longest]))


# %% tags=["wrong-2"]
def best_short_span(start, end, begin, longest):
    return best_span(start, end, begin)  # no limit


# %% tags=["wrong-3"]
def fair_questions(pairs, rng):
    return choice_questions(pairs, test_openings, rng)  # the old questions


# %% tags=["wrong-3"]
def fair_questions(pairs, rng):
    asked = []
    for module, sentence, following in pairs:
        candidates = [following]
        while len(candidates) < 4:
            other, _, wrong = rng.choice(pairs)
            if other != module and wrong not in candidates:
                candidates.append(wrong)
        asked.append((sentence, candidates, 0))  # always at the first place
    return asked
