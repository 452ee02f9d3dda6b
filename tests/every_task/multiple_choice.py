"""Two to five choices a row; the right one has the words of the question's half."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.conftest import WORDS
from tests.every_task import Rows, Sample


def rows(count: int, seed: int) -> Rows:
    generator = random.Random(f"choices {seed}")

    def words(low: bool, most: int) -> str:
        return " ".join(generator.choice(WORDS[:5] if low else WORDS[5:]) for _ in range(generator.randint(1, most)))

    result = []
    for _ in range(count):
        size = generator.randint(2, 5)
        label = generator.randrange(size)
        choices = [words(place == label, 6) for place in range(size)]
        result.append({"question": words(generator.random() < 0.5, 20), "choices": choices, "label": label})
    return result


def reload(folder: Path, given: Rows) -> list[Any]:
    import torch
    from transformers import AutoModelForMultipleChoice, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMultipleChoice.from_pretrained(folder)
    result = []
    for row in given:
        pairs = [[row["question"], choice] for choice in row["choices"]]
        encoded = tokenizer(pairs, padding=True, return_tensors="pt")
        with torch.no_grad():
            scores = model(**{name: tensor[None] for name, tensor in encoded.items()}).logits[0].softmax(0)
        result.append([int(scores.argmax()), scores.tolist()])
    return result


SAMPLE = Sample(
    inputs=("question", "choices"),
    rows=rows,
    metrics=["accuracy"],
    reload=reload,
    expected=lambda record: [record["prediction"], record["scores"]],
)
