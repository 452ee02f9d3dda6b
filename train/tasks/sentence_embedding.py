"""Texts → vectors that are alike where the texts are: from pairs that belong together, or that have a score."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from data.collate import mask, pad
from data.encoded import REAL, Encoded, Features
from data.errors import UserError
from data.source import Rows
from train.tasks import _contrast, _embedding, _labels, _text_pairs
from train.tasks._asked import Asked
from train.tasks.base import Arrays, Outputs, Task, TaskConfig, pieces

if TYPE_CHECKING:
    from torch import Tensor, nn


READ = ("input_ids", "attention_mask", "token_type_ids")


class Config(TaskConfig):
    """Sentence embeddings: the columns, what is learned of them, and how the tokens of a text become its vector."""

    whole = True
    name: Literal["sentence_embedding"] = "sentence_embedding"
    text: tuple[str, str] | None = Field(
        None, description="The two columns of texts. Default: anchor and positive, question and answer, or as usual."
    )
    kind: Literal["auto", "contrastive", "cosine"] = Field(
        "auto",
        description="contrastive: pairs belong together, all other texts of the batch are negatives; cosine: each pair "
        "has a score. auto: cosine where there is a column of scores.",
    )
    negatives: tuple[str, ...] | None = Field(
        None, description="contrastive: columns of hard negatives. Default: negative, negative_1, ... where there are."
    )
    scale: float = Field(20.0, gt=0.0, description="contrastive: what cosines are multiplied by, 1 / temperature.")
    symmetric: bool = Field(False, description="contrastive: the first text of each pair is to be found, too.")
    score: str | None = Field(None, description="cosine: column of scores. Default: score, similarity or label.")
    range: tuple[float, float] | None = Field(
        None,
        description="cosine: the scores that mean 0 and 1. Default: scores from -1 to 1 are cosines as they stand; "
        "others run from 0 (or the lowest, if below) to the highest of the training rows.",
    )
    pooling: _embedding.Pooling = Field(
        "mean", description="A text's vector: the mean of its tokens' vectors, or that of the first, or of the last."
    )
    normalize: bool = Field(True, description="Whether the exported model gives vectors of length 1.")
    prefixes: tuple[str, str] | None = Field(
        None, description='Put before the first and before the other texts, as in ["query: ", "passage: "].'
    )

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The pair and its negatives."""
        return (*(self.text or ()), *(self.negatives or ()))


@dataclass(frozen=True)
class SentenceEmbedding(Task):
    """One forward pass gives all texts of the rows; the loss is a sum over pairs.

    Contrastive, all texts of the whole batch are each pair's negatives, whatever micro-batches and processes it is cut
    into: exactly, by gradient caching (https://arxiv.org/abs/2101.06983).
    """

    config: Config
    pairs: _text_pairs.Pairs
    kind: Literal["pairs", "regression"]
    padding: int

    pipeline = None
    library = "sentence-transformers"

    @classmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> SentenceEmbedding:
        """Find the columns, what is learned of them and the range of the scores."""
        pairs = _text_pairs.find(config, rows)
        return cls(config, pairs, "regression" if pairs.score else "pairs", tokenizer.pad_token_id)

    @property
    def least(self) -> int:
        """One pair alone has no other text that it could be told from."""
        return 2 if self.couples and not self.pairs.texts[2:] else 1

    @property
    def couples(self) -> bool:
        """Contrastive, every pair is judged against the others of the batch."""
        return not self.pairs.score

    @property
    def columns(self) -> tuple[str, ...]:
        """The texts and the score."""
        return (*self.pairs.texts, *([self.pairs.score] if self.pairs.score else []))

    @property
    def identity(self) -> str:
        """Columns, prefixes, and which scores are allowed."""
        return json.dumps([*astuple(self.pairs), self.config.prefixes])

    def __str__(self) -> str:
        """Say what was found in the data."""
        return f"sentence embedding, {self.pairs}"

    @property
    def model_class(self) -> Any:
        """The base model, without a head."""
        return _embedding.Backbone

    @property
    def model_config(self) -> dict[str, Any]:
        """Nothing: there is no head."""
        return {}

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """Of ranks, or of which text is found."""
        return ("spearman", "pearson") if self.pairs.score else ("recall_at",)

    @property
    def usage(self) -> str:
        """By sentence-transformers."""
        return _embedding.usage(self.config.prefixes)

    def check_model(self, model: nn.Module) -> None:
        """Raise `UserError` for a model of two halves: the vectors of which would be meant?"""
        settings: Any = model.config
        if settings.is_encoder_decoder:
            raise UserError(
                f"task sentence_embedding: {settings.model_type} has encoder and decoder; take a model that is one"
            )

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Texts must not be empty, nor a negative equal to its positive; scores are numbers within their range."""
        return self.pairs.problem(row)

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize the texts of each row, one after the other in `input_ids`, as long as `sizes` says.

        `length` is what a row takes when computed: its texts x the longest. A text without tokens makes it unusable.
        """
        first, other = self.config.prefixes or ("", "")
        table = [*zip(*(rows[name] for name in self.pairs.texts), strict=True)]
        flat = [(other if place else first) + text for row in table for place, text in enumerate(row)]
        encoded = tokenizer(flat, truncation=True, max_length=max_length, return_attention_mask=False)
        count = len(self.pairs.texts)
        spans = [slice(start, start + count) for start in range(0, len(flat), count)]
        sizes = [[len(ids) for ids in encoded["input_ids"][span]] for span in spans]
        good = [place for place, lengths in enumerate(sizes) if all(lengths)]
        features: dict[str, list[Any]] = {"row": good, "sizes": [sizes[place] for place in good]}
        for name in ("input_ids", "token_type_ids"):
            if name in encoded:
                features[name] = [[*chain(*encoded[name][spans[place]])] for place in good]
        if self.pairs.score:
            features["label"] = [_labels.number(rows[self.pairs.score][place]) for place in good]
        longest = [max(lengths) for lengths in features["sizes"]]
        return {
            **features,
            "length": [count * most for most in longest],
            "longest": longest,
            REAL: [sum(lengths) for lengths in features["sizes"]],
            "targets": [1] * len(good),
            "unusable": self.pairs.unusable(sizes),
        }

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids, attention_mask, token_type_ids: (B x S, T), the S texts of a row after each other.

        And labels (B,), scaled, where there are scores; else `keys` (B, S), equal where texts are.
        """
        import torch

        ends = [[*accumulate(sizes, initial=0)] for sizes in features["sizes"]]

        def texts(name: str) -> list[Any]:
            rows = zip(features[name], ends, strict=True)
            return [flat[start:end] for flat, places in rows for start, end in pairwise(places)]

        ids = texts("input_ids")
        tensors = {"input_ids": pad(ids, self.padding), "attention_mask": mask(ids)}
        if "token_type_ids" in features:
            tensors["token_type_ids"] = pad(texts("token_type_ids"), 0)
        if self.pairs.score:
            low, high = self.pairs.range or (0.0, 1.0)
            scaled = (np.asarray(features["label"], dtype=np.float64) - low) / (high - low)
            return {**tensors, "labels": torch.from_numpy(scaled.astype(np.float32))}
        return {**tensors, "keys": torch.from_numpy(_contrast.text_keys(ids)).view(-1, len(self.pairs.texts))}

    def _units(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Return the vectors of all texts of the rows, (B, S, D), of length 1."""
        given = {name: tensor for name, tensor in tensors.items() if name in READ}
        flat = _embedding.unit_vectors(model, given, self.config.pooling)
        return flat.view(-1, len(self.pairs.texts), flat.shape[1])

    def share(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the vectors (B, S, D), and what tells equal texts (B, S)."""
        return {"units": self._units(model, tensors), "keys": tensors["keys"]}

    def couple(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give each pair's loss among all pairs, (N,), and the gradient of all losses by its vectors, (N, S, D)."""
        return _contrast.cached(shared["units"], shared["keys"], self.config.scale, symmetric=self.config.symmetric)

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Squared error of the cosines; or the cross entropy of finding each pair: summed over pairs.

        With a cached gradient its value is the sum of these pairs' losses, and its gradient what all losses of the
        batch have through these pairs' texts. Without, the micro-batch is a batch by itself.
        """
        units = self._units(model, tensors)
        if self.pairs.score:
            return self._errors(units, tensors).sum()
        if "gradient" not in tensors:
            scale, symmetric = self.config.scale, self.config.symmetric
            return _contrast.losses(units, tensors["keys"], scale, symmetric=symmetric).sum()
        product = (units * tensors["gradient"]).sum()
        return product - product.detach() + tensors["losses"].sum()

    def _errors(self, units: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        cosines = (units[:, 0] * units[:, 1]).sum(1)
        return (cosines - tensors["labels"].to(cosines.dtype)) ** 2

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the vectors (B, S, D), of length 1; and references and loss, (B,), or what tells equal texts, (B, S)."""
        shared = self._units(model, tensors)
        if self.pairs.score:
            return {"units": shared, "references": tensors["labels"], "loss": self._errors(shared, tensors)}
        return {"units": shared, "keys": tensors["keys"]}

    def completed(self, found: Arrays) -> Arrays:
        """Give each pair's cosine; and, contrastive, its loss and its place among all pairs of the set."""
        import torch

        units = torch.from_numpy(found["units"])
        kept = {name: values for name, values in found.items() if name in ("loss", "references")}
        kept["cosines"] = (units[:, 0] * units[:, 1]).sum(1).numpy()
        if self.pairs.score:
            return kept
        keys, scale, symmetric = torch.from_numpy(found["keys"]), self.config.scale, self.config.symmetric
        more, equal = _contrast.places(units, keys)
        loss = _contrast.losses(units, keys, scale, symmetric=symmetric)
        return {**kept, "loss": loss.numpy(), "more_similar": more.numpy(), "as_similar": equal.numpy()}

    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """predictions, references: cosines and scaled scores, (n,); or more_similar, as_similar: counts, (n,)."""
        if self.pairs.score:
            return {"predictions": found["cosines"], "references": found["references"]}
        return {name: found[name] for name in ("more_similar", "as_similar")}

    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Asked:
        """Return what compares the two texts of each row; of rows with the first alone, what gives its vector."""
        names, there = self.pairs.texts[:2], rows[0].dataset.column_names
        names = names if names[1] in there else names[:1]
        task = replace(self, pairs=replace(self.pairs, texts=names, score=None))

        def answers(found: Arrays) -> Iterator[dict[str, Any]]:
            for units in found["units"].astype(np.float64):
                cosine = [round(float(units[0] @ units[1]), 6)] if len(units) > 1 else []
                yield {"prediction": cosine[0] if cosine else [round(value, 6) for value in units[0].tolist()]}

        return Asked(task, names, lambda row: {}, answers)

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """The cosine of each pair, and its score as it is in the data; or its rank, from 1 (of a tie, the mean)."""
        scores = encoded.column("label").tolist() if self.pairs.score else []
        for place, where in enumerate(encoded.places()):
            cosine = round(float(found["cosines"][place]), 6)
            if self.pairs.score:
                yield {**where, "prediction": cosine, "reference": scores[place]}
                continue
            rank = float(found["more_similar"][place]) + (float(found["as_similar"][place]) + 1) / 2
            yield {**where, "prediction": cosine, "rank": rank, "loss": round(float(found["loss"][place]), 6)}

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """A line for each text, and what they have to do with each other."""
        result: list[tuple[str, str | None]] = []
        for place, ids in enumerate(tensors["input_ids"]):
            means = {0: None, 1: None if self.pairs.score else "positive"}.get(place, "negative")
            text = "".join(pieces(ids[: int(tensors["attention_mask"][place].sum())], tokenizer))
            result += [(text, means), ("\n", None)]
        return [*result, ("", f"{float(tensors['labels'][0]):g}")] if self.pairs.score else result

    def accompany(self, model: nn.Module, max_length: int, folder: Path) -> None:
        """Write what makes the folder a model of sentence-transformers."""
        settings: Any = model.config
        width, config = settings.get_text_config().hidden_size, self.config
        _embedding.describe(folder, width, max_length, config.pooling, config.prefixes, normalize=config.normalize)


task = SentenceEmbedding
