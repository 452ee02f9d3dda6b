"""Adapters: what learns, what is kept, and that all ways to load them predict the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import figures
from tests.worker import carry_out
from train.adapter import quiet

MakeConfig = Callable[..., dict[str, Any]]


def records(output: Path) -> list[Any]:
    return [json.loads(line) for line in (output / "predictions" / "validation.jsonl").read_text().splitlines()]


def learned(make_config: MakeConfig, output: Path, kind: str = "lora", **changes: Any) -> dict[str, Any]:
    """Return the config of a run with an adapter that learns something."""
    adapter = {"kind": kind, "rank": 4, **changes.pop("adapter", {})}
    length = 40 if kind == "dora" else 20  # its directions move more slowly
    defaults = {"optim__lr": 1e-2, "optim__schedule": "constant", "updates": length}
    return make_config(**{"adapter": adapter, "output": str(output), **defaults, **changes})


def on_its_base(folder: Path, auto: str = "AutoModelForSequenceClassification") -> tuple[Any, Any]:
    """Put an exported adapter on its base, as the lines of its card do: they are run."""
    card = (folder / "README.md").read_text()
    lines = card.partition("```python\n")[2].partition("```")[0]
    assert auto in lines
    names: dict[str, Any] = {}
    with quiet():
        exec(lines.replace("path/to/this/folder", str(folder)), names)
    return names["model"], names["tokenizer"]


def scores(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, float]]:
    import torch

    found = []
    for row in rows:
        with torch.no_grad():
            chances = model.double()(**tokenizer(row["text"], return_tensors="pt")).logits[0].softmax(0).tolist()
        found.append({model.config.id2label[place]: chance for place, chance in enumerate(chances)})
    return found


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_merged_or_not_it_predicts_the_same(kind: str, make_config: MakeConfig, tmp_path: Path) -> None:
    """The run's own records, the adapter on its base through peft, the merged model: in float64, with a new token."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    alone, merged = tmp_path / "alone", tmp_path / "merged"
    tokens = ["w1 w2"]
    assert carry_out(learned(make_config, alone, kind, model__add_tokens=tokens)) == 0
    assert carry_out(learned(make_config, merged, kind, model__add_tokens=tokens, adapter={"merge": True})) == 0
    losses = list(figures(alone, "train/loss").values())
    assert min(losses[-3:]) < losses[0] - 0.05
    assert records(alone) == records(merged)
    rows = [json.loads(line) for line in (tmp_path / "single_label-validation.jsonl").read_text().splitlines()]
    rows.append({"text": "w1 w2 w3"})
    whole = AutoModelForSequenceClassification.from_pretrained(merged / "model", dtype=torch.float64)
    expected = scores(whole, AutoTokenizer.from_pretrained(merged / "model"), rows)
    model, tokenizer = on_its_base(alone / "model")
    assert len(tokenizer) == len(model.get_input_embeddings().weight)
    found = scores(model, tokenizer, rows)
    for own, one, other in zip([*records(alone), None], found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-6)  # the card's lines load float32
        assert own is None or own["scores"] == pytest.approx(other, abs=2e-6)  # records are rounded to six digits
    files = {path.name for path in (alone / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "lockstep.json", "tokenizer.json"} <= files
    assert "model.safetensors" not in files and not (merged / "model" / "adapter_config.json").exists()
