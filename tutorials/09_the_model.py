# %% [markdown]
# # 9. The model
#
# **You will be able to** build a YOSO layer from its parts, train a masked language model with it,
# switch it from exact to sampled attention without touching a weight, and exchange checkpoints with
# transformers.
#
# **Time:** 40 minutes, and 20 for the exercises.
#
# **You need:** tutorials 1 and 4, and to have trained a network with PyTorch once.
#
# **Source:** [`yoso_core.model.layers`](../model/layers.py),
# [`yoso_core.model.heads`](../model/heads.py) and
# [`yoso_core.model.attention`](../model/attention.py); sections 3 and 4 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714).

# %%
import copy
import warnings
from tempfile import TemporaryDirectory

warnings.filterwarnings("ignore", message="IProgress not found")  # a notebook without ipywidgets: transformers' progress bars

import numpy as np
import torch
import transformers
from torch.nn import functional as F

import yoso_core.model
from yoso_core import draw
from yoso_core.demo.language import as_bytes, split
from yoso_core.demo.words import read_text
from yoso_core.model import YosoConfig, YosoForMaskedLM, expected_weights, yoso_attention
from yoso_core.model.draws import evaluation_draw
from yoso_core.model.layers import YosoLayer, YosoSelfAttention

draw.use_look()
transformers.utils.logging.disable_progress_bar()  # saving and loading would draw one
torch.set_num_threads(1)  # the model is so small that waking a second thread takes longer than its work

# %% [markdown]
# ## One layer, part by part
#
# An encoder layer has two halves: attention, where tokens look at each other, and a feed-forward
# network, where each thinks for itself. Only the first half is special here. We take a small layer
# with random weights and two texts of ten tokens, and compute what it gives by hand.

# %%
torch.manual_seed(0)
tiny = YosoConfig(
    hidden_size=32, num_attention_heads=4, intermediate_size=64, num_hash=16, hash_code_len=4, use_expectation=False, conv_window=3
)
layer = YosoSelfAttention(tiny, layer=1).eval()
hidden_states = torch.randn(2, 10, 32)  # batch, tokens, hidden

# %% [markdown]
# Three linear maps give queries, keys and values. Their 32 numbers are cut into 4 *heads* of 8, and
# every head attends by itself.


# %%
def heads_of(x):
    """(batch, n, hidden) to (batch, heads, n, hidden / heads)."""
    return x.unflatten(-1, (4, 8)).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).flatten(2)


with torch.no_grad():
    query, key, value = (heads_of(project(hidden_states)) for project in (layer.query, layer.key, layer.value))
assert query.shape == (2, 4, 10, 8)

# %% [markdown]
# The attention of tutorials 1 to 4 stands in the middle: hash, scatter, gather, scale every row to
# length 1. Where do the hashes come from? *In training* every call draws new ones. *In evaluation*
# they follow from `config.hash_seed`, the number of the layer and the head: a model that is asked
# twice must answer the same. With `conv_window` a small convolution over neighboring values is
# added, which the paper calls YOSO-C: a cheap eye for what stands next to a token.

# %%
signs = evaluation_draw("signs", tiny.hash_seed, 1, 4, 16, 4, 8, torch.device("cpu"))  # seed, layer, heads, m, tau, head dim
with torch.no_grad():
    context = yoso_attention(query, key, value, num_hash=16, hash_code_len=4, signs=signs)
    by_hand = merged(context + layer.conv(value))
    assert torch.equal(by_hand, layer(hidden_states)[0]), "the layer is what we built"

    layer.train()
    assert not torch.equal(layer(hidden_states)[0], layer(hidden_states)[0]), "training draws new hashes in every call"
    layer.eval()
    assert torch.equal(layer(hidden_states)[0], layer(hidden_states)[0]), "evaluation repeats"

# %% [markdown]
# Set `use_expectation`, and the same layer uses the expected weights $E_{ij} = (1 -
# \theta_{ij}/\pi)^\tau$ in the place of collisions. The setting is read whenever the layer runs, so
# there is nothing to build again.

# %%
tiny.use_expectation = True
with torch.no_grad():
    weight = expected_weights(query, key, 4)
    by_hand = merged(F.normalize(weight @ value, dim=-1) + layer.conv(value))
    assert torch.allclose(by_hand, layer(hidden_states)[0], atol=1e-5)

# %% [markdown]
# The rest is any transformer's: a linear map, a residual, a LayerNorm; then the feed-forward
# network, a residual, a LayerNorm.

# %%
whole = YosoLayer(tiny, layer=1).eval()
with torch.no_grad():
    context, _ = whole.attention.self(hidden_states)
    attended = whole.attention.output.LayerNorm(whole.attention.output.dense(context) + hidden_states)
    thought = whole.output.dense(F.gelu(whole.intermediate.dense(attended)))
    assert torch.allclose(whole.output.LayerNorm(thought + attended), whole(hidden_states)[0], atol=1e-6)

# %% [markdown]
# ## An encoder, and six heads on it
#
# `YosoModel` is embeddings (word + position + token type, normalized) and a stack of such layers.
# It gives a vector for every token. What becomes of the vectors is the business of a small network
# on top, also called a head, though it has nothing to do with the heads inside the attention. Six
# tasks, one encoder:

# %%
size = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 100, "num_labels": 5}
words = torch.randint(3, 100, (2, 10))
with torch.no_grad():
    for name in ("Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"):
        output = getattr(yoso_core.model, f"Yoso{name}")(YosoConfig(**size)).eval()(words)
        print(f"Yoso{name:<26}", *(f"{key} {tuple(x.shape)}" for key, x in output.items()))
    choices = torch.stack([words, words.flip(1), words.roll(1, 1)], dim=1)  # two questions with three answers each
    output = yoso_core.model.YosoForMultipleChoice(YosoConfig(**size)).eval()(choices)
    print(f"Yoso{'ForMultipleChoice':<26}", *(f"{key} {tuple(x.shape)}" for key, x in output.items()))
    assert output.logits.shape == (2, 3)

# %% [markdown]
# Where are the weights of a model of the usual size? Attention has none of its own: its four linear
# maps are a fifth of the model, the hashes are drawn and cost nothing. So YOSO and BERT of one size
# have equally many, and what YOSO saves is time and memory, not weights.

# %%
with torch.device("meta"):  # shapes alone, no memory
    base = YosoForMaskedLM(YosoConfig())


def part_of(name):
    for part, sign in (("words", "word_emb"), ("positions", "position_emb"), ("attention", "attention"), ("feed-forward", "encoder")):
        if sign in name:
            return part
    return "rest"


count = dict.fromkeys(("words", "positions", "attention", "feed-forward", "rest"), 0.0)
for name, parameter in base.named_parameters():
    count[part_of(name)] += parameter.numel() / 1e6
assert np.isclose(sum(count.values()), base.num_parameters() / 1e6)
maps_and_norm = 4 * (768 * 768 + 768) + 2 * 768  # of a layer: query, key, value, output; a LayerNorm
assert np.isclose(count["attention"], 12 * maps_and_norm / 1e6), "nothing else"
assert 0.2 < count["attention"] / sum(count.values()) < 0.25

figure, axes = draw.picture(width=6.4, height=2.7)
bars = axes.barh(list(count), list(count.values()), color=draw.BLUE)
axes.bar_label(bars, fmt="%.1f", padding=4)
axes.set(title=f"{sum(count.values()):.0f} million weights of a base model", xlabel="million weights", xlim=(0, 66))
axes.invert_yaxis()
figure

# %% [markdown]
# ## A text with holes
#
# A masked language model learns by filling holes: some tokens are hidden, and it has to say which
# they were. Our text is the language reference that every Python carries for its `help()`, our
# tokens are bytes, so there is no vocabulary to build. One block of text in ten is held out: the
# model never sees it in training.
#
# Most holes can be filled from the letters around them, and for that the convolution will do. To
# see what *attention* is for we take the task of an editor of old books: **two damaged copies of
# one line, with holes in different places.** Who can look up the same place in the other copy knows
# most of the answer. The two copies get the same positions (`position_ids`) and different
# `token_type_ids`.

# %%
MASK, LENGTH, SHARE, IGNORED = 256, 64, 0.3, -100
text = read_text(None)[1].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")  # one byte in the place of three
train_bytes, held_out_text = split(text)
data, held_out = (torch.from_numpy(x.astype(np.int64)) for x in (train_bytes, as_bytes(held_out_text)))
where = {
    "position_ids": torch.arange(LENGTH).repeat(2)[None] + 2,  # rows 0 and 1 of the table are unused, as in RoBERTa
    "token_type_ids": torch.arange(2).repeat_interleave(LENGTH)[None],
}


def two_copies(source, starts, generator):
    """``(input_ids, labels)`` of lines that begin at ``starts``: each twice, with holes; a label
    where a hole is, all else is ignored.
    """
    lines = source[starts[:, None] + torch.arange(LENGTH)].repeat(1, 2)
    hole = torch.rand(lines.shape, generator=generator) < SHARE
    return lines.masked_fill(hole, MASK), lines.masked_fill(~hole, IGNORED)


def readable(ids):
    return "".join("\N{WHITE SQUARE}" if i == MASK else chr(i) if 32 <= i < 127 else "?" for i in ids.tolist())


lines = torch.arange(0, len(held_out) - LENGTH + 1, LENGTH)[::6]
test_ids, test_labels = two_copies(held_out, lines, torch.Generator().manual_seed(0))
holes = test_labels != IGNORED
wanted = test_labels[holes]
print(f"{len(data):,} bytes to train on, {len(test_ids)} lines held out with {len(wanted):,} holes. One of them:\n")
print(readable(test_ids[0, :LENGTH]), readable(test_ids[0, LENGTH:]), sep="\n")

# %% [markdown]
# A loss means nothing alone. Two guessers without a network stand beside ours: one knows how
# frequent each byte is, and nothing else; the other copies the byte from the other copy where it
# can be read, and takes the most frequent byte where not.

# %%
frequency = torch.bincount(data, minlength=MASK).double() + 1
frequency /= frequency.sum()
guess_loss = float(-frequency.log()[wanted].mean())
guess_right = float((wanted == frequency.argmax()).double().mean())

other_copy = test_ids.roll(LENGTH, dims=1)[holes]
legible = other_copy != MASK
copy_right = float((torch.where(legible, other_copy, frequency.argmax()) == wanted).double().mean())
assert abs(float(legible.double().mean()) - (1 - SHARE)) < 0.05
print(f"most frequent byte: {guess_right:.0%} right, loss {guess_loss:.2f}; copying: {copy_right:.0%} right")

# %% [markdown]
# ## Training
#
# Two layers of 64 numbers, two heads. A small model is helped by a good start: weights of size
# $1/\sqrt{64}$, positions that stand out against the words, keys that start as queries (so what is
# alike attends to each other), and a larger context, because YOSO scales it to length 1. From the
# usual start of a large model it would take thousands of steps to find the other copy.
#
# We train with the expectation, which at 128 tokens costs little, and keep the loss of the text
# held out.

# %%
torch.manual_seed(0)
model = YosoForMaskedLM(
    YosoConfig(
        vocab_size=MASK + 1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=2 * LENGTH,
        type_vocab_size=2,
        hidden_dropout_prob=0.0,
        initializer_range=64**-0.5,
        use_expectation=True,
        num_hash=32,
        hash_code_len=8,
        conv_window=7,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
)
with torch.no_grad():
    model.yoso.embeddings.position_embeddings.weight.mul_(2)
    for block in model.yoso.encoder.layer:
        block.attention.self.key.weight.copy_(block.attention.self.query.weight)
        block.attention.output.dense.weight.mul_(3)


def logits_of(model, ids):
    return model(ids, **{name: x.expand(len(ids), -1) for name, x in where.items()}).logits


@torch.no_grad()
def score(model, num_hash=None):
    """Loss and predictions for the holes of the text held out, by sampling with so many hashes,
    or ``None`` for the expectation.
    """
    config, training = model.config, model.training
    before = config.use_expectation, config.num_hash
    config.use_expectation, config.num_hash = num_hash is None, num_hash or 1
    logits = logits_of(model.eval(), test_ids)[holes]
    config.use_expectation, config.num_hash = before
    model.train(training)
    return float(F.cross_entropy(logits, wanted)), logits.argmax(dim=1)


def train(model, steps, learning_rate, seed):
    """The loss of every step, and ``(step, loss held out)`` now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    losses, checks = [], [(0, score(model)[0])]
    model.train()
    for step in range(1, steps + 1):
        ids, labels = two_copies(data, torch.randint(len(data) - LENGTH + 1, (8,), generator=generator), generator)
        loss = F.cross_entropy(logits_of(model, ids).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 40 == 0:
            checks.append((step, score(model)[0]))
    model.eval()
    return losses, checks


losses, checks = train(model, 480, learning_rate=5e-3, seed=1)

# %%
figure, axes = draw.picture(width=7, height=3.6)
axes.plot(range(1, len(losses) + 1), losses, color=draw.GRAY, linewidth=0.8, label="training, each step")
axes.plot(*zip(*checks, strict=True), "o-", color=draw.BLUE, markersize=4, label="held out")
axes.axhline(guess_loss, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label="byte frequencies alone")
axes.set(title="Two damaged copies", xlabel="step", ylabel="loss, nats a hole", ylim=(0, 6))
axes.grid(True)
axes.legend()

loss, guess = score(model)
right = float((guess == wanted).double().mean())
right_legible, right_lost = (float((guess == wanted)[which].double().mean()) for which in (legible, ~legible))
print(f"held out: {right:.0%} right. Legible in the other copy: {right_legible:.0%}; lost in both: {right_lost:.0%}")
assert loss < 0.4 * guess_loss
assert right > copy_right > guess_right
assert right_lost > 1.3 * guess_right, "where both copies are lost, it reads the letters around"
figure

# %% [markdown]
# First it learns the frequencies, which is the plateau at the dashed line; then it finds the other
# copy, and the loss falls to less than a third. It beats both guessers: it copies where it can, and
# where a byte is lost in both copies it spells from the neighbors.
#
# ## What the attention does
#
# `output_attentions=True` gives the expected weights. If the model looks up the other copy, then
# place $i$ of one copy has a large weight for place $i$ of the other: two lines beside the
# diagonal. Nobody told it to; the loss did.

# %%
with torch.no_grad():
    seen = model(test_ids[:16], **{name: x.expand(16, -1) for name, x in where.items()}, output_attentions=True).attentions
figure, panels = draw.picture(2, height=3.9, sharey=True)
for number, (panel, weights) in enumerate(zip(panels, seen, strict=True), 1):
    mean = weights.mean(dim=(0, 1)).numpy()  # over texts and heads
    image = draw.heat_map(panel, mean, title=f"Layer {number}", limits=(0, float(seen[1].mean(dim=(0, 1)).max())))
    for rule in (panel.axvline, panel.axhline):
        rule(LENGTH - 0.5, color=draw.INK, linewidth=0.8)
    panel.set_xticks([31.5, 95.5], ["first copy", "second copy"])
    panel.set_xlabel("key")
panels[0].set_yticks([31.5, 95.5], ["first copy", "second copy"], rotation=90, va="center")
panels[0].set_ylabel("query")
figure.colorbar(image, ax=panels.tolist(), shrink=0.85, label="mean weight")

place = torch.arange(LENGTH)
to_the_other, to_any = (float(x) for x in (seen[0][:, :, place, place + LENGTH].mean(), seen[0].mean()))
print(f"layer 1: mean weight for the same place in the other copy {to_the_other:.3f}, for a place picked at random {to_any:.3f}")
assert to_the_other > 5 * to_any
figure

# %% [markdown]
# Layer 1 does the looking up. Layer 2 is less picky: it takes in the whole line, and its own place
# a little more.
#
# ## Swapped at inference
#
# The same weights now run by sampling: one setting, `model.config.use_expectation = False`. The
# more hashes, the nearer to the expectation. Here is one line of the text held out. White squares
# are holes. Below each stands what the model puts there: wrong letters are in a box, right ones are
# shaded, and an empty place is a space.

# %%
chosen = 6
ways = {"m = 1": 1, "m = 4": 4, "m = 16": 16, "m = 64": 64, "expectation": None}
predicted = {}
for way, m in ways.items():
    filled = test_ids.clone()
    filled[holes] = score(model, m)[1]
    predicted[way] = filled[chosen, :LENGTH]
shown = test_ids[chosen, :LENGTH]
truth = torch.where(holes, test_labels, test_ids)[chosen, :LENGTH]

figure, axes = draw.picture(width=9, height=2.9)
rows = {"damaged": shown, "other copy": test_ids[chosen, LENGTH:], **predicted}
for y, ids in enumerate(rows.values()):
    for x, letter in enumerate(readable(ids)):
        hole, wrong = shown[x] == MASK, ids[x] != truth[x]
        face = "none" if y < 2 or not hole else "#f6c7a8" if wrong else "#cfe6f5"
        box = {"facecolor": face, "edgecolor": draw.INK if y >= 2 and wrong else "none", "linewidth": 0.8, "pad": 1.2}
        axes.text(x, y, letter, ha="center", va="center", fontsize=9, family="DejaVu Sans Mono", bbox=box)
axes.set(xlim=(-1, LENGTH), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)), xticks=[])
axes.set_yticks(range(len(rows)), list(rows))
axes.set_title("One line, filled with more and more hashes")
axes.spines[:].set_visible(False)
axes.tick_params(length=0)
figure

# %% [markdown]
# How many hashes does this model need? To find one place among 128 is a sharp task, and a model
# that never met sampling in training relies on weights that a few hashes miss. So we also train a
# copy of it for 80 steps *with* sampling, 16 hashes, drawn anew in every step, as the paper trains
# its sampled models: the model learns to live with the noise.

# %%
nums_hash = [1, 2, 4, 8, 16, 32, 64, 128]
expectation, before = score(model)[0], [score(model, m)[0] for m in nums_hash]

sampled = copy.deepcopy(model)
sampled.config.use_expectation, sampled.config.num_hash = False, 16
train(sampled, 80, learning_rate=2e-3, seed=2)
expectation_after, after = score(sampled)[0], [score(sampled, m)[0] for m in nums_hash]

figure, axes = draw.picture(width=7, height=3.6)
for number, (label, curve, exact) in enumerate(
    (("trained with the expectation", before, expectation), ("then 80 steps with 16 hashes", after, expectation_after))
):
    color = draw.PALETTE[number]
    axes.plot(nums_hash, curve, draw.MARKERS[number] + "-", color=color, label=label)
    axes.axhline(exact, color=color, linestyle=(0, (4, 3 + 4 * number)), linewidth=1)
axes.plot([], [], color=draw.INK, linestyle=draw.DASHES, linewidth=1, label="the same weights, expectation")
axes.axhline(guess_loss, color=draw.GRAY, linewidth=2, label="byte frequencies alone")
axes.set(title="The same weights with more hashes", xlabel="hashes m", ylabel="loss held out, nats a hole", xscale="log", ylim=(0, None))
axes.set_xticks(nums_hash, map(str, nums_hash))
axes.minorticks_off()
axes.grid(True)
axes.legend()

assert before[-1] < before[4] < before[2] < before[0], "more hashes, less loss"
assert abs(before[-1] - expectation) < 0.1 * expectation, "128 hashes are near the expectation"
assert after[4] < before[4] - 0.1, "trained with 16 hashes, it is better with 16"
figure

# %% [markdown]
# Two rules follow. **Measure the loss against m on your own data**; a curve like this takes a
# minute. And **train with as many hashes as you will run with**, if only at the end.
#
# ## Padding
#
# Texts of a batch have different lengths, so short ones are filled up, and `attention_mask` says
# what is text. Then a padded line must give what it gives alone, to the last token. It sounds
# natural, but the attention of transformers' own YOSO takes the mask and *ignores it* (in version
# 5.23; its convolution does not). We run our trained weights in both.

# %%
theirs = transformers.YosoForMaskedLM(transformers.YosoConfig(**model.config.to_diff_dict())).eval()
theirs.load_state_dict(model.state_dict())

lengths = [128, 100, 64, 20]
mask = (torch.arange(128) < torch.tensor(lengths)[:, None]).long()
ids = held_out[torch.arange(4)[:, None] * 200 + torch.arange(128)].masked_fill(mask == 0, 0)


@torch.no_grad()
def apart(network):
    """For every line the largest difference between its logits in the padded batch and those
    that it has alone.
    """
    padded = network(ids, attention_mask=mask).logits
    return [float((padded[i, :n] - network(ids[i : i + 1, :n]).logits[0]).abs().max()) for i, n in enumerate(lengths)]


ours_apart, theirs_apart = apart(model), apart(theirs)
assert max(ours_apart) < 1e-3
assert min(theirs_apart[1:]) > 0.1

figure, axes = draw.picture(width=6.4, height=3.2)
place = np.arange(len(lengths))
for shift, label, values, hatch, color in (
    (-0.2, "ours", ours_apart, "", draw.BLUE),
    (0.2, "transformers", theirs_apart, "//", draw.ORANGE),
):
    bars = axes.bar(place + shift, values, 0.38, color=color, hatch=hatch, edgecolor=draw.INK, linewidth=0.6, label=label)
    axes.bar_label(bars, [f"{value:.0e}" if 0 < value < 0.01 else f"{value:.1f}" for value in values], padding=3, fontsize=8.5)
axes.set(title="Padded beside alone", ylabel="largest difference of logits", xlabel="tokens of a line in a batch of 128")
axes.set_xticks(place, map(str, lengths))
axes.set_ylim(0, 1.25 * max(theirs_apart))
axes.legend(ncols=2, loc="upper left")
figure

# %%
without_convolution = transformers.YosoModel(transformers.YosoConfig(**size)).eval()
half = torch.tensor([[1] * 5 + [0] * 5] * 2)
with torch.no_grad():
    given, ignored = without_convolution(words, attention_mask=half)[0], without_convolution(words)[0]
assert torch.equal(given, ignored), "in transformers the mask changes nothing at all"

# %% [markdown]
# Ours do not differ, or on another machine only by float32's rounding. Sampled attention is right
# as well, with one caveat: sums of another shape may round differently, and a bit of a hash turns
# where a projection is nearly zero. In float64 none turns here.

# %%
precise = copy.deepcopy(model)
precise.config.use_expectation = False
assert max(apart(precise.double())) < 1e-9

# %% [markdown]
# ## The same checkpoint in two libraries
#
# Classes, weights and settings have the names of transformers' YOSO, so a folder that one saves the
# other loads. Without a GPU theirs can run the expectation alone: its sampling is a CUDA kernel.

# %%
with TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    loaded = transformers.YosoForMaskedLM.from_pretrained(folder).eval()
    assert type(loaded).__module__ == "transformers.models.yoso.modeling_yoso"
    assert torch.allclose(logits_of(loaded, test_ids[:4]), logits_of(model, test_ids[:4]), atol=1e-3)

with TemporaryDirectory() as folder, torch.no_grad():
    loaded.save_pretrained(folder)
    back = YosoForMaskedLM.from_pretrained(folder)
    assert torch.equal(logits_of(back, test_ids[:4]), logits_of(model, test_ids[:4])), "there and back, not a bit is lost"

    loaded.config.use_expectation = False  # transformers copied the setting when it was built: this changes nothing
    assert torch.allclose(logits_of(loaded, test_ids[:4]), logits_of(model, test_ids[:4]), atol=1e-3)
    adopted = yoso_core.model.adopt(loaded)  # a model that is loaded already becomes ours, in place
    assert adopted is loaded
    assert isinstance(adopted, YosoForMaskedLM)
    back.config.use_expectation = False
    assert torch.equal(logits_of(adopted, test_ids[:4]), logits_of(back, test_ids[:4])), "and now it samples, on a CPU"

    if not torch.cuda.is_available():
        try:
            transformers.YosoModel(transformers.YosoConfig(**size, use_expectation=False)).eval()(words)
        except AttributeError as error:
            print("transformers, asked to sample:", error)
        else:
            raise AssertionError("transformers samples without a GPU: the text above has to be changed")

# %% [markdown]
# Two more doors: `yoso_core.model.register_auto_classes()` puts these classes behind `AutoModel`
# and `pipeline`, and `yoso_core.model.export_for_hub(model, folder)` writes a folder that others
# load with `trust_remote_code=True`.
#
# ## What to keep
#
# - A YOSO layer is a transformer's layer; only the sum over keys is another one. It has as many
#   weights as BERT's.
# - `use_expectation` and `num_hash` may change between two calls. How many hashes are enough
#   depends on how sharp the model's attention is, and on whether it has met sampling in training.
# - Padded equals alone up to rounding, and checkpoints go to transformers and back.
#
# Next: [10. YOSO in your own encoder](10_yoso_in_your_encoder.ipynb), where other people's models
# attend this way.
#
# ## Exercise 1: a layer with padding
#
# Write what `YosoSelfAttention` gives with the expectation, from `layer.query`, `layer.key`,
# `layer.value` and `layer.conv`, for texts with padding: `mask` is bool, `(batch, n)`, true for
# tokens. The checker looks at the rows of tokens, so what you give for padding is free; but what
# padding *holds* must not reach a token.


# %% tags=["exercise-1"]
def expected_context(layer, hidden_states, mask):
    """The context (batch, n, hidden) of a layer with 4 heads of 8, tau = 4, and a convolution."""
    raise NotImplementedError("exercise 1 is waiting for you")


# %% tags=["check-1"]
mask = torch.arange(10) < torch.tensor([10, 6])[:, None]
with torch.no_grad():
    found = expected_context(layer, hidden_states, mask)
    assert found.shape == hidden_states.shape, f"need the shape {tuple(hidden_states.shape)}, got {tuple(found.shape)}"
    off = (found - layer(hidden_states, mask)[0]).abs()
    assert off[0].max() < 1e-4, f"a text without padding differs from the layer by {off[0].max():.2g}"
    assert off[1, :6].max() < 1e-4, "a text with padding differs from the layer: does padding reach the weights, or the convolution?"
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: several draws
#
# Sampling with 4 hashes is cheap and rough. Average the *probabilities* over several draws, that is
# over several values of `config.hash_seed`, and leave the model's settings as you found them. Use
# `logits_of(model, ids)` of this tutorial.


# %% tags=["exercise-2"]
@torch.no_grad()
def averaged(model, ids, num_hash, seeds):
    """Probabilities (batch, n, vocabulary): the mean over sampled attention with these seeds and
    ``num_hash`` hashes.
    """
    raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
settings = model.config.to_dict()
found = averaged(model, test_ids[:16], 4, range(8))
changed = [name for name, setting in model.config.to_dict().items() if settings[name] != setting]
for name in changed:
    setattr(model.config, name, settings[name])
assert not changed, f"the model's settings are others now: {changed}"
assert torch.allclose(found.sum(dim=-1), torch.ones(found.shape[:2]), atol=1e-4), "probabilities of one place should sum to 1"
labels = test_labels[:16]
loss = {}
for count in (1, 8):
    p = averaged(model, test_ids[:16], 4, range(count)).gather(2, labels.clamp_min(0)[..., None])[..., 0]
    loss[count] = float(-p[labels != IGNORED].log().mean())
assert loss[8] < 0.8 * loss[1], f"eight draws should be better than one: loss {loss[8]:.2f}, with one {loss[1]:.2f}"
print(f"Exercise 2: right. Loss {loss[1]:.2f} with one draw, {loss[8]:.2f} with eight.")

# %% [markdown]
# ## Exercise 3: padding on the left
#
# Some tokenizers put the padding in front. Then the first token of a line no longer stands in
# column 0, and its position has to be given: the first token of every line stands at row 2 of the
# table, the next at 3, and so on.


# %% tags=["exercise-3"]
def positions(mask):
    """``position_ids (batch, n)`` for ``mask (batch, n)``, 1 for tokens. Padding needs a valid
    row too; which one is free.
    """
    raise NotImplementedError("exercise 3 is waiting for you")


# %% tags=["check-3"]
ids = held_out[:40].repeat(3, 1)
mask = (torch.arange(40) >= torch.tensor([0, 13, 30])[:, None]).long()
found = positions(mask)
assert found.shape == mask.shape, f"need the shape {tuple(mask.shape)}, got {tuple(found.shape)}"
assert found.min() >= 0, "the table has no negative rows"
with torch.no_grad():
    padded = model(ids, attention_mask=mask, position_ids=found).logits
    for line, start in enumerate((0, 13, 30)):
        off = float((padded[line, start:] - model(ids[line : line + 1, start:]).logits[0]).abs().max())
        assert off < 1e-2, f"a line with {start} tokens of padding differs from the line alone by {off:.2g}"
print("Exercise 3: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** A column of zeros in the weights keeps padding out of the sum. The convolution
# needs a mask of its own: its neighbors are there whatever the weights say.


# %% tags=["solution-1"]
def expected_context(layer, hidden_states, mask):
    query, key, value = (heads_of(project(hidden_states)) for project in (layer.query, layer.key, layer.value))
    weight = expected_weights(query, key, 4, key_mask=mask[:, None, :])
    value = value.masked_fill(~mask[:, None, :, None], 0)
    return merged(F.normalize(weight @ value, dim=-1) + layer.conv(value))


# %% [markdown]
# **Exercise 2.** `try ... finally` puts the settings back even if something fails on the way.


# %% tags=["solution-2"]
@torch.no_grad()
def averaged(model, ids, num_hash, seeds):
    config = model.config
    before = config.use_expectation, config.num_hash, config.hash_seed
    config.use_expectation, config.num_hash = False, num_hash
    total = 0
    try:
        for seed in seeds:
            config.hash_seed = seed
            total = total + logits_of(model, ids).softmax(dim=-1)
    finally:
        config.use_expectation, config.num_hash, config.hash_seed = before
    return total / len(seeds)


# %% [markdown]
# **Exercise 3.** The running sum of the mask counts tokens from 1, so the first stands at $1 + 1 =
# 2$.


# %% tags=["solution-3"]
def positions(mask):
    return mask.cumsum(dim=1) + 1


# %% tags=["wrong-1"]
def expected_context(layer, hidden_states, mask):
    query, key, value = (heads_of(project(hidden_states)) for project in (layer.query, layer.key, layer.value))
    weight = expected_weights(query, key, 4, key_mask=mask[:, None, :])
    return merged(F.normalize(weight @ value, dim=-1) + layer.conv(value))  # the convolution still reads the padding


# %% tags=["wrong-1"]
def expected_context(layer, hidden_states, mask):
    query, key, value = (heads_of(project(hidden_states)) for project in (layer.query, layer.key, layer.value))
    value = value.masked_fill(~mask[:, None, :, None], 0)
    return merged(expected_weights(query, key, 4) @ value + layer.conv(value))  # rows of the context are not scaled to length 1


# %% tags=["wrong-2"]
@torch.no_grad()
def averaged(model, ids, num_hash, seeds):
    model.config.use_expectation, model.config.num_hash = False, num_hash  # and so they stay
    total = 0
    for seed in seeds:
        model.config.hash_seed = seed
        total = total + logits_of(model, ids).softmax(dim=-1)
    return total / len(seeds)


# %% tags=["wrong-2"]
@torch.no_grad()
def averaged(model, ids, num_hash, seeds):
    config = model.config
    before = config.use_expectation, config.num_hash
    config.use_expectation, config.num_hash = False, num_hash
    draws = [logits_of(model, ids).softmax(dim=-1) for _ in seeds]  # eight times the same draw: evaluation repeats
    config.use_expectation, config.num_hash = before
    return sum(draws) / len(seeds)


# %% tags=["wrong-3"]
def positions(mask):
    return mask.cumsum(dim=1)  # the first token stands at row 1


# %% tags=["wrong-3"]
def positions(mask):
    return torch.arange(2, 2 + mask.shape[1]).expand_as(mask)  # counts the padding too
