"""A new output layer begins at the best that can be said of every row alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from tests.conftest import figures
from tests.worker import carry_out
from train.tasks._head import begin_at, log_odds
from train.tasks._labels import Labels
from train.tasks.text_classification import Config, TextClassification

MakeConfig = Callable[..., dict[str, Any]]
SMALL = {"hidden_size": 3, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}


@pytest.mark.parametrize(("smoothing", "weights"), [(0.0, None), (0.2, None), (0.0, (3.0, 1.0, 0.5)), (0.1, (2, 2, 1))])
def test_of_all_constants_the_odds_have_the_least_loss(smoothing: float, weights: tuple[float, ...] | None) -> None:
    """By the gradient of the task's own loss, over rows of which 5, 1 and 300 of 400 have a label."""
    counts, rows = (5, 1, 300), 400
    task = TextClassification(
        Config(label_smoothing=smoothing), ("text",), "label", "multi_label", Labels(("a", "b", "c")), 0, weights
    )
    labels = torch.zeros(rows, 3)
    for label, count in enumerate(counts):
        labels[:count, label] = 1
    logits = torch.tensor(log_odds(counts, rows, smoothing, weights), dtype=torch.float64, requires_grad=True)
    task._losses(logits.expand(rows, 3), labels, smoothing).sum().backward()
    # half a row more with each label, and half a row without it: in the gradient no more than those
    assert logits.grad is not None and logits.grad.abs().max() < max(weights or [1])
    assert all(map(torch.isfinite, torch.tensor(log_odds((0, rows), rows))))


def test_only_a_new_output_layer_is_set() -> None:
    torch.manual_seed(0)
    for family, kept in (("bert", False), ("bert", True), ("llama", False)):
        config = AutoConfig.for_model(family, **SMALL, num_labels=3, pad_token_id=0)
        model = AutoModelForSequenceClassification.from_config(config)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        begin_at(model, [] if kept else list(before), [1.0, 2.0, 3.0])
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        # Llama's head has no bias; that three is also BERT's width confuses nothing
        assert changed == (["classifier.bias"] if family == "bert" and not kept else [])


@pytest.mark.parametrize("shape", ["multi_label", "regression"])
def test_a_run_begins_at_the_training_rows_and_a_second_stage_where_the_first_ended(
    shape: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(shape, updates=1, optim__lr=1e-12, precision="fp32")
    assert carry_out(config) == 0
    output = Path(config["output"])
    bias = load_file(output / "model" / "model.safetensors")["classifier.bias"].tolist()
    rows = [json.loads(line) for line in Path(config["data"]["train"]).read_text().splitlines()]
    values = [row.get("label", row.get("labels", row.get("score"))) for row in rows]
    if shape == "regression":
        assert bias == pytest.approx([sum(values) / len(values)], rel=1e-5)
        return
    names = list(json.loads((output / "model" / "config.json").read_text())["label2id"])
    counts = [sum(name in given for given in values) for name in names]
    assert bias == pytest.approx(log_odds(counts, len(rows)), rel=1e-5)
    again = make_config(
        shape, updates=1, optim__lr=1e-12, precision="fp32", output=str(tmp_path / "again"),
        model={"path": str(output / "model")}, task__class_weights="balanced",
    )  # fmt: skip
    assert carry_out(again) == 0
    kept = load_file(tmp_path / "again" / "model" / "model.safetensors")["classifier.bias"].tolist()
    assert kept == pytest.approx(bias, rel=1e-6)


def test_numbers_far_from_zero_are_within_reach(make_config: MakeConfig) -> None:
    """A price of 10,000 at a rate of 1e-3: from 0 the bias alone would take ten million updates."""
    config = make_config("regression", updates=30, precision="fp32")
    path = Path(config["data"]["train"])
    for part in (path, Path(config["data"]["validation"])):
        rows = [json.loads(line) for line in part.read_text().splitlines()]
        key = next(name for name in ("label", "labels", "score") if name in rows[0])
        part.write_text("".join(json.dumps({**row, key: row[key] + 10_000}) + "\n" for row in rows))
    assert carry_out(config) == 0
    assert figures(Path(config["output"]), "validation/loss")[30] < 10
