"""Each text's answer has the same words moved on by one, in another order; a wrong answer has those of another half."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.conftest import WORDS
from tests.every_task import Rows, Sample


def rows(count: int, seed: int) -> Rows:
    generator = random.Random(f"pairs {seed}")
    result = []
    for _ in range(count):
        places = [generator.randrange(len(WORDS) - 1) for _ in range(generator.randint(2, 12))]
        moved = generator.sample([place + 1 for place in places], len(places))
        wrong = [generator.randrange(len(WORDS)) for _ in range(generator.randint(1, 20))]
        texts = (" ".join(WORDS[place] for place in chosen) for chosen in (places, moved, wrong))
        result.append(dict(zip(("anchor", "positive", "negative"), texts, strict=True)))
    return result


def reload(folder: Path, given: Rows) -> list[Any]:
    """One text at a time, by transformers alone: the cosine of each pair, and its rank among all."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def vector(text: str) -> Any:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden.mean(0), dim=0)

    anchors, positives = (torch.stack([vector(row[name]) for row in given]) for name in ("anchor", "positive"))
    similar = anchors @ positives.T
    ranks = (similar > similar.diagonal()[:, None]).sum(1) + 1.0
    return [[cosine, rank] for cosine, rank in zip(similar.diagonal().tolist(), ranks.tolist(), strict=True)]


SAMPLE = Sample(
    rows=rows,
    metrics=[{"name": "recall_at", "k": [1, 5]}],
    reload=reload,
    expected=lambda record: [record["prediction"], record["rank"]],
    inputs=("anchor", "positive"),
    merges=True,
    task={"symmetric": True},
)
