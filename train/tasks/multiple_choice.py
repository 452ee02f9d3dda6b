"""A question and any number of choices → the right one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from data.collate import mask, pad
from data.encoded import REAL, Encoded, Features
from data.errors import UserError
from data.source import Rows, check_columns
from train.tasks._asked import Asked
from train.tasks._choices import Choices
from train.tasks.base import Arrays, Outputs, Task, TaskConfig, inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

CONTEXTS = ("context", "passage", "article", "sent1")
QUESTIONS = ("question", "question_stem", "sent2", "ctx")
CHOICES = ("choices", "options", "endings", "choice")
LABELS = ("label", "answerKey", "answer")
NO_LABEL = "no label"


class Config(TaskConfig):
    """Multiple choice: its columns."""

    name: Literal["multiple_choice"] = "multiple_choice"
    context: str | None = Field(
        None,
        description="Column of a text that goes before the question (a row may have none). Default: context, passage, "
        'article or sent1, if there is one; "": none.',
    )
    question: str | None = Field(
        None, description="Question column. Default: question, question_stem, sent2 or ctx, whichever there is."
    )
    choices: str | tuple[str, ...] | None = Field(
        None,
        description="Column that lists the choices, or a column for each (the last may be empty). Default: choices, "
        "options, endings or choice, or ending0, ending1, ...",
    )
    label: str | None = Field(None, description="Column of the right choice. Default: label, answerKey or answer.")
    label_is: Literal["auto", "from_0", "from_1", "text"] = Field(
        "auto",
        description="What it holds: the place of the choice, counted from 0 or 1, or its letter or own label; or its "
        "text. auto: what most of the training rows can mean.",
    )


@dataclass(frozen=True)
class MultipleChoice(Task):
    """Choosing one of a row's own choices; the loss is a sum over rows.

    Each choice is scored as a pair (prompt, choice). Rows may have different numbers of choices, also in one
    micro-batch.
    """

    context: str | None
    question: str
    choices: Choices
    padding: int

    kind = "single_label"
    model_class = "AutoModelForMultipleChoice"
    pipeline = None
    default_metrics = ("accuracy",)

    @classmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> MultipleChoice:
        """Find the columns in the training rows."""
        there = rows[0].dataset.column_names

        def find(chosen: str | None, known: Sequence[str]) -> str | None:
            return chosen or next((name for name in known if name in there), None)

        context = None if config.context == "" else find(config.context, CONTEXTS)
        question = find(config.question, QUESTIONS) or QUESTIONS[0]
        label = find(config.label, LABELS) or LABELS[0]
        if isinstance(config.choices, tuple):
            choices = config.choices
        else:
            endings = tuple(f"ending{number}" for number in range(len(there)) if f"ending{number}" in there)
            listed = find(config.choices, CHOICES)
            choices = (listed,) if listed else endings or CHOICES[:1]
        wanted = [name for name in (context, question, *choices, label) if name]
        check_columns(rows, wanted, "task (choose columns with task.question, task.choices, task.label, task.context)")
        if isinstance(config.choices, tuple) and len(choices) < 2:
            raise UserError(
                f"task.choices: a list names a column for each choice; for one that lists them: {choices[0]}"
            )
        if config.label_is == "auto":
            read = Choices.found(choices, label, rows)
        else:
            read = Choices(choices, label, config.label_is)
        return cls(context, question, read, tokenizer.pad_token_id)

    @property
    def columns(self) -> tuple[str, ...]:
        """Context (if there is one), question, choices and label."""
        return (*([self.context] if self.context else []), self.question, *self.choices.columns, self.choices.label)

    @property
    def identity(self) -> str:
        """The columns and what each is."""
        return json.dumps([self.context, self.question, *astuple(self.choices)])

    def __str__(self) -> str:
        """Say what was found in the data."""
        prompt = f"{self.context} + {self.question}" if self.context else self.question
        counted = {"from_0": "", "from_1": " (counted from 1)", "text": " (its text)"}[self.choices.reading]
        return f"multiple choice: {prompt} + {', '.join(self.choices.columns)} → {self.choices.label}{counted}"

    @property
    def model_config(self) -> dict[str, Any]:
        """Nothing: the head gives each pair one number."""
        return {}

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """A question, two or more choices that are not blank, and a label among them; a context may be blank."""
        if self.context and not isinstance(row[self.context], str | None):
            return f"{self.context!r} must be text, not {row[self.context]!r}"
        if not isinstance(row[self.question], str):
            return f"{self.question!r} must be text, not {row[self.question]!r}"
        return self.choices.problem(row) if row[self.question].strip() else f"{self.question!r} is empty"

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize a pair (prompt, choice) for each choice; those of a row lie one after the other, as long as `sizes`.

        Of long pairs the prompt is cut at its beginning, so that the question stays; where a choice leaves no room for
        one, the longer of the two is cut. `length` is what the row takes when computed: choices x longest pair. That
        bounds memory exactly where all rows have as many choices; where they differ, a micro-batch may take more, by at
        most the ratio of the largest number of choices to the smallest.
        """
        table = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        listed = [self.choices.of(row)[0] for row in table]
        parts = self.columns[: 2 if self.context else 1]
        prompts = [" ".join(filter(None, ((row[name] or "").strip() for name in parts))) for row in table]
        pairs = [(prompt, choice) for prompt, texts in zip(prompts, listed, strict=True) for choice in texts]
        encoded = _pairs(pairs, tokenizer, max_length)
        ends = list(accumulate((len(texts) for texts in listed), initial=0))
        features: dict[str, list[Any]] = {
            name: [[token for pair in values[start:end] for token in pair] for start, end in pairwise(ends)]
            for name, values in encoded.items()
        }
        sizes = [[len(ids) for ids in encoded["input_ids"][start:end]] for start, end in pairwise(ends)]
        longest = [max(lengths) for lengths in sizes]
        return {
            **features,
            "sizes": sizes,
            "choices": [len(lengths) for lengths in sizes],
            "label": [self.choices.right(row) for row in table],
            "length": [len(lengths) * most for lengths, most in zip(sizes, longest, strict=True)],
            "longest": longest,
            REAL: [sum(lengths) for lengths in sizes],
            "targets": [1] * len(sizes),
        }

    def balance(self, encoded: Encoded) -> dict[str, int]:
        """How often the right choice stands at each place."""
        return {f"choice {place}": int(count) for place, count in enumerate(np.bincount(encoded.column("label")))}

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """A line for each pair; the right one is what is learned."""
        result: list[tuple[str, str | None]] = []
        for place, ids in enumerate(tensors["input_ids"][0]):
            size = int(tensors["attention_mask"][0, place].sum())
            right = place == int(tensors["labels"][0])
            result += [(tokenizer.decode(ids[:size]), "right" if right else None), ("\n", None)]
        return result

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids, attention_mask, token_type_ids: (1, N, T), the N pairs of all B rows; labels: (B,).

        And `pairs`, (B, C): which of the N each choice of a row is, -1 where the row has fewer than C. To the model all
        are choices of one question, so that rows may have any number of them. The mask is there also where nothing is
        padded: ModernBERT cannot average over tokens without it.
        """
        import torch

        sequences = _split(features["input_ids"], features["sizes"])
        tensors = {"input_ids": pad(sequences, self.padding), "attention_mask": mask(sequences)}
        if "token_type_ids" in features:
            tensors["token_type_ids"] = pad(_split(features["token_type_ids"], features["sizes"]), 0)
        tensors = {name: tensor.unsqueeze(0) for name, tensor in tensors.items()}
        starts = accumulate((len(sizes) for sizes in features["sizes"]), initial=0)
        places = [np.arange(start, end) for start, end in pairwise(starts)]
        labels = torch.from_numpy(features["label"].astype(np.int64))
        return {**tensors, "pairs": pad(places, -1), "labels": labels}

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Cross entropy over each row's own choices, summed over rows."""
        from torch.nn import functional

        return functional.cross_entropy(_logits(model, tensors), tensors["labels"], reduction="sum")

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give scores (B, C), probabilities, nan beyond a row's own choices; predictions, references, loss: (B,)."""
        from torch.nn import functional

        logits, labels = _logits(model, tensors), tensors["labels"]
        return {
            "scores": logits.softmax(1).masked_fill(tensors["pairs"] < 0, float("nan")),
            "predictions": logits.argmax(1),
            "references": labels,
            "loss": functional.cross_entropy(logits, labels, reduction="none"),
        }

    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """predictions and references: places of choices, (n,)."""
        return {name: found[name] for name in ("predictions", "references")}

    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Asked:
        """The right choice is not needed: one stands for it."""
        read = replace(self, choices=replace(self.choices, label=NO_LABEL))
        return Asked(read, self.columns[:-1], lambda row: {NO_LABEL: read.choices.some_label(row)})

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """Places of the choice made and of the right one, from 0, and the score of every choice."""
        counts = encoded.column("choices").tolist()
        for example, (place, count) in enumerate(zip(encoded.places(), counts, strict=True)):
            scores = [round(score, 6) for score in found["scores"][example, :count].tolist()]
            made, right = (int(found[name][example]) for name in ("predictions", "references"))
            yield {**place, "prediction": made, "reference": right, "scores": scores}


def _logits(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """Return the logits of each row's choices, (B, C), -inf beyond its own."""
    pairs = tensors["pairs"]
    flat = model(**{name: tensor for name, tensor in inputs(tensors).items() if name != "pairs"}).logits[0]
    table: Tensor = flat[pairs.clamp(min=0)].masked_fill(pairs < 0, float("-inf"))
    return table


def _split(flat: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
    """Return the sequences that lie one after the other in each row."""
    return [part for row, lengths in zip(flat, sizes, strict=True) for part in np.split(row, np.cumsum(lengths)[:-1])]


def _pairs(pairs: list[tuple[str, str]], tokenizer: Any, max_length: int) -> dict[str, list[list[int]]]:
    """Return input_ids and, where the model takes them, token_type_ids of each pair, cut to `max_length`."""
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    alone = tokenizer([choice for _, choice in pairs], add_special_tokens=False, verbose=False)["input_ids"]
    result: dict[str, list[list[int]]] = {}
    usual = tokenizer.truncation_side
    for leaves_room, how, side in ((True, "only_first", "left"), (False, "longest_first", usual)):
        places = [place for place, ids in enumerate(alone) if (len(ids) < room) is leaves_room]
        if not places:
            continue
        texts = zip(*(pairs[place] for place in places), strict=True)
        tokenizer.truncation_side = side
        try:
            encoded = tokenizer(*map(list, texts), truncation=how, max_length=max_length)
        finally:
            tokenizer.truncation_side = usual
        for name in tokenizer.model_input_names:
            for place, ids in zip(places, encoded[name], strict=True):
                result.setdefault(name, [[] for _ in pairs])[place] = ids
    result.pop("attention_mask", None)
    return result


task = MultipleChoice
