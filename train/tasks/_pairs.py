"""A prompt and two answers, in the shapes in which data sets give them; and what of them are tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.source import Rows
from train.tasks import _chat, _fields, _messages
from train.tasks._messages import Conversation, Message, Unusable

Marked = tuple[list[int], list[int]]
"""Tokens, and for each 1 if it counts, 0 if it is only read."""

LOOKED_AT = 1_000


class Pair(NamedTuple):
    """One prompt and the two answers to it: texts, or lists of messages."""

    prompt: Any
    chosen: Any
    rejected: Any
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Columns:
    """Where prompt and answers of a row stand. Without a prompt the answers are whole conversations, or whole texts."""

    prompt: str | None
    chosen: str
    rejected: str
    tools: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        return tuple(name for name in (self.prompt, self.chosen, self.rejected, self.tools) if name)

    @classmethod
    def found(cls, rows: Sequence[Rows], config: Any) -> Columns:
        """Return the columns that the config names, or the usual ones; raise `UserError` for one that is not there."""
        there = _fields.names(rows[0])
        prompt, tools = (getattr(config, key) or (key if key in there else None) for key in ("prompt", "tools"))
        found = cls(prompt, config.chosen, config.rejected, tools)
        _fields.check(rows, found.names, "task (choose columns with task.prompt, task.chosen and task.rejected)")
        return found

    def texts(self, rows: Rows) -> bool | None:
        """Whether prompt and answers are texts, by the first row that is a pair; None if the first 1,000 are none."""
        for place in range(min(LOOKED_AT, len(rows.dataset))):
            try:
                return isinstance(self.pair(rows.dataset[place]).chosen, str)
            except Unusable:
                continue
        return None

    def pair(self, row: Mapping[str, Any]) -> Pair:
        """Return the pair of a row; raise `Unusable`.

        Lists of messages: a prompt of text is a message of the user, an answer of text one of the assistant. Answers
        that begin with the prompt's messages are taken without them. Without a prompt column the prompt is the longest
        run of messages that both begin with.
        """
        prompt, chosen, rejected = (
            _fields.value(row, name) if name else "" for name in (self.prompt, self.chosen, self.rejected)
        )
        if chosen == rejected:
            raise Unusable(f"{self.chosen!r} and {self.rejected!r} are the same: there is nothing to prefer")
        given = {self.prompt: prompt, self.chosen: chosen, self.rejected: rejected}
        if all(isinstance(value, str) for value in given.values()):
            for name, value in given.items():
                if name and not value.strip():
                    raise Unusable(f"{name!r} is empty")
            return Pair(prompt, chosen, rejected)
        for name, value in given.items():
            if name and not isinstance(value, str | list):
                raise Unusable(f"{name!r} must be text or a list of messages, not {value!r}")
        begun = _messages.messages(prompt, self.prompt) if self.prompt else None
        answers = {name: _messages.messages(given[name], name, "assistant") for name in (self.chosen, self.rejected)}
        tools = _messages.tools(_fields.value(row, self.tools), self.tools) if self.tools else None
        begun, chosen, rejected = _parted(begun, answers)
        return Pair(begun, chosen, rejected, tools)


def _parted(begun: list[Message] | None, answers: dict[str, list[Message]]) -> Iterator[list[Message]]:
    """Yield the messages of the prompt, and what follows it on both sides; raise `Unusable`."""
    chosen, rejected = answers.values()
    size = 0
    if begun is None:
        while size < min(len(chosen), len(rejected)) and chosen[size] == rejected[size]:
            size += 1
        begun = chosen[:size]
    elif chosen[: len(begun)] == begun == rejected[: len(begun)]:
        size = len(begun)
    names = " and ".join(map(repr, answers))
    if not begun:
        raise Unusable(f"{names} have no message in common that they begin with: they answer different prompts")
    yield begun
    for name, messages in answers.items():
        if len(messages) == size:
            raise Unusable(f"{name!r} ends where its prompt ends: it is no answer")
        if messages[size]["role"] != "assistant":
            raise Unusable(
                f"{name!r} goes on after the prompt with a message of the role {messages[size]['role']!r}: an answer "
                "is the assistant's, and both are to the same prompt"
            )
        yield messages[size:]


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts around a text, and so around prompt and answer."""

    begin: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Frame:
        """Find it by trying. The end is EOS, or what an encoder's tokenizer ends with instead."""
        plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        first = next((at for at in range(len(whole)) if plain and whole[at : at + len(plain)] == plain), len(whole))
        end = tokenizer.eos_token_id
        return cls(tuple(whole[:first]), tuple(whole[first + len(plain) :]) if end is None else (end,))


def sequences(
    pairs: Sequence[Pair], tokenizer: Any, frame: Frame, template: _chat.Template | None
) -> Iterator[list[Marked] | str]:
    """Yield what the model reads of each pair, prompt + chosen and prompt + rejected answer, or what is wrong with it.

    Lists of messages are written by the template, and what the assistant writes after the prompt counts.
    """
    conversations = [
        Conversation([*pair.prompt, *answer], pair.tools, len(pair.prompt))
        for pair in pairs
        if isinstance(pair.chosen, list)
        for answer in (pair.chosen, pair.rejected)
    ]
    rendered = iter(_chat.render(tokenizer, template, conversations)) if template else iter(())
    texts = iter(_tokens([pair for pair in pairs if isinstance(pair.chosen, str)], tokenizer, frame))
    for pair in pairs:
        if isinstance(pair.chosen, str):
            yield next(texts)
            continue
        both = [next(rendered), next(rendered)]
        problem = next((each for each in both if isinstance(each, str)), None)
        yield problem or [(each.ids, [*map(int, each.learned)]) for each in both if not isinstance(each, str)]


def _tokens(pairs: Sequence[Pair], tokenizer: Any, frame: Frame) -> Iterator[list[Marked] | str]:
    """Yield prompt + chosen and prompt + rejected answer of pairs of texts in tokens, with what stands around them.

    The prompt's tokens are those that it has alone, as in generation, which knows no answer yet. An answer's are those
    that prompt + answer has behind them; where a token would reach over the boundary, those that the answer has alone.
    So this is what a model can have read and written, token by token. Each answer ends with the frame's end.
    """
    prompts = ids_of(tokenizer, [pair.prompt for pair in pairs])
    answers = []
    for texts in ([pair.chosen for pair in pairs], [pair.rejected for pair in pairs]):
        whole = ids_of(tokenizer, [pair.prompt + text for pair, text in zip(pairs, texts, strict=True)])
        alone = ids_of(tokenizer, texts)
        answers.append(
            [
                _ended(ids[len(prompt) :] if ids[: len(prompt)] == prompt else other, frame.end)
                for prompt, ids, other in zip(prompts, whole, alone, strict=True)
            ]
        )
    for pair, prompt, *both in zip(pairs, prompts, *answers, strict=True):
        read = [*frame.begin, *prompt]
        if pair.prompt and not read:
            yield "the tokenizer leaves nothing of the prompt"
            continue
        yield [([*read, *answer], [0] * len(read) + [1] * len(answer)) for answer in both]


def cut(both: list[Marked], max_length: int) -> list[Marked] | str:
    """Return two sequences cut at `max_length`, or why they are no pair then."""
    (chosen, _), (rejected, _) = both
    prompt = max(learned.index(1) for _, learned in both)
    if prompt >= max_length:
        return (
            f"the prompt has {prompt} tokens, so that data.max_length {max_length} leaves no token of an answer; raise "
            "it, or shorten the prompt"
        )
    if chosen == rejected:
        return "chosen and rejected answer are the same tokens: there is nothing to prefer"
    if chosen[:max_length] == rejected[:max_length]:
        return f"chosen and rejected answer are the same as far as data.max_length {max_length} reaches; raise it"
    return [(ids[:max_length], learned[:max_length]) for ids, learned in both]


def _ended(ids: list[int], end: tuple[int, ...]) -> list[int]:
    """Return tokens with the end, once: an author may have written it."""
    return ids if end and tuple(ids[-len(end) :]) == end else [*ids, *end]


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Return the tokens of texts, without any that the tokenizer adds."""
    if not texts:
        return []
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
    return ids
