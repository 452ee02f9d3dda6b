"""Low words speak for one label, high ones for the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.conftest import rows
from tests.every_task import Rows, Sample


def reload(folder: Path, given: Rows) -> list[Any]:
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(folder), top_k=None)
    found = classify([row["text"] for row in given])
    return [{score["label"]: score["score"] for score in scores} for scores in found]


SAMPLE = Sample(
    rows=lambda count, seed: rows("single_label", count, seed),
    metrics=["accuracy", "f1", "roc_auc"],
    reload=reload,
    expected=lambda record: record["scores"],
)
