# %% [markdown]
# # 10. YOSO in your own encoder
#
# **You will be able to** put YOSO attention into a model of transformers with one argument, say
# what that changes and what it refuses, and tune the three numbers that matter.
#
# **Time:** 35 minutes, and 20 for the exercises.
#
# **You need:** tutorials 1 and 9.
#
# **Source:** [`yoso_core.model.encoders`](../model/encoders.py) and
# [`yoso_core.model.attention`](../model/attention.py); section 3.1 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714).

# %%
import copy
import warnings
from tempfile import TemporaryDirectory

warnings.filterwarnings("ignore", message="IProgress not found")  # a notebook without ipywidgets: transformers' progress bars

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, BertForTokenClassification

from yoso_core import draw
from yoso_core.model import YosoAttentionOptions, enable_yoso_attention, yoso_attention

draw.use_look()
transformers.utils.logging.disable_progress_bar()  # saving and loading would draw one
torch.set_num_threads(1)  # the models are so small that waking a second thread takes longer than its work

# %% [markdown]
# ## One argument
#
# Models of transformers do not compute attention themselves. They ask a table of functions, by
# name: `"eager"`, `"sdpa"`, `"flash_attention_2"`. `enable_yoso_attention()` puts one more into the
# table, and from then on every encoder that asks can be built, or loaded, with
# `attn_implementation="yoso"`. We take a small BERT with random weights, and a copy of it with the
# same ones.

# %%
enable_yoso_attention()
small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 99}
torch.manual_seed(0)
softmax = AutoModel.from_config(BertConfig(**small, initializer_range=0.2), attn_implementation="sdpa").eval()
yoso = AutoModel.from_config(BertConfig(**small, initializer_range=0.2), attn_implementation="yoso").eval()
yoso.load_state_dict(softmax.state_dict())
words = torch.randint(3, 99, (4, 20))

with torch.no_grad():
    same = F.cosine_similarity(softmax(words).last_hidden_state, yoso(words).last_hidden_state, dim=-1)
assert same.max() < 0.99, "the same weights, and another output for every token"
print(f"cosine of the outputs of both, over tokens: {same.min():.2f} to {same.max():.2f}")

# %% [markdown]
# ## What changes
#
# To see what runs inside, we catch query, key and value of a layer on their way. The options say
# how to attend: `num_hash` and `hash_code_len` are $m$ and $\tau$; `use_expectation` takes the
# exact weights. They apply to all models, or to one.

# %%
enable_yoso_attention(YosoAttentionOptions(hash_code_len=8, use_expectation=True), model=yoso)
layer = yoso.encoder.layer[0].attention.self
with torch.no_grad():
    states = yoso.embeddings(words)
    query, key, value = (project(states).unflatten(-1, (2, 32)).transpose(1, 2) for project in (layer.query, layer.key, layer.value))
    theta = torch.arccos((F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT).clamp(-1, 1))
    by_hand = F.normalize((1 - theta / torch.pi) ** 8 @ value, dim=-1)
    context = layer(states)[0]
assert torch.allclose(context, by_hand.transpose(1, 2).flatten(2), atol=1e-4)
assert torch.allclose(context.unflatten(-1, (2, 32)).norm(dim=-1), torch.tensor(1.0), atol=1e-4), "every row of a head has length 1"

# %% [markdown]
# Two differences to softmax are worth knowing before you train.
#
# - **The size of the output.** Softmax gives an average of values, as long as values are. YOSO
#   gives a direction, of length 1.
# - **The size of queries and keys.** Softmax grows picky when queries grow longer: that is how a
#   model sets its sharpness. YOSO looks at angles alone, so a longer query changes nothing, and
#   sharpness is $\tau$, which you choose.
#
# The second, drawn: we make all queries longer, and watch how much of the weight falls on the
# strongest key.


# %%
def strongest(length, weights):
    """The share of the largest weight in a row, over the mean of all rows, with queries
    ``length`` times as long.
    """
    found = weights(length * query, key)
    return float((found.amax(dim=-1) / found.sum(dim=-1)).mean())


def expected(query, key, tau=8):
    theta = torch.arccos((F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT).clamp(-1, 1))
    return (1 - theta / torch.pi) ** tau


lengths = [0.25, 0.5, 1, 2, 4, 8]
taus = [1, 2, 4, 8, 16, 32]
of_softmax = [strongest(length, lambda q, k: (q @ k.mT / 32**0.5).softmax(dim=-1)) for length in lengths]
of_yoso = [strongest(length, expected) for length in lengths]
of_tau = [strongest(1, lambda q, k, tau=tau: expected(q, k, tau)) for tau in taus]

figure, (left, right) = draw.picture(2, sharey=True)
left.plot(lengths, of_softmax, "o-", color=draw.GRAY, markeredgecolor=draw.INK, label="softmax")
left.plot(lengths, of_yoso, "D-", color=draw.BLUE, label=r"YOSO, $\tau$ = 8")
left.set(title="Longer queries", xlabel="length of queries, times", ylabel="share of the strongest key", xscale="log", ylim=(0, 1))
left.set_xticks(lengths, map(str, lengths))
right.plot(taus, of_tau, "D-", color=draw.BLUE, label="YOSO")
right.set(title=r"Larger $\tau$", xlabel=r"$\tau$", xscale="log")
right.set_xticks(taus, map(str, taus))
for panel in (left, right):
    panel.minorticks_off()
    panel.grid(True)
    panel.legend(loc="upper left")

assert np.ptp(of_yoso) < 1e-5, "YOSO does not see the length"
assert np.all(np.diff(of_softmax) > 0)
assert np.all(np.diff(of_tau) > 0)
figure

# %% [markdown]
# The same holds in a whole model: three times the queries, the same output. And there are no
# probabilities to drop, so the attention's dropout has no effect. The model's other dropouts work
# as ever.

# %%
longer = copy.deepcopy(yoso)
with torch.no_grad():
    for block in longer.encoder.layer:
        block.attention.self.query.weight.mul_(3)
        block.attention.self.query.bias.mul_(3)
    assert torch.allclose(longer(words).last_hidden_state, yoso(words).last_hidden_state, atol=1e-3)

    without = copy.deepcopy(yoso).train()
    for module in without.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for block in without.encoder.layer:
        block.attention.self.dropout.p = 0.9
    assert torch.equal(without(words).last_hidden_state, yoso(words).last_hidden_state)

# %% [markdown]
# ## A task that needs attention
#
# What difference does it make to a model that is *trained* with it? We need a task that is small,
# and hopeless without attention.
#
# A sequence has 24 letters in random order, each with one of 8 colors; then the same 24 letters in
# another order, without color. For each of the latter the model shall say which color it had.
# Letters are `input_ids`, colors `token_type_ids`, and the answer stands at another place every
# time: only who finds the same letter knows it. Guessing gets 1 in 8.

# %%
LETTERS, COLORS, NUMBER = 32, 8, 24


def lookups(batch, generator):
    """Inputs and labels; -100 where nothing is asked."""
    letter = torch.rand(batch, LETTERS, generator=generator).argsort(dim=1)[:, :NUMBER]
    color = torch.randint(COLORS, (batch, NUMBER), generator=generator)
    order = torch.rand(batch, NUMBER, generator=generator).argsort(dim=1)
    return {
        "input_ids": torch.cat([letter, letter.gather(1, order)], dim=1),
        "token_type_ids": torch.cat([color + 1, torch.zeros_like(color)], dim=1),
        "labels": torch.cat([torch.full_like(color, -100), color.gather(1, order)], dim=1),
    }


test = lookups(64, torch.Generator().manual_seed(0))
asked = test["labels"] >= 0
most_frequent = float((test["labels"][asked] == test["labels"][asked].mode().values).float().mean())
assert abs(most_frequent - 1 / COLORS) < 0.05


def new_model(options=None):
    """A BERT of two layers, with the same weights every time: on softmax, or on YOSO with these
    options.
    """
    config = BertConfig(
        vocab_size=LETTERS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=2 * NUMBER,
        type_vocab_size=COLORS + 1,
        num_labels=COLORS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=64**-0.5,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = BertForTokenClassification(config)
    with torch.no_grad():  # keys start as queries, so what is alike attends to each other: it halves the steps, for softmax too
        for block in model.bert.encoder.layer:
            block.attention.self.key.weight.copy_(block.attention.self.query.weight)
    if options is not None:
        enable_yoso_attention(options, model=model)
    return model.eval()


@torch.no_grad()
def accuracy(model):
    predicted = model(input_ids=test["input_ids"], token_type_ids=test["token_type_ids"]).logits.argmax(dim=-1)
    return float((predicted == test["labels"])[asked].float().mean())


def train(model, steps=120, learning_rate=4e-3, every=10, seed=1):
    """``[(step, accuracy)]`` on sequences that it never saw; every step brings new ones."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # the hashes of training are drawn from torch's generator
    seen = [(0, accuracy(model))]
    for step in range(1, steps + 1):
        loss = model.train()(**lookups(24, generator)).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.eval()
        if step % every == 0:
            seen.append((step, accuracy(model)))
    return seen


# %% [markdown]
# ## Both learn it
#
# The same weights at the start, the same data, the same steps: with softmax, with YOSO's
# expectation, and with YOSO as it is meant to be used, sampled with 32 hashes, new ones in every
# step.

# %%
ways = {
    "softmax": None,
    "YOSO, expectation": YosoAttentionOptions(hash_code_len=8, use_expectation=True),
    "YOSO, 32 hashes": YosoAttentionOptions(hash_code_len=8, num_hash=32),
}
trained = {name: new_model(options) for name, options in ways.items()}
curves = {name: train(model) for name, model in trained.items()}

figure, axes = draw.picture(width=7, height=3.6)
for number, (name, curve) in enumerate(curves.items()):
    axes.plot(*zip(*curve, strict=True), draw.MARKERS[number] + "-", color=(draw.GRAY, *draw.PALETTE)[number], label=name, markersize=5)
axes.axhline(1 / COLORS, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label="guessing")
axes.set(title="Looking up a color", xlabel="training step", ylabel="share right, new sequences", ylim=(0, 1.05))
axes.grid(True)
axes.legend(loc="center right")

assert all(curve[0][1] < 0.25 and curve[-1][1] > 0.95 for curve in curves.values())
figure

# %% [markdown]
# ## The trap: weights that were trained with softmax
#
# What if you load a checkpoint that softmax has trained, and set `attn_implementation="yoso"`? It
# runs, and is wrong: the weights are tuned to another function. It does not have to start over,
# though. A few steps of further training repair it.

# %%
switched = copy.deepcopy(trained["softmax"])
enable_yoso_attention(ways["YOSO, 32 hashes"], model=switched)
repaired = train(switched, steps=40, every=4, learning_rate=2e-3, seed=2)

figure, axes = draw.picture(width=7, height=3.4)
axes.axhline(accuracy(trained["softmax"]), color=draw.GRAY, linewidth=3, label="softmax, before the switch")
axes.plot(*zip(*repaired, strict=True), "D-", color=draw.BLUE, label="switched to YOSO, trained on")
axes.axhline(1 / COLORS, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label="guessing")
axes.set(title="After the switch", xlabel="further training step", ylabel="share right", ylim=(0, 1.05))
axes.grid(True)
axes.legend(loc="lower right", bbox_to_anchor=(1, 0.18))

assert repaired[0][1] < 0.9 * accuracy(trained["softmax"])
assert repaired[-1][1] > 0.95
figure

# %% [markdown]
# ## What must be tuned
#
# **How sharp: $\tau$.** Two random vectors meet with probability $2^{-\tau}$, so among 48 tokens a
# small $\tau$ lets a crowd through. We train with the expectation at several $\tau$.
#
# **How many hashes: $m$.** After training it can be changed at once. We run three models with more
# and fewer. (Dashed: guessing.)

# %%
taus = [1, 2, 4, 8, 16]
models = [new_model(YosoAttentionOptions(hash_code_len=tau, use_expectation=True)) for tau in taus]
reached = [train(model, steps=75, every=75) for model in models]

nums_hash = [1, 2, 4, 8, 16, 32, 64]


def with_hashes(model, m):
    """Its accuracy when it samples with ``m`` hashes; the options stand in the model's config,
    and may be changed there.
    """
    before = dict(model.config.yoso_attention)
    model.config.yoso_attention.update(use_expectation=False, num_hash=m)
    found = accuracy(model)
    model.config.yoso_attention.update(before)
    return found


of_m = {
    r"$\tau$ = 8, trained with 32 hashes": trained["YOSO, 32 hashes"],
    r"$\tau$ = 8, trained with expectation": trained["YOSO, expectation"],
    r"$\tau$ = 16, trained with expectation": models[-1],
}
of_m = {name: [with_hashes(model, m) for m in nums_hash] for name, model in of_m.items()}

figure, (left, right) = draw.picture(2, sharey=True, height=3.8)
left.plot(range(len(taus)), [run[-1][1] for run in reached], "o-", color=draw.INK)
left.set(title=r"Trained with $\tau$, 75 steps", xlabel=r"$\tau$", ylabel="share right", ylim=(0, 1.05))
left.set_xticks(range(len(taus)), map(str, taus))
for number, (label, curve) in enumerate(of_m.items()):
    right.plot(nums_hash, curve, draw.MARKERS[number] + "-", color=draw.PALETTE[number], label=label)
right.set(title="Run with m", xlabel="hashes m", xscale="log")
right.set_xticks(nums_hash, map(str, nums_hash))
right.minorticks_off()
for panel in (left, right):
    panel.axhline(1 / COLORS, color=draw.INK, linestyle=draw.DASHES, linewidth=1)
    panel.grid(True)
figure.legend(loc="outside lower center", ncols=3, title="right panel")

last = [run[-1][1] for run in reached]
with_32, with_expectation, pickier = of_m.values()
assert last[0] < 0.5 < 0.9 < last[3], "one bit lets too many through, eight do not"
assert all(curve[-1] > curve[0] + 0.2 for curve in of_m.values())
assert with_32[2] > with_expectation[2] + 0.03, "who trained with few hashes does better with few"
assert pickier[4] < with_expectation[4] - 0.05, "a larger tau needs more hashes"
figure

# %% [markdown]
# The two pull against each other. A larger $\tau$ is pickier, and its collisions are rarer, so it
# takes more hashes to see them: the error of a weight $E$ is $\sqrt{E (1 - E) / m}$ (tutorial 1),
# and a larger $\tau$ makes $E$ small. Take the smallest $\tau$ that learns the task, then the
# smallest $m$ that keeps its accuracy, and train with that $m$.
#
# **How fast: the learning rate.** Is a good one for softmax good for YOSO? We ask for the accuracy
# after 60 steps, where differences show.

# %%
rates = [1e-3, 4e-3, 8e-3, 3.2e-2]
of_rate = {
    name: [train(new_model(ways[name]), steps=60, every=60, learning_rate=rate)[-1][1] for rate in rates]
    for name in ("softmax", "YOSO, expectation")
}

figure, axes = draw.picture(width=6.4, height=3.4)
for number, (name, curve) in enumerate(of_rate.items()):
    color = (draw.GRAY, draw.BLUE)[number]
    axes.plot(rates, curve, draw.MARKERS[number] + "-", color=color, markeredgecolor=draw.INK, label=name)
axes.axhline(1 / COLORS, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label="guessing")
axes.set(title="After 60 steps", xlabel="learning rate", ylabel="share right", xscale="log", ylim=(0, 1.05))
axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
axes.minorticks_off()
axes.grid(True)
axes.legend(loc="upper left")

assert all(curve[2] > 0.9 for curve in of_rate.values()), "one rate is good for both"
assert all(max(curve[0], curve[3]) < 0.4 for curve in of_rate.values()), "a small and a large one are bad for both"
figure

# %% [markdown]
# What is good for one is good for the other here, and a too small or too large rate fails both. So
# begin with the rate that your model has had, and spend your time on $\tau$ and $m$.
#
# ## Padding changes nothing
#
# The mask reaches the keys, so padding is never counted. That holds for every family of encoders
# that asks the table; here are five of them, with the largest difference between a padded text and
# the same text alone. The hidden states are of size 1.

# %%
families = {
    "Bert": {},
    "Roberta": {},
    "Electra": {"embedding_size": 32},
    "DistilBert": {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128},
    "ModernBert": {"local_attention": 8},
}
lengths = [20, 13, 6]
mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).long()
ids = torch.randint(3, 99, (3, 20), generator=torch.Generator().manual_seed(0)).masked_fill(mask == 0, 1)
special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2, "vocab_size": 99}
for family, own in families.items():
    config = getattr(transformers, f"{family}Config")(**({} if family == "DistilBert" else small) | own | special)
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="yoso").eval()
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).last_hidden_state
        alone = [model(input_ids=ids[i : i + 1, :n]).last_hidden_state[0] for i, n in enumerate(lengths)]
        all_counted = model(input_ids=ids, attention_mask=torch.ones_like(mask)).last_hidden_state
    masked, counted = (max(float((x[i, :n] - alone[i]).abs().max()) for i, n in enumerate(lengths)) for x in (padded, all_counted))
    print(f"{family:<12} padding masked: {masked:.1g}, padding counted as text: {counted:.1g}")
    assert masked < 1e-4 < 1e-3 < counted

# %% [markdown]
# ModernBERT is a mixed case: most of its layers look at a window of near tokens only. These *local*
# layers keep their softmax, and the global ones become YOSO. So where all layers are local, nothing
# changes.

# %%
for layers, changes in (("sliding_attention", False), ("full_attention", True)):
    outputs = []
    for attention in ("sdpa", "yoso"):
        config = transformers.ModernBertConfig(**small | families["ModernBert"] | special, layer_types=[layers] * 2)
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(AutoModel.from_config(config, attn_implementation=attention).eval()(input_ids=ids[:1]).last_hidden_state)
    assert (float((outputs[0] - outputs[1]).abs().max()) > 1e-3) == changes

# %% [markdown]
# ## What raises, and why
#
# Some attention cannot be computed by hashing, and then you get an error, never another result in
# silence.


# %%
def refused(what, *arguments, **given):
    try:
        what(*arguments, **given)
    except (TypeError, ValueError) as error:
        return str(error)
    raise AssertionError("it was not refused")


decoder = AutoModel.from_config(transformers.LlamaConfig(**small, num_key_value_heads=2), attn_implementation="yoso").eval()
print("A decoder:\n ", refused(decoder, words))
print("An additive mask:\n ", refused(yoso, words, attention_mask=torch.zeros(4, 1, 1, 20)))
deberta = transformers.DebertaV2Config(**small)
print("A model that never asks:\n ", refused(AutoModel.from_config, deberta, attn_implementation="yoso"))

# %% [markdown]
# - **Decoders.** A bucket holds the sum of *all* its keys. Token 5 of a decoder may see the first
#   five only, so it would need a table of its own, and so would every token: the cost would be
#   back.
# - **Additive masks and position biases.** There are no scores that something could be added to.
# - **Models that never ask the table.** transformers alone would accept the name and go on as
#   before, and you would measure the wrong model.
#
# ## The options travel with the model
#
# The name, and what you gave with `model=`, are saved in the config.

# %%
original = trained["YOSO, 32 hashes"]
with TemporaryDirectory() as folder:
    original.save_pretrained(folder)
    loaded = BertForTokenClassification.from_pretrained(folder)
assert loaded.config.yoso_attention["num_hash"] == 32
with torch.no_grad():
    assert torch.equal(loaded(**test).logits, original(**test).logits)

# %% [markdown]
# ## What to keep
#
# - `enable_yoso_attention()`, then `attn_implementation="yoso"`. The weights stay; the function is
#   another, so **train on**.
# - Sharpness is $\tau$, not the length of queries. Noise is $m$. Tune $\tau$ first, then $m$; begin
#   with the learning rate you had.
# - Padding is exact. What hashing cannot do (decoders, biases) raises.
#
# Next: [11. Long sequences](11_long_sequences.ipynb), where the linear cost begins to pay.
#
# ## Exercise 1: how few hashes?
#
# Find the smallest $m$ out of 1, 2, 4, ..., 256 with which a model still reaches an accuracy of
# `goal`. Set the number where this model reads it, use `accuracy(model)`, and leave the model as it
# was.


# %% tags=["exercise-1"]
def hashes_needed(model, goal):
    """The smallest power of two, as an int, or None if 256 are too few."""
    raise NotImplementedError("exercise 1 is waiting for you")


# %% tags=["check-1"]
subject = trained["YOSO, 32 hashes"]
before = dict(subject.config.yoso_attention)
for goal in (0.45, 0.75, 0.95):
    found = hashes_needed(subject, goal)
    assert subject.config.yoso_attention == before, "the model's options are others now"
    assert found in {2**i for i in range(9)}, f"need a power of two up to 256, got {found}"
    assert with_hashes(subject, found) >= goal, f"{found} hashes reach {with_hashes(subject, found):.2f}, less than {goal}"
    assert found == 1 or with_hashes(subject, found // 2) < goal, f"{found // 2} hashes would do for {goal}, you said {found}"
assert hashes_needed(subject, 1.01) is None, "no number of hashes reaches more than all: need None"
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: an encoder without transformers
#
# Your own network needs no table of names: `yoso_attention` stands where
# `F.scaled_dot_product_attention` stood. Complete the module. Padding must not count, in evaluation
# the same input must give the same output (`rng=` seeds the hashes), and in training the hashes
# must be new in every call. `split_heads` is done for you.


# %%
def split_heads(x):
    """(batch, n, 3 * 64) to query, key and value, each (batch, 4, n, 16)."""
    return [part.unflatten(-1, (4, 16)).transpose(1, 2) for part in x.chunk(3, dim=-1)]


# %% tags=["exercise-2"]
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(64, 3 * 64)

    def forward(self, x, mask):
        """``x (batch, n, 64)``, ``mask`` bool ``(batch, n)``, true for tokens;
        ``(batch, n, 64)``, four heads, m = 64, tau = 4.
        """
        raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
torch.manual_seed(0)
module, x = Attention().double().eval(), torch.randn(2, 30, 64, dtype=torch.double)
mask = torch.arange(30) < torch.tensor([30, 17])[:, None]
found = module(x, mask)
assert found.shape == x.shape, f"need the shape {tuple(x.shape)}, got {tuple(found.shape)}"
assert torch.equal(found, module(x, mask)), "in evaluation two calls should give the same"
alone = module(x[1:, :17], mask[1:, :17])
assert torch.allclose(found[1, :17], alone[0], atol=1e-9), "a padded text should be what it is alone"
query, key, value = split_heads(module.project(x[:1]))
exact = yoso_attention(query, key, value, hash_code_len=4, use_expectation=True).transpose(1, 2).flatten(2)
alike = float(F.cosine_similarity(found[:1], exact, dim=-1).mean().detach())
assert alike > 0.75, f"64 hashes should come near the expectation, the cosine is {alike:.2f}: are the heads where they should be?"
module.train()
assert not torch.equal(module(x, mask), module(x, mask)), "in training every call should draw new hashes"
module(x, mask).square().sum().backward()
assert module.project.weight.grad is not None, "there is no gradient"
print("Exercise 2: right.")

# %% [markdown]
# ## Exercise 3: which tau for a softmax?
#
# A softmax head weighs a key at angle $\theta$ by $\exp(\beta (\cos\theta - 1))$, relative to a key
# at angle 0, where $\beta$ is the usual length of query times length of key over $\sqrt{d}$. You
# want to switch such a model, and begin with a $\tau$ that is about as sharp. Choose the one for
# which both weights fall to one half at the same angle, rounded to a whole number, at least 1. (For
# $\beta \ge 1$.)


# %% tags=["exercise-3"]
def matching_tau(beta):
    """The whole number tau whose weight (1 - theta / pi)**tau is one half where softmax's is."""
    raise NotImplementedError("exercise 3 is waiting for you")


# %% tags=["check-3"]
for beta in (1, 2, 8, 32, 100):
    found = matching_tau(beta)
    half = np.arccos(1 - np.log(2) / beta)
    there = {tau: abs(np.log((1 - half / np.pi) ** tau) - np.log(0.5)) for tau in range(1, 60)}
    assert found in there, f"beta = {beta}: need a whole number of at least 1, got {found}"
    assert there[found] == min(there.values()), (
        f"beta = {beta}: softmax's weight is one half at {np.degrees(half):.0f} degrees, that of tau = {found} is "
        f"{(1 - half / np.pi) ** found:.2f} there"
    )
print("Exercise 3: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** Upwards from one, so that the first that does is the smallest. The number stands
# in `config.yoso_attention`.


# %% tags=["solution-1"]
def hashes_needed(model, goal):
    before = dict(model.config.yoso_attention)
    try:
        for m in (2**i for i in range(9)):
            model.config.yoso_attention.update(use_expectation=False, num_hash=m)
            if accuracy(model) >= goal:
                return m
        return None
    finally:
        model.config.yoso_attention.update(before)


# %% [markdown]
# **Exercise 2.** The heads are the last leading dimension, and share the mask: `mask[:, None]`.


# %% tags=["solution-2"]
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(64, 3 * 64)

    def forward(self, x, mask):
        query, key, value = split_heads(self.project(x))
        rng = None if self.training else 0
        context = yoso_attention(query, key, value, num_hash=64, hash_code_len=4, key_mask=mask[:, None], rng=rng)
        return context.transpose(1, 2).flatten(2)


# %% [markdown]
# **Exercise 3.** Softmax's weight is one half where $\cos\theta = 1 - \ln 2 / \beta$. There $\tau =
# \ln 2 / (-\ln (1 - \theta / \pi))$. A $\beta$ of 8 asks for $\tau = 5$, a $\beta$ of 32 for 10:
# four times as sharp a softmax is matched by twice the $\tau$.


# %% tags=["solution-3"]
def matching_tau(beta):
    theta = np.arccos(1 - np.log(2) / beta)
    return max(1, round(np.log(2) / -np.log(1 - theta / np.pi)))


# %% tags=["wrong-1"]
def hashes_needed(model, goal):
    for m in (2**i for i in range(9)):
        model.config.num_hash = m  # this model reads config.yoso_attention: nothing happens
        if accuracy(model) >= goal:
            return m
    return None


# %% tags=["wrong-1"]
def hashes_needed(model, goal):
    for m in (2**i for i in range(9)):
        model.config.yoso_attention["num_hash"] = m  # and so it stays
        if accuracy(model) >= goal:
            return m
    return None


# %% tags=["wrong-2"]
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(64, 3 * 64)

    def forward(self, x, mask):
        query, key, value = split_heads(self.project(x))
        context = yoso_attention(query, key, value, num_hash=64, hash_code_len=4, rng=0)  # padding counts, training repeats
        return context.transpose(1, 2).flatten(2)


# %% tags=["wrong-2"]
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(64, 3 * 64)

    def forward(self, x, mask):
        query, key, value = split_heads(self.project(x))
        context = yoso_attention(query, key, value, num_hash=64, hash_code_len=4, key_mask=mask[:, None])  # new hashes in evaluation too
        return context.transpose(1, 2).flatten(2)


# %% tags=["wrong-2"]
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(64, 3 * 64)

    def forward(self, x, mask):
        query, key, value = split_heads(self.project(x))
        rng = None if self.training else 0
        context = yoso_attention(query, key, value, num_hash=64, hash_code_len=4, key_mask=mask[:, None], rng=rng)
        return context.flatten(2).reshape(x.shape)  # heads and tokens are mixed up


# %% tags=["wrong-3"]
def matching_tau(beta):
    return round(beta)  # as sharp by name only


# %% tags=["wrong-3"]
def matching_tau(beta):
    theta = np.arccos(1 - np.log(2) / beta)
    return max(1, round(np.log(2) / (theta / np.pi)))  # ln(1 - x) is not -x when the angle is large
