"""A unigram vocabulary: its expectations against all ways to cut a word, its logarithm, and the same bits anywhere."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from data import unigram
from data.errors import UserError

REVIEWS = Path(__file__).parents[2] / "data" / "samples" / "reviews" / "train.jsonl"
counted = some.dictionaries(some.text("abc", min_size=1, max_size=7), some.integers(1, 9), min_size=1, max_size=6)


def reviews() -> Counter[str]:
    lines = REVIEWS.read_text(encoding="utf-8").splitlines()
    return Counter(f"▁{word}" for line in lines for word in json.loads(line)["text"].split(" "))


def cuts(word: str, chances: dict[str, float]) -> Iterator[tuple[list[str], float]]:
    """Yield every way to cut a word into known pieces, with its probability."""
    if not word:
        yield [], 1.0
    for end in range(1, len(word) + 1):
        if word[:end] in chances:
            for rest, chance in cuts(word[end:], chances):
                yield [word[:end], *rest], chances[word[:end]] * chance


@given(counted, some.integers(0, 2**32))
def test_expectations_are_those_over_all_ways_to_cut_every_word(words: dict[str, int], seed: int) -> None:
    lattice = unigram._lattice(Counter(words), 50)
    pieces = [lattice.text(piece) for piece in range(len(lattice.lengths))]
    assert len(set(pieces)) == len(pieces) and set("".join(words)) <= set(pieces)
    weights = np.random.default_rng(seed).random(len(pieces)) + 0.01
    chances = dict(zip(pieces, weights / weights.sum(), strict=True))
    expected = dict.fromkeys(pieces, 0.0)
    for word, count in words.items():
        ways = list(cuts(word, chances))
        total = math.fsum(chance for _, chance in ways)
        for way, chance in ways:
            for piece in way:
                expected[piece] += count * chance / total
    found = lattice.expected(weights / weights.sum())
    assert found.tolist() == pytest.approx([expected[piece] for piece in pieces], abs=1e-9)


@given(counted, some.integers(0, 2**32))
def test_a_piece_is_compared_with_the_best_way_to_spell_it(words: dict[str, int], seed: int) -> None:
    lattice = unigram._lattice(Counter(words), 50)
    pieces = [lattice.text(piece) for piece in range(len(lattice.lengths))]
    weights = np.random.default_rng(seed).random(len(pieces)) + 0.01
    chances = dict(zip(pieces, weights / weights.sum(), strict=True))
    ratios = unigram._log_ratio(weights / weights.sum(), lattice)
    for piece, ratio in zip(pieces, ratios.tolist(), strict=True):
        others = [chance for way, chance in cuts(piece, chances) if way != [piece]]
        assert ratio == pytest.approx(math.log(chances[piece] / max(others)) if others else 0.0, abs=1e-9)


@given(some.floats(1e-300, 1e300))
def test_the_logarithm_is_right(value: float) -> None:
    assert unigram._log(np.array([value]))[0] == pytest.approx(math.log(value), rel=1e-15, abs=1e-15)


def test_the_vocabulary_is_the_same_to_the_last_bit_everywhere() -> None:
    """This digest stands for every machine: no C library's exp or log, no order of a hash table is in it."""
    pieces = unigram.train(reviews(), 1_000)
    assert len(pieces) == 1_000 and len(dict(pieces)) == 1_000
    assert set().union(*reviews()) <= set(dict(pieces))
    assert math.fsum(math.exp(score) for _, score in pieces) == pytest.approx(1.0)
    digest = hashlib.sha256(repr(pieces).encode()).hexdigest()
    assert digest.startswith("d63a75bc26b72465"), digest


def test_it_needs_no_more_tokens_than_that_of_the_library() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = [json.loads(line)["text"] for line in REVIEWS.read_text(encoding="utf-8").splitlines()[:300]]
    counts = Counter(f"▁{word}" for text in texts for word in text.split(" "))
    theirs = Tokenizer(models.Unigram())
    ours = Tokenizer(models.Unigram([("?", 0.0), *unigram.train(counts, 999)], unk_id=0))
    theirs.pre_tokenizer = ours.pre_tokenizer = pre_tokenizers.Metaspace()
    theirs.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=1_000, unk_token="?", special_tokens=["?"], show_progress=False)
    )
    lengths = [sum(len(each.encode(text)) for text in texts) for each in (ours, theirs)]
    assert lengths[0] <= lengths[1]


def test_too_many_characters_are_counted_and_rare_words_lose_none() -> None:
    with pytest.raises(UserError, match="5 different characters"):
        unigram.train(Counter(["abc", "de"]), 4)
    words = Counter({"aaa": 5, "aab": 2, "xyz": 1, "abz": 1})
    kept = unigram.shorten(words, 2)
    assert kept == {"aaa": 5, "aab": 2, "x": 1, "y": 1, "z": 1}
    assert unigram.shorten(words) is words


def test_long_words_do_not_underflow() -> None:
    pieces = unigram.train(Counter({"ab" * 5_000: 1, "c" * 3_000: 10**9, "d": 1}), 40)
    assert {"a", "b", "c", "d"} <= set(dict(pieces)) and all(math.isfinite(score) for _, score in pieces)
