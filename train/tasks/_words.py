"""Words and their pieces: which piece is of which word, and long rows cut into windows or consecutive parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError


def owners_of(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the word of each piece (pieces,), and the first piece of each word (words,), -1 where it has none.

    A piece is of the word that its last character is of; one of blanks alone, of the word that comes next.
    """
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    starts = ends - [len(word) for word in words]
    span = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    last = span[:, 1] - 1
    owners = np.searchsorted(ends, last, "right")  # the first word that ends behind it
    real = (last >= span[:, 0]) & (owners < len(words)) & (last >= starts[np.minimum(owners, len(words) - 1)])
    firsts = np.full(len(words), -1)
    places = np.flatnonzero(real)
    firsts[owners[places][::-1]] = places[::-1]
    following = np.searchsorted(places, np.arange(len(span)))
    if not len(places):
        return np.zeros(0, dtype=np.int64), firsts
    return owners[places][np.minimum(following, len(places) - 1)], firsts


def numbered(
    text: str, numbers: Sequence[int | None], spans: Sequence[tuple[int, int]], free: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """Return for each token the word it belongs to, (T,), from 0; -1 where a piece of the word may not be hidden.

    Words are what the tokenizer splits text into before it makes pieces, and end at blanks too, where a tokenizer
    (some of sentencepiece's) does not split there.
    """
    words = np.full(len(numbers), -1)
    word, before, start, stop = -1, None, 0, 0
    for place, (number, (begin, end)) in enumerate(zip(numbers, spans, strict=True)):
        if number is None:
            continue
        after_blank = text[begin : begin + 1].isspace() or text[max(0, begin - 1) : begin].isspace()
        if number != before or (after_blank and begin >= stop and not text[start:stop].isspace()):
            word += 1
        words[place], before, start, stop = word, number, begin, end
    return np.where(np.isin(words, words[~free]), -1, words)


@dataclass(frozen=True)
class Window:
    """Words `first` to `end` (not with it) of a row, and those of them that are judged here."""

    first: int
    end: int
    judged: NDArray[np.int64]


def windows(sizes: NDArray[np.int64], room: int, overlap: int) -> list[Window]:
    """Cover words of so many pieces, none more than `room`, by windows of at most `room` that share about `overlap`.

    Each word is judged in one window: where the nearer of the two cuts beside it is farthest, in pieces. The ends of
    the row are no cuts.
    """
    total, words = np.concatenate([[0], np.cumsum(sizes)]), len(sizes)
    first, end = 0, int(np.searchsorted(total, room, "right")) - 1
    spans = [(first, end)]
    while end < words:
        kept = max(total[end] - overlap, total[end + 1] - room)  # the next word must fit
        first = max(first + 1, int(np.searchsorted(total, kept)))
        end = int(np.searchsorted(total, total[first] + room, "right")) - 1
        spans.append((first, end))
    best, where = np.full(words, -1.0), np.zeros(words, dtype=np.int64)
    for number, (first, end) in enumerate(spans):
        left = total[first:end] - total[first] + (0 if first else np.inf)
        right = total[end] - total[first + 1 : end + 1] + (0 if end < words else np.inf)
        context = np.minimum(left, right)
        where[first:end][context > best[first:end]] = number
        best[first:end] = np.maximum(best[first:end], context)
    found = [Window(first, end, first + np.flatnonzero(where[first:end] == number))
             for number, (first, end) in enumerate(spans)]  # fmt: skip
    return [window for window in found if len(window.judged) or not words]


def cuts(special: NDArray[np.bool_], max_length: int) -> Iterator[NDArray[np.int64]]:
    """Yield the places of the tokens of each example: consecutive ones of the text, within those that the model adds.

    `special` (T,) says which tokens of a whole text the tokenizer has added at its ends. (The tokenizer would cut, too,
    but some versions drop the rest: https://github.com/huggingface/tokenizers/issues/2091.)
    """
    inner = np.flatnonzero(~special)
    if not len(inner):
        return
    before, after = np.arange(inner[0]), np.arange(inner[-1] + 1, len(special))
    room = max_length - len(before) - len(after)
    if room < 1:
        raise UserError(f"data.max_length: {max_length} leaves no room beside the tokens that the model adds to a text")
    for start in range(0, len(inner), room):
        yield np.concatenate([before, inner[start : start + room], after])
