"""The target is the source's words, each moved on by one: learned by a tiny T5."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.conftest import WORDS
from tests.every_task import Rows, Sample

LENGTH = 16


def rows(count: int, seed: int) -> Rows:
    generator = random.Random(f"moved {seed}")
    result = []
    for _ in range(count):
        places = [generator.randrange(len(WORDS) - 1) for _ in range(generator.randint(1, 20))]
        source, target = (" ".join(WORDS[place + step] for place in places) for step in (0, 1))
        result.append({"source": source, "target": target})
    return result


def reload(folder: Path, given: Rows) -> list[Any]:
    """One row at a time, as the model's card says."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in given:
        ids = tokenizer(row["source"], truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
        end = tokenizer.eos_token_id
        labels = tokenizer(row["target"])["input_ids"]
        labels = torch.tensor([(labels if labels[-1] == end else [*labels, end])[:LENGTH]])
        with torch.no_grad():
            text = tokenizer.decode(model.generate(ids)[0], skip_special_tokens=True)
            loss = model(input_ids=ids, labels=labels).loss.item() * labels.shape[1]
        found.append([text.strip(), loss])
    return found


SAMPLE = Sample(
    inputs=("source",),
    rows=rows,
    metrics=["bleu", "chrf", "rouge", "exact_match"],
    reload=reload,
    expected=lambda record: [record["prediction"], record["loss"]],
    task={"generation": {"beams": 2, "max_new_tokens": 6}, "label_smoothing": 0.1},
    model="t5",
    data={"max_length": LENGTH},
)
