"""Conversations in tokens, by a chat template, and which of the tokens the assistant writes."""

from __future__ import annotations

import datetime
import json
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from data.errors import UserError, nearest
from train.tasks._chatml import CHATML
from train.tasks._messages import Conversation, Unusable, check_said
from train.tasks.base import require_fast

log = logging.getLogger("train")

Span = tuple[int, int]

BUILT_IN: Final = {"chatml": CHATML}
MARK: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")
CONTROL: Final = re.compile(r"<\|[^|<>\s]+\|>|<\w+_of_\w+>")
"""What is written in templates as if it were a token of its own."""
CLOCK: Final = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
DAY: Final = datetime.date(2024, 7, 26)
"""What templates that ask for the date are told (the one that Llama 3's name themselves): a run that is encoded on
another day is the same run."""
REMEDY: Final = (
    "give task.template a template that marks what the assistant writes with {% generation %} and {% endgeneration %}, "
    "the token that ends its turn inside"
)

PLAIN: Final = Conversation([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}])


class Rendered(NamedTuple):
    """A conversation as the model reads it."""

    ids: list[int]
    learned: list[bool]
    """For each token whether the assistant writes it: its turns with what ends them, without their headers."""
    text: str
    spans: list[Span]
    """The characters of `text` that are learned."""
    ends: list[int]
    """Where each token ends in `text`."""

    def bytes(self, last: int, end: str) -> int:
        """Return how many bytes the assistant writes up to token `last`, without the tokens `end`."""
        turns = (self.text[start : min(stop, self.ends[last])] for start, stop in self.spans)
        return sum(len(turn.replace(end, "").encode()) for turn in turns)


@dataclass(frozen=True)
class Template:
    """A chat template that a tokenizer can use, and `end`, the token that ends the assistant's turns."""

    text: str
    origin: str
    end: str
    special: tuple[str, ...] = field(repr=False)
    """Special and added tokens: those that a text is looked through for before anything else."""

    @property
    def marked(self) -> bool:
        """Whether the template itself says what the assistant writes."""
        return bool(MARK.search(self.text))

    def ending(self, text: str) -> str | None:
        """Return the token that a text ends with, the longest, if it does."""
        return max((token for token in self.special if text.endswith(token)), key=len, default=None)


def choose(tokenizer: Any, chosen: str | None, *, with_tools: bool = False) -> Template:
    """Return the template: the tokenizer's own, a built-in, or that of a file; and set it, to be exported.

    The token that ends the assistant's turns becomes the tokenizer's EOS, so that generation stops there. A template
    that the tokenizer cannot use is refused with the remedy (`UserError`).
    """
    require_fast(tokenizer, "a chat template", "to know which tokens the assistant writes")
    text, origin = _text(tokenizer, chosen, with_tools=with_tools)
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    special = tuple(sorted({token for token in (*added, *tokenizer.all_special_tokens) if token.strip()}))
    template = Template(text, origin, "", special)
    found = render(tokenizer, template, [PLAIN])[0]
    if isinstance(found, str):
        raise UserError(f"task.template: {origin} cannot be used: {found}")
    end = _end(tokenizer, template, found)
    if tokenizer.eos_token != end:
        tokenizer.eos_token = end
    if end in added and not added[end].special:  # or it would be shown in what is written
        tokenizer.add_tokens([end], special_tokens=True)
    tokenizer.chat_template = text
    return replace(template, end=end)


def _end(tokenizer: Any, template: Template, plain: Rendered) -> str:
    """Return the token that ends a turn, as `plain` shows it; raise `UserError` where nobody would learn to end one."""
    origin, written = template.origin, plain.text[slice(*plain.spans[-1])].rstrip()
    pieces = [token for token in dict.fromkeys(CONTROL.findall(plain.text)) if token not in template.special]
    add = f"add them with model.add_tokens: {json.dumps(pieces)}"
    end = template.ending(written)
    if not template.marked and (head := written.partition("Good morning")[0].strip()):
        question = PLAIN._replace(messages=PLAIN.messages[:1])
        if _jinja(tokenizer, template, question, ask=True) == _jinja(tokenizer, template, question):
            raise UserError(
                f"task.template: {origin} does not mark what the assistant writes, and has no prompt for its turn "
                f"(add_generation_prompt), so that {head!r} would be learned too; {REMEDY}"
            )
    if end is None and (last := next((token for token in pieces if written.endswith(token)), None)):
        raise UserError(
            f"task.template: {origin} ends a turn with {last!r}, which is no token of this tokenizer; {add}"
        )
    if end is None:
        raise UserError(
            f"task.template: with {origin} nobody would learn to end a turn: what the assistant writes is "
            f"{written!r}, and the last of it is no special token of this tokenizer; {REMEDY}"
        )
    if pieces and os.environ.get("RANK", "0") == "0":
        log.warning("task.template: %s writes %s, no tokens of this tokenizer; %s", origin, ", ".join(pieces), add)
    return end


def _text(tokenizer: Any, chosen: str | None, *, with_tools: bool) -> tuple[str, str]:
    """Return the text of the template that is meant, and its name in messages."""
    if chosen is None:
        if not tokenizer.chat_template:
            raise UserError(
                "task.template: this tokenizer has no chat template; set task.template=chatml (with "
                'model.add_tokens: ["<|im_start|>", "<|im_end|>"], if it lacks them), or to a .jinja file'
            )
        own: str = tokenizer.get_chat_template(None, tools=[{}] if with_tools else None)
        return own, "the tokenizer's template"
    if chosen in BUILT_IN:
        bos = tokenizer.bos_token_id
        begins = bos is not None and tokenizer([""])["input_ids"][0][:1] == [bos]  # as all texts that it has learned
        return ("{{- bos_token }}" if begins else "") + BUILT_IN[chosen], f"the template {chosen}"
    file = Path(chosen).expanduser()
    if not file.is_file():
        known = ", ".join(BUILT_IN)
        raise UserError(
            f"task.template: there is neither a built-in template nor a file {chosen!r} (looked from {Path.cwd()}); "
            f"built in: {known}{nearest(chosen, BUILT_IN)}"
        )
    return file.read_text(encoding="utf-8"), f"the template {file.name}"


def render(tokenizer: Any, template: Template, conversations: Sequence[Conversation]) -> list[Rendered | str]:
    """Return each conversation in tokens, with those that the assistant writes; or what makes it unusable.

    The template's text is tokenized as a whole, and nothing is added to it. What the assistant writes is what the
    template marks; of a template without marks, what comes after the text that asks for the turn, as far as that can be
    proved to be so (see `_proved`). A token belongs to a turn if any of its characters does.
    """
    written: list[tuple[str, list[Span]] | str] = []
    for conversation in conversations:
        try:
            written.append(_write(tokenizer, template, conversation))
        except Unusable as problem:
            written.append(str(problem))
    texts = [each[0] for each in written if not isinstance(each, str)]
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    given: Any = {"input_ids": [], "offset_mapping": []}
    if texts:
        given = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, **options)
    tokens = zip(given["input_ids"], given["offset_mapping"], strict=True)
    found: list[Rendered | str] = []
    for each in written:
        if isinstance(each, str):
            found.append(each)
            continue
        ids, offsets = next(tokens)
        if ids[:2] == [tokenizer.bos_token_id] * 2:
            found.append(f"the template begins it with two {tokenizer.bos_token!r}; {template.origin} should write one")
        else:
            text, spans = each
            found.append(Rendered(ids, _learned(offsets, spans), text, spans, [end for _, end in offsets]))
    return found


def ask(tokenizer: Any, template: Template, conversations: Sequence[Conversation]) -> list[list[int] | str]:
    """Return the tokens after which the assistant answers each conversation, or what makes it unusable."""
    found: list[list[int] | str] = []
    for conversation in conversations:
        try:
            text, _ = _jinja(tokenizer, template, conversation, ask=True)
            _check(tokenizer, template, conversation, text, ask=True)
            found.append(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        except Unusable as problem:
            found.append(str(problem))
    return found


def _learned(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return for each token whether it lies in a span, or reaches into it."""
    found, before, ahead = [], 0, list(reversed(spans))
    for start, end in offsets:
        start = before if start == end else start  # blanks alone, which some tokenizers leave out of the offsets
        while ahead and ahead[-1][1] <= start:
            ahead.pop()
        found.append(bool(ahead) and end > ahead[-1][0] and start < end)
        before = max(before, end)
    return found


def _write(tokenizer: Any, template: Template, conversation: Conversation) -> tuple[str, list[Span]]:
    """Return the text of a conversation, and where in it the assistant's turns are that are learned."""
    given, _, first = conversation
    turns = [place for place, message in enumerate(given) if message["role"] == "assistant"]
    if not any(place >= first for place in turns):
        roles = ", ".join(dict.fromkeys(message["role"] for message in given))
        raise Unusable(f"there is no turn of the assistant to learn: the roles are {roles}")
    if template.marked:
        text, spans = _jinja(tokenizer, template, conversation)
        spans = [span for span in spans if span[0] < span[1]]
        if len(spans) < len(turns) or (first and len(spans) != len(turns)):
            raise Unusable(f"the template marks {len(spans)} of the assistant's {len(turns)} turns")
        spans = spans if not first else [span for span, place in zip(spans, turns, strict=True) if place >= first]
    else:
        text, _ = _jinja(tokenizer, template, conversation)
        spans = [_proved(tokenizer, template, conversation, place, text) for place in turns if place >= first]
    _check(tokenizer, template, conversation, text, spans)
    return text, spans


def _proved(tokenizer: Any, template: Template, conversation: Conversation, place: int, text: str) -> Span:
    """Return where the turn `place` stands in the text of a template that does not mark it; raise `Unusable` unless
    that is sure.

    It begins where the text of all before it ends, with the prompt that asks for it: this must begin the whole text,
    and that of the conversation up to this turn. It ends with the special token at the end of the latter. In the whole
    text it is the same; or the end of it, where the template shortens earlier turns (as Qwen3's leaves out thoughts).
    """
    before = conversation._replace(messages=conversation.messages[:place])
    upto = conversation._replace(messages=conversation.messages[: place + 1])
    prompt = _jinja(tokenizer, template, before, ask=True)[0]
    alone = _jinja(tokenizer, template, upto)[0]
    start = len(prompt)
    why = f"the template does not mark what the assistant writes, and it cannot be told of message {place}"
    if not (alone.startswith(prompt) and text.startswith(prompt)):
        raise Unusable(f"{why}: with what comes after it the text before it is another one; {REMEDY}")
    turn = alone[start:].rstrip()
    end = template.ending(turn)
    if end is None:
        if place + 1 == len(conversation.messages) or text.startswith(alone):
            return start, start + len(alone[start:])
        raise Unusable(f"{why}: no special token ends it; {REMEDY}")
    if text.startswith(turn, start):
        return start, start + len(turn)
    stop = text.find(end, start) + len(end)
    if stop < start + len(end) or not turn.endswith(text[start:stop]):
        raise Unusable(f"{why}: it is written otherwise when others follow; {REMEDY}")
    return start, stop


def _check(
    tokenizer: Any, template: Template, given: Conversation, text: str, spans: Sequence[Span] = (), *, ask: bool = False
) -> None:
    """Raise `Unusable` for what a template leaves out without a word, as some do with messages of roles unknown."""
    check_said(given, text, spans)
    for place, message in enumerate(given.messages):
        if message["role"] in ("user", "assistant") or not message.get("content", "").strip():
            continue
        others = given._replace(messages=given.messages[:place] + given.messages[place + 1 :])
        try:
            without, _ = _jinja(tokenizer, template, others, ask=ask)
        except Unusable:  # it is missed
            continue
        if without == text:
            raise Unusable(f"the template leaves out message {place}: role {message['role']!r} is unknown to it")


def _jinja(
    tokenizer: Any, template: Template, conversation: Conversation, *, ask: bool = False
) -> tuple[str, list[Span]]:
    """Return what the template makes of a conversation, and the spans that it marks. `ask`: for the next turn."""
    import jinja2
    from transformers.utils import chat_template_utils

    render_template: Any = chat_template_utils.render_jinja_template
    fixed = CLOCK.sub(lambda found: repr(DAY.strftime(found[2])), template.text)
    try:
        texts, spans = render_template(
            [conversation.messages],
            tools=conversation.tools,
            chat_template=fixed,
            return_assistant_tokens_mask=template.marked,
            add_generation_prompt=ask,
            **tokenizer.special_tokens_map,
        )
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise Unusable(f"it is no Jinja: line {error.lineno}: {error.message}") from error
    except Exception as error:  # the template's own refusal, or code of it that does not expect such messages
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unusable(f"the template refuses it: {reason}") from error
    return texts[0], [(start, end) for start, end in spans[0]] if spans else []
