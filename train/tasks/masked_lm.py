"""Texts with some tokens hidden → those tokens: pretraining and adaptation of encoders."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from data.collate import mask, pad
from data.encoded import Encoded, Features
from data.errors import UserError
from data.order import draws
from data.source import Rows
from train.tasks import _words
from train.tasks._fields import text_column
from train.tasks._filling import Filling, guesses
from train.tasks.base import IGNORED, Arrays, Outputs, Task, TaskConfig, pieces, require_fast

if TYPE_CHECKING:
    from torch import Tensor, nn


class Config(TaskConfig):
    """Masked language modelling: which text, and how much of it is hidden, how."""

    name: Literal["masked_lm"] = "masked_lm"
    text: str | None = Field(
        None, description="Text column. Default: the usual name (text, document, content, sentence), or the only one."
    )
    mask_rate: float = Field(0.15, gt=0.0, lt=1.0, description="Share of tokens that the model has to guess.")
    replace: tuple[float, float, float] = Field(
        (0.8, 0.1, 0.1),
        description="Of the tokens to guess, the shares that become the mask token, become a random token, and stay.",
    )
    whole_words: bool = Field(False, description="Hide all pieces of a word or none.")

    @field_validator("replace")
    @classmethod
    def _shares(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) < 0 or abs(sum(value) - 1) > 1e-6:
            raise ValueError(f"three shares that add up to 1 (mask token, random token, unchanged), not {list(value)}")
        return value


@dataclass(frozen=True)
class MaskedLM(Task):
    """Guessing hidden tokens; the loss is a sum over them.

    What is hidden follows from an example's key alone: new in each epoch of training, the same in each evaluation. A
    text longer than `max_length` becomes several examples, one after the other, so that nothing is lost.
    """

    config: Config
    text: str
    tokenizer: Any = field(repr=False)

    kind = "masked_tokens"
    model_class = "AutoModelForMaskedLM"
    pipeline = "fill-mask"
    default_metrics = ("perplexity", "accuracy")

    @classmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> MaskedLM:
        """Find the text; raise `UserError` for a tokenizer that cannot hide anything."""
        text = text_column(rows, config.text)
        if tokenizer.mask_token_id is None:
            raise UserError(
                "task masked_lm: the tokenizer has no mask token. Take a model that was made to fill in hidden tokens "
                "(BERT, RoBERTa, ModernBERT, ...), or task causal_lm, which guesses each next token"
            )
        require_fast(tokenizer, "task masked_lm", "to cut long texts")
        return cls(config, text, tokenizer)

    @cached_property
    def special(self) -> NDArray[np.int64]:
        """Ids that are never hidden and never drawn: of special tokens, unknown ones among them."""
        return np.array(sorted(self.tokenizer.all_special_ids), dtype=np.int64)

    @cached_property
    def regular(self) -> NDArray[np.int64]:
        """All other ids, of which random tokens are drawn."""
        return np.setdiff1d(np.array([*self.tokenizer.get_vocab().values()], dtype=np.int64), self.special)

    @property
    def columns(self) -> tuple[str, ...]:
        """The text column."""
        return (self.text,)

    @property
    def identity(self) -> str:
        """The column, the share that is hidden (targets are estimated with it), whether words are kept, and the code
        that cuts texts: what was cut by a tokenizer that drops the rest must not be used again."""
        return json.dumps([self.text, self.config.mask_rate, self.config.whole_words, inspect.getsource(_words)])

    def __str__(self) -> str:
        """Say what is hidden."""
        what = "the words" if self.config.whole_words else "the tokens"
        return f"masked language modelling: {self.text}, {self.config.mask_rate:.0%} of {what} hidden"

    @property
    def model_config(self) -> dict[str, Any]:
        """Nothing: the head has the size of the vocabulary."""
        return {}

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Texts must be strings that are not blank."""
        value = row[self.text]
        if not isinstance(value, str):
            return f"{self.text!r} must be text, not {value!r}"
        return None if value.strip() else f"{self.text!r} is empty: there is nothing to hide"

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize texts and cut the long ones into consecutive examples; with whole words, number each one's words.

        What holds no token that could be hidden (blanks of other scripts, unknown tokens only) gives no example; a
        text of which nothing is left is named among the problems. `targets` is how many will be hidden, about.
        """
        texts = rows[self.text]
        encoded = tokenizer(
            texts, return_special_tokens_mask=True, return_offsets_mapping=True, return_attention_mask=False,
            return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        features: dict[str, list[Any]] = {"row": [], "input_ids": [], "length": [], "targets": []}
        if self.config.whole_words:
            features["words"] = []
        for row, text in enumerate(texts):
            ids, spans = np.array(encoded["input_ids"][row], dtype=np.int64), encoded["offset_mapping"][row]
            for taken in _words.cuts(np.array(encoded["special_tokens_mask"][row], dtype=np.bool_), max_length):
                free = ~np.isin(ids[taken], self.special)
                if self.config.whole_words:
                    numbers = encoded.word_ids(row)
                    words = _words.numbered(text, [numbers[at] for at in taken], [spans[at] for at in taken], free)
                    free = words >= 0
                if not free.any():
                    continue
                features["row"].append(row)
                features["input_ids"].append(ids[taken])
                features["length"].append(len(taken))
                features["targets"].append(max(1, round(self.config.mask_rate * int(free.sum()))))
                if self.config.whole_words:
                    features["words"].append(words)
        problem = f"{self.text!r} holds no token that could be hidden"
        empty = sorted(set(range(len(texts))) - set(features["row"]))
        return {**features, "unusable": [(place, problem) for place in empty]}

    def count(self, features: Features) -> int:
        """Return how many tokens of these examples `collate` hides, from the same draws."""
        return int(self._chosen(features).sum())

    def _chosen(self, features: Features) -> NDArray[np.bool_]:
        """Return which tokens are to be guessed, (B, T): each (each word) at the same rate, and at least one a row.

        Whole words: the draw of its first place is that of all its pieces.
        """
        ids = pad(features["input_ids"], int(self.special[0])).numpy()
        if self.config.whole_words:
            units = pad(features["words"], -1).numpy()
            free = units >= 0
        else:
            units = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
            free = ~np.isin(ids, self.special)
        drawn = np.where(free, draws(features["key"][:, None], 3 * units), 2.0)
        chosen: NDArray[np.bool_] = drawn <= np.maximum(self.config.mask_rate, drawn.min(axis=1, keepdims=True))
        return chosen

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids with hidden tokens, attention_mask, labels (-100 where nothing is to be guessed): (B, T).

        And `places`, (M,): where in (B x T) the labels are, so that no device has to be asked.
        """
        import torch

        sequences = features["input_ids"]
        ids, keys = pad(sequences, self.tokenizer.pad_token_id).numpy(), features["key"][:, None]
        chosen = self._chosen(features)
        masked, random, _ = self.config.replace
        positions = np.arange(ids.shape[1])
        how = draws(keys, 3 * positions + 1)
        other = self.regular[(draws(keys, 3 * positions + 2) * len(self.regular)).astype(np.int64)]
        given = np.where(how < masked, self.tokenizer.mask_token_id, np.where(how < masked + random, other, ids))
        tensors = {
            "input_ids": torch.from_numpy(np.where(chosen, given, ids)),
            "labels": torch.from_numpy(np.where(chosen, ids, IGNORED)),
            "places": torch.from_numpy(np.flatnonzero(chosen)),
        }
        if len({len(sequence) for sequence in sequences}) > 1:  # rectangular batches take attention's faster path
            tensors["attention_mask"] = mask(sequences)
        return tensors

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Cross entropy, summed over hidden tokens."""
        from torch.nn import functional

        return functional.cross_entropy(*guesses(model, tensors), reduction="sum")

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give loss and targets, (B,); and for the M hidden tokens of the row that has most, each (B, M):

        positions, predictions, references (ids, -100 beyond a row's own) and scores (probabilities, nan beyond).
        """
        logits, references = guesses(model, tensors)
        found = logits.log_softmax(1)
        best = found.max(1)
        hidden = tensors["labels"] != IGNORED
        rows, positions = tensors["places"] // hidden.shape[1], tensors["places"] % hidden.shape[1]
        column = (hidden.cumsum(1) - 1)[rows, positions]
        shape = (len(hidden), int(column.max()) + 1)  # waits for the device

        def spread(values: Tensor, fill: float) -> Tensor:
            return values.new_full(shape, fill).index_put((rows, column), values)

        losses = spread(-found.gather(1, references[:, None])[:, 0], 0.0).sum(1)
        return {
            "loss": losses,
            "targets": hidden.sum(1),
            "positions": spread(positions, IGNORED),
            "given": spread(tensors["input_ids"][rows, positions], IGNORED),
            "predictions": spread(best.indices, IGNORED),
            "references": spread(references, IGNORED),
            "scores": spread(best.values.exp(), float("nan")),
        }

    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """losses, targets: (n,) of examples; predictions, references: (m,) of all hidden tokens."""
        hidden = found["references"] != IGNORED
        tokens = {name: found[name][hidden] for name in ("predictions", "references")}
        return {"losses": found["loss"], "targets": found["targets"], **tokens}

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """Yield for each example its loss and its hidden tokens: where, what stood there instead, and the guess."""
        names = self.tokenizer.convert_ids_to_tokens
        keys = ("position", "given", "prediction", "reference", "score")
        for example, place in enumerate(encoded.places()):
            count = int(found["targets"][example])
            given, predictions, references = (
                names(found[name][example, :count].tolist()) for name in ("given", "predictions", "references")
            )
            positions = found["positions"][example, :count].tolist()
            scores = [round(score, 6) for score in found["scores"][example, :count].tolist()]
            columns = zip(positions, given, predictions, references, scores, strict=True)
            hidden = [dict(zip(keys, token, strict=True)) for token in columns]
            yield {**place, "loss": round(float(found["loss"][example]), 6), "hidden": hidden}

    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Filling:
        """Return what guesses the mask tokens that the texts hold."""
        return Filling(self.text, tokenizer)

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """The text as the model sees it, with the token to be guessed where there is one."""
        labels = tensors["labels"][0].tolist()
        shown = zip(pieces(tensors["input_ids"][0], tokenizer), labels, strict=True)
        return [(piece, None if label == IGNORED else tokenizer.decode([label]).strip()) for piece, label in shown]


task = MaskedLM
