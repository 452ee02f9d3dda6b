"""Text → text, by an encoder and a decoder: translation, summarization."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from pydantic import Field

from data.collate import mask, pad
from data.encoded import Encoded, Features
from data.errors import UserError
from data.source import Rows
from train.limits import longest_output
from train.tasks import _fields
from train.tasks._asked import Asked
from train.tasks._generation import Generation, texts
from train.tasks._losses import token_losses
from train.tasks._writing import keys, most_tokens
from train.tasks.base import IGNORED, Arrays, Outputs, Task, TaskConfig, pieces

if TYPE_CHECKING:
    from torch import Tensor, nn

SOURCES = ("source", "document", "article", "dialogue", "text", "input")
NO_TARGET = "no target"
TARGETS = ("target", "summary", "highlights", "output")


class Config(TaskConfig):
    """Sequence to sequence: its columns, what stands before each source, and how targets are written."""

    name: Literal["seq2seq"] = "seq2seq"
    source: str | None = Field(
        None,
        description="Column of the texts that are read; translation.en is the field en of the column translation. "
        "Default: source, document, article, dialogue, text or input, whichever there is.",
    )
    target: str | None = Field(
        None,
        description="Column of the texts that are to be written. Default: target, summary, highlights or output.",
    )
    prefix: str = Field("", description='Put before each source, as in "summarize: ".')
    max_target_length: int | None = Field(
        None, ge=2, description="Tokens of a target; longer ones are cut. Default: data.max_length."
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="Share of the target spread over the vocabulary.")
    generation: Generation | None = Field(
        Generation(),
        description="How targets are written in evaluation, and by the exported model; null: only the loss is judged.",
    )

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Both sides."""
        return tuple(name for name in (self.source, self.target) if name)


@dataclass(frozen=True)
class Seq2Seq(Task):
    """Each token of the target is predicted from the source and the tokens before it; the loss is their sum.

    A target ends with EOS; one that is cut does not, so that nobody learns to stop in the middle.
    """

    config: Config
    source: str
    target: str
    tokenizer: Any = field(repr=False, compare=False)

    kind = "texts"
    free = ("generation", "prefix")
    model_class = "AutoModelForSeq2SeqLM"
    pipeline = None

    @classmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> Seq2Seq:
        """Find the columns; raise `UserError` for a tokenizer that has no end."""
        if tokenizer.eos_token_id is None:
            raise UserError("task seq2seq: the tokenizer has no end token (EOS), so that a text would never end")
        there = _fields.names(rows[0])
        source, target = (
            chosen or next((name for name in known if name in there), known[0])
            for chosen, known in ((config.source, SOURCES), (config.target, TARGETS))
        )
        _fields.check(rows, [source, target], "task (choose columns with task.source and task.target)")
        return cls(config, source, target, tokenizer)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of source and target; one, if both are fields of it."""
        return tuple(dict.fromkeys(_fields.column(name) for name in (self.source, self.target)))

    @property
    def identity(self) -> str:
        """Columns, prefix, and where targets are cut."""
        return json.dumps([self.source, self.target, self.config.prefix, self.config.max_target_length])

    def __str__(self) -> str:
        """Say what was found in the data."""
        prefix = f"{self.config.prefix!r} + " if self.config.prefix else ""
        how = f"written with {self.config.generation}" if self.config.generation else "not written in evaluation"
        return f"sequence to sequence: {prefix}{self.source} → {self.target}, {how}"

    @property
    def model_config(self) -> dict[str, Any]:
        """Nothing: the output layer has the size of the vocabulary."""
        return {}

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """Of the words and the characters that are written."""
        return ("bleu", "chrf") if self.config.generation else ()

    def initialize(self, model: nn.Module, fresh: Collection[str], splits: Mapping[str, Encoded]) -> None:
        """Say what a text begins with where the model does not; let it write as the config says, also exported."""
        settings: Any = model.config
        start = getattr(settings, "decoder_start_token_id", None)
        known: Any = model.get_input_embeddings()  # type: ignore[operator]
        if start is None or start >= known.num_embeddings:  # Marian's default, of a larger vocabulary
            decoder = getattr(settings, "decoder", None)  # T5Gemma's says it, as its BOS
            starts = (
                getattr(model.generation_config, "decoder_start_token_id", None),
                getattr(decoder, "bos_token_id", None),
                self.tokenizer.pad_token_id,  # T5's way
            )
            settings.decoder_start_token_id = next(
                token for token in starts if token is not None and token < known.num_embeddings
            )
        room, cut = longest_output(cast(Any, model)), self.config.max_target_length
        if cut and cut > room:
            raise UserError(f"task.max_target_length: {cut} is more than the {room} tokens that the decoder can write")
        if self.config.generation:
            usual = cut or int(max(map(len, splits["train"].dataset[:1000]["labels"])) * 2)
            inherits = len(fresh) < len([*model.parameters()])  # what a kind of model forces means nothing from scratch
            self._settle(self.config.generation, model, usual, inherits=inherits)

    def _settle(self, how: Generation, model: Any, usual: int, *, inherits: bool) -> None:
        """Let the model write as is said, within the positions of its decoder."""
        room = longest_output(model)
        most = most_tokens(how.max_new_tokens, usual, room, f"the decoder can write {room:,}. Lower it")
        how.settle(model, self.tokenizer, most, inherits=inherits)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Source and target must be texts that are not empty."""
        for name in (self.source, self.target):
            value = _fields.value(row, name)
            if not isinstance(value, str):
                return f"{name!r} must be text, not {value!r}"
            if not value.strip():
                return f"{name!r} is empty"
        return None

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize sources and, as labels, targets; `text` is the target as it stands, `longest` the longer side."""
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        sources = [self.config.prefix + text for text in _fields.values(rows, self.source)]
        targets = _fields.values(rows, self.target)
        read = tokenizer(sources, truncation=True, max_length=max_length, **options)["input_ids"]
        limit, end = self.config.max_target_length or max_length, tokenizer.eos_token_id
        whole = tokenizer(text_target=targets, **options)["input_ids"]
        labels = [(ids if ids[-1:] == [end] else [*ids, end])[:limit] for ids in whole]
        lengths = [len(ids) for ids in labels]
        return {
            "row": list(range(len(sources))),
            "input_ids": read,
            "labels": labels,
            "text": targets,
            "length": [len(ids) + size for ids, size in zip(read, lengths, strict=True)],
            "longest": [len(ids) for ids in read],
            "targets": lengths,
        }

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids and attention_mask: (B, S); labels, -100 on padding: (B, T); where texts are drawn, keys: (B,)."""
        import torch

        drawn = self.config.generation is not None and self.config.generation.temperature is not None
        return {
            "input_ids": pad(features["input_ids"], self.tokenizer.pad_token_id),
            "attention_mask": mask(features["input_ids"]),
            "labels": pad(features["labels"], IGNORED),
            **({"keys": torch.from_numpy(keys(features["row"]))} if drawn else {}),
        }

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """The source, and under it the target, all of which is learned."""
        read = [(piece, None) for piece in pieces(tensors["input_ids"][0], tokenizer)]
        return [*read, ("\n", None), *((piece, piece.strip()) for piece in pieces(tensors["labels"][0], tokenizer))]

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Cross entropy of all tokens of the targets, smoothed as the config says: summed."""
        return token_losses(self._logits(model, tensors), tensors["labels"], self.config.label_smoothing).sum()

    def _logits(self, model: Any, tensors: dict[str, Tensor]) -> Tensor:
        """Return logits (B, T, V) for each token of the labels, the decoder reading those before it."""
        labels = tensors["labels"]
        start = getattr(model, "module", model).config.decoder_start_token_id  # DDP hides what it wraps
        before = labels.new_full(labels.shape, start)
        before[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self.tokenizer.pad_token_id)
        read = {name: tensors[name] for name in ("input_ids", "attention_mask")}
        logits: Tensor = model(**read, decoder_input_ids=before, use_cache=False).logits
        return logits

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the loss (B,), without smoothing; and `written` (B, W): the tokens of the text that the model writes."""
        found = {"loss": token_losses(self._logits(model, tensors), tensors["labels"]).sum(1)}
        if self.config.generation:
            read = tensors["input_ids"], tensors["attention_mask"]
            found["written"] = self.config.generation.write(model, self.tokenizer, *read, tensors.get("keys"))
        return found

    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """predictions, references: texts (n,)."""
        if "written" not in found:
            return {}
        return {"predictions": self._texts(found), "references": encoded.dataset["text"][:]}

    def _texts(self, found: Arrays) -> list[str]:
        stop = self.config.generation.stop if self.config.generation else ()
        return [text.strip() for text in texts(found["written"], self.tokenizer, stop)]

    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Asked:
        """Targets are not needed: a mark stands for them. `translation.en` may be a column `en` of its own here."""
        owner: Any = model
        how = self.config.generation or Generation()
        self._settle(how, model, owner.generation_config.max_new_tokens or 256, inherits=True)
        there, short = _fields.names(rows[0]), self.source.rpartition(".")[2]
        source = short if self.source not in there and short in there else self.source
        config = self.config.model_copy(update={"generation": how})
        task = replace(self, config=config, source=source, target=NO_TARGET)
        return Asked(task, (_fields.column(source),), lambda row: {NO_TARGET: "."})

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """The text that was written, the target, and the target's loss."""
        given = self._texts(found) if "written" in found else None
        for place, where in enumerate(encoded.places()):
            prediction = {"prediction": given[place]} if given else {}
            reference, loss = encoded.dataset[place]["text"], float(found["loss"][place])
            yield {**where, **prediction, "reference": reference, "loss": round(loss, 6)}

    def contents(self, features: Features) -> Sequence[Any]:
        """Return the source and the target of each example: a copy has both."""
        pairs = zip(features["input_ids"], features["labels"], strict=True)
        return [np.concatenate([read, [-1], labels]) for read, labels in pairs]


task = Seq2Seq
