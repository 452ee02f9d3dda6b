"""Every example exactly once, in order, and the same figures on any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AttentionMaskInterface, PreTrainedModel

from data.errors import UserError
from tests.conftest import rows
from tests.distributed import launch
from tests.worker import carry_out
from train import hardware
from train.checkpoint import Checkpoints
from train.evaluation import Coming, Evaluator, joined, stacked

MakeConfig = Callable[..., dict[str, Any]]


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "predictions" / "validation.jsonl").read_text().splitlines()]


def test_fewer_rows_than_processes_and_uneven_shares(make_config: MakeConfig, tmp_path: Path) -> None:
    """One, two and seven examples on three processes: as on one, to the last bit of each score."""
    jobs = []
    for count in (1, 2, 7):
        config = make_config(validation=count, updates=1, output=str(tmp_path / f"three-{count}"))
        kept = tmp_path / f"{count}.jsonl"
        Path(config["data"]["validation"]).rename(kept)
        config["data"]["validation"] = str(kept)
        config["evaluate"] = {"batch_tokens": 30}
        config["batch_size"] = 31  # the shares of training are uneven too
        jobs.append({"config": config})
    launch(jobs, 3, tmp_path)
    for count, job in zip((1, 2, 7), jobs, strict=True):
        assert carry_out({**job["config"], "output": str(tmp_path / f"one-{count}")}) == 0
        three, one = lines(tmp_path / f"three-{count}"), lines(tmp_path / f"one-{count}")
        assert [line["row"] for line in three] == list(range(count))
        assert three == one


def test_predictions_name_the_rows_of_the_file(make_config: MakeConfig, tmp_path: Path) -> None:
    """Rows left out as bad keep their number, so that a prediction can be looked up in the file."""
    config = make_config(updates=2, data__on_bad_row="skip")
    file = Path(config["data"]["validation"])
    good = file.read_text().splitlines()[:4]
    file.write_text("\n".join([good[0], '{"text": "", "label": "low"}', *good[1:]]) + "\n")
    assert carry_out(config) == 0
    found = lines(tmp_path / "out")
    assert [line["row"] for line in found] == [0, 2, 3, 4]
    assert [line["reference"] for line in found] == [json.loads(line)["label"] for line in good]


def test_mixed_sources_are_trained_on_and_resumed(make_config: MakeConfig, tmp_path: Path) -> None:
    parts = []
    for name, count in (("a", 60), ("b", 200)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows("single_label", count, count)))
        parts.append({"path": str(file), "weight": 1.0})
    records = []
    for place, stops in enumerate(([None], [3, 9, None])):
        record = tmp_path / f"record-{place}.jsonl"
        config = make_config(updates=14, output=str(tmp_path / str(place)), data__train=parts)
        for stop in stops:
            assert carry_out(config, stop_after=stop, record=str(record)) == 0
        records.append([json.loads(line)[1] for line in record.read_text().splitlines()])
    assert records[0] == records[1]
    epoch = [example for update in records[0][:9] for example in update]  # 260 examples, 130 of each source
    assert len(epoch) == 260
    assert sum(example < 60 for example in epoch) == 130
    assert len({example for example in epoch if example >= 60}) == 130
    assert {sum(example == row for example in epoch) for row in range(60)} == {2, 3}


def test_the_best_figure_must_be_reported(make_config: MakeConfig, tmp_path: Path) -> None:
    """Before anything is written; where only the data tell the names of figures, at the first evaluation."""
    with pytest.raises(UserError, match=r"checkpoint.best: no metric .* reports 'f1'; there are loss, accuracy"):
        carry_out(make_config(checkpoint__best="f1", updates=2))
    assert not (tmp_path / "out").exists()
    nothing: Any = None  # no checkpoint is written
    checkpoints = Checkpoints(
        tmp_path,
        Accelerator(cpu=True),
        nothing,
        keep=1,
        best="validation/f1_LOC",
        higher_is_better=True,
        patience=None,
    )
    with pytest.raises(UserError, match="no evaluation reports 'validation/f1_LOC'; there are validation/loss"):
        checkpoints.judge(1, {"validation/loss": 1.0})


def test_predictions_of_different_width_are_filled_up() -> None:
    wide, narrow = np.arange(6).reshape(2, 3), np.array([[7, 8]])
    assert stacked([wide, narrow]).tolist() == [[0, 1, 2], [3, 4, 5], [7, 8, -100]]
    scores = stacked([np.ones((1, 2, 1)), np.zeros((1, 1, 2))])
    assert scores.shape == (2, 2, 2) and np.isnan(scores).sum() == 4
    assert stacked([np.arange(2), np.arange(3)]).tolist() == [0, 1, 0, 1, 2]


def test_the_device_is_waited_for_once(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between micro-batches nobody asks for a value; all predictions are fetched when the last is on its way.

    Of an encoder that computes padding: one that does not counts its tokens on a CPU.
    """
    asked, waits, begun = list[str](), list[int](), list[int]()
    real_arrived, real_found = Coming.arrived, Evaluator._found

    def found(self: Evaluator, part: Any) -> Any:
        begun.append(1)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
                real = getattr(torch.Tensor, name)
                patch.setattr(
                    torch.Tensor, name, lambda *given, name=name, real=real: (asked.append(name), real(*given))[1]
                )
            return real_found(self, part)

    def arrived(self: Coming) -> Any:
        waits.append(len(self._coming))
        return real_arrived(self)

    monkeypatch.setattr(Evaluator, "_found", found)
    monkeypatch.setattr(Coming, "arrived", arrived)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", None)  # what it was comes back at the end
    monkeypatch.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", None)
    hardware._never_ask()  # as on a GPU
    assert carry_out(make_config(updates=1, evaluate__batch_tokens=60, padding_free=False)) == 0
    assert asked == []
    assert len(begun) > 3 and waits == [len(begun)]
    monkeypatch.setattr("train.evaluation.ON_THE_WAY", 1)
    coming = Coming(torch.device("cpu"))
    for place in range(3):
        coming.add([(np.array([place]), {"loss": np.array([place / 2])})])
    assert waits[1:] == [1, 1, 1]
    ids, arrays = joined(coming.arrived())
    assert ids.tolist() == [0, 1, 2] and arrays["loss"].tolist() == [0, 0.5, 1]
