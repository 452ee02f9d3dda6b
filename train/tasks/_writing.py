"""Texts that a language model writes on: what is asked of it without a target."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.collate import mask, pad
from data.encoded import Encoded, Features
from data.errors import UserError
from data.order import example_keys
from train.limits import longest_input
from train.tasks._generation import Generation, texts
from train.tasks.base import Arrays

if TYPE_CHECKING:
    from torch import Tensor, nn


MOST = 256  # tokens that are written, where neither the config nor the model says how many


def keys(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return what a text is drawn from, (n,), for each row's place in its source.

    So it is the same in evaluation, packed or not, and in `train.predict`, whatever other rows are skipped.
    """
    return example_keys(rows, "evaluation").astype(np.int64)


def most_tokens(own: int | None, usual: int, room: int, why: str) -> int:
    """Return how many tokens a text may have: `own`, of the config; without, the usual number as far as there is room.

    Raises `UserError` where there is none for it: before training, since nothing would be written past a model's end.
    `why` says what takes the room, and the remedy.
    """
    if (own or 1) > room:
        asked = f"{own:,} tokens are" if own else "a single token is"
        raise UserError(f"task.generation.max_new_tokens: {asked} more than there is room for; {why}")
    return own or min(usual, room)


class Beginner(Protocol):
    """What knows where writing begins: a task, or what stands for it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Say what makes a row unusable."""

    def beginnings(self, rows: Mapping[str, list[Any]]) -> list[list[int] | str]:
        """Return for each row the tokens that stand before what is written, or what is wrong with it."""


@dataclass(frozen=True)
class Writer:
    """Writes on from the beginning that each row gives, as long as the model and the config allow."""

    source: Beginner
    tokenizer: Any = field(repr=False)
    generation: Generation
    room: int
    """Tokens of the longest beginning."""

    @classmethod
    def of(cls, source: Beginner, generation: Generation | None, model: nn.Module, tokenizer: Any) -> Writer:
        """Return what writes on from what `source` reads; tell the model how. `UserError` where there is no room."""
        owner: Any = model
        generation = generation or Generation()
        longest = longest_input(owner, tokenizer)
        usual = owner.generation_config.max_new_tokens or min(MOST, longest // 2)
        generation.settle(model, tokenizer, usual, inherits=True)
        new = owner.generation_config.max_new_tokens
        if new >= longest:
            raise UserError(
                f"task.generation.max_new_tokens: {new} leaves nothing of the {longest} tokens that the model takes "
                "for the text to be written on; lower it"
            )
        return cls(source, tokenizer, generation, longest - new)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return self.source.columns

    @property
    def identity(self) -> str:
        """The columns, the code that makes beginnings and the longest of them."""
        code = inspect.getsource(sys.modules[type(self.source).__module__])
        return json.dumps([code, repr(self.source), self.columns, self.room])

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Say what makes a row unusable."""
        return self.source.problem(row)

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize beginnings; one that leaves no room for what is to be written is unusable."""
        found = self.source.beginnings(rows)
        problems = {place: self._unfit(ids) for place, ids in enumerate(found)}
        good = [place for place, problem in problems.items() if problem is None]
        lengths = [len(found[place]) for place in good]
        return {
            "row": good,
            "input_ids": [found[place] for place in good],
            "length": lengths,
            "targets": lengths,
            "unusable": [(place, problem) for place, problem in problems.items() if problem],
        }

    def _unfit(self, ids: list[int] | str) -> str | None:
        if isinstance(ids, str):
            return ids
        if not ids:
            return "no token stands before what is to be written, and the tokenizer has none to begin with"
        if len(ids) > self.room:
            return f"{len(ids):,} tokens leave no room to write: at most {self.room:,} may stand before"
        return None

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids, padded on the left, and attention_mask: (B, S); keys: (B,)."""
        import torch

        sequences = features["input_ids"]
        return {
            "input_ids": pad(sequences, self.tokenizer.pad_token_id, left=True),
            "attention_mask": mask(sequences, left=True),
            "keys": torch.from_numpy(keys(features["row"])),
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
