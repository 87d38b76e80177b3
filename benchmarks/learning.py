"""What a model makes of the way it is sampled in training: the suite ``learning``.

A small masked language model, that of tutorial 9, fills holes in one of two damaged copies of a
line by looking at the other. It is trained with the expectation, then from there on by sampling,
once in each setting, with the same text in the same order. What the text held out costs is measured
in the setting that it was trained in, in the other hash layout, and with the expectation.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yoso_core.benchmarks.machines import where
from yoso_core.benchmarks.tables import markdown
from yoso_core.files import write_json

if TYPE_CHECKING:
    import torch

Result = dict[str, Any]

SEEDS = (0, 1, 2)
MASK, LENGTH, SHARE, IGNORED, BATCH = 256, 64, 0.3, -100, 8
EXPECTED_STEPS, SAMPLED_STEPS = 480, 160


@dataclass(frozen=True)
class Setting:
    """How a model is sampled in training."""

    name: str
    config: Mapping[str, Any] = field(hash=False)


_M16 = {"num_hash": 16}
SETTINGS = (
    Setting("m = 16", _M16),
    Setting("m = 16, the paper's layout", {**_M16, "hash_layout": "paper"}),
    Setting("m = 16, half in the backward pass", {**_M16, "backward_num_hash": 8}),
    Setting("m = 16, a quarter", {**_M16, "backward_num_hash": 4}),
    Setting("m = 16, an eighth", {**_M16, "backward_num_hash": 2}),
    Setting("m = 16, oversample = 2", {**_M16, "oversample": 2}),
    Setting("m = 8", {"num_hash": 8}),
    Setting("m = 8, oversample = 2", {"num_hash": 8, "oversample": 2}),
    Setting("m = 8, oversample = 4", {"num_hash": 8, "oversample": 4}),
)
"""Those after the first are compared with it, seed by seed."""


class Task:
    """The text, the lines held out with their holes, and the model before it has learned."""

    def __init__(self) -> None:
        import torch

        from yoso_core.demo.language import as_bytes, split
        from yoso_core.demo.words import read_text

        train, held_out = split(read_text(None)[1].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
        self.data = torch.from_numpy(train.astype(np.int64))
        self.held_out = torch.from_numpy(as_bytes(held_out).astype(np.int64))
        lines = torch.arange(0, len(self.held_out) - LENGTH + 1, LENGTH)[::3]
        self.test = self.copies(self.held_out, lines, torch.Generator().manual_seed(0))

    def copies(self, source: "torch.Tensor", starts: "torch.Tensor", generator: "torch.Generator") -> "tuple[torch.Tensor, torch.Tensor]":
        """``(input_ids, labels)`` of the lines that begin at ``starts``: each twice, with holes."""
        import torch

        lines = source[starts[:, None] + torch.arange(LENGTH)].repeat(1, 2)
        hole = torch.rand(lines.shape, generator=generator) < SHARE
        return lines.masked_fill(hole, MASK), lines.masked_fill(~hole, IGNORED)

    def new_model(self, seed: int) -> Any:
        """Weights that learn to look things up within some hundred steps."""
        import torch

        from yoso_core.model import YosoConfig, YosoForMaskedLM

        torch.manual_seed(seed)
        config = YosoConfig(
            vocab_size=MASK + 1,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            max_position_embeddings=2 * LENGTH,
            type_vocab_size=2,
            hidden_dropout_prob=0.0,
            initializer_range=64**-0.5,
            hash_code_len=8,
            conv_window=7,
            pad_token_id=None,
        )
        model = YosoForMaskedLM(config)
        with torch.no_grad():
            model.yoso.embeddings.position_embeddings.weight.mul_(2)
            layers: Any = model.yoso.encoder.layer
            for block in layers:
                block.attention.self.key.weight.copy_(block.attention.self.query.weight)
                block.attention.output.dense.weight.mul_(3)
        return model

    def loss(self, model: Any, batch: "tuple[torch.Tensor, torch.Tensor]") -> "torch.Tensor":
        """Nats a hole."""
        import torch

        ids, labels = batch
        rows = len(ids)
        positions = torch.arange(LENGTH).repeat(2).expand(rows, -1) + 2
        types = torch.arange(2).repeat_interleave(LENGTH).expand(rows, -1)
        logits = model(ids, position_ids=positions, token_type_ids=types).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def train(self, model: Any, steps: int, learning_rate: float, seed: int) -> None:
        import torch

        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        for _ in range(steps):
            starts = torch.randint(len(self.data) - LENGTH + 1, (BATCH,), generator=generator)
            optimizer.zero_grad()
            loss = self.loss(model, self.copies(self.data, starts, generator))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    def held_out_loss(self, model: Any, **config: Any) -> float:
        """With these settings; sampled, the mean over four draws of the hashes."""
        import torch

        tried = copy.deepcopy(model).eval()
        for name, x in config.items():
            setattr(tried.config, name, x)
        losses = []
        with torch.no_grad():
            for seed in range(1 if tried.config.use_expectation else 4):
                tried.config.hash_seed = seed
                losses.append(float(self.loss(tried, self.test)))
        return float(np.mean(losses))


def learn(task: Task, seed: int, steps: tuple[int, int], track: Callable[[Iterable[Setting]], Iterable[Setting]]) -> list[Result]:
    """Every setting from one start: so many steps with the expectation, then so many by
    sampling.
    """
    import torch

    start = task.new_model(seed)
    start.config.use_expectation = True
    task.train(start, steps[0], 5e-3, seed)
    rows = []
    for setting in track(SETTINGS):
        model = copy.deepcopy(start)
        for name, x in {"use_expectation": False, **setting.config}.items():
            setattr(model.config, name, x)
        torch.manual_seed(seed)
        task.train(model, steps[1], 2e-3, 100 + seed)
        other = "paper" if model.config.hash_layout == "chained" else "chained"
        found = {
            "as_trained": task.held_out_loss(model),
            "other_layout": task.held_out_loss(model, hash_layout=other),
            "expectation": task.held_out_loss(model, use_expectation=True),
            "before": task.held_out_loss(start, use_expectation=False, **setting.config),
        }
        rows.append({"seed": seed, "setting": setting.name, **found})
    return rows


def run_learning(output: Path, *, quick: bool = False, progress: bool = True) -> Path:
    """Train and measure every setting with every seed. Print the table, and write
    ``learning.json``, whose path is returned. Seeds that stand there already are not done again.

    ``quick``: one seed and few steps, to see that the benchmark works, into
    ``learning-quick.json``.
    """
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import track

    path = output / f"learning{'-quick' if quick else ''}.json"
    steps = (12, 4) if quick else (EXPECTED_STEPS, SAMPLED_STEPS)
    settings = {"steps": list(steps), "settings": [setting.name for setting in SETTINGS]}
    results: Result = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if results.get("settings") != settings:
        results = {"suite": "learning", "quick": quick, "settings": settings, "environment": where("cpu"), "rows": []}
    task = Task()
    for seed in SEEDS[:1] if quick else SEEDS:
        if not any(row["seed"] == seed for row in results["rows"]):
            tracked = partial(track, description=f"seed {seed}", disable=not progress, transient=True)
            results["rows"] += learn(task, seed, steps, tracked)
            write_json(path, results)
    Console().print(Markdown(learning_table(results)))
    return path


COLUMNS = {"as_trained": "as trained", "other_layout": "in the other layout", "expectation": "with the expectation"}


def learning_table(results: Result) -> str:
    """Nats a hole of the text held out, in Markdown: the mean over seeds, and in brackets the
    difference to the first setting with its standard error over seeds.
    """
    seeds = sorted({row["seed"] for row in results["rows"]})
    losses = {(row["seed"], row["setting"]): row for row in results["rows"]}
    first = results["settings"]["settings"][0]
    lines = []
    for setting in results["settings"]["settings"]:
        cells = []
        for column in COLUMNS:
            values = np.array([losses[seed, setting][column] for seed in seeds])
            apart = values - [losses[seed, first][column] for seed in seeds]
            error = apart.std(ddof=1) / np.sqrt(len(seeds)) if len(seeds) > 1 else np.nan
            cells.append(f"{values.mean():.3f}" + ("" if setting == first else f" ({apart.mean():+.3f} ± {error:.3f})"))
        lines.append([setting, *cells])
    return markdown(["trained with", *COLUMNS.values()], lines, left=1)
