"""A prompt, a chosen and a rejected answer → a model that prefers the one: DPO, IPO, ORPO; or one that scores them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from data.encoded import REAL, Encoded, Features
from data.errors import UserError
from data.source import Rows
from train.tasks import _chat, _fields, _messages, _preference
from train.tasks._answering import Prompts, Scores
from train.tasks._generation import Generation
from train.tasks._messages import Unusable
from train.tasks._pairs import Columns, Frame, cut, sequences
from train.tasks._writing import Writer
from train.tasks.base import IGNORED, Arrays, Outputs, Task, TaskConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

PARTS = ("input_ids", "learned", "rejected", "rejected_learned")
BETA = 0.1
FOR = {"beta": ("dpo", "ipo", "orpo"), "label_smoothing": ("dpo",), "sft_weight": ("dpo", "ipo")}
"""Keys that have an effect with some losses only."""


HINT = (
    "The score of an answer is the only logit for the tokens of the prompt, of the answer and what ends it (`{}`). "
    "Scores compare answers to one prompt; how large they are means nothing."
)


class Config(TaskConfig):
    """Preference: the columns of prompt and answers, and what is learned of them."""

    name: Literal["preference"] = "preference"
    loss: Literal["dpo", "ipo", "orpo", "reward"] = Field(
        "dpo",
        description="dpo, ipo: prefer the chosen answer more than the starting model does. orpo: learn to write it and "
        "prefer it, without a starting model to compare with. reward: a model that scores answers (Bradley-Terry).",
    )
    prompt: str | None = Field(
        None, description="Column of prompts, texts or lists of messages. Default: prompt, if there is one."
    )
    chosen: str = Field("chosen", description="Column of the better answers, texts or lists of messages.")
    rejected: str = Field("rejected", description="Column of the worse answers.")
    tools: str | None = Field(
        None, description="Column of the tools that a conversation may call. Default: tools, if there is one."
    )
    template: str | None = Field(
        None,
        description="What writes lists of messages: chatml, or a file of Jinja. Default: the tokenizer's template.",
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="dpo, ipo: the higher, the closer to the starting model. orpo: weight of the odds ratio beside the "
        f"likelihood. Default: {BETA}.",
    )
    label_smoothing: float = Field(
        0.0, ge=0.0, lt=0.5, description="dpo: how often a preference may be the wrong way round (conservative DPO)."
    )
    sft_weight: float = Field(
        0.0, ge=0.0, description="dpo, ipo: weight of the chosen answer's mean loss per token, added to the loss."
    )

    generation: Generation = Field(Generation(), description="How `train.predict` answers a prompt.")

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> Config:
        for key, losses in FOR.items():
            if getattr(self, key) and self.loss not in losses:
                raise ValueError(f"{key} has no effect with loss {self.loss}; it is for {' and '.join(losses)}")
        return self

    @property
    def refers(self) -> bool:
        """Whether an answer's likelihood is compared with that under the starting model."""
        return self.loss in ("dpo", "ipo")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Prompt and answers."""
        return (self.prompt or "prompt", self.chosen, self.rejected)


@dataclass(frozen=True)
class Preference(Task):
    """A pair is one example and one target; the loss is a sum over pairs, also where it has a part for each token.

    Both sequences of a pair go through the model together. Texts are tokenized by `_pairs.tokens`. A prompt is never
    cut; what of an answer does not fit behind it is cut off, its end with it.
    """

    config: Config
    where: Columns
    frame: Frame
    template: _chat.Template | None
    kind: Literal["preferences", "rewards"]
    tokenizer: Any = field(repr=False, compare=False)
    hint: str = ""
    free = ("generation",)

    @classmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> Preference:
        """Find the columns and the template; raise `UserError` where nothing says where an answer begins or ends."""
        where = Columns.found(rows, config)
        texts = {where.texts(part) for part in rows}
        template = None
        if False in texts or (config.template and True not in texts):
            template = _chat.choose(tokenizer, config.template, with_tools=where.tools is not None)
        elif config.template or config.tools:
            key = "template" if config.template else "tools"
            raise UserError(f"task.{key} has no effect: prompts and answers are texts; it is for lists of messages")
        if config.loss != "reward" and tokenizer.eos_token_id is None:
            raise UserError("task preference: the tokenizer has no end token (EOS), so that no answer would end")
        frame = Frame.of(tokenizer)
        hint = HINT.format(tokenizer.decode([*frame.end])) if config.loss == "reward" else ""
        kind: Any = "rewards" if config.loss == "reward" else "preferences"
        return cls(config, where, frame, template, kind, tokenizer, hint)

    @property
    def beta(self) -> float:
        """The chosen beta, or the usual one."""
        return float(self.config.beta or BETA)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of prompt and answers; one, if they are fields of it."""
        return tuple(dict.fromkeys(map(_fields.column, self.where.names)))

    @property
    def identity(self) -> str:
        """Columns, what stands around prompt and answer, and the template."""
        template = self.template.text if self.template else None
        return json.dumps([self.where.names, self.frame.begin, self.frame.end, template])

    def __str__(self) -> str:
        """Say what was found in the data, and what is made of it."""
        config = self.config
        beta = "" if self.kind == "rewards" else f", beta {self.beta:g}"
        extra = [f"{key} {getattr(config, key):g}" for key in ("label_smoothing", "sft_weight") if getattr(config, key)]
        prompt = self.where.prompt or "what both begin with"
        parts = f"{prompt} → {self.where.chosen} rather than {self.where.rejected}"
        return ", ".join([f"preference, {config.loss}{beta}", *extra]) + f": {parts}"

    @property
    def model_class(self) -> str:
        """A language model; for scores one output read from the last token, or as the kind of model has it."""
        return "AutoModelForSequenceClassification" if self.kind == "rewards" else "AutoModelForCausalLM"

    @property
    def model_config(self) -> dict[str, Any]:
        """One output, if it scores."""
        return {"num_labels": 1} if self.kind == "rewards" else {}

    @property
    def pipeline(self) -> str | None:
        """It writes answers; for scores there is none, since the usual one makes probabilities of them."""
        return None if self.kind == "rewards" else "text-generation"

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """How often and how clearly the chosen answer is preferred, and how likely both are."""
        return ("preference",) if self.kind == "rewards" else ("preference", "answer_likelihood")

    def check_model(self, model: nn.Module) -> None:
        """Prove that an answer's tokens are predicted from those before them only."""
        if self.kind == "preferences":
            _preference.check(model)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """There must be a prompt and two different answers to it, none of them empty."""
        try:
            pair = self.where.pair(row)
        except Unusable as error:
            return str(error)
        if isinstance(pair.chosen, list):
            return None if self.template else f"{self.where.chosen!r} has messages, but the training rows have texts"
        if self.where.prompt or self.kind == "rewards":
            return None
        return (
            f"{self.where.chosen!r} is text and there is no column of prompts, so that nothing says where the answer "
            "begins: name one with task.prompt, or give lists of messages (only task.loss=reward takes whole texts)"
        )

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize both sequences of each pair and cut them at `max_length`.

        input_ids, rejected       prompt and chosen, prompt and rejected answer
        learned, rejected_learned  1 for the tokens of the answers that count, else 0
        `length` is what the pair takes when computed: twice the longer one. Pairs of which the cut leaves no answer, or
        no difference, are named as unusable.
        """
        table = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        pairs = [self.where.pair(row) for row in table]
        features: dict[str, list[Any]] = {name: [] for name in ("row", *PARTS)}
        unusable: list[tuple[int, str]] = []
        for place, both in enumerate(sequences(pairs, tokenizer, self.frame, self.template)):
            found = both if isinstance(both, str) else cut(both, max_length)
            if isinstance(found, str):
                unusable.append((place, found))
                continue
            for name, value in zip(features, [place, *(part for marked in found for part in marked)], strict=True):
                features[name].append(value)
        longest = [max(map(len, pair)) for pair in zip(features["input_ids"], features["rejected"], strict=True)]
        return {
            **features,
            "length": [2 * size for size in longest],
            "longest": longest,
            REAL: [
                len(one) + len(other) for one, other in zip(features["input_ids"], features["rejected"], strict=True)
            ],
            "targets": [1] * len(longest),
            "unusable": unusable,
        }

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels and answers: (B, 2, T), chosen first; reference: (B, 2), if it is known.

        Labels stand where they are predicted, -100 where nothing is; `answers` is 1 where that is of an answer. And
        where labels are, `places` (M,), and what is no padding, `tokens` (N,).
        """
        return _preference.collated(features, self.tokenizer.pad_token_id, whole=self.config.loss == "orpo")

    def contents(self, features: Features) -> list[Any]:
        """Return both sequences of each pair: a copy has both."""
        pairs = zip(features["input_ids"], features["rejected"], strict=True)
        return [np.concatenate([chosen, [IGNORED], rejected]) for chosen, rejected in pairs]

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """The prompt, and on lines of their own what follows it on both sides; the tokens that count are marked."""
        return _preference.shown(tensors, tokenizer)

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Return the chosen loss, summed over pairs."""
        return self._judge(model, tensors)["loss"].sum()

    def reference(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Return the log-probabilities of both answers, (B, 2)."""
        return _preference.likelihoods(model, tensors)[0]

    def _judge(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return loss (B,), rewards (B, 2) and, of a language model, the answers' log-probabilities, logps (B, 2)."""
        config = self.config
        if config.loss == "reward":
            scores = _preference.scores(model, tensors)
            return {"loss": _preference.dpo(scores, 0.0), "rewards": scores}
        logps, lengths, whole = _preference.likelihoods(model, tensors)
        if config.loss == "orpo":
            means = logps / lengths
            loss = whole[:, 0] + self.beta * _preference.odds_ratio(means)
            return {"loss": loss, "rewards": self.beta * means, "logps": logps}
        ratios = logps - tensors["reference"].to(logps.dtype)
        rewards = self.beta * ratios
        if config.loss == "ipo":
            loss = _preference.ipo(ratios, lengths, self.beta)
        else:
            loss = _preference.dpo(rewards, config.label_smoothing)
        if config.sft_weight:
            loss = loss - config.sft_weight * logps[:, 0] / lengths[:, 0]
        return {"loss": loss, "rewards": rewards, "logps": logps}

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give loss (B,), rewards (B, 2), chosen first, and, of a language model, logps (B, 2)."""
        return self._judge(model, tensors)

    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """rewards and, of a language model, logps of chosen and rejected answers: (n, 2), as lists."""
        return {name: found[name].tolist() for name in ("rewards", "logps") if name in found}

    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Writer | Scores:
        """Return what answers prompts; or, of a reward model, scores answers, which stand in the column `chosen`."""
        there, files = _fields.names(rows[0]), [_fields.names(part) for part in rows]
        tools = _messages.tools_asked(self.where.tools if self.template else None, files)
        where = replace(self.where, tools=tools)
        if self.kind == "rewards":
            return Scores(where, self.frame, self.template, tokenizer)
        name = where.prompt or ("prompt" if "prompt" in there else where.chosen)
        prompts = Prompts(name, tools, self.frame, self.template, tokenizer)
        return Writer.of(prompts, self.config.generation, model, tokenizer)

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """The rewards of both answers, the margin, and their log-probabilities."""
        for example, place in enumerate(encoded.places()):
            chosen, rejected = found["rewards"][example].tolist()
            values = {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected}
            if "logps" in found:
                values["chosen_logp"], values["rejected_logp"] = found["logps"][example].tolist()
            yield {**place, **{name: round(value, 6) for name, value in values.items()}}


task = Preference
