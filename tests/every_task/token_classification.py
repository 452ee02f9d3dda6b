"""Names are low words, begun and continued by what comes before; some rows are longer than a window."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.conftest import WORDS
from tests.every_task import Rows, Sample

MAX_LENGTH = 16


def rows(count: int, seed: int) -> Rows:
    """Return rows of 1 to 40 words: w0 to w19 are persons, w20 to w39 places, the others nothing."""
    generator = random.Random(f"tags {seed}")
    result = []
    for _ in range(count):
        words = [generator.choice(WORDS) for _ in range(generator.choice((1, 5, 12, 14, 40)))]
        tags, before = [], "O"
        for word in words:
            kind = ("PER", "LOC", "O")[int(word[1:]) // 20]
            tags.append("O" if kind == "O" else f"{'I' if kind == before else 'B'}-{kind}")
            before = kind
        result.append({"tokens": words, "ner_tags": tags})
    return result


def fits(words: list[str]) -> bool:
    """Say whether a row is one window: of longer ones a pipeline knows nothing."""
    return len(words) <= MAX_LENGTH - 2


def reload(folder: Path, given: Rows) -> list[Any]:
    from transformers import pipeline

    tag = pipeline("token-classification", model=str(folder), ignore_labels=[])
    served = [tag(row["tokens"], is_split_into_words=True)[0] if fits(row["tokens"]) else [] for row in given]
    return [[entry["entity"] for entry in entries] for entries in served]


SAMPLE = Sample(
    inputs=("tokens",),
    rows=rows,
    metrics=["seqeval", {"name": "seqeval", "strict": True, "per_type": True, "prefix": "strict_"}],
    reload=reload,
    expected=lambda record: record["prediction"] if fits(record["prediction"]) else [],
    data={"max_length": MAX_LENGTH},
)
