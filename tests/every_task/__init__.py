"""For each task, what the test over all tasks needs to know of it: a module of the task's name with a `SAMPLE`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """Learnable rows of a task, and how its exported model is used by somebody else."""

    rows: Callable[[int, int], Rows]
    """(count, seed) → rows of very different lengths, made of the words of the tests' tokenizer."""
    metrics: list[Any]
    reload: Callable[[Path, Rows], list[Any]]
    """(the exported folder, the validation rows) → a value for each record; called in a fresh process."""
    expected: Callable[[dict[str, Any]], Any]
    """A line of predictions/validation.jsonl → the same value."""
    inputs: tuple[str, ...] = ("text",)
    """The columns that a row without targets has."""
    asked: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row
    """A row → what is asked, where a row without targets is not enough."""
    asks_the_same: bool = True
    """Whether `train.predict` is asked what the run predicts of its validation rows."""
    merges: bool = False
    """Whether it exports a whole model only, so that an adapter has to be merged."""
    task: dict[str, Any] = field(default_factory=dict)
    model: str = "bert"
    data: dict[str, Any] = field(default_factory=dict)


def load(name: str) -> Sample:
    """Return a task's sample; ModuleNotFoundError for a task that has none."""
    sample: Sample = importlib.import_module(f"tests.every_task.{name}").SAMPLE
    return sample
