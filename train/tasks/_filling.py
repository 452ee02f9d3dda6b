"""Guesses at hidden tokens: of training, and of texts that hold mask tokens already."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from data.collate import mask, pad
from data.encoded import Encoded, Features
from train.tasks import _words
from train.tasks.base import IGNORED, Arrays, inputs

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Filling:
    """Guesses the mask tokens that stand in each text. A text longer than `max_length` is read in parts."""

    text: str
    tokenizer: Any = field(repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The text column."""
        return (self.text,)

    @property
    def identity(self) -> str:
        """The column and the code that reads it."""
        return json.dumps([self.text, *(inspect.getsource(sys.modules[part]) for part in (__name__, _words.__name__))])

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """A text must hold the mask token at least once."""
        value, sign = row[self.text], self.tokenizer.mask_token
        if not isinstance(value, str):
            return f"{self.text!r} must be text, not {value!r}"
        return None if sign in value else f"{self.text!r} holds no {sign}, so there is nothing to guess"

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize texts and keep the parts of long ones that hold a mask; `masks` are their places."""
        options = {"return_special_tokens_mask": True, "return_attention_mask": False, "verbose": False}
        encoded = tokenizer(rows[self.text], return_token_type_ids=False, **options)
        features: dict[str, list[Any]] = {name: [] for name in ("row", "input_ids", "length", "targets", "masks")}
        for row, sequence in enumerate(encoded["input_ids"]):
            ids, added = np.array(sequence), np.array(encoded["special_tokens_mask"][row], dtype=np.bool_)
            hidden = ids == tokenizer.mask_token_id
            for taken in _words.cuts(added & ~hidden, max_length):
                if hidden[taken].any():
                    features["row"].append(row)
                    features["input_ids"].append(ids[taken])
                    features["masks"].append(np.flatnonzero(hidden[taken]))
                    features["length"].append(len(taken))
                    features["targets"].append(int(hidden[taken].sum()))
        lost = sorted(set(range(len(encoded["input_ids"]))) - set(features["row"]))
        return {**features, "unusable": [(row, f"{self.text!r} holds no mask token") for row in lost]}

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels (any id where something is hidden, else -100): (B, T); places: (M,)."""
        import torch

        sequences = features["input_ids"]
        ids = pad(sequences, self.tokenizer.pad_token_id)
        hidden = np.zeros(tuple(ids.shape), dtype=np.bool_)
        for row, places in enumerate(features["masks"]):
            hidden[row, places] = True
        labels = torch.where(torch.from_numpy(hidden), ids, IGNORED)
        places = torch.from_numpy(np.flatnonzero(hidden))
        return {"input_ids": ids, "attention_mask": mask(sequences), "labels": labels, "places": places}

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the likeliest token of each mask and its probability: (B, M), -100 and nan where a row has fewer."""
        logits, _ = guesses(model, tensors)
        best = logits.softmax(1).max(1)
        hidden = tensors["labels"] != IGNORED
        rows = tensors["places"] // hidden.shape[1]
        column = (hidden.cumsum(1) - 1).flatten()[tensors["places"]]
        shape = (len(hidden), int(column.max()) + 1)  # waits for the device
        tokens = best.indices.new_full(shape, IGNORED).index_put((rows, column), best.indices)
        scores = best.values.new_full(shape, float("nan")).index_put((rows, column), best.values)
        return {"tokens": tokens, "scores": scores}

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """Yield for each row the guesses at its masks, in order, and their probabilities."""
        rows: dict[int, tuple[dict[str, int], list[str], list[float]]] = {}
        for place, tokens, scores in zip(encoded.places(), found["tokens"], found["scores"], strict=True):
            _, words, chances = rows.setdefault(place["row"], (place, [], []))
            words += [self.tokenizer.decode([token]).strip() for token in tokens[tokens != IGNORED].tolist()]
            chances += [round(score, 6) for score in scores[tokens != IGNORED].tolist()]
        for place, words, chances in rows.values():
            yield {**place, "prediction": words, "scores": chances}


def guesses(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits (M, V) and labels (M,) of the hidden tokens.

    The output layer, which for a small model costs more than all others together, is given the hidden tokens only: a
    hook picks them on its way in. A model that takes no notice of the hook gives all, and they are picked then.
    """
    places = tensors["places"]
    plain: Any = getattr(model, "module", model)  # inside DistributedDataParallel
    layer = plain.get_output_embeddings()
    hook = layer and layer.register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1)[places], *given[1:]))
    try:
        wanted = {name: tensor for name, tensor in inputs(tensors).items() if name != "places"}
        logits: Tensor = model(**wanted).logits
    finally:
        if hook:
            hook.remove()
    logits = logits.flatten(0, 1)[places] if logits.dim() == 3 else logits
    return logits, tensors["labels"].flatten()[places]
