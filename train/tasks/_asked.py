"""What is asked of a task whose rows need no targets any more: their predictions alone."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data.encoded import Encoded, Features
from train.tasks.base import Arrays, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

OF_TARGETS = ("reference", "loss")
"""What a record says of the target."""


@dataclass(frozen=True)
class Asked:
    """A task, over rows with nothing but its inputs.

    `targets` gives for a row what stands for its targets, by column: the task encodes it as it always does, nothing is
    learned from it, and no record tells of it. Targets that the rows do have are not looked at.
    """

    task: Task
    columns: tuple[str, ...]
    targets: Callable[[Mapping[str, Any]], dict[str, Any]]
    answers: Callable[[Arrays], Iterator[dict[str, Any]]] | None = None
    """What is said of each example, where that is not what the task's records say."""

    @property
    def identity(self) -> str:
        """The task's, with its code, and the columns that are read."""
        code = inspect.getsource(sys.modules[type(self.task).__module__])
        return json.dumps([code, self.task.identity, self.columns])

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Say what makes the inputs unusable."""
        return self.task.problem({**row, **self.targets(row)})

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Encode as the task does."""
        given = [self.targets(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True)]
        filled = {name: [each[name] for each in given] for name in given[0]}
        return self.task.encode({**rows, **filled}, tokenizer, max_length)

    def collate(self, features: Features) -> dict[str, Tensor]:
        """Collate as the task does."""
        return self.task.collate(features)

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predict as the task does."""
        return self.task.predict(model, tensors)

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """Yield the answers; or the task's records, without what they say of targets."""
        if self.answers:
            yield from (
                {**place, **answer} for place, answer in zip(encoded.places(), self.answers(found), strict=True)
            )
            return
        for record in self.task.records(found, encoded):
            yield {name: value for name, value in record.items() if name not in OF_TARGETS}
