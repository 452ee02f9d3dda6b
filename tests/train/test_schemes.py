"""Entities out of tags, against the package seqeval, and which scheme a set of tags is of."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Sequence

import pytest
from seqeval.metrics.sequence_labeling import get_entities  # type: ignore[import-untyped]
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES, Tokens  # type: ignore[import-untyped]

from train.schemes import LETTERS, Scheme, detect, entities, fits

CASES = 2000
TYPES = ("PER", "LOC", "creative-work")
THEIRS = {"iob1": IOB1, "iob2": IOB2, "bioes": IOBES, "bilou": BILOU, "bmes": IOBES}


def random_tags(generator: random.Random, letters: str) -> list[str]:
    """Tags in no order, or nearly right ones."""
    size, careless = generator.randint(1, 12), generator.random()
    tags: list[str] = []
    for _ in range(size):
        if tags and tags[-1] != "O" and generator.random() > careless:
            tags.append(f"I{tags[-1][1:]}")
        else:
            tags.append(generator.choice(["O", *(f"{letter}-{kind}" for letter in letters for kind in TYPES)]))
    return tags


def test_lenient_entities_are_those_of_seqeval() -> None:
    generator, seen = random.Random(0), Counter[int]()
    for _ in range(CASES):
        tags = random_tags(generator, generator.choice(("I", "BI", "BIES")))
        expected = [(kind, first, last + 1) for kind, first, last in get_entities(tags)]
        assert entities(tags) == expected, tags
        seen[len(expected)] += 1
    assert seen[0] > 20 and sum(count * seen[count] for count in seen) > CASES


@pytest.mark.parametrize("scheme", LETTERS)
def test_strict_entities_are_those_of_seqeval(scheme: Scheme) -> None:
    generator, found, malformed = random.Random(scheme), 0, 0
    for _ in range(CASES):
        tags = random_tags(generator, LETTERS[scheme])
        theirs = [tag.replace("M-", "I-", 1) for tag in tags]  # the package has no BMES: it is IOBES with an M
        expected = [(entity.tag, entity.start, entity.end) for entity in Tokens(theirs, THEIRS[scheme]).entities]
        assert entities(tags, scheme) == expected, tags
        found += len(expected)
        malformed += expected != entities(tags)
    assert found > CASES // 2 and malformed > CASES // 10


def test_bilou_is_bioes_with_other_letters() -> None:
    generator = random.Random(1)
    for _ in range(CASES):
        tags = random_tags(generator, "BILU")
        other = [tag.replace("L-", "E-", 1).replace("U-", "S-", 1) if tag[1:2] == "-" else tag for tag in tags]
        assert entities(tags) == entities(other)
        assert entities(tags, "bilou") == entities(other, "bioes")


def spell(spans: Sequence[tuple[str, int, int]], size: int, scheme: Scheme) -> list[str]:
    """Return the tags of entities, written by the rules of a scheme."""
    tags = ["O"] * size
    for kind, first, end in spans:
        for place in range(first, end):
            letter = "B" if place == first else "I"
            if scheme == "iob1" and letter == "B":
                letter = "B" if first and tags[first - 1][2:] == kind else "I"
            elif scheme in ("bioes", "bilou", "bmes") and place == end - 1:
                letter = {"B": "U", "I": "L"}[letter] if scheme == "bilou" else {"B": "S", "I": "E"}[letter]
            elif scheme == "bmes" and letter == "I":
                letter = "M"
            tags[place] = f"{letter}-{kind}"
    return tags


def test_every_scheme_spells_the_same_entities_and_is_recognised() -> None:
    generator = random.Random(2)
    written: dict[Scheme, list[list[str]]] = {scheme: [] for scheme in LETTERS}
    for _ in range(200):
        spans, place = [], generator.randint(0, 2)
        while place < 10:
            end = place + generator.randint(1, 3)
            spans.append((generator.choice(TYPES), place, end))
            place = end + generator.choice((0, 0, 1, 2))
        for scheme, sentences in written.items():
            sentences.append(spell(spans, 14, scheme))
            assert entities(sentences[-1]) == entities(sentences[-1], scheme) == spans
    for scheme, sentences in written.items():
        assert detect({tag for tags in sentences for tag in tags}, sentences) == scheme


def test_sets_of_tags() -> None:
    assert detect(["O", "I-PER"], [["I-PER", "O"]]) == "iob1"
    assert detect(["O", "B-PER"], [["B-PER", "O"]]) == "iob2"
    assert detect(["O", "B", "I"], [["B", "I"]]) == "iob2"
    assert entities(["O", "B", "I", None, "I"]) == [("_", 1, 3), ("_", 4, 5)]
    mostly = [["O", "B-PER", "I-PER"], ["B-PER"], ["I-PER"]]  # a slip does not make it another scheme
    assert detect(["O", "B-PER", "I-PER"], mostly) == "iob2"
    for names in (
        ["NOUN", "VERB"],
        ["O"],
        ["O", "PER"],
        ["B-PER", "I-PER", "E-PER", "U-PER"],
        ["O", "BPER"],
        ["O", ""],
    ):
        assert detect(names, []) is None
    assert fits(["B-PER"], "BI") and not fits(["E-PER"], "BI")


def test_seqeval_warns_of_nothing_we_accept() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_entities(["B", "I", "O"]) == [("_", 0, 1)]
