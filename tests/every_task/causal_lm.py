"""Sentences in which each word is followed by the next one or the one after."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.conftest import WORDS
from tests.every_task import Rows, Sample


def rows(count: int, seed: int) -> Rows:
    generator = random.Random(f"sentences {seed}")
    result = []
    for _ in range(count):
        word, words = generator.randrange(len(WORDS)), []
        for _ in range(generator.choice((1, 2, 3, 5, 8, 40))):
            word = (word + generator.choice((1, 2))) % len(WORDS)
            words.append(WORDS[word])
        result.append({"text": " ".join(words)})
    return result


def reload(folder: Path, given: Rows) -> list[Any]:
    """Each document's loss, computed apart and piece by piece, as a reader of the README would."""
    import torch
    from transformers import pipeline

    written = pipeline("text-generation", model=str(folder), dtype=torch.float64, device="cpu")
    assert len(written("w1 w2 w3", max_new_tokens=4, do_sample=False, return_full_text=False)) == 1
    model, tokenizer = written.model, written.tokenizer
    losses = []
    for row in given:
        ids = torch.tensor(tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id])
        loss = 0.0
        for start in range(0, len(ids) - 1, SAMPLE.data["max_length"]):
            piece = ids[start : start + SAMPLE.data["max_length"] + 1]
            with torch.no_grad():
                chances = model(piece[None, :-1]).logits[0].log_softmax(1)
            loss -= chances[torch.arange(len(piece) - 1), piece[1:]].sum().item()
        losses.append([loss, len(ids) - 1])
    return losses


SAMPLE = Sample(
    rows=rows,
    metrics=["perplexity", "bits_per_byte"],
    reload=reload,
    expected=lambda record: [record["loss"], record["tokens"]],
    model="gpt2",
    data={"max_length": 8},
    asked=lambda row: {"text": " ".join(row["text"].split()[:9])},
    asks_the_same=False,
    task={"generation": {"max_new_tokens": 5}},
)
