"""What the tests of tokenizers, checkpoints and pipelines share: a byte-level BPE as RoBERTa's, and
tiny checkpoints.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_support import enliven
from tokenizers import ByteLevelBPETokenizer

import yoso_core
from yoso_core.model import YosoConfig
from yoso_core.model.tokenizer import load_tokenizer

TEXTS = [
    "Paris is the capital of France.",
    "Rome is the capital of Italy, and Madrid is the capital of Spain.",
    "The quick brown fox jumps over the lazy dog.",
    "A long text has many words, and a short one has few.",
]

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
"""In the order of RoBERTa's vocabulary, where the mask stands last."""

SIZE: dict[str, Any] = {
    "vocab_size": 360,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hash_code_len": 4,
    "num_hash": 8,
}


def write_bpe(folder: Path) -> Path:
    """vocab.json and merges.txt, as RoBERTa's were published."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=SIZE["vocab_size"], min_frequency=1, special_tokens=SPECIAL, show_progress=False)
    bpe.save_model(str(folder))
    return folder


def write_config(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "yoso", **SIZE, **fields}))
    return folder


def tiny(head: str, **changes: Any) -> Any:
    """A model whose attention matters, in evaluation mode, for the vocabulary of `write_bpe`."""
    model = getattr(yoso_core.model, head)(YosoConfig(**(SIZE | changes)))
    enliven(model)
    return model.eval()


def write_checkpoint(folder: Path, head: str = "YosoForMaskedLM", **changes: Any) -> Path:
    """A model with its tokenizer, as `from_pretrained` takes it."""
    model = tiny(head, **changes)
    model.save_pretrained(folder)
    load_tokenizer(write_bpe(folder)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked LM."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def in_new_process(code: str, folder: Path) -> str:
    """What ``code`` prints in a Python of its own that looks for nothing on the hub and keeps the
    code it loads in ``folder``.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def words(tokenizer: Any, *texts: str) -> dict[str, torch.Tensor]:
    """A batch, padded on the right."""
    return dict(tokenizer(list(texts), padding=True, return_tensors="pt"))
