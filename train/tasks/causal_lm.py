"""Texts → the next token of each token: language modelling from left to right."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from data import packing
from data.collate import pad
from data.encoded import Encoded, Features
from data.source import Rows
from train.tasks import _packed
from train.tasks._fields import text_column
from train.tasks._generation import Generation
from train.tasks._pieces import by_row, positions, sums
from train.tasks._writing import Writer
from train.tasks.base import IGNORED, Arrays, Outputs, Task, TaskConfig, pieces

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKINGS = {"documents": packing.best_fit, "concatenate": packing.stream, "none": packing.apart}


class Config(TaskConfig):
    """Causal language modelling: its column, and how documents become rows."""

    name: Literal["causal_lm"] = "causal_lm"
    text: str | None = Field(
        None,
        description="Text column; a row is a document. Default: the usual name (text, document, ...), or the only one.",
    )
    packing: Literal["documents", "concatenate", "none"] = Field(
        "documents",
        description="documents: several whole ones fill a row, none sees another. concatenate: one stream cut into "
        "full rows, with attention across documents. none: a row each. Longer ones than data.max_length are cut "
        "into consecutive pieces, and nothing is lost.",
    )
    generation: Generation = Field(Generation(), description="How `train.predict` writes on from a text.")


@dataclass(frozen=True)
class CausalLanguageModelling(Task):
    """Every token but a document's first is predicted from the tokens before it, exactly once; the loss is their sum.

    A document is its text between BOS and EOS, as far as the tokenizer has them (or puts its own there). Where it is
    cut, the last token of a piece still predicts the first of the next, so that the cut decides only how far back a
    token sees. With `concatenate` a document's first token is predicted as well, from the end of the document before;
    a BOS that is the same as EOS is then left out, since that end says it already.
    """

    config: Config
    text: str
    bos: int | None
    eos: int | None
    padding: int
    kind: Literal["next_tokens"] = "next_tokens"
    hint: str = ""
    free = ("generation",)

    @classmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> CausalLanguageModelling:
        """Find the text column."""
        text, bos = text_column(rows, config.text), tokenizer.bos_token_id
        hint = ""
        if bos is not None and tokenizer([""])["input_ids"][0][:1] != [bos]:  # as GPT-2's
            hint = (
                f"Each text that it learned from began with the token `{tokenizer.bos_token}`, which this tokenizer "
                f'does not put there by itself: write on from `"{tokenizer.bos_token}" + text`.'
            )
        return cls(config, text, bos, tokenizer.eos_token_id, tokenizer.pad_token_id, hint=hint)

    @property
    def columns(self) -> tuple[str, ...]:
        """The text column."""
        return (self.text,)

    @property
    def identity(self) -> str:
        """Column, tokens around a document, and how it is packed: by name and by code."""
        return json.dumps([self.text, self.bos, self.eos, self.config.packing, inspect.getsource(packing)])

    def __str__(self) -> str:
        """Say what was found in the data, and what becomes of it."""
        ends = [f"{name} {token}" for name, token in (("BOS", self.bos), ("EOS", self.eos)) if token is not None]
        marked = f"with {' and '.join(ends)}" if ends else "without BOS and EOS"
        return f"causal language modelling: {self.text}, documents {marked}, packing {self.config.packing}"

    @property
    def model_class(self) -> str:
        """Causal language models, recurrent ones too."""
        return "AutoModelForCausalLM"

    @property
    def model_config(self) -> dict[str, Any]:
        """The tokens that documents begin and end with: generation is to do the same."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos}

    @property
    def pipeline(self) -> str:
        """It writes on from a text."""
        return "text-generation"

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """Per token and, comparable between tokenizers, per byte."""
        return ("perplexity", "bits_per_byte")

    def check_model(self, model: nn.Module) -> None:
        """Prove that later tokens have no influence and, with packing=documents, that other documents have none."""
        _packed.check(model, isolated=self.config.packing == "documents")

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """A document must be a text, and not empty."""
        if not isinstance(row[self.text], str):
            return f"{self.text!r} must be text, not {row[self.text]!r}"
        return None if row[self.text].strip() else f"{self.text!r} is empty"

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize documents and pack them into rows of `max_length`, as far as these rows go.

        input_ids   the tokens taken in; each predicts the next one
        pieces      positions of each document in the row; `rows` says which documents these are
        following   for each piece the token that its last position predicts, which need not stand in the row
        bytes       of the texts (UTF-8) that begin in the row, without those of a first token that nothing predicts
        A document of one token predicts nothing and is named as unusable: a tokenizer without BOS and EOS makes such.
        """
        texts = rows[self.text]
        encoded = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        taken, predicted, given = self._positions(encoded["input_ids"])
        sizes = [len(text.encode()) for text in texts]
        if encoded.is_fast:
            for place, first in enumerate(given):
                if first is not None and (span := encoded.token_to_chars(place, first)):
                    sizes[place] = len(texts[place][span.end :].encode())
        packed = PACKINGS[self.config.packing]([len(tokens) for tokens in predicted], max_length)
        nothing = f"{self.text!r} is a single token, with none to predict"
        lengths = [sum(piece.stop - piece.start for piece in row) for row in packed]
        return {
            "input_ids": [
                [token for document, start, stop in row for token in taken[document][start:stop]] for row in packed
            ],
            "pieces": [[piece.stop - piece.start for piece in row] for row in packed],
            "following": [[predicted[piece.document][piece.stop - 1] for piece in row] for row in packed],
            "bytes": [sum(sizes[piece.document] for piece in row if piece.start == 0) for row in packed],
            "length": lengths,
            "targets": lengths,
            "row": [row[0].document for row in packed],
            "rows": [[piece.document for piece in row] for row in packed],
            "unusable": [(place, nothing) for place, tokens in enumerate(predicted) if not tokens],
        }

    def _positions(self, documents: list[list[int]]) -> tuple[list[list[int]], list[list[int]], list[int | None]]:
        """Return the tokens that each document takes in, those that it predicts at the same positions, and which token
        of its own begins it, predicted by nothing: none, where BOS or the document before does that."""
        concatenate = self.config.packing == "concatenate"
        begin = [] if self.bos is None or (concatenate and self.bos == self.eos) else [self.bos]
        end = [] if self.eos is None else [self.eos]
        taken, predicted, given = [], [], []
        before: list[int] = []
        for ids in documents:
            first, inner = self._inner(ids)
            tokens = [*before, *begin, *inner, *end]
            taken.append(tokens[:-1])
            predicted.append(tokens[1:])
            given.append(None if before or begin or not inner else first)
            before = tokens[-1:] if concatenate else []
        return taken, predicted, given

    def _inner(self, ids: list[int]) -> tuple[int, list[int]]:
        """Return the tokens between those that begin and end a document (its tokenizer, or its author, may have put
        some there already), and the place of the first."""
        first, last = 0, len(ids)
        while first < last and ids[first] == self.bos:
            first += 1
        while first < last and ids[last - 1] == self.eos:
            last -= 1
        return first, ids[first:last]

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids and labels, which stand where they are predicted: (B, T); pieces (B, P), 0 where a row has fewer.

        With packing=documents also position_ids (B, T), which begin anew in each document, the padding being one more.
        And places (M,), those of the targets. There is no attention mask: to a causal model padding on the right is
        what comes later, and a mask would switch off the one that transformers makes from the positions.
        """
        import torch

        sequences = features["input_ids"]
        ids = pad(sequences, self.padding)
        labels = np.full(ids.shape, IGNORED, dtype=np.int64)
        for row, (tokens, sizes) in enumerate(zip(sequences, features["pieces"], strict=True)):
            ends = sizes.cumsum()
            size = len(tokens)
            labels[row, : size - 1] = tokens[1:]
            labels[row, ends - 1] = features["following"][row]
        tensors = {"input_ids": ids, "labels": torch.from_numpy(labels), "pieces": pad(features["pieces"], 0),
                   "places": _packed.places(labels)}  # fmt: skip
        if self.config.packing == "documents":
            tensors["position_ids"] = torch.from_numpy(positions(features["pieces"], ids.shape[1]))
        return tensors

    def contents(self, features: Features) -> list[Any]:
        """Return each document, or piece of a long one: the row that it is packed in says nothing of it."""
        rows = zip(features["input_ids"], features["pieces"], strict=True)
        return [piece for ids, sizes in rows for piece in np.split(ids, np.cumsum(sizes)[:-1])]

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """Each document of the row on lines of its own; all but its first token is learned."""
        import torch

        found: list[tuple[str, str | None]] = []
        start = 0
        for size in tensors["pieces"][0].tolist():
            ids = torch.cat([tensors["input_ids"][0, start : start + 1], tensors["labels"][0, start : start + size]])
            first, *others = pieces(ids, tokenizer)
            found += [(first, None), *((piece, piece.strip()) for piece in others), ("\n", None)]
            start += size
        return found

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Cross entropy of all tokens that are predicted, in nats: summed."""
        return _packed.loss(model, tensors)

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the summed loss of each example (B,) and of each of its pieces (B, P), and how many of its tokens are
        the likeliest (B,)."""
        losses, hits = _packed.losses_and_hits(model, tensors)
        return {"loss": losses.sum(1), "losses": sums(losses, tensors["pieces"]), "hits": hits.sum(1)}

    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """losses, in nats, targets, hits, and bytes of the texts that begin in it: of each example (n,)."""
        counts = {name: encoded.column(name) for name in ("targets", "bytes")}
        return {"losses": found["loss"], "hits": found["hits"], **counts}

    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Writer:
        """Return what writes on from each text."""
        return Writer.of(_Text(self.columns, self, tokenizer), self.config.generation, model, tokenizer)

    def beginning(self, ids: list[int]) -> list[int]:
        """Return the tokens of a text as documents begin, and without an end."""
        return [*([] if self.bos is None else [self.bos]), *self._inner(ids)[1]]

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """A line a document: its loss, summed over all its pieces, and how many tokens were predicted."""
        sizes = encoded.dataset.data.column("pieces").to_pylist()
        for where, parts in by_row(encoded, sizes, found["losses"].tolist()):
            yield {**where, "loss": sum(loss for _, loss in parts), "tokens": sum(size for size, _ in parts)}


@dataclass(frozen=True)
class _Text:
    """Texts that are to be written on, for `_writing.Writer`."""

    columns: tuple[str, ...]
    task: CausalLanguageModelling
    tokenizer: Any = field(repr=False)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """A text must not be empty."""
        return self.task.problem(row)

    def beginnings(self, rows: Mapping[str, list[Any]]) -> list[list[int] | str]:
        """Return the tokens of each text."""
        given = self.tokenizer(rows[self.task.text], return_attention_mask=False, verbose=False)["input_ids"]
        return [self.task.beginning(ids) for ids in given]


task = CausalLanguageModelling
