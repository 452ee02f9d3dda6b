"""Conversations → the assistant's turns: supervised fine-tuning with a chat template."""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from data import packing
from data.collate import pad
from data.encoded import Encoded, Features
from data.source import Rows, check_columns
from train.tasks import _packed, _turns
from train.tasks._chat import Template, choose, render
from train.tasks._generation import Generation, ends, texts
from train.tasks._messages import Columns, Unusable, tools_asked
from train.tasks._pieces import by_row, positions, sums
from train.tasks._writing import Writer, keys
from train.tasks.base import IGNORED, Arrays, Outputs, Task, TaskConfig, pieces

if TYPE_CHECKING:
    from torch import Tensor, nn

PACKINGS = {"documents": packing.best_fit, "none": packing.apart}


class Config(TaskConfig):
    """Chat: its columns, the template that makes a text of a conversation, and how conversations become rows."""

    name: Literal["chat"] = "chat"
    messages: str | None = Field(
        None,
        description="Column of lists of messages {role, content, tool_calls}. Default: messages or conversations, "
        "whichever there is; else prompt and completion.",
    )
    prompt: str | None = Field(
        None, description="Column of what is read, instead of messages: a text (the user's) or a list of messages."
    )
    completion: str | None = Field(
        None, description="Column of what is learned after the prompt: a text (the assistant's) or a list of messages."
    )
    tools: str | None = Field(
        None, description="Column of the tools of each row: a list, or JSON of one. Default: tools, if there is one."
    )
    template: str | None = Field(
        None,
        description="Chat template: chatml (built in) or a .jinja file; it is exported with the model. Default: the "
        "tokenizer's own.",
    )
    packing: Literal["documents", "none"] = Field(
        "documents",
        description="documents: several whole conversations fill a row, none sees another. none: a row each. What "
        "is longer than data.max_length is cut at the end.",
    )
    generation: Generation | None = Field(
        None, description="How the last turn is written in evaluation; null: it is not, only its loss is judged."
    )

    @property
    def text_columns(self) -> tuple[str, ...]:
        """What is said, and the roles; tools."""
        named = tuple(name for name in (self.messages, self.prompt, self.completion) if name)
        owners = named or ("messages", "conversations", "prompt", "completion")
        parts = tuple(f"{owner}{part}" for owner in owners for part in ("", ".role", ".content"))
        return (*parts, self.tools or "tools")

    @model_validator(mode="after")
    def _one_form(self) -> Config:
        if self.messages and (self.prompt or self.completion):
            raise ValueError("messages, or prompt and completion: give one of them")
        return self


@dataclass(frozen=True)
class Chat(Task):
    """Each token that the assistant writes is predicted from all before it, the one that ends its turn too; the loss
    is their sum.

    What the others say, and what introduces a turn, is read and not learned. A conversation that is longer than a row
    is cut at its end.
    """

    config: Config
    found: Columns
    template: Template
    tokenizer: Any = field(repr=False, compare=False)

    kind = "next_tokens"
    free = ("generation",)
    model_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    hint = (
        "It has learned conversations: give the pipeline a list of messages such as "
        '`[{"role": "user", "content": "..."}]`, or the model what `tokenizer.apply_chat_template(messages, '
        "add_generation_prompt=True)` makes of one."
    )

    @classmethod
    def prepare(cls, config: Any, rows: Sequence[Rows], tokenizer: Any) -> Chat:
        """Find the columns, and set the template on the tokenizer; raise `UserError` for one that cannot be used."""
        found = Columns.find(config, [set(part.dataset.column_names) for part in rows])
        where = "task (choose columns with task.messages, or task.prompt and task.completion; task.tools)"
        check_columns(rows, found.all, where)
        template = choose(tokenizer, config.template, with_tools=found.tools is not None)
        return cls(config, found, template, tokenizer)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of messages, or of prompt and completion; and of tools."""
        return self.found.all

    @property
    def identity(self) -> str:
        """Columns, template with its special tokens, and how rows are packed: by name and by code."""
        special = sorted(map(str, self.tokenizer.special_tokens_map.items()))
        code = inspect.getsource(packing)
        return json.dumps([self.found, self.template.text, self.template.end, special, self.config.packing, code])

    def __str__(self) -> str:
        """Say what was found in the data, and what is learned."""
        how = "marked by" if self.template.marked else "told by the prompts of"
        return (
            f"chat: {', '.join(self.found.all)}; the assistant's turns, {how} {self.template.origin}, each with its "
            f"end {self.template.end}; packing {self.config.packing}"
        )

    @property
    def model_config(self) -> dict[str, Any]:
        """The tokens that texts begin and turns end with: generation is to do the same."""
        return {"bos_token_id": self.tokenizer.bos_token_id, "eos_token_id": self.tokenizer.eos_token_id}

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """Of the tokens that the assistant writes."""
        return ("perplexity", "token_accuracy")

    def check_model(self, model: nn.Module) -> None:
        """Prove that later tokens have no influence and, with packing=documents, that other conversations have none."""
        remedy = "Set task.packing=none (a conversation a row, padded)"
        _packed.check(model, isolated=self.config.packing == "documents", remedy=remedy)

    def initialize(self, model: nn.Module, fresh: Collection[str], splits: Mapping[str, Encoded]) -> None:
        """Let the model stop where a turn ends, and write as the config says, also exported."""
        settings: Any = model.generation_config
        settings.eos_token_id = ends(settings.eos_token_id, self.tokenizer.eos_token_id)
        settings.pad_token_id = self.tokenizer.pad_token_id
        if self.config.generation:
            inherits = len(fresh) < len([*model.parameters()])
            _turns.settle(self.config.generation, model, self.tokenizer, splits, inherits=inherits)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Messages must be lists of them, with text; the assistant's not empty."""
        try:
            self.found.conversation(row)
        except Unusable as problem:
            return str(problem)
        return None

    def encode(self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokenize conversations by the template and pack them into rows of `max_length`, as far as these rows go.

        input_ids   the tokens taken in
        labels      for each of them the token after it, if the assistant writes that one; else -100
        pieces      positions of each conversation in the row; `rows` says which ones these are
        counts      targets of each conversation in the row
        bytes       of what the assistant writes in the row (UTF-8), without the tokens that end its turns
        Named as unusable is what the template refuses, and a conversation of which the cut leaves nothing to learn.
        """
        names = list(rows)
        parts = zip(*rows.values(), strict=True)
        given = [self.found.conversation(dict(zip(names, values, strict=True))) for values in parts]
        unusable, taken, labels, sizes, owners = [], [], [], [], []
        for place, each in enumerate(render(tokenizer, self.template, given)):
            if isinstance(each, str):
                unusable.append((place, each))
                continue
            follows = zip(each.ids[1:], each.learned[1:], strict=True)
            targets = [token if learned else IGNORED for token, learned in follows][:max_length]
            if all(target == IGNORED for target in targets):
                begins = each.learned.index(True) if True in each.learned else len(each.ids)
                problem = f"what comes before the assistant's turn is {begins:,} tokens and fills the whole length"
                unusable.append((place, f"{problem} (data.max_length is {max_length:,})"))
                continue
            taken.append(each.ids[:-1][:max_length])
            labels.append(targets)
            sizes.append(each.bytes(len(targets), self.template.end))
            owners.append(place)
        packed = PACKINGS[self.config.packing]([len(tokens) for tokens in taken], max_length)
        counts = [[sum(token != IGNORED for token in labels[piece.document]) for piece in row] for row in packed]
        return {
            "input_ids": [[token for piece in row for token in taken[piece.document]] for row in packed],
            "labels": [[token for piece in row for token in labels[piece.document]] for row in packed],
            "pieces": [[piece.stop for piece in row] for row in packed],
            "counts": counts,
            "bytes": [sum(sizes[piece.document] for piece in row) for row in packed],
            "length": [sum(piece.stop for piece in row) for row in packed],
            "targets": [sum(each) for each in counts],
            "row": [owners[row[0].document] for row in packed],
            "rows": [[owners[piece.document] for piece in row] for row in packed],
            "unusable": unusable,
        }

    def collate(self, features: Features) -> dict[str, Tensor]:
        """input_ids and labels, which stand where they are predicted: (B, T); pieces (B, P), 0 where a row has fewer.

        And places (M,), those of the targets. Where texts are drawn, keys (B, P). With packing=documents also
        position_ids (B, T), which begin anew in each conversation, the padding being one more. There is no attention
        mask, for the reasons that causal_lm has.
        """
        import torch

        labels = pad(features["labels"], IGNORED)
        tensors = {
            "input_ids": pad(features["input_ids"], self.tokenizer.pad_token_id),
            "labels": labels,
            "pieces": pad(features["pieces"], 0),
            "places": _packed.places(labels.numpy()),
        }
        if self.config.generation and self.config.generation.temperature is not None:
            tensors["keys"] = pad([keys(rows) for rows in features["rows"]], 0)
        if self.config.packing == "documents":
            width = tensors["input_ids"].shape[1]
            tensors["position_ids"] = torch.from_numpy(positions(features["pieces"], width))
        return tensors

    def contents(self, features: Features) -> list[Any]:
        """Return each conversation: the row that it is packed in says nothing of it."""
        rows = zip(features["input_ids"], features["pieces"], strict=True)
        return [piece for ids, sizes in rows for piece in np.split(ids, np.cumsum(sizes)[:-1])]

    def marks(self, tensors: dict[str, Tensor], tokenizer: Any) -> list[tuple[str, str | None]]:
        """Each conversation of the row on lines of its own; what the assistant writes is learned."""
        found: list[tuple[str, str | None]] = []
        start = 0
        for size in tensors["pieces"][0].tolist():
            ids, labels = (tensors[name][0, start : start + size] for name in ("input_ids", "labels"))
            ids = ids.new_tensor([*ids.tolist(), *(token for token in labels[-1:].tolist() if token != IGNORED)])
            learned = [False, *(labels != IGNORED).tolist()]
            shown = pieces(ids, tokenizer)
            found += [
                (text, text.strip() if is_learned else None) for text, is_learned in zip(shown, learned, strict=False)
            ]
            found.append(("\n", None))
            start += size
        return found

    def loss(self, model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
        """Cross entropy of all tokens that the assistant writes, in nats: summed."""
        return _packed.loss(model, tensors)

    def predict(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the summed loss of each example (B,); of each of its conversations the loss, and how many tokens are the
        likeliest, (B, P); and `written` (B, P, W): its last turn as the model writes it, -100 behind the end."""
        losses, right = _packed.losses_and_hits(model, tensors)
        hits, losses_of_each = (sums(values, tensors["pieces"]) for values in (right, losses))
        found = {"loss": losses.sum(1), "losses": losses_of_each, "hits": hits}
        if self.config.generation:
            found["written"] = _turns.written(self.config.generation, model, self.tokenizer, tensors)
        return found

    def asked(self, model: nn.Module, tokenizer: Any, rows: Sequence[Rows]) -> Writer:
        """Return what writes the assistant's next turn; its own at the end of a conversation is left out."""
        found = self.found._replace(tools=tools_asked(self.found.tools, [part.dataset.column_names for part in rows]))
        return Writer.of(_turns.Question(found, self.template, tokenizer), self.config.generation, model, tokenizer)

    def outputs(self, found: Arrays, encoded: Encoded) -> Outputs:
        """losses, in nats, targets, hits, and bytes of the assistant's turns: of each example (n,)."""
        hits = np.maximum(found["hits"], 0).sum(1)
        counts = {name: encoded.column(name) for name in ("targets", "bytes")}
        return {"losses": found["loss"], "hits": hits, **counts}

    def records(self, found: Arrays, encoded: Encoded) -> Iterator[dict[str, Any]]:
        """A line a conversation: loss, targets and accuracy; the last turn as written and as it stands in the data."""
        columns = [encoded.dataset.data.column("counts").to_pylist(), found["losses"].tolist(), found["hits"].tolist()]
        if self.config.generation:
            stop = self.config.generation.stop
            given = [[turn.strip() for turn in texts(each, self.tokenizer, stop)] for each in found["written"]]
            columns += [given, _turns.references(encoded, self.tokenizer)]
        for where, [(tokens, loss, hits, *turns)] in by_row(encoded, *columns):
            figures = {"loss": loss, "tokens": tokens, "accuracy": round(hits / tokens, 6)}
            yield {**where, **dict(zip(("prediction", "reference"), turns, strict=False)), **figures}


task = Chat
