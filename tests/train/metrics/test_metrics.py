"""Choosing, loading and computing metrics: names, options, messages, the interface of `evaluate`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from data.errors import UserError
from data.section import Section
from train import metrics
from train.metrics import Choice, Kind

ROOT = Path(__file__).parents[3]
LOCAL = [
    "accuracy", "answer_likelihood", "bits_per_byte", "bleu", "chrf", "exact_match", "f1", "matthews_correlation",
    "mse", "pearson", "perplexity", "precision", "preference", "recall", "recall_at", "roc_auc", "rouge", "seqeval",
    "spearman", "squad", "token_accuracy",
]  # fmt: skip
LOWER = ("mse", "perplexity", "bits_per_byte")


def outputs(kind: str, size: int = 200, classes: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    if kind == "regression":
        return {"predictions": rng.normal(size=size).astype(np.float32), "references": rng.normal(size=size)}
    scores = rng.random((size, classes), dtype=np.float32)
    if kind == "multi_label":
        return {
            "predictions": (scores > 0.5).astype(np.int64),
            "references": rng.integers(0, 2, (size, classes)),
            "scores": scores,
        }
    scores /= scores.sum(axis=1, keepdims=True)
    return {"predictions": scores.argmax(axis=1), "references": rng.integers(0, classes, size), "scores": scores}


def compute(loaded: list[Any], given: dict[str, Any]) -> dict[str, float]:
    """Compute the figures of a task whose kind shows in its predictions."""
    predictions = given["predictions"]
    number = "regression" if predictions.dtype.kind == "f" else "single_label"
    return metrics.compute(loaded, given, "multi_label" if predictions.ndim == 2 else number)  # type: ignore[arg-type]


def fitting(kind: Any) -> list[str]:
    fit = []
    for name in metrics.names():
        try:
            metrics.check(Choice(name), kind)
        except UserError:
            continue
        fit.append(name)
    return fit


def test_names_are_the_files() -> None:
    assert metrics.names() == LOCAL
    files = (ROOT / "train" / "metrics").glob("[!_]*.py")
    assert metrics.names() == sorted(path.stem for path in files)


@pytest.mark.parametrize("name", LOCAL)
def test_every_file_offers_what_the_contract_asks(name: str) -> None:
    module = metrics._module(name)
    assert module.KINDS and set(module.KINDS) <= set(get_args(Kind))
    assert module.TAKES in (
        "predictions",
        "scores",
        "losses",
        "hits",
        "tag_predictions",
        "rewards",
        "logps",
        "more_similar",
    )
    assert module.HIGHER_IS_BETTER is (name not in LOWER)
    assert issubclass(module.Options, Section) and module.Options() and module.__doc__
    assert not {"name", "prefix"} & set(module.Options.model_fields)


def test_parse() -> None:
    assert metrics.parse("accuracy") == Choice("accuracy", {}, "")
    assert metrics.parse({"name": "f1", "average": "macro"}) == Choice("f1", {"average": "macro"}, "")
    assert metrics.parse({"name": "mse", "prefix": "dev_"}) == Choice("mse", {}, "dev_")
    assert metrics.parse({"name": "meteor", "alpha": 0.9}) == Choice("meteor", {"alpha": 0.9}, "")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "f1", "avrage": "macro"}, "'f1': no option 'avrage'; options are .*; did you mean 'average'"),
        ({"name": "f1", "average": "marco"}, "average is 'marco'; allowed are 'auto', .*; did you mean 'macro'"),
        ({"name": "f1", "average": "macro", "positive": 0}, "positive has no effect with average macro"),
        ({"name": "f1", "positive": -1}, "positive is -1; Input should be greater than or equal to 0"),
        ({"name": "roc_auc", "average": "binary"}, "average is 'binary'; allowed are 'auto', 'micro'"),
        ({"name": "accuracy", "normalize": False}, "no option 'normalize'; options are prefix"),
        ({"f1": {"average": "macro"}}, "a mapping with one .*name: f1, average: macro"),
        ({"name": "f1", "prefix": 3}, "a metric is a name .*'prefix': 3"),
        (7, "a metric is a name .*got 7; names that need no network: accuracy, .*f1"),
    ],
)
def test_a_wrong_entry_says_what_is_allowed(entry: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        metrics.parse(entry)


def test_all_problems_of_an_entry_come_at_once() -> None:
    with pytest.raises(UserError) as error:
        metrics.parse({"name": "f1", "average": "x", "positve": 1})
    assert len(str(error.value).splitlines()) == 2


def test_a_metric_on_the_wrong_kind_of_task_names_those_that_fit() -> None:
    assert fitting("regression") == ["mse", "pearson", "spearman"]
    assert fitting("multi_label") == ["accuracy", "f1", "precision", "recall", "roc_auc"]
    assert (fitting("tags"), fitting("entities")) == (["accuracy"], ["accuracy", "seqeval"])
    assert fitting("single_label") == ["accuracy", "f1", "matthews_correlation", "precision", "recall", "roc_auc"]
    with pytest.raises(
        UserError, match=r"'pearson' is for regression .* is single_label; metrics that fit: accuracy, "
    ):
        compute([metrics.load(Choice("pearson"))], outputs("single_label"))
    with pytest.raises(
        UserError,
        match=r"'accuracy' is for single_label and multi_label and .* fit: mse, pearson, spearman",
    ):
        compute([metrics.load(Choice("accuracy"))], outputs("regression"))
    metrics.check(Choice("meteor"), "regression")


def test_load_explains_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    def unreachable(name: str, **_: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(evaluate, "load", unreachable)
    with pytest.raises(UserError, match=re.escape(", ".join(LOCAL))) as error:
        metrics.load(metrics.parse("acuracy"))
    assert "did you mean 'accuracy'" in str(error.value) and "ConnectionError: no route" in str(error.value)


@pytest.mark.parametrize("kind", ["single_label", "multi_label", "regression"])
def test_figures_are_the_same_to_the_last_bit_however_one_asks(kind: str) -> None:
    given, checked = outputs(kind), 0
    for name in fitting(kind):
        choice = Choice(name)
        metric, other = metrics.load(choice), metrics.load(choice)
        assert metric.name == name
        taken = given["scores" if metrics._module(name).TAKES == "scores" else "predictions"]
        figures = compute([metric], given)
        assert all(type(value) is float and math.isfinite(value) for value in figures.values()) and figures
        assert figures == compute([other], {key: values[::-1] for key, values in given.items()})
        assert figures == metric.compute(predictions=taken, references=given["references"])
        assert figures == metric.compute(predictions=taken.tolist(), references=given["references"].tolist())
        for start in range(0, 200, 64):
            metric.add_batch(predictions=taken[start : start + 64], references=given["references"][start : start + 64])
        assert figures == metric.compute()
        for prediction, reference in zip(taken, given["references"], strict=True):
            metric.add(prediction=prediction, reference=reference)
        assert figures == metric.compute()
        checked += 1
    assert checked >= 3


def test_evaluate_carries_float64() -> None:
    metric = metrics.load(Choice("mse"))
    assert metric.compute(predictions=[1.0 + 1e-9], references=[1.0]) == {"mse": (1.0 + 1e-9 - 1.0) ** 2}


def test_evaluate_refuses_what_is_no_class_id() -> None:
    for wrong in (0.7, math.nan):
        with pytest.raises(UserError, match="'accuracy' takes class ids or labels of 0 and 1; got"):
            metrics.load(Choice("accuracy")).compute(predictions=[0, wrong], references=[0, 1])


def test_result_names() -> None:
    chosen: list[str | dict[str, Any]] = [
        "accuracy",
        "f1",
        {"name": "f1", "average": "macro"},
        {"name": "f1", "average": "binary", "positive": 2, "prefix": "third_"},
        {"name": "roc_auc", "average": "weighted"},
    ]
    loaded = [metrics.load(metrics.parse(entry)) for entry in chosen]
    figures = compute(loaded, outputs("single_label"))
    assert list(figures) == ["accuracy", "f1", "f1_macro", "third_f1_binary", "roc_auc_weighted"]
    assert figures["f1"] == figures["f1_macro"]
    with pytest.raises(UserError, match="two metrics both report 'f1'; tell them apart with a prefix"):
        compute([*loaded, loaded[1]], outputs("single_label"))


def test_auto_is_binary_for_two_classes_that_the_scores_tell() -> None:
    two = outputs("single_label", classes=2)
    auto, binary, macro = (
        metrics.load(metrics.parse({"name": "f1", "average": average})) for average in ("auto", "binary", "macro")
    )
    value = compute([auto], two)["f1"]
    assert value == compute([binary], two)["f1_binary"]
    assert value == auto.compute(predictions=two["predictions"], references=two["references"], classes=2)["f1"]
    without_scores = {key: two[key] for key in ("predictions", "references")}
    assert compute([auto], without_scores)["f1"] == compute([macro], two)["f1_macro"] != value
    declared = metrics.load(metrics.parse({"name": "f1", "classes": 2}))
    assert compute([declared], without_scores)["f1"] == value


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"positive": 3, "average": "binary"}, "single_label", "positive is 3; allowed are 0 to 2"),
        ({"positive": 0}, "single_label", "positive has no effect unless there are exactly two classes"),
        ({"average": "binary"}, "multi_label", "average binary is about one class"),
        ({"classes": 2}, "single_label", "classes is 2, the scores have 3; leave it out"),
    ],
)
def test_options_that_do_not_fit_the_outputs(options: dict[str, Any], kind: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute([metrics.load(metrics.parse({"name": "f1", **options}))], outputs(kind))


def test_missing_scores_and_missing_examples() -> None:
    area, accuracy = metrics.load(Choice("roc_auc")), metrics.load(Choice("accuracy"))
    given = outputs("single_label")
    del given["scores"]
    with pytest.raises(UserError, match=r"'roc_auc' needs scores, .* choose from accuracy, f1"):
        compute([area], given)
    with pytest.raises(UserError, match="no examples to evaluate"):
        compute([accuracy], {key: values[:0] for key, values in given.items()})


def test_higher_is_better() -> None:
    assert all(map(metrics.higher_is_better, ["accuracy", "eval/f1_macro", "roc_auc", "loss/accuracy", "blossom"]))
    assert not any(
        map(metrics.higher_is_better, ["mse", "loss", "eval/loss", "eval_loss", "dev_mse", "dev.perplexity"])
    )


def test_what_would_be_refused_at_the_first_evaluation_is_refused_before_training() -> None:
    other = metrics.parse({"name": "seqeval", "strict": True, "scheme": "bioes"})
    with pytest.raises(UserError, match=r"seqeval.*scheme is bioes, the task says iob2"):
        metrics.rehearse(other, "entities", ("O", "B-X", "I-X"), "iob2")
    metrics.rehearse(metrics.parse({"name": "seqeval", "strict": True}), "entities", ("O", "B-X", "I-X"), "iob2")
    with pytest.raises(UserError, match=r"'roc_auc' needs scores.*choose from accuracy"):
        metrics.rehearse(metrics.parse("roc_auc"), "single_label", ())
    metrics.rehearse(metrics.parse("roc_auc"), "single_label", ("no", "yes"))
    metrics.rehearse(metrics.parse({"name": "f1", "average": "macro"}), "single_label", ())
