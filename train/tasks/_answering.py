"""What is asked of a model that has learned preferences: an answer to a prompt, or the score of one."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from data.collate import mask, pad
from data.encoded import Encoded, Features
from train.tasks import _chat, _fields, _messages
from train.tasks._messages import Conversation, Unusable
from train.tasks._pairs import Columns, Frame, Pair, ids_of, sequences
from train.tasks.base import Arrays

if TYPE_CHECKING:
    from torch import Tensor, nn

OTHER = "other answer"


@dataclass(frozen=True)
class Prompts:
    """Prompts that are to be answered, for `_writing.Writer`: texts, or conversations up to the assistant's turn."""

    name: str
    tools: str | None
    frame: Frame
    template: _chat.Template | None
    tokenizer: Any = field(repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of prompts, and of tools."""
        return tuple(_fields.column(name) for name in (self.name, self.tools) if name)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """A prompt must be text, or messages, as in training."""
        value = _fields.value(row, self.name)
        if self.template is None:
            return None if isinstance(value, str) and value.strip() else f"{self.name!r} must be text, not {value!r}"
        try:
            self._asked(row)
        except Unusable as problem:
            return str(problem)
        return None

    def _asked(self, row: Mapping[str, Any]) -> Conversation:
        tools = _messages.tools(_fields.value(row, self.tools), self.tools) if self.tools else None
        return _messages.unanswered(_fields.value(row, self.name), self.name, tools)

    def beginnings(self, rows: Mapping[str, list[Any]]) -> list[list[int] | str]:
        """Return the tokens of each prompt, as they stood before answers in training."""
        if self.template is None:
            prompts = ids_of(self.tokenizer, _fields.values(rows, self.name))
            return [[*self.frame.begin, *prompt] for prompt in prompts]
        table = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        return _chat.ask(self.tokenizer, self.template, [self._asked(row) for row in table])


@dataclass(frozen=True)
class Scores:
    """Scores the answer of each row, which stands where the chosen one stood in training."""

    where: Columns
    frame: Frame
    template: _chat.Template | None
    tokenizer: Any = field(repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of prompt and answer, and of tools."""
        names = (self.where.prompt, self.where.chosen, self.where.tools)
        return tuple(dict.fromkeys(_fields.column(name) for name in names if name))

    @property
    def identity(self) -> str:
        """The columns, what stands around texts, and the code."""
        return json.dumps([inspect.getsource(sys.modules[__name__]), repr(self)])

    def _pair(self, row: Mapping[str, Any]) -> Pair:
        """Return prompt and answer, with something beside it that is no answer of anybody."""
        answer = _fields.value(row, self.where.chosen)
        other: Any = f"{answer}."
        if isinstance(answer, list) and answer and isinstance(answer[-1], Mapping):
            other = [*answer[:-1], {**answer[-1], "content": f"{answer[-1].get('content') or ''}."}]
        return replace(self.where, rejected=OTHER).pair({**row, OTHER: other})

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """There must be a prompt and an answer, neither empty."""
        try:
            pair = self._pair(row)
        except Unusable as problem:
            return str(problem)
        fits = isinstance(pair.chosen, str) == (self.template is None)
        return None if fits else f"{self.where.chosen!r} must be of the form that it had in training"

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize prompts and answers, cut at `max_length`; a prompt that leaves no room for an answer is unusable."""
        table = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        features: dict[str, list[Any]] = {"row": [], "input_ids": []}
        unusable: list[tuple[int, str]] = []
        found = sequences([self._pair(row) for row in table], tokenizer, self.frame, self.template)
        for place, both in enumerate(found):
            if isinstance(both, str):
                unusable.append((place, both))
                continue
            ids, answers = both[0]
            if (begin := answers.index(1)) >= max_length:
                unusable.append((place, f"the prompt has {begin} tokens, and {max_length} is all that is read"))
                continue
            features["row"].append(place)
            features["input_ids"].append(ids[:max_length])
        lengths = [len(ids) for ids in features["input_ids"]]
        return {**features, "length": lengths, "targets": [1] * len(lengths), "unusable": unusable}

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids and attention_mask: (B, T)."""
        sequences = features["input_ids"]
        return {"input_ids": pad(sequences, self.tokenizer.pad_token_id), "attention_mask": mask(sequences)}

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give scores (B,)."""
        return {"scores": model(**tensors).logits[:, 0].float()}

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """Yield the score of each answer."""
        for place, score in zip(encoded.places(), found["scores"].tolist(), strict=True):
            yield {**place, "prediction": round(score, 6)}
