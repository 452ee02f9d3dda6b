"""Rows → conversations: messages, tools, and what is wrong with them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, NamedTuple

log = logging.getLogger("train")

MESSAGES: Final = ("messages", "conversations")
TOOLS: Final = "tools"

Message = dict[str, Any]


class Unusable(ValueError):
    """What is wrong with a row."""


class Conversation(NamedTuple):
    """What a row says."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    first: int = 0
    """The assistant's turns before this message are read, not learned."""


class Columns(NamedTuple):
    """Where a conversation stands in a row: in `messages`, or in `prompt` and `completion`; and the tools, if any."""

    messages: str | None
    prompt: str
    completion: str
    tools: str | None

    @classmethod
    def find(cls, config: Any, files: Sequence[Collection[str]]) -> Columns:
        """Return the columns that the config names, or the usual ones of the files' columns.

        Tools are read if any file has them: a file without must not pass for one that has none.
        """
        there = files[0]
        usual = next((name for name in MESSAGES if name in there), None)
        if config.prompt or config.completion or (usual is None and {"prompt", "completion"} <= set(there)):
            usual = None
        else:
            usual = usual or MESSAGES[0]
        described = config.tools or (TOOLS if any(TOOLS in names for names in files) else None)
        return cls(config.messages or usual, config.prompt or "prompt", config.completion or "completion", described)

    @property
    def all(self) -> tuple[str, ...]:
        """The columns that are read."""
        said = (self.messages,) if self.messages else (self.prompt, self.completion)
        return (*said, self.tools) if self.tools else said

    def conversation(self, row: Mapping[str, Any]) -> Conversation:
        """Return what a row says; raise `Unusable`."""
        described = tools(row[self.tools], self.tools) if self.tools else None
        if self.messages and isinstance(row[self.messages], str):
            raise Unusable(f"{self.messages!r} must be a list of messages, not {_short(row[self.messages])}")
        if self.messages:
            return Conversation(messages(row[self.messages], self.messages), described)
        prompt = messages(row[self.prompt], self.prompt)
        completion = messages(row[self.completion], self.completion, "assistant")
        return Conversation([*prompt, *completion], described, first=len(prompt))

    def question(self, row: Mapping[str, Any]) -> Conversation:
        """Return what a row asks the assistant; raise `Unusable`."""
        name = self.messages or self.prompt
        return unanswered(row[name], name, tools(row[self.tools], self.tools) if self.tools else None)


def tools_asked(known: str | None, files: Sequence[Collection[str]]) -> str | None:
    """Return the column of tools of rows that are to be answered, if any file has it: `known`, that of training.

    It is said if there is one of the usual name that is not read.
    """
    if any(known in names for names in files):
        return known
    if any(TOOLS in names for names in files) and os.environ.get("RANK", "0") == "0":
        remedy = (
            "none was read in training" if known is None else f"in training it was {known!r}: --column {known}=tools"
        )
        log.warning("the column %r is not read; %s", TOOLS, remedy)
    return None


def unanswered(value: Any, name: str, tools: list[dict[str, Any]] | None) -> Conversation:
    """Return a conversation without the turn of the assistant's that it ends with, if it does; raise `Unusable`."""
    given = messages(value, name)
    while given and given[-1]["role"] == "assistant":
        given.pop()
    if not given:
        raise Unusable(f"{name!r} holds nothing that the assistant could answer")
    return Conversation(given, tools)


def messages(value: Any, name: str, role: str = "user") -> list[Message]:
    """Return the messages of a row's column: a list of them, or a text, which is one message of that role.

    Keys without a value are left out: a column's rows all have the keys of any of them. Arguments of tool calls that
    are JSON are read, and a message of role `tool_call` becomes the assistant's call, as templates expect it. Raises
    `Unusable`.
    """
    if isinstance(value, str):
        if not value.strip():
            raise Unusable(f"{name!r} is empty")
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise Unusable(f"{name!r} must be a list of messages, not {_short(value)}")
    if not value:
        raise Unusable(f"{name!r} is empty")
    return [_message(_without_none(each), f"message {place} of {name!r}") for place, each in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Unusable(f"{where} must have a role and a content, not {_short(message)}")
    if message["role"] == "tool_call":
        content = message.get("content")
        calls = _json(content) if isinstance(content, str) else None
        message = {"role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
        if not all(isinstance(call, dict) and "name" in call for call in message["tool_calls"]):
            raise Unusable(f"{where} has role tool_call, but is no JSON with a name and arguments: {_short(content)}")
    calls = message.get("tool_calls") or []
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise Unusable(f"{where}: content must be text, not {_short(content)}")
    if content is None and not calls:
        raise Unusable(f"{where} has no content")
    if message["role"] == "assistant" and not calls and not str(content).strip():
        raise Unusable(f"{where}, the assistant's, is empty")
    found = {key: kept for key, kept in message.items() if key != "tool_calls"}
    return {**found, "tool_calls": [_call(call, where) for call in calls]} if calls else found


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable(f"{where}: a tool call must have a name and arguments, not {_short(call)}")
    arguments = function.get("arguments", {})
    read = _json(arguments) if isinstance(arguments, str) else arguments
    function = {**function, "arguments": read if isinstance(read, dict) else arguments}
    outside = {key: value for key, value in call.items() if key not in function} if "function" in call else {}
    return {"type": "function", **outside, "function": function}


def tools(value: Any, name: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row, in the form {"type": "function", "function": {...}}; None where it has none.

    They come as a list, or as JSON of one. Raises `Unusable`.
    """
    found = _json(value) if isinstance(value, str) and value.strip() else _without_none(value or None)
    if found in (None, []):
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise Unusable(f"{name!r} must be a list of tools, or JSON of one, not {_short(value)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]


def check_said(conversation: Conversation, text: str, spans: Sequence[tuple[int, int]]) -> None:
    """Raise `Unusable` for what a template leaves out of its text without a word: tools, calls or contents of a form
    that it does not know. What the assistant says must stand in its own turn (`spans` of `text`).

    Of thoughts (up to </think>) templates may do as they like.
    """
    for tool in conversation.tools or ():
        function = tool.get("function")
        if isinstance(function, dict) and str(function.get("name", "")) not in text:
            raise Unusable(f"the template leaves out the tools: it does not know {function['name']!r}")
    given = conversation.messages
    turns = [place for place in range(conversation.first, len(given)) if given[place]["role"] == "assistant"]
    own = dict(zip(turns, spans, strict=True)) if len(turns) == len(spans) else {}
    for place, message in enumerate(given):
        if message["role"] in ("user", "assistant"):
            shown = text[slice(*own[place])] if place in own else text
            parts = [message.get("content", "").rpartition("</think>")[2].strip()]
            parts += [call["function"]["name"] for call in message.get("tool_calls", ())]
            if missing := next((part for part in parts if part not in shown), None):
                raise Unusable(f"the template leaves out what message {place} says: {_short(missing)}")


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(each) for key, each in value.items() if each is not None}
    return [_without_none(each) for each in value] if isinstance(value, list) else value


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _short(value: Any) -> str:
    return text if len(text := repr(value)) < 100 else f"{text[:100]}..."
