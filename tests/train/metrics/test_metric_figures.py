"""Every metric against scikit-learn and scipy, to 1e-12, on at least 1,000 random cases for each average."""

from __future__ import annotations

import importlib
import math
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import scipy.stats  # type: ignore[import-untyped]
import sklearn  # type: ignore[import-untyped]
import sklearn.metrics  # type: ignore[import-untyped]

CASES = 1000
RATIOS = ("precision", "recall", "f1")


def figures(name: str, predictions: Any, references: Any, **options: Any) -> dict[str, float]:
    module = importlib.import_module(f"train.metrics.{name}")
    return dict(module.compute(predictions, references, module.Options(**options)))


def close(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=1e-12, abs_tol=1e-12) or (math.isnan(ours) and math.isnan(theirs))


def single_label(rng: np.random.Generator, classes: int | None = None) -> tuple[Any, Any, int]:
    """Class ids of 1 to 40 examples: some classes absent, some columns of one class, some predictions nearly right."""
    size, classes = int(rng.choice([1, 2, 5, 20, 40])), classes or int(rng.integers(2, 6))
    references = rng.integers(rng.choice([0, 0, 0, classes - 1]), classes, size)
    predictions = rng.integers(0, rng.integers(1, classes + 1), size)
    right = rng.random(size) < rng.choice([0.0, 0.7, 1.0])
    return np.where(right, references, predictions), references, classes


def multi_label(rng: np.random.Generator) -> tuple[Any, Any]:
    """Labels of 1 to 40 examples and 2 to 5 columns, from never true to always true."""
    shape = int(rng.choice([1, 2, 5, 20, 40])), int(rng.integers(2, 6))
    predictions, references = (
        (rng.random(shape) < rng.choice([0.0, 0.3, 0.7, 1.0], shape[1])).astype(np.int64) for _ in range(2)
    )
    return predictions, references


def scores_like(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Scores, on a coarse grid half of the time, so that many are equal."""
    scores = rng.random(shape)
    return np.round(scores * 4) / 4 if rng.random() < 0.5 else scores


def columns(rng: np.random.Generator) -> tuple[Any, Any]:
    """Two columns of 1 to 60 values, with ties half of the time; some constant."""
    size, scale = int(rng.choice([1, 2, 3, 10, 20, 60])), float(rng.choice([1e-3, 1.0, 100.0]))
    references = rng.normal(size=size) * scale + rng.normal()
    predictions = references * rng.normal() + rng.normal(size=size) * scale
    if rng.random() < 0.5:
        references, predictions = np.round(references), np.round(predictions)
    if rng.random() < 0.1:
        predictions = np.full(size, 0.1)
    return predictions, references


@pytest.fixture(autouse=True)
def quick_sklearn() -> Any:
    with sklearn.config_context(skip_parameter_validation=True, assume_finite=True):
        yield


def reference_ratios(predictions: Any, references: Any, **options: Any) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an average over no label at all
        values = sklearn.metrics.precision_recall_fscore_support(references, predictions, zero_division=0, **options)
    return dict(zip(RATIOS, values[:3], strict=True))


def test_ratios_of_one_class() -> None:
    rng, seen = np.random.default_rng(1), Counter[str]()
    for _ in range(CASES):
        predictions, references, classes = single_label(rng)
        positive = int(rng.integers(0, classes))
        expected = reference_ratios(predictions, references, labels=[positive], average=None)
        for name in RATIOS:
            ours = figures(name, predictions, references, average="binary", positive=positive, classes=classes)
            assert close(ours.pop(f"{name}_binary"), expected[name][0]) and not ours
            seen[name] += 1
            if classes == 2 and positive == 1:  # what auto is for two classes
                assert figures(name, predictions, references, classes=2) == {name: pytest.approx(expected[name][0])}
    assert min(seen.values()) >= CASES


@pytest.mark.parametrize("average", ["micro", "macro", "weighted"])
def test_averages_of_ratios(average: str) -> None:
    rng, seen = np.random.default_rng(2), Counter[str]()
    for case in range(CASES):
        predictions, references = single_label(rng)[:2] if case % 2 else multi_label(rng)
        expected = reference_ratios(predictions, references, average=average)
        for name in RATIOS:
            ours = figures(name, predictions, references, average=average)
            assert close(ours.pop(f"{name}_{average}"), expected[name]) and not ours
            seen[name] += 1
            if average == "macro":
                assert figures(name, predictions, references) == pytest.approx({name: expected[name]}, abs=1e-12)
    assert min(seen.values()) >= CASES


def test_one_column_of_labels_is_one_label() -> None:
    """Apart, because scikit-learn takes a single column for two classes."""
    rng = np.random.default_rng(10)
    for _ in range(50):
        predictions, references, _ = single_label(rng, classes=2)
        for name in RATIOS:
            expected = figures(name, predictions, references, average="binary")[f"{name}_binary"]
            for average in ("micro", "macro", "weighted"):
                ours = figures(name, predictions[:, None], references[:, None], average=average)
                assert close(ours[f"{name}_{average}"], expected)


def test_accuracy() -> None:
    rng = np.random.default_rng(3)
    for case in range(CASES):
        predictions, references = single_label(rng)[:2] if case % 2 else multi_label(rng)
        ours = figures("accuracy", predictions, references)
        assert ours.keys() == {"accuracy"}
        assert close(ours["accuracy"], sklearn.metrics.accuracy_score(references, predictions))


def test_matthews_correlation() -> None:
    rng = np.random.default_rng(4)
    for _ in range(CASES):
        predictions, references, _ = single_label(rng)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one class only
            expected = sklearn.metrics.matthews_corrcoef(references, predictions)
        assert close(figures("matthews_correlation", predictions, references)["matthews_correlation"], expected)


def test_matthews_correlation_of_many_examples_does_not_overflow() -> None:
    references = np.tile([0, 1, 1, 0], 500_000)
    predictions = np.tile([0, 1, 0, 0], 500_000)
    assert close(figures("matthews_correlation", predictions, references)["matthews_correlation"], 1 / math.sqrt(3))


def pairs_in_order(scores: Any, positive: Any) -> float:
    """The definition: the share of (positive, negative) pairs with the higher score for the positive one."""
    if positive.all() or not positive.any():
        return math.nan
    difference = scores[positive][:, None] - scores[~positive][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def test_area_of_two_classes() -> None:
    rng, defined = np.random.default_rng(5), 0
    while defined < CASES:
        _, references, _ = single_label(rng, classes=2)
        scores = scores_like(rng, (len(references), 2))
        ours = figures("roc_auc", scores, references)["roc_auc"]
        assert close(ours, pairs_in_order(scores[:, 1], references == 1))
        if len(np.unique(references)) == 2:
            assert close(ours, sklearn.metrics.roc_auc_score(references, scores[:, 1]))
            defined += 1
        for average in ("micro", "macro", "weighted"):
            averaged = figures("roc_auc", scores, references, average=average)
            assert averaged.keys() == {f"roc_auc_{average}"} and close(averaged[f"roc_auc_{average}"], ours)


def reference_areas(truth: Any, scores: Any) -> dict[str, float]:
    """scikit-learn's areas, averaged over the columns that have one; nan where there is none."""
    area = sklearn.metrics.roc_auc_score
    areas = {"micro": area(truth.ravel(), scores.ravel())}
    kept = [column for column in range(truth.shape[1]) if 0 < truth[:, column].sum() < len(truth)]
    if not kept:
        return {**areas, "macro": math.nan, "weighted": math.nan}
    truth, scores = truth[:, kept], scores[:, kept]
    values = area(truth, scores, average=None) if len(kept) > 1 else [area(truth[:, 0], scores[:, 0])]
    return {**areas, "macro": np.mean(values), "weighted": np.average(values, weights=truth.sum(axis=0))}


def test_area_of_several_columns() -> None:
    rng, outcomes = np.random.default_rng(6), Counter[str]()
    while min(outcomes["area"], 8 * outcomes["nan"]) < CASES:
        if rng.random() < 0.5:
            _, references, classes = single_label(rng, classes=3)
            truth = (references[:, None] == np.arange(classes)).astype(np.int64)
        else:
            references = truth = multi_label(rng)[1][:, :3]
        if truth.all() or not truth.any():
            continue
        scores = scores_like(rng, truth.shape)
        expected = reference_areas(truth, scores)
        assert close(figures("roc_auc", scores, references)["roc_auc"], expected["macro"])
        for average, value in expected.items():
            ours = figures("roc_auc", scores, references, average=average)
            assert close(ours.pop(f"roc_auc_{average}"), value) and not ours
        outcomes["nan" if math.isnan(expected["macro"]) else "area"] += 1


def test_area_is_that_of_one_against_the_rest() -> None:
    rng, checked = np.random.default_rng(7), 0
    for _ in range(150):
        _, references, classes = single_label(rng, classes=3)
        scores = rng.random((len(references), classes))
        scores /= scores.sum(axis=1, keepdims=True)
        if len(np.unique(references)) < classes:
            continue
        for average in ("macro", "weighted", "micro"):
            expected = sklearn.metrics.roc_auc_score(references, scores, multi_class="ovr", average=average)
            assert close(figures("roc_auc", scores, references, average=average)[f"roc_auc_{average}"], expected)
            checked += 1
    assert checked >= 100


def test_regression() -> None:
    rng, seen = np.random.default_rng(8), Counter[str]()
    while min(seen["varied"], 8 * seen["constant"]) < CASES:
        predictions, references = columns(rng)
        ours = {name: figures(name, predictions, references)[name] for name in ("pearson", "spearman", "mse")}
        assert close(ours["mse"], sklearn.metrics.mean_squared_error(references, predictions))
        if len(references) == 1 or min(np.ptp(predictions), np.ptp(references)) == 0:
            assert math.isnan(ours["pearson"]) and math.isnan(ours["spearman"])
            seen["constant"] += 1
        else:
            assert close(ours["pearson"], scipy.stats.pearsonr(predictions, references).statistic)
            assert close(ours["spearman"], scipy.stats.spearmanr(predictions, references).statistic)
            seen["varied"] += 1


def test_regression_of_extreme_values() -> None:
    line = np.array([1.0, 2.0, 4.0])
    for scale in (1e-310, 1e-200, 1e200, 4e307):
        assert close(figures("pearson", line * scale, line)["pearson"], 1.0)
    assert close(figures("pearson", 1e8 + line, line)["pearson"], 1.0)
    assert figures("mse", line * 1e200, line)["mse"] == math.inf


def test_a_diverged_model_gets_nan_and_no_warning() -> None:
    """nan would otherwise sort above every number and make a good-looking area."""
    references = np.array([0.0, 1.0, 2.0])
    for broken in (math.nan, math.inf):
        predictions = np.array([0.0, broken, -broken])
        assert math.isnan(figures("pearson", predictions, references)["pearson"])
        assert figures("mse", predictions, references)["mse"] != 0
    assert math.isnan(figures("spearman", np.array([0.0, math.nan, 1.0]), references)["spearman"])
    for labels in (np.array([0, 1, 1]), np.array([[0, 1], [1, 0], [1, 1]])):
        scores = np.array([[0.2, 0.8], [0.1, math.nan], [0.6, 0.4]])
        assert math.isnan(figures("roc_auc", scores, labels)["roc_auc"])


def test_figures_do_not_depend_on_the_order_of_the_examples() -> None:
    """To the last bit: how many processes evaluated must not show."""
    rng, checked = np.random.default_rng(9), 0
    for _ in range(100):
        size = 97
        references, scores = rng.integers(0, 3, size), scores_like(rng, (size, 3))
        values = rng.normal(size=(2, size)) * 10.0 ** rng.integers(-3, 4)
        order = rng.permutation(size)
        for name, taken, truth in (
            ("accuracy", scores.argmax(axis=1), references),
            ("f1", scores.argmax(axis=1), references),
            ("matthews_correlation", scores.argmax(axis=1), references),
            ("roc_auc", scores, references),
            ("mse", values[0], values[1]),
            ("pearson", values[0], values[1]),
            ("spearman", values[0], values[1]),
        ):
            assert figures(name, taken, truth) == figures(name, taken[order], truth[order])
            checked += 1
    assert checked == 700
