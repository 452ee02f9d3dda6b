"""Figures of entities against the package seqeval, and what the metric says of what it cannot score."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import seqeval.metrics  # type: ignore[import-untyped]
from seqeval.scheme import BILOU, IOB1, IOB2, IOBES  # type: ignore[import-untyped]

from data.errors import UserError
from tests.train.test_schemes import random_tags
from train import metrics
from train.metrics.seqeval import Options, compute
from train.schemes import LETTERS, Scheme

CASES = 1000
THEIRS = {"iob1": IOB1, "iob2": IOB2, "bioes": IOBES, "bilou": BILOU, "bmes": IOBES}


def rows(generator: random.Random, letters: str) -> tuple[list[list[str]], list[list[str]]]:
    """Tags of one to six rows, the predicted ones right in part; both may break the rules of every scheme."""
    references = [random_tags(generator, letters) for _ in range(generator.randint(1, 6))]
    right, predictions = generator.random(), []
    for tags in references:
        other = random_tags(generator, letters)
        mixed = [tag if generator.random() < right else other[place % len(other)] for place, tag in enumerate(tags)]
        predictions.append(tags if generator.random() < right else mixed)
    return predictions, references


def expected(predictions: Any, references: Any, **options: Any) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ratios of nothing
        report = seqeval.metrics.classification_report(
            references, predictions, output_dict=True, zero_division=0, **options
        )
        theirs = {
            name: getattr(seqeval.metrics, f"{name}_score")(references, predictions, zero_division=0, **options)
            for name in ("precision", "recall", "f1")
        }
    theirs["accuracy"] = seqeval.metrics.accuracy_score(references, predictions)
    averages = ("micro avg", "macro avg", "weighted avg")
    per_type = {f"f1_{kind}": line["f1-score"] for kind, line in report.items() if kind not in averages}
    return {name: float(value) for name, value in {**theirs, **per_type}.items()}


def has_entities(predictions: Any, references: Any, **options: Any) -> bool:
    """seqeval's report fails where there is no entity at all."""
    from train.schemes import entities

    scheme = next((name for name, theirs in THEIRS.items() if theirs is options.get("scheme")), None)
    return any(entities(tags, scheme) for tags in (*predictions, *references))  # type: ignore[arg-type]


def test_lenient_figures_are_those_of_seqeval() -> None:
    generator, checked = random.Random(0), 0
    while checked < CASES:
        predictions, references = rows(generator, generator.choice(("I", "BI", "BIES")))
        if has_entities(predictions, references):
            ours = compute(predictions, references, Options(per_type=True))
            assert ours == pytest.approx(expected(predictions, references), abs=1e-12)
            assert compute(predictions[::-1], references[::-1], Options(per_type=True)) == ours
            checked += 1


@pytest.mark.parametrize("scheme", LETTERS)
def test_strict_figures_are_those_of_seqeval(scheme: Scheme) -> None:
    generator, checked, different = random.Random(scheme), 0, 0
    while checked < CASES:
        theirs = rows(generator, LETTERS[scheme].replace("M", "I"))  # the package has no BMES: it is IOBES with an M
        predictions, references = (
            [[tag.replace("I-", "M-", 1) if scheme == "bmes" else tag for tag in tags] for tags in side]
            for side in theirs
        )
        options = {"mode": "strict", "scheme": THEIRS[scheme]}
        if has_entities(*theirs, **options):
            ours = compute(predictions, references, Options(strict=True, scheme=scheme, per_type=True))
            assert ours == pytest.approx(expected(*theirs, **options), abs=1e-12)
            different += ours != compute(predictions, references, Options(per_type=True))
            checked += 1
    assert different > CASES // 3


def test_a_word_without_prediction_is_wrong_and_outside() -> None:
    references = [["B-PER", "I-PER", "O", "O"]]
    figures = compute([["B-PER", None, None, "O"]], references, Options())
    assert figures == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 0.5}
    none = compute([["O", "O"]], [["O", None]], Options(strict=True, per_type=True))
    assert none == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 0.5}


def test_by_the_interface_of_evaluate() -> None:
    predictions, references = [["B-PER", "I-PER"], ["I-LOC", None]], [["B-PER", "I-PER"], ["B-LOC", "O"]]
    lenient, strict = (metrics.load(metrics.parse({"name": "seqeval", "strict": strict})) for strict in (False, True))
    figures = lenient.compute(predictions=predictions, references=references)
    assert figures == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "accuracy": 0.5}
    lenient.add_batch(predictions=predictions, references=references)
    assert lenient.compute() == figures
    assert strict.compute(predictions=predictions, references=references)["recall"] == 0.5  # found: IOB2
    iob1 = strict.compute(predictions=predictions, references=references, scheme="iob1")
    assert (iob1["precision"], iob1["recall"]) == (0.5, 1.0)  # in IOB1, B begins nothing after O


def test_the_scheme_of_the_task_is_that_of_the_metric() -> None:
    outputs = {"tag_predictions": [["I-PER"]], "tag_references": [["I-PER"]]}
    strict = {"name": "seqeval", "strict": True}
    found = {
        scheme: metrics.compute([metrics.load(metrics.parse(strict))], {**outputs, "scheme": scheme}, "entities")["f1"]
        for scheme in ("iob1", "iob2")
    }
    assert found == {"iob1": 1.0, "iob2": 0.0}
    other = metrics.load(metrics.parse({**strict, "scheme": "iob2"}))
    with pytest.raises(UserError, match="scheme is iob2, the task says iob1; leave it out"):
        metrics.compute([other], {**outputs, "scheme": "iob1"}, "entities")


def test_its_figures_can_choose_the_best_checkpoint() -> None:
    names = ["precision", "recall", "f1", "accuracy"]
    assert metrics.figures(metrics.parse("seqeval")) == names
    assert metrics.figures(metrics.parse({"name": "seqeval", "prefix": "dev_"})) == [f"dev_{name}" for name in names]
    assert all(map(metrics.higher_is_better, [*names, "f1_creative-work"]))


def test_what_cannot_be_scored_is_named() -> None:
    with pytest.raises(UserError, match="'seqeval' takes tags such as O, B-PER and I-PER; got NOUN, VERB"):
        compute([["NOUN"]], [["VERB"]], Options())
    with pytest.raises(
        UserError, match=r"strict needs tags of one scheme \(iob1, iob2, bioes, bilou, bmes\); got E-X, U-X"
    ):
        compute([["E-X"]], [["U-X"]], Options(strict=True))
    with pytest.raises(UserError, match=r"strict needs tags of one scheme \(iob2\); got E-X"):
        compute([["E-X"]], [["O"]], Options(strict=True, scheme="iob2"))
    with pytest.raises(UserError, match="row 1 has not as many predicted tags as words"):
        compute([["O"], ["O"]], [["O"], ["O", "O"]], Options())
    with pytest.raises(UserError, match="scheme has no effect without strict"):
        metrics.parse({"name": "seqeval", "scheme": "iob1"})
    with pytest.raises(
        UserError, match="'seqeval' is for entities tasks, this one is tags; metrics that fit: accuracy"
    ):
        metrics.check(metrics.Choice("seqeval"), "tags")
