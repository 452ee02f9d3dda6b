"""Each text counts on from somewhere, so its neighbours tell what a hidden word is. Long ones become two examples."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from data.order import example_keys
from data.source import Rows as SourceRows
from tests.conftest import WORDS
from tests.every_task import Rows, Sample
from train.tasks.masked_lm import Config, MaskedLM

LENGTH = 20


def rows(count: int, seed: int) -> Rows:
    generator = random.Random(f"masked {seed}")
    result = []
    for _ in range(count):
        start, length = generator.randrange(8), generator.randint(1, 30)
        result.append({"text": " ".join(WORDS[(start + step) % 8] for step in range(length))})
    return result


def reload(folder: Path, given: Rows) -> list[Any]:
    """Hide the same tokens again, knowing nothing of the run, and let the pipeline guess those that are masked."""
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = MaskedLM.prepare(Config(), [SourceRows(Dataset.from_list(given), "rows")], tokenizer)
    encoded = task.encode({"text": [row["text"] for row in given]}, tokenizer, LENGTH)
    sequences = [np.array(ids) for ids in encoded["input_ids"]]
    keys = example_keys(np.arange(len(sequences)), "evaluation")
    hidden = task.collate({"input_ids": sequences, "key": keys})["input_ids"]
    fill = pipeline("fill-mask", model=str(folder), top_k=1)
    result = []
    for ids, sequence in zip(hidden.tolist(), sequences, strict=True):
        words = tokenizer.convert_ids_to_tokens(ids[1 : len(sequence) - 1])
        found = fill(" ".join(words)) if "[MASK]" in words else []
        result.append([[guess["token_str"], guess["score"]] for [guess] in map(listed, found)])
    return result


def listed(guesses: Any) -> list[dict[str, Any]]:
    """With one mask the pipeline gives its guesses, with several a list of guesses for each."""
    return guesses if isinstance(guesses, list) else [guesses]


def expected(record: dict[str, Any]) -> Any:
    return [[token["prediction"], token["score"]] for token in record["hidden"] if token["given"] == "[MASK]"]


SAMPLE = Sample(
    rows=rows,
    metrics=["perplexity", "accuracy"],
    reload=reload,
    expected=expected,
    data={"max_length": LENGTH},
    asked=lambda row: {"text": row["text"] + " [MASK]"},
    asks_the_same=False,
)
