"""The reviews that ship with the project."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from benchmarks import tfidf

FOLDER = Path(__file__).parents[2] / "data" / "samples" / "reviews"
SPLITS = ("train", "validation")

Trigrams = set[tuple[str, ...]]


def reviews(split: str) -> list[dict[str, str]]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def trigrams(text: str) -> Trigrams:
    words = re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def test_there_are_enough_and_all_have_text_label_and_domain() -> None:
    found = {split: reviews(split) for split in SPLITS}
    assert sum(map(len, found.values())) >= 1200
    assert len(found["validation"]) >= 200
    for review in [*found["train"], *found["validation"]]:
        assert set(review) == {"text", "label", "domain"}
        assert review["text"] == review["text"].strip()


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_balanced(split: str) -> None:
    counts = Counter(review["label"] for review in reviews(split))
    assert set(counts) == {"positive", "negative"}
    assert all(0.45 <= count / counts.total() <= 0.55 for count in counts.values())


@pytest.mark.parametrize("split", SPLITS)
def test_lengths_vary_between_5_and_120_words(split: str) -> None:
    lengths = [len(review["text"].split()) for review in reviews(split)]
    assert min(lengths) >= 5
    assert max(lengths) <= 120
    assert max(lengths) >= 60


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_a_dozen_domains_with_both_labels(split: str) -> None:
    labels = defaultdict(set)
    for review in reviews(split):
        labels[review["domain"]].add(review["label"])
    assert sum(len(both) == 2 for both in labels.values()) >= 12


def test_no_review_is_nearly_another_across_splits() -> None:
    train = [trigrams(review["text"]) for review in reviews("train")]
    places = defaultdict(set)
    for number, grams in enumerate(train):
        for gram in grams:
            places[gram].add(number)
    for review in reviews("validation"):
        grams = trigrams(review["text"])
        for number in set().union(*(places[gram] for gram in grams if gram in places)):
            likeness = len(grams & train[number]) / len(grams | train[number])
            assert likeness < 0.4, review["text"]


def test_no_text_stands_twice() -> None:
    texts = [" ".join(re.findall(r"\w+", review["text"].lower())) for split in SPLITS for review in reviews(split)]
    assert len(set(texts)) == len(texts)


def test_counting_words_is_not_enough() -> None:
    """The quickstart's header says 0.9275 for the model: at least five points above the best simple baseline."""
    folder = "package:data/samples/reviews"
    assert tfidf.main(f"{folder}/train.jsonl", f"{folder}/validation.jsonl") <= 0.87
