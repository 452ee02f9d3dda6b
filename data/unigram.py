"""A unigram vocabulary from counted words: the same pieces and scores, to the last bit, on any machine.

The method is that of Kudo, https://arxiv.org/abs/1804.10959: many frequent substrings, expectation maximization, and
those pieces dropped whose loss costs the likelihood least. The trainer of `tokenizers` gives another vocabulary each
time: it sums in the order of a hash table. Here every sum has one order, and only + - × ÷ are used, which all machines
round alike; so there is a logarithm of our own.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError

LONGEST_PIECE = 16  # characters
LONGEST_WORD = 24  # characters; longer ones are learned from in parts, so that no product of probabilities underflows
WORDS = 300_000  # the most frequent words are learned from: at most 1 GB and a minute
SEEDS = 10  # pieces at first, for each of those asked for
SHRINK = 0.75  # of the pieces stay each round

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


def shorten(counts: Counter[str], limit: int = WORDS) -> Counter[str]:
    """Return the `limit` most frequent words, and the characters that no other holds as words that occurred once.

    Of equally frequent words a checksum decides, not the alphabet.
    """
    if len(counts) <= limit:
        return counts
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], zlib.crc32(entry[0].encode()), entry[0]))
    kept = Counter(dict(ranked[:limit]))
    kept.update(sorted(set().union(*counts) - set().union(*kept)))
    return kept


def train(counts: Counter[str], size: int) -> list[tuple[str, float]]:
    """Return at most `size` pieces and their natural log probabilities, the most probable first.

    Every character of the words is among them. Raises `UserError` where they alone are more than `size`.
    """
    parts: Counter[str] = Counter()
    for word, count in counts.items():
        for start in range(0, len(word), LONGEST_WORD):
            parts[word[start : start + LONGEST_WORD]] += count
    alphabet = len(set().union(*parts))
    if alphabet > size:
        raise UserError(f"the text has {alphabet:,} different characters, and each needs a place of its own")
    lattice = _lattice(shorten(parts), SEEDS * size)
    single = lattice.lengths == 1
    weights = lattice.seeds
    while True:
        for _ in range(2):
            expected = lattice.expected(weights / fsum(weights))
            # The digamma function of the Bayesian variant, to the first term: exp(digamma(c)) = c - 1/2 + O(1/c)
            weights = np.where(expected >= 0.5, np.maximum(expected - 0.5, 0.05), 0.0)
            weights[single] = np.maximum(weights[single], 0.05)
        there = int(np.count_nonzero(weights))
        if there <= size:
            break
        loss = expected * _log_ratio(weights / fsum(weights), lattice)
        loss[single] = np.inf
        loss[weights == 0] = -np.inf
        kept = np.argsort(-loss, kind="stable")[: max(size, int(SHRINK * there))]
        weights = np.where(np.isin(np.arange(len(weights)), kept), weights, 0.0)
    scores = _log(weights[weights > 0] / fsum(weights))
    found = [lattice.text(piece) for piece in np.flatnonzero(weights).tolist()]
    return sorted(zip(found, scores.tolist(), strict=True), key=lambda entry: (-entry[1], entry[0]))


@dataclass(frozen=True)
class _Lattice:
    """All ways to cut all words into pieces. The words stand one after the other, the longest first.

    `pieces[l - 1]` is, for each position, the piece of l characters that begins there, or `len(lengths)` for none.
    """

    characters: str
    starts: Places
    """Of each word (W,), the longest first."""
    word_lengths: Places
    counts: Floats
    """Of each word (W,)."""
    pieces: list[Places]
    lengths: Places
    """Of each piece (P,), in characters."""
    first: Places
    """Of each piece (P,), one position where it stands."""
    seeds: Floats
    """Of each piece (P,), how often it stands in the words."""

    def text(self, piece: int) -> str:
        return self.characters[self.first[piece] : self.first[piece] + self.lengths[piece]]

    def expected(self, probabilities: Floats) -> Floats:
        """Return how often each piece is expected (P,), over all ways to cut each word, weighted by probability."""
        chances = np.append(probabilities, 0.0)
        before, after = self._sums(chances)
        total = before[self._ends()]
        per_position = np.repeat(self.counts / total, self.word_lengths)
        word = np.repeat(np.arange(len(self.starts)), self.word_lengths)
        expected = np.zeros(len(chances))
        place = np.arange(len(self.characters)) + word  # sums have one more place a word than characters
        for length, pieces in enumerate(self.pieces, 1):
            here = np.flatnonzero(pieces < len(probabilities))
            share = before[place[here]] * chances[pieces[here]] * after[place[here] + length] * per_position[here]
            expected += np.bincount(pieces[here], weights=share, minlength=len(chances))
        return expected[:-1]

    def _ends(self) -> Places:
        return self.starts + np.arange(len(self.starts)) + self.word_lengths

    def _sums(self, chances: Floats) -> tuple[Floats, Floats]:
        """Return the probability of all ways up to each place between characters, and of all ways from there on."""
        before, after = np.zeros((2, len(self.characters) + len(self.starts)))
        begin = self.starts + np.arange(len(self.starts))
        before[begin] = after[self._ends()] = 1.0
        for place in range(1, int(self.word_lengths[0]) + 1):
            words = int(np.searchsorted(-self.word_lengths, -place, side="right"))  # those that are long enough
            starts, begins, ends = self.starts[:words], begin[:words], self._ends()[:words]
            last = starts + self.word_lengths[:words]
            for length, pieces in enumerate(self.pieces[:place], 1):
                before[begins + place] += before[begins + place - length] * chances[pieces[starts + place - length]]
                after[ends - place] += after[ends - place + length] * chances[pieces[last - place]]
        return before, after


def _lattice(counts: Counter[str], seeds: int) -> _Lattice:
    """Find the characters, and the substrings (at least twice there) that take most of the text: `seeds` in all."""
    words = sorted(counts, key=lambda word: (-len(word), word))
    characters = "".join(words)
    sizes = np.array([len(word) for word in words], dtype=np.int64)
    weights = np.array([counts[word] for word in words], dtype=np.float64)
    remaining = np.concatenate([np.arange(size, 0, -1) for size in sizes])
    per_position = np.repeat(weights, sizes)
    codes = np.frombuffer(characters.encode("utf-32-le"), dtype=np.uint32)
    alphabet = np.unique(codes, return_inverse=True)[1].astype(np.int64)
    letters = int(alphabet.max()) + 1
    names, there, found = [alphabet], np.arange(len(alphabet)), 0  # each substring's number, by its first position
    first, often, lengths = [], [], []
    for length in range(1, LONGEST_PIECE + 1):
        here = there[remaining[there] >= length]
        keys = alphabet[here] if length == 1 else names[-1][here] * letters + alphabet[here + length - 1]
        places, numbers = np.unique(keys, return_index=True, return_inverse=True)[1:]
        counted = np.bincount(numbers, weights=per_position[here]).astype(np.float64)
        kept = counted >= (2 if length > 1 else 0)
        if not kept.any():
            break
        named = np.full(len(alphabet), -1, dtype=np.int64)
        named[here] = np.where(kept[numbers], found + np.cumsum(kept)[numbers] - 1, -1)
        names, there, found = [*names, named], here[kept[numbers]], found + int(kept.sum())
        first.append(here[places][kept])
        often.append(counted[kept])
        lengths.append(np.full(int(kept.sum()), length))
    spans, sums, positions = np.concatenate(lengths), np.concatenate(often), np.concatenate(first)
    share = np.where(spans == 1, np.inf, sums * spans)
    chosen = np.sort(np.lexsort((positions, spans, -share))[: max(seeds, letters)])
    number = np.full(found + 1, len(chosen), dtype=np.int64)  # the last, which -1 finds: none
    number[chosen] = np.arange(len(chosen))
    pieces, starts = [number[named] for named in names[1:]], np.cumsum(sizes) - sizes
    return _Lattice(characters, starts, sizes, weights, pieces, spans[chosen], positions[chosen], sums[chosen])


def _log_ratio(probabilities: Floats, lattice: _Lattice) -> Floats:
    """Return the log of how much more probable each piece (P,) is than the best way to spell it with others."""
    chances = np.append(probabilities, 0.0)
    last = len(lattice.characters) - 1
    best = np.zeros((LONGEST_PIECE + 1, len(probabilities)))
    best[0] = 1.0
    for place in range(1, LONGEST_PIECE + 1):
        for length, pieces in enumerate(lattice.pieces[:place], 1):
            chance = chances[pieces[np.minimum(lattice.first + place - length, last)]]
            if length == place:
                chance[lattice.lengths == length] = 0.0  # itself
            best[place] = np.maximum(best[place], best[place - length] * chance)
    spelled = best[lattice.lengths, np.arange(len(probabilities))]
    known = (probabilities > 0) & (spelled > 0)
    return np.where(known, _log(np.where(known, probabilities, 1.0)) - _log(np.where(known, spelled, 1.0)), 0.0)


def _log(values: Floats) -> Floats:
    """Return the natural logarithm to 1e-15, by + - × ÷ alone: those of C libraries differ in the last bit."""
    fraction, exponent = np.frexp(values)
    low = fraction < 0.7071067811865476
    fraction, exponent = np.where(low, fraction * 2, fraction), exponent - low
    ratio = (fraction - 1) / (fraction + 1)  # log(fraction) = 2 artanh(ratio), and |ratio| < 0.172
    square, series = ratio * ratio, np.zeros_like(ratio)
    for power in range(21, 0, -2):
        series = series * square + 1 / power
    return np.asarray(exponent * 0.6931471805599453 + 2 * ratio * series)
