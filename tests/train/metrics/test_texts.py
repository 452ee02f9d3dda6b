"""Figures of written texts: those of sacreBLEU and rouge-score on random cases, whatever the order."""

from __future__ import annotations

import random
from typing import Any

import pytest
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
from sacrebleu import corpus_bleu, corpus_chrf

from data.errors import UserError
from train import metrics

CASES = 1000
WORDS = ["the", "The", "cat", "sat", "on", "a", "mat.", "it's", "42", "über", "x-y", "–", "猫", "(so)"]


def text(generator: random.Random) -> str:
    lines = generator.randint(1, 3)
    return "\n".join(" ".join(generator.choices(WORDS, k=generator.randint(0, 9))) for _ in range(lines))


def figures(predictions: list[str], references: list[str], *entries: Any) -> dict[str, float]:
    loaded = [metrics.load(metrics.parse(entry)) for entry in entries]
    return metrics.compute(loaded, {"predictions": predictions, "references": references}, "texts")


def test_rouge_is_that_of_rouge_score() -> None:
    generator, names = random.Random(0), ("rouge1", "rouge2", "rougeL", "rougeLsum")
    scorer, seen = RougeScorer(names), 0
    for _ in range(CASES):
        prediction, reference = text(generator), text(generator)
        theirs = {name: score.fmeasure for name, score in scorer.score(reference, prediction).items()}
        assert figures([prediction], [reference], "rouge") == pytest.approx(theirs, abs=1e-12)
        seen += theirs["rougeL"] != theirs["rougeLsum"]
    assert seen > CASES // 20


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    generator, seen = random.Random(1), 0
    for _ in range(CASES):
        size = generator.randint(1, 8)
        predictions, references = ([text(generator) for _ in range(size)] for _ in range(2))
        predictions[0] = references[0] if generator.random() < 0.5 else predictions[0]
        found = figures(predictions, references, "bleu", "chrf")
        assert found["bleu"] == pytest.approx(corpus_bleu(predictions, [references], force=True).score, abs=1e-12)
        assert found["chrf"] == pytest.approx(corpus_chrf(predictions, [references]).score, abs=1e-12)
        seen += found["bleu"] > 1
    assert seen > CASES // 4


def test_the_order_of_texts_does_not_matter() -> None:
    generator = random.Random(2)
    pairs = [(text(generator), text(generator)) for _ in range(200)]
    names = ("bleu", "chrf", "rouge", "exact_match")
    expected = figures(*map(list, zip(*pairs, strict=True)), *names)
    for _ in range(5):
        generator.shuffle(pairs)
        assert figures(*map(list, zip(*pairs, strict=True)), *names) == expected


def test_exact_match() -> None:
    given, gold = ["a  b", " a b ", "A b", "c"], ["a b"] * 4
    assert figures(given, gold, "exact_match") == {"exact_match": 0.5}
    assert figures(given, gold, {"name": "exact_match", "ignore_case": True}) == {"exact_match": 0.75}


def test_options_and_kinds() -> None:
    upper = figures(["THE CAT SAT DOWN"], ["the cat sat down"], {"name": "bleu", "lowercase": True})
    assert upper == {"bleu": pytest.approx(100.0)}
    assert figures(["猫が座った。"], ["猫が座った。"], {"name": "bleu", "tokenize": "char"})["bleu"] > 99
    plus = figures(["the cat"], ["the dog"], {"name": "chrf", "word_order": 2})["chrf"]
    assert plus != figures(["the cat"], ["the dog"], "chrf")["chrf"]
    with pytest.raises(UserError, match="metric 'bleu' is for texts tasks, this one is next_tokens"):
        metrics.check(metrics.parse("bleu"), "next_tokens")
