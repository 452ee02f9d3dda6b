"""Texts or pairs of texts → one label, several labels, or a number."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from data.collate import mask, pad
from data.encoded import Encoded, Features
from data.errors import UserError, nearest
from data.source import Rows, check_columns
from train.tasks import _head, _labels
from train.tasks._asked import Asked
from train.tasks.base import Arrays, Outputs, Task, TaskConfig, inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["single_label", "multi_label", "regression"]

TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
    ("text",),
    ("sentence",),
)
LABELS = ("label", "labels", "score")


class Config(TaskConfig):
    """Text classification: its columns, the kind of label, and how the loss weighs them."""

    name: Literal["text_classification"] = "text_classification"
    text: str | tuple[str, str] | None = Field(None, description="Text column, or the two columns of a pair.")
    label: str | None = Field(None, description="Label column. Default: label, labels or score, whichever there is.")
    kind: Literal["auto", "single_label", "multi_label", "regression"] = Field(
        "auto", description="auto: lists of labels are multi_label, fractions are regression, else single_label."
    )
    labels: tuple[str, ...] | None = Field(
        None, description="Label names in the model's order. Default: from the data."
    )
    class_weights: Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="Weight of each label in the loss, or 'balanced': rows / (labels x rows of the label)."
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="Share of the target spread over all labels.")
    pooling: Literal["model", "concat"] = Field(
        "model", description="What the label is read from: the model's own head, or ULMFiT's: last + max + mean."
    )
    threshold: float = Field(0.5, gt=0.0, lt=1.0, description="multi_label: probability from which a label is given.")


@dataclass(frozen=True)
class TextClassification(Task):
    """Classification and regression with a head on the pooled text; the loss is a sum over rows (or row x label)."""

    config: Config
    texts: tuple[str, ...]
    label: str
    kind: Kind
    labels: _labels.Labels
    padding: int
    weights: tuple[float, ...] | None = None

    @classmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> TextClassification:
        """Find the columns, kind and labels in the training rows."""
        there = set(rows[0].dataset.column_names)
        texts = (config.text,) if isinstance(config.text, str) else config.text
        texts = texts or next((names for names in TEXTS if there.issuperset(names)), ("text",))
        label = config.label or next((name for name in LABELS if name in there), "label")
        check_columns(rows, [*texts, label], "task (choose columns with task.text and task.label)")
        kind = _labels.kind(rows[0], label) if config.kind == "auto" else config.kind
        if kind == "regression":
            for key in ("labels", "class_weights", "label_smoothing"):
                if getattr(config, key):
                    raise UserError(f"task.{key} cannot take effect: the column {label!r} holds numbers (regression)")
        if "threshold" in config.model_fields_set and config.threshold != 0.5 and kind != "multi_label":
            raise UserError(
                f"task.threshold cannot take effect: {label!r} holds one label a row; it is for multi_label"
            )
        if kind != "regression":
            _labels.refuse_multi_hot(rows[0], label)
        labels = _labels.Labels(()) if kind == "regression" else _labels.find(rows, label, config.labels)
        return cls(config, tuple(texts), label, kind, labels, tokenizer.pad_token_id)

    @property
    def columns(self) -> tuple[str, ...]:
        """The text columns and the label column."""
        return (*self.texts, self.label)

    @property
    def identity(self) -> str:
        """Columns, kind and labels."""
        return json.dumps([self.texts, self.label, self.kind, self.labels.names, self.labels.by_index])

    def __str__(self) -> str:
        """Say what was found in the data."""
        names = self.labels.names
        labels = (
            f"{len(names)} labels ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else "a number"
        )
        return f"text classification, {self.kind}: {' + '.join(self.texts)} → {self.label}, {labels}"

    @property
    def model_class(self) -> Any:
        """Sequence classification, also for pairs and for regression."""
        if self.config.pooling == "concat":
            from train.concat_pooling import ConcatPoolingForSequenceClassification

            return ConcatPoolingForSequenceClassification
        return "AutoModelForSequenceClassification"

    @property
    def model_config(self) -> dict[str, Any]:
        """The size of the head and the names of its outputs, which stay in the exported model."""
        names = self.labels.names or ("value",)
        problem = {"single_label": "single_label_classification", "multi_label": "multi_label_classification"}
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: index for index, name in enumerate(names)},
            "problem_type": problem.get(self.kind, "regression"),
        }

    @property
    def free(self) -> tuple[str, ...]:
        """Only where there may be several labels, there is a threshold."""
        return ("threshold",) if self.kind == "multi_label" else ()

    @property
    def pipeline(self) -> str:
        """The pipeline of the same name."""
        return "text-classification"

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """One or two that fit the kind."""
        return {"single_label": ("accuracy",), "multi_label": ("f1",), "regression": ("pearson", "mse")}[self.kind]

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Texts must be non-empty strings; labels must be in the set (or numbers, for regression)."""
        for name in self.texts:
            if not isinstance(row[name], str):
                return f"{name!r} must be text, not {row[name]!r}"
            if not row[name].strip():
                return f"{name!r} is empty"
        value = row[self.label]
        if self.kind == "regression":
            return None if _labels.number(value) is not None else f"{self.label!r} must be a number, not {value!r}"
        if self.kind == "multi_label" and not isinstance(value, list):
            return f"{self.label!r} must be a list of labels, not {value!r}"
        for label in value if self.kind == "multi_label" else [value]:
            if self.labels.index(label) is None:
                names = self.labels.names
                shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
                return f"label {label!r} is not one of: {shown}{nearest(str(label), names)}"
        return None

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize texts (pairs as one sequence, the longer one cut first) and number the labels."""
        encoded = tokenizer(
            *(rows[name] for name in self.texts), truncation=True, max_length=max_length, return_attention_mask=False
        )
        features: dict[str, list[Any]] = {"input_ids": encoded["input_ids"]}
        if len(self.texts) == 2 and "token_type_ids" in encoded:
            features["token_type_ids"] = encoded["token_type_ids"]
        values = rows[self.label]
        if self.kind == "regression":
            features["label"] = [_labels.number(value) for value in values]
        elif self.kind == "multi_label":
            features["label"] = [sorted({self.labels.index(label) for label in row}) for row in values]
        else:
            features["label"] = [self.labels.index(value) for value in values]
        targets = max(1, len(self.labels.names)) if self.kind == "multi_label" else 1
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return {**features, "length": lengths, "targets": [targets] * len(lengths)}

    def informed(self, train: Encoded) -> TextClassification:
        """Work out class weights; "balanced" needs the frequency of each label in the training set."""
        names, weights = self.labels.names, self.config.class_weights
        if weights is None:
            return self
        if isinstance(weights, dict):
            unknown = [name for name in weights if name not in names]
            if unknown:
                raise UserError(f"task.class_weights: {unknown[0]!r} is not one of the labels {', '.join(names)}")
            return replace(self, weights=tuple(weights.get(name, 1.0) for name in names))
        counts, rows = np.array([*self.balance(train).values()]), len(train.dataset)
        if not counts.all():
            missing = names[int(np.argmin(counts))]
            raise UserError(f"task.class_weights=balanced: no training row has the label {missing!r}; give weights")
        balanced = rows / counts - 1 if self.kind == "multi_label" else rows / (len(names) * counts)
        return replace(self, weights=tuple(balanced.tolist()))

    def initialize(self, model: nn.Module, fresh: Collection[str], splits: Mapping[str, Encoded]) -> None:
        """Begin with the mean of the numbers, or with the frequency of each label."""
        if self.kind == "regression":
            _head.begin_at(model, fresh, [float(splits["train"].column("label").mean())])
        elif self.kind == "multi_label":
            counts, rows = [*self.balance(splits["train"]).values()], len(splits["train"].dataset)
            _head.begin_at(model, fresh, _head.log_odds(counts, rows, self.config.label_smoothing, self.weights))

    def balance(self, encoded: Encoded) -> dict[str, int]:
        """Rows of each label."""
        counts = np.zeros(len(self.labels.names), dtype=np.int64)
        for chunk in encoded.dataset.data.column("label").chunks if len(counts) else ():
            values = chunk.flatten() if self.kind == "multi_label" else chunk
            counts += np.bincount(values.to_numpy(), minlength=len(counts))
        return dict(zip(self.labels.names, counts.tolist(), strict=True))

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """The text, then its labels or number."""
        value = tensors["labels"][0]
        given = value.nonzero().flatten() if self.kind == "multi_label" else value.reshape(1)
        names = [str(place) if self.kind == "regression" else self.labels.names[place] for place in given.tolist()]
        return [*super().marks(tensors, tokenizer), ("", ", ".join(names) or "no label")]

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids, attention_mask (if anything is padded), token_type_ids: (B, T); labels: (B,) or (B, labels)."""
        import torch

        sequences = features["input_ids"]
        tensors = {"input_ids": pad(sequences, self.padding)}
        if len({len(sequence) for sequence in sequences}) > 1:  # rectangular batches take attention's faster path
            tensors["attention_mask"] = mask(sequences)
        if "token_type_ids" in features:
            tensors["token_type_ids"] = pad(features["token_type_ids"], 0)
        if self.kind == "multi_label":
            labels = np.zeros((len(sequences), len(self.labels.names)), dtype=np.float32)
            for row, given in enumerate(features["label"]):
                labels[row, given] = 1
        else:
            labels = features["label"].astype(np.float32 if self.kind == "regression" else np.int64)
        return {**tensors, "labels": torch.from_numpy(labels)}

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Cross entropy, binary cross entropy over all labels, or squared error: summed."""
        return self._losses(model(**inputs(tensors)).logits, tensors["labels"], self.config.label_smoothing).sum()

    def _losses(self, logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
        """Return the loss of each row (B,), weighted by class. It is divided by targets later, not by weights."""
        from torch.nn import functional

        weights = logits.new_tensor(self.weights) if self.weights else None
        if self.kind == "single_label":
            return functional.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing, reduction="none")
        if self.kind == "multi_label":
            smooth = labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
            return functional.binary_cross_entropy_with_logits(
                logits, smooth, pos_weight=weights, reduction="none"
            ).sum(1)
        return functional.mse_loss(logits.squeeze(1), labels.to(logits.dtype), reduction="none")

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give scores (B, labels): probabilities, or values (B, 1); references; loss (B,), without smoothing."""
        logits, labels = model(**inputs(tensors)).logits, tensors["labels"]
        scores = {"single_label": lambda: logits.softmax(1), "multi_label": logits.sigmoid}.get(
            self.kind, lambda: logits
        )
        return {"scores": scores(), "references": labels, "loss": self._losses(logits, labels, 0.0)}

    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """predictions: label numbers (n,), 0/1 (n, labels), or values (n,)."""
        scores, references = found["scores"], found["references"]
        if self.kind == "regression":
            return {"predictions": scores[:, 0], "references": references}
        if self.kind == "multi_label":
            given = (np.asarray(scores, dtype=float) >= self.config.threshold).astype(np.int64)
            return {"predictions": given, "references": references.astype(np.int64), "scores": scores}
        return {"predictions": scores.argmax(1), "references": references, "scores": scores}

    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Asked:
        """Labels are not needed: one stands for them."""
        any_label = {"single_label": self.labels.names[:1], "multi_label": ([],)}.get(self.kind, (0.0,))[0]
        return Asked(self, self.texts, lambda row: {self.label: any_label})

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """Predictions and references by name, and the score of every label."""
        outputs, names, places = self.outputs(found, encoded), self.labels.names, encoded.places()
        for row, (prediction, reference) in enumerate(
            zip(outputs["predictions"].tolist(), outputs["references"].tolist(), strict=True)
        ):
            if self.kind == "regression":
                yield {**places[row], "prediction": prediction, "reference": reference}
                continue
            named = [self.labels.named(value) for value in (prediction, reference)]
            scores = dict(zip(names, [round(score, 6) for score in outputs["scores"][row].tolist()], strict=True))
            yield {**places[row], "prediction": named[0], "reference": named[1], "scores": scores}


task = TextClassification
