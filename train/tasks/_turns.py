"""The assistant's next turn: of packed conversations in evaluation, and of those that are asked."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.collate import mask, pad
from data.encoded import Encoded
from train.limits import longest_input
from train.tasks._chat import Template, ask
from train.tasks._generation import Generation, prove_padding
from train.tasks._messages import Columns, Unusable
from train.tasks._writing import most_tokens
from train.tasks.base import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("train")

Tokens = NDArray[np.int64]
LOOKED_AT = 1_000


@dataclass(frozen=True)
class Question:
    """What is asked of the assistant in a row, for `_writing.Writer`."""

    found: Columns
    template: Template
    tokenizer: Any = field(repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of messages, or of prompts; and of tools."""
        return (self.found.messages or self.found.prompt, *([self.found.tools] if self.found.tools else []))

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Say what is wrong with the messages."""
        try:
            self.found.question(row)
        except Unusable as problem:
            return str(problem)
        return None

    def beginnings(self, rows: Mapping[str, list[Any]]) -> list[list[int] | str]:
        """Return the tokens that the assistant answers; or what the template says against it."""
        names, parts = list(rows), zip(*rows.values(), strict=True)
        asked = [self.found.question(dict(zip(names, values, strict=True))) for values in parts]
        return ask(self.tokenizer, self.template, asked)


def settle(
    generation: Generation, model: Any, tokenizer: Any, splits: Mapping[str, Encoded], *, inherits: bool
) -> None:
    """Let the model write turns as the config says, and as long as there is room behind any prompt of an evaluation.

    Usual are turns twice as long as those of the first conversations. Raises `UserError` where there is no room.
    """
    train = splits["train"].features(np.arange(min(LOOKED_AT, len(splits["train"].dataset))))
    longest = max(int(counts.max()) for counts in train["counts"])
    judged = [encoded for role, encoded in splits.items() if role != "train"]
    before, limit = max(map(longest_prompt, judged), default=1), longest_input(model, tokenizer)
    why = (
        f"the model takes {limit:,} tokens, and the longest prompt of the rows to be judged has {before:,}. Lower "
        "data.max_length, which cuts conversations, or task.generation.max_new_tokens"
    )
    most = most_tokens(generation.max_new_tokens, 2 * longest, limit - before, why)
    if most < longest and not generation.max_new_tokens and os.environ.get("RANK", "0") == "0":
        log.warning("task.generation: a turn ends after %d tokens, there are some of %d; %s", most, longest, why)
    prove_padding(model)  # prompts differ in length; later the weights may be shared out
    generation.settle(model, tokenizer, most, inherits=inherits)


def longest_prompt(encoded: Encoded) -> int:
    """Return how many tokens the longest prompt has of those that last turns are written from."""
    longest, size = 0, len(encoded.dataset)
    for first in range(0, size, LOOKED_AT):
        features = encoded.features(np.arange(first, min(first + LOOKED_AT, size)))
        for labels, pieces in zip(features["labels"], features["pieces"], strict=True):
            longest = max(longest, *(_last(labels[start:stop])[0] + 1 for start, stop in _bounds(pieces)))
    return longest


def written(generation: Generation, model: nn.Module, tokenizer: Any, tensors: dict[str, Tensor]) -> Tensor:
    """Return (B, P, W): the last turn of each conversation of collated examples as the model writes it, -100 behind."""
    sizes, before = tensors["pieces"], prompts(tensors)
    ids, there = pad(before, tokenizer.pad_token_id, left=True), mask(before, left=True)
    keys = tensors["keys"][sizes > 0] if "keys" in tensors else None
    turns = generation.write(model, tokenizer, ids.to(sizes.device), there.to(sizes.device), keys)
    found = turns.new_full((*sizes.shape, turns.shape[1]), IGNORED)
    found[sizes > 0] = turns
    return found


def prompts(tensors: Mapping[str, Tensor]) -> list[Tokens]:
    """Return what the last turn of each conversation of collated examples is written from: all tokens before it."""
    ids, labels, pieces = (tensors[name].cpu().numpy() for name in ("input_ids", "labels", "pieces"))
    found = []
    for row, sizes in enumerate(pieces):
        for start, stop in _bounds(sizes[sizes > 0]):
            found.append(ids[row, start:stop][: _last(labels[row, start:stop])[0] + 1])
    return found


def references(encoded: Encoded, tokenizer: Any) -> list[list[str]]:
    """Return for each example the text of the last turn of each of its conversations, as far as it is not cut."""
    found = []
    for place in range(len(encoded.dataset)):
        features = encoded.features(np.array([place]))
        labels, turns = features["labels"][0], []
        for start, stop in _bounds(features["pieces"][0]):
            turn = labels[start:stop][slice(*_last(labels[start:stop]))]
            turns.append(tokenizer.decode(turn, skip_special_tokens=True).strip())
        found.append(turns)
    return found


def _bounds(sizes: Tokens) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(sizes).tolist()
    yield from zip([0, *ends[:-1]], ends, strict=True)


def _last(labels: Tokens) -> tuple[int, int]:
    """Return from where to where in a conversation's labels (T,) the last of the assistant's turns goes."""
    edges = np.diff(np.concatenate([[0], labels != IGNORED, [0]]))
    return int(np.flatnonzero(edges > 0)[-1]), int(np.flatnonzero(edges < 0)[-1])
