"""What a file of this folder offers, and how a config chooses one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from data.section import Section

Kind = Literal[
    "single_label", "multi_label", "regression", "tags", "entities", "answers", "masked_tokens", "next_tokens", "texts",
    "preferences", "rewards", "pairs",
]  # fmt: skip
"""What a task predicts: a class, labels or a number for each example; a tag for each word, of no scheme or of one that
spells entities; a text out of a text; the tokens that were hidden; each next token; a text of its own; the
rewards of two answers and how likely these are; rewards alone; which text belongs to which."""


class Module(Protocol):
    """A metric: one file, light to import (numpy at most), named as the metric.

    KINDS              the kinds of task it can score
    TAKES              the entry of a task's outputs that it scores: "predictions", "scores" where it needs
                       probabilities, or whatever else tasks of its kinds give ("losses", "tag_predictions", ...)
    AGAINST            the entry that it is held against; "references", if left out
    HIGHER_IS_BETTER   False for an error
    FIGURES            only where its results have other names than its own: all that it may report
    FIGURES_WITH       only where an option adds some: their names by option; f1_* where the data give the names
    Options            what the config may say beside the name; one called `classes` is filled in with C where the
                       config leaves it out and the scores tell it; so is `scheme`, where the task gives its own
    columns            only where both are neither class ids nor numbers: a function that returns the `datasets` types
                       of one prediction and one reference, such as (List(Value("string")), List(Value("string")));
                       `compute` then gets the entries as the task gave them
    """

    KINDS: tuple[Kind, ...]
    TAKES: str
    HIGHER_IS_BETTER: bool
    Options: type[Section]

    def compute(self, taken: Any, references: Any, options: Section, /) -> dict[str, float]:
        """Return figures by result name, the same to the last bit in whatever order the examples come.

        references: (n,) int64 class ids, (n, L) int64 labels of 0 and 1, or (n,) float64 values (regression).
        taken: predictions like the references; or float64 scores, (n, C) of classes or (n, L) of labels. What a task
        calls otherwise comes as float64, (n,), on both sides, or as `columns` says.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """A metric as the config chose it: its name, its options as given, and what to put before its result names."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
