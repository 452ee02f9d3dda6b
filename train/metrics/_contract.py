"""What a file of this folder offers, and how a config chooses one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from data.section import Section

Kind = Literal["single_label", "multi_label", "regression"]


class Module(Protocol):
    """A metric: one file, light to import (numpy at most), named as the metric.

    KINDS              the kinds of task it can score
    TAKES              "predictions", or "scores" where it needs probabilities
    HIGHER_IS_BETTER   False for an error
    Options            what the config may say beside the name; one called `classes` is filled in with C where the
                       config leaves it out and the scores tell it
    """

    KINDS: tuple[Kind, ...]
    TAKES: Literal["predictions", "scores"]
    HIGHER_IS_BETTER: bool
    Options: type[Section]

    def compute(self, taken: NDArray[Any], references: NDArray[Any], options: Section, /) -> dict[str, float]:
        """Return figures by result name, the same to the last bit in whatever order the examples come.

        references: (n,) int64 class ids, (n, L) int64 labels of 0 and 1, or (n,) float64 values (regression).
        taken: predictions like the references; or float64 scores, (n, C) of classes or (n, L) of labels.
        """
        ...


@dataclass(frozen=True)
class Choice:
    """A metric as the config chose it: its name, its options as given, and what to put before its result names."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
