"""Texts that a language model writes on: what is asked of it without a target."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from data.collate import mask, pad
from data.encode import Encoded, Features
from data.errors import UserError
from train.limits import longest_input
from train.tasks._generation import Generation, texts
from train.tasks.base import Arrays

if TYPE_CHECKING:
    from torch import Tensor, nn

Beginnings = Callable[[Mapping[str, list[Any]]], list[list[int]]]


@dataclass(frozen=True)
class Writer:
    """Writes on from the beginning that each row gives, as long as the model and the config allow."""

    columns: tuple[str, ...]
    tokenizer: Any = field(repr=False)
    generation: Generation
    room: int
    """Tokens of the longest beginning."""
    unfit: Callable[[Mapping[str, Any]], str | None]
    """What makes a row's beginning unusable."""
    beginnings: Beginnings
    """Rows → tokens that stand before what is written. Of the task's own module, whose code is part of what is kept."""

    @classmethod
    def of(
        cls, task: Any, generation: Generation | None, model: nn.Module, tokenizer: Any, beginnings: Beginnings
    ) -> Writer:
        """Return what writes for `task`; the model is told how. Raises `UserError` where there would be no room."""
        owner: Any = model
        generation = generation or Generation()
        generation.settle(model, tokenizer, owner.generation_config.max_new_tokens or 256, inherits=True)
        longest, new = longest_input(owner, tokenizer), owner.generation_config.max_new_tokens
        if new >= longest:
            raise UserError(
                f"task.generation.max_new_tokens: {new} leaves nothing of the {longest} tokens that the model takes "
                "for the text to be written on; lower it"
            )
        return cls(task.columns, tokenizer, generation, longest - new, task.problem, beginnings)

    @property
    def identity(self) -> str:
        """The columns, the code that makes beginnings and the longest of them."""
        code = inspect.getsource(sys.modules[self.beginnings.__module__])
        return json.dumps([code, self.columns, self.room])

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Say what makes a row unusable."""
        return self.unfit(row)

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize beginnings; one that leaves no room for what is to be written is unusable."""
        found = self.beginnings(rows)
        good = [place for place, ids in enumerate(found) if 0 < len(ids) <= self.room]
        problems = [
            (place, f"{len(ids):,} tokens leave no room to write: at most {self.room:,} may stand before")
            if ids
            else (place, "no token stands before what is to be written, and the tokenizer has none to begin with")
            for place, ids in enumerate(found)
            if not 0 < len(ids) <= self.room
        ]
        lengths = [len(found[place]) for place in good]
        return {
            "row": good,
            "input_ids": [found[place] for place in good],
            "length": lengths,
            "targets": lengths,
            "unusable": problems,
        }

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids, padded on the left, and attention_mask: (B, S); keys: (B,)."""
        import torch

        sequences = features["input_ids"]
        return {
            "input_ids": pad(sequences, self.tokenizer.pad_token_id, left=True),
            "attention_mask": mask(sequences, left=True),
            "keys": torch.from_numpy(features["key"].astype(np.int64)),
        }

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give what is written: (B, W)."""
        given = tensors["input_ids"], tensors["attention_mask"], tensors["keys"]
        return {"written": self.generation.write(model, self.tokenizer, *given)}

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """Yield what was written after each row's beginning."""
        written = texts(found["written"], self.tokenizer, self.generation.stop)
        for place, text in zip(encoded.places(), written, strict=True):
            yield {**place, "prediction": text}
