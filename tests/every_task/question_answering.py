"""The word after the marker w0 is the answer, if there is one; contexts are longer than what fits."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.conftest import WORDS
from tests.every_task import Rows, Sample

LENGTH, STRIDE, LONGEST = 24, 6, 4


def rows(count: int, seed: int) -> Rows:
    generator = random.Random(f"answers {seed}")
    result = []
    for _ in range(count):
        words = [generator.choice(WORDS[1:]) for _ in range(generator.randint(2, 50))]
        answer: dict[str, Any] = {"text": [], "answer_start": []}
        if generator.random() < 0.7:
            place = generator.randrange(len(words) - 1)
            words[place] = WORDS[0]
            start = len(" ".join(words[: place + 1])) + 1
            answer = {"text": [words[place + 1]], "answer_start": [start]}
        question = " ".join(generator.choice(WORDS[1:]) for _ in range(generator.randint(1, 4)))
        result.append({"question": question, "context": " ".join(words), "answers": answer})
    return result


def reload(folder: Path, given: Rows) -> list[Any]:
    """The tokenizer's own windows, one at a time, and every span compared in plain Python."""
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in given:
        windows = tokenizer(
            row["question"], row["context"], truncation="only_second", max_length=LENGTH, stride=STRIDE,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        best, null = (-float("inf"), ""), float("inf")
        for number, ids in enumerate(windows["input_ids"]):
            offsets = windows["offset_mapping"][number]
            with torch.no_grad():
                out = model(input_ids=torch.tensor([ids]))
            start, end = out.start_logits[0].tolist(), out.end_logits[0].tolist()
            inside = [place for place, side in enumerate(windows.sequence_ids(number)) if side == 1]
            null = min(null, start[0] + end[0])
            for first in inside:
                for last in range(first, min(first + LONGEST, inside[-1] + 1)):
                    text = row["context"][offsets[first][0] : offsets[last][1]]
                    best = max(best, (start[first] + end[last], text))
        found.append([best[1], best[0], null - best[0]])
    return found


def expected(record: dict[str, Any]) -> list[Any]:
    best = record["n_best"][0]
    return [best["text"], best["score"], record["null_odds"]]


SAMPLE = Sample(
    inputs=("question", "context"),
    rows=rows,
    metrics=["squad"],
    reload=reload,
    expected=expected,
    task={"stride": STRIDE, "max_answer_length": LONGEST, "n_best": 3},
    data={"max_length": LENGTH},
)
