"""SQuAD's exact match and F1: against published predictions, and against a second implementation on random cases."""

from __future__ import annotations

import gzip
import json
import random
import re
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train import answers, metrics
from train.metrics import Choice, squad

SHARED = Path(__file__).parents[4] / "shared" / "data"
VOCABULARY = [
    "the",
    "A",
    "an",
    "cat",
    "Cat.",
    "dog",
    "42",
    "–",
    "naïve",
    "(x)",
    "theatre",
    "l'an",
    "中国",
    "\u00a0",
    "",
]

Cases = tuple[list[dict[str, Any]], list[list[str]]]


def figures(predictions: list[dict[str, Any]], references: list[list[str]]) -> dict[str, float]:
    return squad.compute(predictions, references, squad.Options())


@pytest.mark.parametrize(
    ("published", "sets", "expected"),
    [
        ("v1.1_bert_ensemble", ["squad_v1_dev_by_article/train", "squad_v1_dev_by_article/test"], (86.21, 92.20)),
        ("v1.1_logistic_regression", ["squad_v1_dev_by_article/train", "squad_v1_dev_by_article/test"], (40.14, 50.98)),
        ("v2.0_bert_single", ["squad_v2_dev/validation"], (78.74, 81.78)),
    ],
)
def test_published_predictions_have_their_published_figures(
    published: str, sets: list[str], expected: tuple[float, float]
) -> None:
    import pyarrow.parquet

    file = SHARED / "fixtures" / "squad_predictions" / f"{published}.json.gz"
    if not file.exists():
        pytest.skip("the published predictions are not here: ../shared/data/fixtures/squad_predictions")
    given = json.loads(gzip.decompress(file.read_bytes()))
    tables = [pyarrow.parquet.read_table(SHARED / "open" / f"{name}.parquet") for name in sets]
    rows = [row for table in tables for row in table.select(["id", "answers"]).to_pylist()]
    assert len(rows) in (10_570, 11_873)
    texts = [given.get(row["id"], "") for row in rows]  # one of them leaves questions out, which count as wrong
    predictions = [{"text": text, "span": text, "null_odds": 0.0} for text in texts]
    found = figures(predictions, [row["answers"]["text"] for row in rows])
    assert (round(100 * found["exact_match"], 2), round(100 * found["f1"], 2)) == expected


def normalized(text: str) -> str:
    """As the official program has it, written again: lower, no punctuation, no articles, single blanks."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.split(r"\s+", re.sub(r"\b(?:an?|the)\b", " ", text).strip()))


def official(text: str, golds: list[str]) -> tuple[float, float]:
    golds = [gold for gold in golds if normalized(gold)] or [""]
    exact = max(int(normalized(text) == normalized(gold)) for gold in golds)
    shares = []
    for gold in golds:
        left, right = normalized(text).split(), normalized(gold).split()
        if not left or not right:
            shares.append(float(left == right))
            continue
        common, rest = 0, list(right)
        for word in left:
            if word in rest:
                rest.remove(word)
                common += 1
        precision, recall = common / len(left), common / len(right)
        shares.append(2 * precision * recall / (precision + recall) if common else 0.0)
    return float(exact), max(shares)


def cases(seed: int, size: int, *, unanswerable: float = 0.4) -> Cases:
    generator = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(generator.choice(VOCABULARY) for _ in range(generator.randint(1, longest)))

    predictions, references = [], []
    for _ in range(size):
        golds = [] if generator.random() < unanswerable else [text(4) for _ in range(generator.randint(1, 3))]
        span = generator.choice(golds) if golds and generator.random() < 0.4 else text(4)
        odds = float(generator.randint(-4, 4))  # many ties
        predictions.append({"text": "" if generator.random() < 0.3 else span, "span": span, "null_odds": odds})
        references.append(golds)
    return predictions, references


def test_each_answer_scores_as_in_a_second_implementation() -> None:
    predictions, references = cases(0, 3_000)
    for prediction, golds in zip(predictions, references, strict=True):
        assert answers.scores(prediction["text"], golds) == pytest.approx(
            official(prediction["text"], golds), abs=1e-12
        )


def test_figures_are_means_over_their_parts() -> None:
    for seed in range(100):
        predictions, references = cases(seed, 30)
        found = figures(predictions, references)
        each = np.array([official(given["text"], golds) for given, golds in zip(predictions, references, strict=True)])
        has = np.array([bool(golds) for golds in references])
        parts = {"HasAns": has, "NoAns": ~has}
        expected = {"exact_match": each[:, 0].mean(), "f1": each[:, 1].mean()}
        for name, rows in parts.items():
            expected |= {f"{name}_exact": each[rows, 0].mean(), f"{name}_f1": each[rows, 1].mean()}
        assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
        assert set(found) == {*expected, "best_exact", "best_f1", "best_threshold"}
        assert set(found) == set(metrics.figures(Choice("squad")))


def test_the_best_threshold_is_the_best_of_all_that_can_be_tried() -> None:
    def reached(place: int, threshold: float) -> float:
        silent = np.array([given["null_odds"] for given in predictions]) > threshold
        return float(np.where(silent, scores[:, 0, place], scores[:, 1, place]).mean())

    tried = [half / 2 for half in range(-11, 12)]
    for seed in range(1_000):
        predictions, references = cases(seed, 5)
        references[0] = []
        found = figures(predictions, references)
        pairs = zip(predictions, references, strict=True)
        scores = np.array([[official("", golds), official(given["span"], golds)] for given, golds in pairs])
        assert found["best_exact"] == pytest.approx(max(reached(0, threshold) for threshold in tried), abs=1e-12)
        assert found["best_f1"] == pytest.approx(max(reached(1, threshold) for threshold in tried), abs=1e-12)
        assert found["best_f1"] == pytest.approx(reached(1, found["best_threshold"]), abs=1e-12)


def test_the_threshold_lies_between_neighbours_that_are_next_to_each_other() -> None:
    low = 0.1
    high = float(np.nextafter(low, 1))
    found = answers.best(np.array([high, low]), np.array([0.0, 1.0]), np.array([1.0, 0.0]))
    assert found == (1.0, low)


def test_figures_do_not_depend_on_the_order() -> None:
    predictions, references = cases(7, 200)
    expected = figures(predictions, references)
    for seed in range(20):
        order = random.Random(seed).sample(range(200), 200)
        assert figures([predictions[row] for row in order], [references[row] for row in order]) == expected


def test_where_every_question_has_an_answer_there_are_two_figures() -> None:
    predictions, references = cases(1, 50, unanswerable=0.0)
    assert set(figures(predictions, references)) == {"exact_match", "f1"}
    nothing = [{**prediction, "text": ""} for prediction in predictions]
    only = figures(nothing, [[] for _ in references])
    assert only["f1"] == only["NoAns_exact"] == 1.0 and "HasAns_f1" not in only


def test_it_can_be_asked_through_evaluate() -> None:
    metric = metrics.load(Choice("squad"))
    predictions, references = cases(2, 60)
    expected = figures(predictions, references)
    outputs = {"predictions": predictions, "references": references}
    assert metrics.compute([metric], outputs, "answers") == metric.compute(**outputs) == expected
    for start in (0, 40):
        metric.add_batch(predictions=predictions[start : start + 40], references=references[start : start + 40])
    assert metric.compute() == expected
