"""Text classification in its four shapes: labels from strings, integers and ClassLabel; weights; the exported model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from data.errors import UserError
from data.source import Rows, named
from tests.conftest import SHAPES, figures
from tests.worker import carry_out
from train.tasks._labels import Labels
from train.tasks.text_classification import Config, TextClassification

MakeConfig = Callable[..., dict[str, Any]]


class Padding:
    pad_token_id = 0


def prepare(dataset: Dataset, **config: Any) -> TextClassification:
    return TextClassification.prepare(Config(**config), [Rows(dataset, "rows.jsonl")], Padding())


def test_labels_from_strings_integers_and_class_labels() -> None:
    texts = ["a", "b", "c"]
    strings = prepare(Dataset.from_dict({"text": texts, "label": ["no", "yes", "no"]}))
    assert strings.labels == Labels(("no", "yes"))
    assert (strings.kind, strings.labels.index("yes"), strings.labels.index("maybe")) == ("single_label", 1, None)
    integers = prepare(Dataset.from_dict({"text": texts, "label": [10, 2, 2]}))
    assert integers.labels.names == ("2", "10")
    assert integers.labels.index(10) == 1
    declared = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    classes = prepare(Dataset.from_dict({"text": texts, "label": [0, 1, 1]}, features=declared))
    assert classes.labels == Labels(("neg", "pos"), by_index=True)
    assert [classes.labels.index(value) for value in (0, "pos", "1", 2, -1, True)] == [0, 1, 1, None, None, None]
    given = prepare(Dataset.from_dict({"text": texts, "label": ["1", "0", "1"]}), labels=["bad", "good"])
    assert [given.labels.index(value) for value in ("1", "good", "2")] == [1, 1, None]
    stars = prepare(Dataset.from_dict({"text": texts, "label": [1, 2, 3]}), labels=["1", "2", "3"])
    assert [stars.labels.index(value) for value in (1, "1", 3, 0)] == [0, 0, 2, None]


def test_files_that_number_labels_differently_agree_by_name() -> None:
    parts = []
    for names in (["neg", "pos"], ["pos", "neg"]):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        parts.append(Rows(Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=features), "x.parquet"))
    decoded = [named(part.dataset[:], part.dataset.features)["label"] for part in parts]
    assert decoded == [["neg", None], ["pos", None]]
    strings = Rows(Dataset.from_dict({"text": ["c"], "label": ["pos"]}), "y.jsonl")
    task = TextClassification.prepare(Config(), [*parts, strings], Padding())
    assert task.labels.names == ("neg", "pos")


def test_a_csv_of_fractions_is_regression_and_a_switch_for_each_label_is_refused() -> None:
    score = prepare(Dataset.from_dict({"text": ["a", "b"], "label": ["0.5", "3"]}))
    assert score.kind == "regression"
    assert str(score) == "text classification, regression: text → label, a number"
    with pytest.raises(UserError, match="seems to hold a 0 or 1 for every label"):
        prepare(Dataset.from_dict({"text": ["a", "b"], "labels": [[1, 0, 0], [0, 0, 1]]}))


def test_an_empty_cell_of_a_csv_is_no_label() -> None:
    names = prepare(Dataset.from_dict({"text": ["a", "b", "c"], "label": ["no", "", "yes"]}))
    assert names.labels.names == ("no", "yes")
    assert names.problem({"text": "b", "label": ""}) == "label '' is not one of: no, yes"
    numbers = prepare(Dataset.from_dict({"text": ["a", "b", "c"], "label": ["0.5", "", "3"]}))
    assert numbers.kind == "regression"
    assert numbers.problem({"text": "b", "label": ""}) == "'label' must be a number, not ''"


def test_kinds_are_found() -> None:
    lists = Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=["a", "b", "c"]))})
    several = prepare(Dataset.from_dict({"text": ["x", "y"], "labels": [[0, 2], []]}, features=lists))
    assert (several.kind, several.labels.names) == ("multi_label", ("a", "b", "c"))
    assert several.free == ("threshold",)
    pair = prepare(Dataset.from_dict({"premise": ["x", "y"], "hypothesis": ["z", "w"], "label": [0, 1]}))
    assert (pair.texts, pair.kind) == (("premise", "hypothesis"), "single_label")
    assert pair.free == ()
    number = prepare(Dataset.from_dict({"text": ["x", "y"], "score": [0.5, 2.0]}))
    assert (number.kind, number.model_config["num_labels"]) == ("regression", 1)
    text = prepare(Dataset.from_dict({"text": ["x", "y"], "label": ["0.5", "2"]}), kind="regression")
    assert text.problem({"text": "x", "label": "nan"}) == "'label' must be a number, not 'nan'"


@pytest.mark.parametrize(
    ("columns", "config", "message"),
    [
        ({"review": ["a", "b"], "label": [0, 1]}, {}, r"no column 'text'; it has review, label"),
        ({"text": ["a", "b"], "labels": [0, 1]}, {"label": "labls"}, r"no column 'labls'.*did you mean 'labels'"),
        ({"text": ["a", "b"], "label": [1, 1]}, {}, "one label only"),
        ({"text": ["a", "b", "c"], "label": ["x", "", " "]}, {}, "one label only"),
        ({"text": ["a", "b"], "label": [0.5, 1.5]}, {"label_smoothing": 0.1}, "label_smoothing cannot take effect"),
        ({"text": ["a", "b"], "label": ["x", "y"]}, {"labels": ["x", "x"]}, "named twice"),
    ],
)
def test_what_cannot_be_used_is_named(columns: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(Dataset.from_dict(columns), **config)


def test_problems_of_rows_are_named() -> None:
    task = prepare(Dataset.from_dict({"text": ["a", "b"], "label": ["positive", "negative"]}))
    assert task.problem({"text": "fine", "label": "positive"}) is None
    assert task.problem({"text": " ", "label": "positive"}) == "'text' is empty"
    assert task.problem({"text": None, "label": "positive"}) == "'text' must be text, not None"
    problem = task.problem({"text": "x", "label": "postive"})
    assert problem == "label 'postive' is not one of: negative, positive; did you mean 'positive'?"
    several = prepare(Dataset.from_dict({"text": ["a", "b"], "labels": [["x"], ["y"]]}))
    assert several.problem({"text": "x", "labels": "x"}) == "'labels' must be a list of labels, not 'x'"
    assert "label 'z' is not one of" in str(several.problem({"text": "x", "labels": ["x", "z"]}))


class Fixed(torch.nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: Any) -> Any:
        return type("Output", (), {"logits": self.logits})


def test_losses_are_sums_with_weights_and_smoothing() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]], dtype=torch.float64)
    dataset = Dataset.from_dict({"text": ["a", "b", "c"], "label": ["x", "y", "z"]})
    weights = {"x": 0.5, "z": 3.0}
    task = prepare(dataset, class_weights=weights, label_smoothing=0.1).informed(None)  # type: ignore[arg-type]
    labels = torch.tensor([2, 0])
    log_probabilities = logits.log_softmax(1)
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    expected = sum(
        0.9 * -weight[label] * log_probabilities[row, label] + 0.1 / 3 * -(weight * log_probabilities[row]).sum()
        for row, label in enumerate(labels)
    )
    loss = task.loss(Fixed(logits), {"input_ids": labels, "labels": labels})
    assert loss.item() == pytest.approx(float(expected), rel=1e-12)
    several = prepare(Dataset.from_dict({"text": ["a", "b"], "labels": [["x", "y"], ["z"]]}), label_smoothing=0.2)
    given = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    smooth = given.double() * 0.8 + 0.1
    probability = logits.sigmoid()
    expected = -(smooth * probability.log() + (1 - smooth) * (1 - probability).log()).sum()
    assert several.loss(Fixed(logits), {"labels": given}).item() == pytest.approx(float(expected), rel=1e-12)


def test_class_weights_keep_the_invariance(make_config: MakeConfig, tmp_path: Path) -> None:
    losses = []
    for place, cut in enumerate(({"micro_batch_size": 32}, {"micro_batch_size": 5})):
        output = tmp_path / str(place)
        config = make_config(
            output=str(output), updates=6, task__class_weights="balanced", task__label_smoothing=0.1, **cut
        )
        assert carry_out(config) == 0
        losses.append(list(figures(output, "train/loss").values()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)


PREDICT = """
import json, sys
from transformers import pipeline
for shape, model, file in json.loads(sys.argv[1]):
    predict = pipeline("text-classification", model=model, top_k=None)
    rows = [json.loads(line) for line in open(file)]
    inputs = [{"text": r["sentence1"], "text_pair": r["sentence2"]} if "sentence1" in r else r["text"] for r in rows]
    function = {"multi_label": "sigmoid", "regression": "none"}.get(shape, "softmax")
    found = [predict(i, function_to_apply=function) for i in inputs]
    print(json.dumps([scores[0] if isinstance(scores[0], list) else scores for scores in found]))
"""


def test_the_exported_models_predict_the_same_in_a_fresh_process(make_config: MakeConfig, tmp_path: Path) -> None:
    given = []
    for shape in SHAPES:
        config = make_config(shape, updates=12, precision="fp32", output=str(tmp_path / shape))
        assert carry_out(config) == 0
        given.append((shape, str(tmp_path / shape / "model"), config["data"]["validation"]))
    command = [sys.executable, "-c", PREDICT, json.dumps(given)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for shape, line in zip(SHAPES, done.stdout.splitlines()[-len(SHAPES) :], strict=True):
        _as_the_run_said(shape, json.loads(line), tmp_path / shape)


def _as_the_run_said(shape: str, served: list[Any], output: Path) -> None:
    ours = [json.loads(line) for line in (output / "predictions" / "validation.jsonl").read_text().splitlines()]
    assert len(served) == len(ours) == 41
    for there, here in zip(served, ours, strict=True):
        scores = {entry["label"]: entry["score"] for entry in there}
        if shape == "regression":
            assert scores["value"] == pytest.approx(here["prediction"], abs=1e-4)
        else:
            assert scores == pytest.approx(here["scores"], abs=1e-4)
    names = {"single_label": {"low", "high"}, "multi_label": {"low", "high", "long"}, "pair": {"0", "1", "2"}}
    assert set(scores) == names.get(shape, {"value"})
    card = (output / "model" / "README.md").read_text()
    assert "validation/loss" in card
    assert np.isfinite(figures(output, "validation/loss")[12])
