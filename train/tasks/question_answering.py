"""A question and a context → the span of the context that answers it, or that there is none (SQuAD 1.1 and 2.0)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from data.collate import mask, pad
from data.encoded import Encoded, Features
from data.errors import UserError
from data.source import Rows, check_columns
from train.answers import best, scores
from train.tasks._asked import Asked
from train.tasks._spans import best_spans, judge, logits, losses
from train.tasks._windows import Pair, answers, misplaced
from train.tasks.base import Arrays, Outputs, Task, TaskConfig, pieces, require_fast

if TYPE_CHECKING:
    from torch import Tensor, nn

NO_ANSWER = "[]"  # the gold answers of a question without one, as `encode` writes them


class Config(TaskConfig):
    """Extractive question answering: its columns, how long contexts are cut, and which answers are given."""

    name: Literal["question_answering"] = "question_answering"
    question: str = Field("question", description="Column of the question.")
    context: str = Field("context", description="Column of the text that holds the answer.")
    answers: str = Field(
        "answers", description="Column of {text: [...], answer_start: [...]}; empty where there is no answer."
    )
    stride: int = Field(128, ge=0, description="Tokens that two windows of a long context share.")
    n_best: int = Field(20, ge=1, description="Answers listed for each row of the predictions.")
    max_answer_length: int = Field(30, ge=1, description="In tokens; longer answers are never given.")
    null_threshold: Literal["auto"] | float = Field(
        "auto",
        description="No answer is given where the null odds are above it. auto: the best F1 on data.validation "
        "(without it, 0). Only for training rows of which some have no answer; without such an answer is always given.",
    )


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """Start and end of the answer, each a choice among the tokens of the context and the null position.

    The null position is the classifier token, or the first token where there is none. The loss of a window is the
    mean of the two cross entropies. The question and padding are no choices: they cannot be predicted, so the model
    need not learn that; and a loss over padding would depend on how the batch is cut.
    """

    config: Config
    padding: int
    classifier: int | None
    nulls: bool = False
    """Whether some training rows have no answer."""
    threshold: float = 0.0

    kind = "answers"
    free = ("max_answer_length", "n_best")

    @classmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> QuestionAnswering:
        """Check the columns, and that the tokenizer tells where its tokens stand in the text."""
        task = cls(config, tokenizer.pad_token_id, tokenizer.cls_token_id)
        check_columns(rows, task.columns, "task (choose columns with task.question, task.context and task.answers)")
        require_fast(tokenizer, "task question_answering", "which knows character offsets")
        return task

    def __str__(self) -> str:
        """Say what was found in the data."""
        kind = "some questions have no answer" if self.nulls else "every question has an answer"
        return f"question answering: {' + '.join(self.columns[:2])} → {self.config.answers}, {kind}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Question, context and answers."""
        return (self.config.question, self.config.context, self.config.answers)

    @property
    def identity(self) -> str:
        """Columns, the overlap of windows and the token of the null position."""
        return json.dumps([self.columns, self.config.stride, self.classifier])

    @property
    def model_class(self) -> str:
        """Two logits for each token."""
        return "AutoModelForQuestionAnswering"

    @property
    def model_config(self) -> dict[str, Any]:
        """The size of the head: a model that was a classifier may say otherwise."""
        return {"num_labels": 2}

    @property
    def pipeline(self) -> None:
        """transformers has none since 5.0."""

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """Exact match and F1."""
        return ("squad",)

    def check_model(self, model: nn.Module) -> None:
        """Raise `UserError` for a model whose first token does not see the last one: it could never say "no answer"."""
        import torch

        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        size, device = table.num_embeddings, table.weight.device
        ids = (torch.arange(8, device=device) % size).unsqueeze(0)
        other = ids.clone()
        other[0, -1] = (other[0, -1] + 1) % size
        training = model.training
        model.eval()
        with torch.no_grad():
            first, second = (model(input_ids=each).start_logits[0, 0] for each in (ids, other))
        model.train(training)
        if torch.allclose(first, second, rtol=0, atol=1e-7):
            raise UserError(
                f"model.path: {type(model).__name__} reads from left to right: its first token, which stands for 'no "
                "answer', sees nothing of the context. Take an encoder, such as BERT, RoBERTa, DeBERTa or ModernBERT"
            )

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Question and context must be non-empty text, and every answer must stand where it says."""
        for name in (self.config.question, self.config.context):
            if not isinstance(row[name], str):
                return f"{name!r} must be text, not {row[name]!r}"
            if not row[name].strip():
                return f"{name!r} is empty"
        name, value = self.config.answers, row[self.config.answers]
        given = answers(value)
        if given is None:
            form = "{text: [...], answer_start: [...]}, both empty where there is no answer"
            return f"{name!r} must be {form}; not {str(value)[:80]}"
        problem = misplaced(row[self.config.context], *given)
        return f"{name!r}: {problem}" if problem else None

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Cut each row into windows, the question first in each, and find the answer in those that hold it whole.

        begins, ends: characters of the context's tokens; text: the context from the first to the last of them;
        golds: the answers as JSON, on the first window of a row; null, first, start, end: places in the window.
        """
        questions, contexts = [text.strip() for text in rows[self.config.question]], rows[self.config.context]
        encoded = tokenizer(
            questions, contexts, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        windows: list[dict[str, Any]] = []
        unusable = []
        for place, (context, value) in enumerate(zip(contexts, rows[self.config.answers], strict=True)):
            pair = Pair.of(encoded, place, context)
            texts, starts = answers(value) or ([], [])
            spans = [pair.find(start, start + len(text)) for text, start in zip(texts, starts, strict=True)]
            if problem := self._unfit(pair, max_length, spans):
                unusable.append((place, problem))
                continue
            golds = json.dumps(texts, ensure_ascii=False)
            for window in pair.windows(pair.room(max_length), self.config.stride):
                windows.append({**pair.window(window, spans, context, self.classifier), "row": place, "golds": golds})
                golds = ""
        names = windows[0] if windows else ("row",)
        return {**{name: [window[name] for window in windows] for name in names}, "unusable": unusable}

    def _unfit(self, pair: Pair, max_length: int, spans: Sequence[range | None]) -> str | None:
        """Say why a row can have no windows, or None."""
        room, tokens, stride = pair.room(max_length), len(pair.offsets), self.config.stride
        remedy = "shorten it, raise data.max_length"
        if not tokens:
            return f"{self.config.context!r} holds nothing that the tokenizer knows"
        if room < 1:
            return f"{self.config.question!r} alone fills data.max_length ({max_length} tokens): {remedy}"
        if tokens > room <= stride:
            return (
                f"{self.config.question!r} leaves {room} of {max_length} tokens for the context, no more than "
                f"task.stride ({stride}): {remedy} or lower task.stride"
            )
        if spans and not any(spans):
            return f"{self.config.answers!r} holds nothing that the tokenizer knows"
        return None

    def informed(self, train: Encoded) -> QuestionAnswering:
        """Find out whether some training rows have no answer."""
        import pyarrow.compute as pc

        nulls = train.partial or pc.any(pc.equal(train.dataset.data.column("golds"), NO_ANSWER)).as_py()
        fixed = self.config.null_threshold
        if fixed != "auto" and not nulls:
            raise UserError("task.null_threshold cannot take effect: every training row has an answer; leave it out")
        return replace(self, nulls=nulls, threshold=0.0 if fixed == "auto" else fixed)

    def balance(self, encoded: Encoded) -> dict[str, int]:
        """Windows with an answer, and without."""
        without = int((encoded.column("start") == encoded.column("null")).sum())
        return {"windows with the answer": len(encoded.dataset) - without, "without": without}

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """The tokens of the answer; or that there is none."""
        null, _, _, start, end = tensors["labels"][0].tolist()
        text = pieces(tensors["input_ids"][0], tokenizer)
        if start == null:
            return [*((piece, None) for piece in text), ("", "no answer")]
        return [(piece, piece.strip() if start <= place <= end else None) for place, piece in enumerate(text)]

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids, attention_mask (if anything is padded), token_type_ids: (B, T); labels: (B, 5), places in T.

        The labels are the null position, the first token of the context, the one behind its last, and start and end of
        the answer, or the null position twice.
        """
        import torch

        sequences = features["input_ids"]
        tensors = {"input_ids": pad(sequences, self.padding)}
        if len({len(sequence) for sequence in sequences}) > 1:
            tensors["attention_mask"] = mask(sequences)
        if "token_type_ids" in features:
            tensors["token_type_ids"] = pad(features["token_type_ids"], 0)
        after = features["first"] + [len(begins) for begins in features["begins"]]
        places = [features["null"], features["first"], after, features["start"], features["end"]]
        return {**tensors, "labels": torch.from_numpy(np.stack(places, axis=1).astype(np.int64))}

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """The mean of the cross entropies of start and end, summed over windows."""
        start, end, _ = logits(model, tensors)
        return losses(start, end, tensors["labels"]).sum()

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the n best spans of each window: all are compared, so the first is the best there is.

        scores, starts, ends: (B, n), ends included, counted from the first token of the context; null_scores and loss:
        (B,).
        """
        start, end, context = logits(model, tensors)
        null, first = tensors["labels"][:, :1], tensors["labels"][:, 1:2]
        found, starts, ends = best_spans(start, end, context, self.config.max_answer_length, self.config.n_best)
        return {
            "scores": found,
            "starts": starts - first,
            "ends": ends - first,
            "null_scores": (start.gather(1, null) + end.gather(1, null)).squeeze(1),
            "loss": losses(start, end, tensors["labels"]),
        }

    def tuned(self, found: Arrays, encoded: Encoded) -> QuestionAnswering:
        """Choose the threshold with the best F1 on these rows, if it is for us to choose."""
        if not self.nulls or self.config.null_threshold != "auto":
            return self
        rows = [
            (row.null_odds, scores(row.span, row.golds)[1], scores("", row.golds)[1])
            for row in judge(found, encoded, 1)
        ]
        return replace(self, threshold=best(*np.array(rows).T).threshold)

    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """predictions: see `train.metrics.squad`; references: the gold answers of each row."""
        rows = list(judge(found, encoded, 1))
        threshold = self.threshold if self.nulls else None
        return {
            "predictions": [
                {"text": row.text(threshold), "span": row.span, "null_odds": row.null_odds} for row in rows
            ],
            "references": [row.golds for row in rows],
        }

    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Asked:
        """Answers are not needed: none stands for them."""
        return Asked(self, self.columns[:2], lambda row: {self.config.answers: {"text": [], "answer_start": []}})

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """The answer ("" for none), the gold answers, the null odds and the n best spans."""
        places, threshold = encoded.places(), self.threshold if self.nulls else None
        for row in judge(found, encoded, self.config.n_best):
            yield {
                **places[row.first],
                "prediction": row.text(threshold),
                "reference": row.golds,
                "null_odds": round(row.null_odds, 6),
                "n_best": [{**each._asdict(), "score": round(each.score, 6)} for each in row.candidates],
            }


task = QuestionAnswering
