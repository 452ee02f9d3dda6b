"""Words → a tag each: entities (NER), parts of speech, chunks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data.collate import mask, pad
from data.encoded import Encoded, Features
from data.errors import UserError, nearest
from data.source import Rows, check_columns
from train.schemes import Scheme
from train.tasks import _labels, _tags, _words
from train.tasks._asked import Asked
from train.tasks.base import IGNORED, Arrays, Outputs, Task, TaskConfig, inputs, pieces, require_fast

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "pos_tags", "upos", "tags", "labels")
CHUNK = 1_000  # rows read at once


class Config(TaskConfig):
    """Token classification: its columns, how tags spell entities, and how long rows are cut into windows."""

    name: Literal["token_classification"] = "token_classification"
    tokens: str | None = Field(None, description="Column of lists of words. Default: tokens or words.")
    tags: str | None = Field(
        None,
        description="Column of lists of tags. Default: the first there is of ner_tags, pos_tags, upos, tags, labels.",
    )
    labels: tuple[str, ...] | None = Field(None, description="Tags in the model's order. Default: from the data.")
    scheme: Literal["auto", "iob1", "iob2", "bioes", "bilou", "bmes", "none"] = Field(
        "auto",
        description="How tags spell entities; none: they do not, as parts of speech. auto: as tags and rows show.",
    )
    stride: int | None = Field(
        None, ge=0, description="Pieces that neighbouring windows of a long row share. Default: a quarter of a window."
    )


@dataclass(frozen=True)
class TokenClassification(Task):
    """A tag for each word, learned and read at its first piece; the loss is a sum over words.

    A row too long for the model becomes windows that overlap. Every word is a target, and is judged, in one of them:
    where it has most context. A word of which the tokenizer leaves nothing, or that is longer than a window, is in
    none and judged as wrong: figures are over all words of the rows.
    """

    config: Config
    tokens: str
    tags: str
    labels: _labels.Labels
    scheme: Scheme | None
    padding: int

    @classmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> TokenClassification:
        """Find the columns, tags and their scheme in the training rows."""
        require_fast(tokenizer, "task token_classification", "which knows what word a piece is of")
        there = rows[0].dataset.column_names
        tokens = config.tokens or next((name for name in TOKENS if name in there), TOKENS[0])
        tags = config.tags or next((name for name in TAGS if name in there), TAGS[0])
        _tags.refuse_plain_text(rows)
        check_columns(rows, [tokens, tags], "task (choose columns with task.tokens and task.tags)")
        labels = _labels.find(rows, tags, config.labels, "tags")
        scheme = _tags.scheme_of(config.scheme, rows, tags, labels)
        return cls(config, tokens, tags, labels, scheme, tokenizer.pad_token_id)

    @property
    def kind(self) -> str:
        """Entities where tags spell them, else tags."""
        return "entities" if self.scheme else "tags"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of words and of tags."""
        return self.tokens, self.tags

    @property
    def identity(self) -> str:
        """Columns, tags, the overlap of windows, and the code that makes them."""
        labels, code = self.labels, inspect.getsource(_words)
        return json.dumps([self.tokens, self.tags, labels.names, labels.by_index, self.config.stride, code])

    def __str__(self) -> str:
        """Say what was found in the data."""
        names, scheme = self.labels.names, self.scheme.upper() if self.scheme else "of no scheme"
        if all(name.isdecimal() for name in names):
            scheme += "; task.labels gives numbers their names"
        shown = f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        return f"token classification: {self.tokens} → {self.tags}, {len(names)} tags ({shown}), {scheme}"

    @property
    def model_class(self) -> str:
        """Token classification."""
        return "AutoModelForTokenClassification"

    @property
    def model_config(self) -> dict[str, Any]:
        """The size of the head and the names of its outputs, which stay in the exported model."""
        names = self.labels.names
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
        }

    @property
    def pipeline(self) -> str:
        """The pipeline of the same name."""
        return "token-classification"

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """Of entities, or over words."""
        return ("seqeval",) if self.scheme else ("accuracy",)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Words must be text, at least one, and each have a tag of the set."""
        words, tags = row[self.tokens], row[self.tags]
        for name, value in ((self.tokens, words), (self.tags, tags)):
            if not isinstance(value, list):
                return f"{name!r} must be a list, one entry a word, not {str(value)[:40]!r}"
        if not words:
            return f"{self.tokens!r} is empty"
        if len(words) != len(tags):
            return f"{len(words)} words in {self.tokens!r} but {len(tags)} tags in {self.tags!r}"
        for place, (word, tag) in enumerate(zip(words, tags, strict=True), 1):
            if not isinstance(word, str):
                return f"word {place} in {self.tokens!r} is {word!r}, not text"
            if self.labels.index(tag) is None:
                names = self.labels.names
                shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
                return f"tag {tag!r} of word {place}, {word!r}, is not one of: {shown}{nearest(str(tag), names)}"
        return None

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize each row as the text of its words with blanks between them, and cut what is too long into windows.

        Words are not tokenized each on its own: byte-level tokenizers would take them for parts of the words before,
        since the blank that begins a word for them would be missing. Beside the usual columns: `words` (places in the
        row) judged in this window, their `tags` and `places` (of their first pieces); and, with the first window of a
        row, `reference`: the tags of all its words.
        """
        encoded = tokenizer(
            [" ".join(words) for words in rows[self.tokens]],
            return_offsets_mapping=True, return_special_tokens_mask=True, return_attention_mask=False, verbose=False,
        )  # fmt: skip
        features: dict[str, list[Any]] = {}
        for row, words in enumerate(rows[self.tokens]):
            reference = np.array([self.labels.index(tag) for tag in rows[self.tags][row]])
            ids, special = np.array(encoded["input_ids"][row], dtype=np.int64), encoded["special_tokens_mask"][row]
            inner = np.flatnonzero(np.array(special, dtype=np.int64) == 0)
            before, after = (ids[: inner[0]], ids[inner[-1] + 1 :]) if len(inner) else (ids, ids[:0])
            owners, firsts = _words.owners_of(words, [encoded["offset_mapping"][row][place] for place in inner])
            sizes, room = np.bincount(owners, minlength=len(words)), max_length - len(before) - len(after)
            there = np.flatnonzero((sizes > 0) & (sizes <= room))
            for window in _words.windows(sizes[there], room, self._overlap(room)):
                taken = np.flatnonzero(np.isin(owners, there[window.first : window.end]))
                judged = there[window.judged]
                example = {
                    "row": row,
                    "input_ids": [*before, *ids[inner[taken]], *after] or [self.padding],
                    "words": judged,
                    "tags": reference[judged],
                    "places": len(before) + np.searchsorted(taken, firsts[judged]),
                    "reference": reference if window.first == 0 else [],
                    "length": max(1, len(before) + len(taken) + len(after)),
                    "targets": len(judged),
                }
                for name, value in example.items():
                    features.setdefault(name, []).append(value)
        return features

    def _overlap(self, room: int) -> int:
        overlap = room // 4 if self.config.stride is None else self.config.stride
        if overlap >= room:
            raise UserError(f"task.stride: {overlap} must be less than the {room} pieces data.max_length leaves")
        return overlap

    def balance(self, encoded: Encoded) -> dict[str, int]:
        """Words of each tag."""
        counts = np.zeros(len(self.labels.names), dtype=np.int64)
        for chunk in encoded.dataset.data.column("tags").chunks:
            counts += np.bincount(chunk.flatten().to_numpy(), minlength=len(counts))
        return dict(zip(self.labels.names, counts.tolist(), strict=True))

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """The pieces, each first one of a word that is learned here with its tag."""
        names = [None if label == IGNORED else self.labels.names[label] for label in tensors["labels"][0].tolist()]
        return list(zip(pieces(tensors["input_ids"][0], tokenizer), names, strict=True))

    def count(self, features: Features) -> int:
        """Words; 1 where there are none, so that a batch of nothing but unreadable words divides 0 by 1."""
        return max(1, super().count(features))

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids, attention_mask (if anything is padded) and labels (-100: no target): (B, T)."""
        sequences = features["input_ids"]
        labels = [np.full(len(sequence), IGNORED) for sequence in sequences]
        for row, places, tags in zip(labels, features["places"], features["tags"], strict=True):
            row[places] = tags
        tensors = {"input_ids": pad(sequences, self.padding), "labels": pad(labels, IGNORED)}
        if len({len(sequence) for sequence in sequences}) > 1:  # rectangular batches take attention's faster path
            tensors["attention_mask"] = mask(sequences)
        return tensors

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Cross entropy, summed over words."""
        return _losses(model(**inputs(tensors)).logits, tensors["labels"]).sum()

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give tags (B, T), numbers of the likeliest at the first pieces of words, else -100; loss (B,)."""
        import torch

        logits, labels = model(**inputs(tensors)).logits, tensors["labels"]
        tags = logits.argmax(2).masked_fill(labels == IGNORED, IGNORED).to(torch.int32)
        return {"tags": tags, "loss": _losses(logits, labels).sum(1)}

    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """predictions, references: numbers of tags (words,), -1 for none; of entities also the tags of each row."""
        rows = list(self._judged(found, encoded))
        outputs: Outputs = {
            "predictions": np.concatenate([predicted for _, predicted, _ in rows]),
            "references": np.concatenate([reference for _, _, reference in rows]),
        }
        if self.scheme:
            outputs["tag_predictions"] = [self._names(predicted) for _, predicted, _ in rows]
            outputs["tag_references"] = [self._names(reference) for _, _, reference in rows]
            outputs["scheme"] = self.scheme
        return outputs

    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Asked:
        """Tags are not needed: one stands for each word's."""

        def targets(row: Mapping[str, Any]) -> dict[str, Any]:
            words = row[self.tokens]
            return {self.tags: [self.labels.names[0]] * len(words) if isinstance(words, list) else []}

        return Asked(self, (self.tokens,), targets)

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """The tag of each word, predicted (null: none) and true."""
        places = encoded.places()
        for example, predicted, reference in self._judged(found, encoded):
            yield {**places[example], "prediction": self._names(predicted), "reference": self._names(reference)}

    def _names(self, numbers: NDArray[np.int64]) -> list[str | None]:
        return [self.labels.names[number] if number >= 0 else None for number in numbers.tolist()]

    def _judged(self, found: Arrays, encoded: Encoded) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield for each row its first example, and the predicted and the true tags of all its words, (words,)."""
        predicted = reference = np.zeros(0, dtype=np.int64)
        first = 0
        for start in range(0, len(encoded.dataset), CHUNK):
            features = encoded.features(np.arange(start, min(start + CHUNK, len(encoded.dataset))))
            for example, given in enumerate(features["reference"], start):
                if len(given):
                    if example:
                        yield first, predicted, reference
                    first, reference, predicted = example, given, np.full(len(given), -1)
                tags = found["tags"][example]
                predicted[features["words"][example - start]] = tags[tags != IGNORED]
        yield first, predicted, reference


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each piece (B, T), 0 where it is no target."""
    from torch.nn import functional

    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(labels.shape)


task = TokenClassification
