"""A question with a long context → windows of tokens that overlap, and where characters lie in them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Offsets = list[tuple[int, int]]
"""For each token of a context the characters (from, to) of the raw text that it stands for, in Unicode code points."""


@dataclass(frozen=True)
class Pair:
    """One question and its whole context as a tokenizer gives them: what stands before the context, the context, and
    what stands after it."""

    columns: dict[str, list[int]]
    """input_ids and token_type_ids, if there are any, of all of it."""
    first: int
    """The place of the context's first token."""
    offsets: Offsets
    """Of the context's tokens."""

    @classmethod
    def of(cls, encoded: Any, place: int, context: str) -> Pair:
        """Return number `place` of a batch that a fast tokenizer has encoded whole, with offsets."""
        sides = encoded.sequence_ids(place)
        first, tokens = (sides.index(1), sides.count(1)) if 1 in sides else (len(sides), 0)
        columns = {name: encoded[name][place] for name in ("input_ids", "token_type_ids") if name in encoded}
        offsets = encoded["offset_mapping"][place][first : first + tokens]
        return cls(columns, first, _whole_characters(offsets, context))

    def room(self, max_length: int) -> int:
        """Return how many tokens of the context fit beside the question and the special tokens."""
        return max_length - (len(self.columns["input_ids"]) - len(self.offsets))

    def windows(self, room: int, stride: int) -> Iterator[range]:
        """Yield the tokens of the context that each window holds, `room` at most, each `stride` less than that on."""
        for start in range(0, len(self.offsets), max(1, room - stride)):
            yield range(start, min(start + room, len(self.offsets)))
            if start + room >= len(self.offsets):
                return

    def find(self, start: int, stop: int) -> range | None:
        """Return the tokens of the context that hold some of the characters `start` to `stop`; None if there are none.

        A piece may begin with the blank before a word, and several pieces may share one character: all are counted.
        """
        held = [token for token, (begin, end) in enumerate(self.offsets) if begin < stop and end > max(start, begin)]
        return range(held[0], held[-1] + 1) if held else None

    def window(
        self, window: range, spans: Sequence[range | None], context: str, classifier: int | None
    ) -> dict[str, Any]:
        """Return one window's features: all but the rest of the context, and the first of `spans` that it holds whole.

        Without one, start and end are the null position: the token `classifier`, or the first token.
        """
        start, stop = self.first + window.start, self.first + window.stop
        after = self.first + len(self.offsets)
        columns = {name: ids[: self.first] + ids[start:stop] + ids[after:] for name, ids in self.columns.items()}
        ids = columns["input_ids"]
        null = ids.index(classifier) if classifier in ids else 0
        held = (span for span in spans if span and window.start <= span.start and span.stop <= window.stop)
        span, shift = next(held, None), self.first - window.start
        begins, ends = (list(part) for part in zip(*self.offsets[window.start : window.stop], strict=True))
        return {
            **columns,
            "begins": begins,
            "ends": ends,
            "text": context[min(begins) : max(ends)],
            "null": null,
            "first": self.first,
            "start": span.start + shift if span else null,
            "end": span.stop - 1 + shift if span else null,
            "length": len(ids),
            "targets": 1,
        }


def _whole_characters(offsets: Offsets, text: str) -> Offsets:
    """Let tokens take in the combining marks behind them, which some tokenizers strip (accents, vowel signs)."""
    if text.isascii():
        return offsets
    whole = []
    for begin, end in offsets:
        while begin < end < len(text) and unicodedata.category(text[end]).startswith("M"):
            end += 1
        whole.append((begin, end))
    return whole


def answers(value: Any) -> tuple[list[Any], list[Any]] | None:
    """Return the texts and starts of a row's answers: {text: [...], answer_start: [...]}, or a list of such pairs.

    None for anything else. No answer may be spelt as empty texts alone, a start as 12.0 (from a column with gaps).
    """
    if isinstance(value, dict) and set(value) >= {"text", "answer_start"}:
        texts, starts = value["text"], value["answer_start"]
    elif isinstance(value, list) and all(isinstance(answer, dict) for answer in value):
        texts, starts = [answer.get("text") for answer in value], [answer.get("answer_start") for answer in value]
    else:
        return None
    if not (isinstance(texts, list) and isinstance(starts, list)):
        return None
    if texts and all(text == "" for text in texts):
        return [], []
    return texts, [int(start) if isinstance(start, float) and start.is_integer() else start for start in starts]


def misplaced(context: str, texts: Sequence[Any], starts: Sequence[Any]) -> str | None:
    """Say what is wrong with answers that should stand in the context at their starts, or None."""
    if len(texts) != len(starts):
        return f"has {len(texts)} texts and {len(starts)} starts"
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            return f"an answer must be text that is not empty, not {text!r}"
        if not isinstance(start, int) or isinstance(start, bool):
            return f"answer_start must be a whole number, not {start!r}"
        if start < 0 or context[start : start + len(text)] != text:
            place = context.find(text)
            there = repr(context[start : start + len(text)]) if 0 <= start < len(context) else "nothing"
            where = f"first at {place}" if place >= 0 else "nowhere in the context"
            return (
                f"the answer {_short(text)} does not stand at answer_start {start}: there stands {there[:80]}; the "
                f"answer stands {where} (characters are counted from 0, as Unicode code points)"
            )
    return None


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
