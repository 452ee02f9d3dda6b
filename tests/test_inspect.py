"""What `python -m train.inspect` shows of data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_config
from tests.worker import carry_out
from train.inspect import _joined, _piece, main
from train.tasks.base import pieces

MakeConfig = Callable[..., dict[str, Any]]


def inspect(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert main([str(write_config(config, tmp_path / "config.yaml")), *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_examples_lengths_balance_copies_and_overlap(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(data__max_length=8)
    texts = {"train": ["w1 w2", "w1  w2", " ".join(["w3"] * 20), "w4"], "validation": ["w1 w2", "w5"]}
    for role, values in texts.items():
        rows = [{"text": text, "label": "yes" if place else "no"} for place, text in enumerate(values)]
        Path(config["data"][role]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = inspect(config, tmp_path, capsys, "-n", "9")
    train, validation = lines.index("== train"), lines.index("== validation")
    assert "  [CLS] w4 [SEP]  → yes" in lines[train:validation]
    assert sum(line.startswith("example ") for line in lines[train:validation]) == 4
    assert "lengths 4 examples, 19 tokens, 4.8 on average" in lines
    assert "        1 reach max_length 8: cut, packed full, or just as long" in lines
    assert "label           3 (75.0%)  yes" in lines and "label           1 (25.0%)  no" in lines
    assert "batches of 32 examples, 1 an epoch; padding is not computed" in lines
    assert "copies  1 texts are equal to an earlier one (25.0%)" in lines  # the tokenizer sees no blanks
    overlap = "overlap 1 texts of validation are in train too (50.0%): figures on them flatter the model"
    assert lines[-1] == overlap
    assert not (tmp_path / "out").exists()


def test_packed_documents_are_compared_one_by_one(
    make_config: MakeConfig, tiny_decoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever rows they are packed in."""
    config = make_config(task={"name": "causal_lm"}, data__max_length=8, data__grouping="window")
    config["model"] = {"path": tiny_decoder}
    texts = ["w1 w2", "w3 w4 w5", "w6 w7 w8 w9", "w1 w2", "w10 w11 w12"]
    for role, values in (("train", texts), ("validation", [*reversed(texts[:3]), "w20 w21"])):
        Path(config["data"][role]).write_text("".join(json.dumps({"text": text}) + "\n" for text in values))
    lines = inspect(config, tmp_path, capsys)
    assert "copies  1 texts are equal to an earlier one (20.0%)" in lines
    assert lines[-1].startswith("overlap 3 texts of validation are in train too (75.0%)")
    plan = "batches of 32 examples, 1 an epoch, of similar length within windows of 16 updates; padding efficiency "
    assert any(line.startswith(plan) for line in lines)


def test_validation_is_shown_as_evaluation_sees_it(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The very tokens that are hidden in every evaluation are marked, those of the first epoch in train."""
    config = make_config(task={"name": "masked_lm", "mask_rate": 0.4}, updates=1)
    for role in ("train", "validation"):
        Path(config["data"][role]).write_text(json.dumps({"text": " ".join(f"w{n}" for n in range(20))}) + "\n")
    lines = inspect({**config, "batch_size": 1}, tmp_path, capsys)
    shown = {
        role: next(line for line in lines[lines.index(f"== {role}") :] if "w1" in line)
        for role in config["data"]
        if role in ("train", "validation")
    }
    assert carry_out({**config, "batch_size": 1}) == 0
    (record,) = map(json.loads, (tmp_path / "out" / "predictions" / "validation.jsonl").read_text().splitlines())
    hidden = [token["reference"] for token in record["hidden"]]
    assert re.findall(r"[\[→](w\d+)\]", shown["validation"]) == hidden != re.findall(r"[\[→](w\d+)\]", shown["train"])


def test_colours_and_problems(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspect(make_config("multi_label"), tmp_path, capsys, "-n", "1", "--color", "always", "seed=5")
    assert any("\033[35m→ " in line for line in lines)
    assert main([str(tmp_path / "config.yaml"), "data.train=nowhere.csv"]) == 2
    assert "nowhere.csv" in capsys.readouterr().err


def test_pieces_make_up_the_text(tiny_model: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10")["input_ids"]
    found = pieces(torch.tensor(ids), tokenizer)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)


def test_what_is_learned_as_it_stands_is_marked_as_one() -> None:
    marks = [("a", None), (" b", "b"), ("##c", "##c"), (" [MASK]", "d"), (" e", "d"), ("", "good")]
    assert "".join(_piece(*mark, color=False) for mark in _joined(marks)) == "a [b##c] [[MASK]→d] [e→d]  → good"


@pytest.mark.parametrize("count", ["-1", "two"])
def test_a_number_of_examples_that_is_none(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["config.yaml", f"-n={count}"])
    assert left.value.code == 2 and f"'{count}' is no number of examples" in capsys.readouterr().err
