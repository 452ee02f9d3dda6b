"""Out of memory: the same update is made again, by all processes, from smaller micro-batches; the run ends the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.errors import UserError
from tests.conftest import figures
from tests.distributed import launch
from tests.lacking import memory_for
from tests.worker import carry_out

MakeConfig = Callable[..., dict[str, Any]]


def config_of(make_config: MakeConfig, tmp_path: Path, run: str, **changes: Any) -> dict[str, Any]:
    """12 updates in float64 without dropout, judged and saved every fourth."""
    settings = {"updates": 12, "evaluate": {"every": 4}, "checkpoint": {"every": 4}}
    return make_config(output=str(tmp_path / run), **{**settings, **changes})


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Hold weights, losses and evaluations of two runs against each other."""
    outputs = [Path(config["output"]) for config in (one, other)]
    assert all((output / "DONE").exists() for output in outputs)
    weights = [load_file(output / "model" / "model.safetensors") for output in outputs]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-9, atol=1e-12)
    for name in ("train/loss", "validation/loss"):
        assert figures(outputs[0], name) == pytest.approx(figures(outputs[1], name), rel=1e-9)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_alone(where: str, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Halved at update 3 until it fits; a stop and what follows keep it, and nothing fails again."""
    small = config_of(make_config, tmp_path, "small", micro_batch_size=4)
    assert carry_out(small) == 0
    config = config_of(make_config, tmp_path, "halved", micro_batch_size=32)
    with memory_for(2, where, from_update=3) as failed:
        assert carry_out(config, stop_after=6) == 0
        assert failed
        before = len(failed)
        assert carry_out(config) == 0
        assert len(failed) == before
    same(config, small)
    said = [record.message for record in caplog.records if "out of memory" in record.message]
    assert len(said) == before and "update 3: " in said[0] and "micro_batch_size=" in said[0]
    sizes = figures(tmp_path / "halved", "train/micro_batch_size")
    assert list(sizes) == [3] and sizes[3] <= 2
    noted = json.loads((tmp_path / "halved" / "memory.json").read_text())
    assert noted["bounds"] == ["micro_batch_size", 32]
    assert [entry["update"] for entry in noted["halved"]] == [3] * before


def test_tokens_are_halved_too(make_config: MakeConfig, tmp_path: Path) -> None:
    """The bound is by default far above what a batch has: what counts is what was too much."""
    small = config_of(make_config, tmp_path, "small", micro_batch_size=4)
    assert carry_out(small) == 0
    config = config_of(make_config, tmp_path, "halved")
    with memory_for(3) as failed:
        assert carry_out(config) == 0
    assert 1 <= len(failed) <= 6
    same(config, small)


def test_an_evaluation_goes_in_pieces(make_config: MakeConfig, tmp_path: Path) -> None:
    whole = config_of(make_config, tmp_path, "whole")
    assert carry_out(whole) == 0
    config = config_of(make_config, tmp_path, "pieces")
    with memory_for(6, "evaluation") as failed:
        assert carry_out(config) == 0
    assert 1 <= len(failed) <= 8
    same(config, whole)


def test_one_example_that_does_not_fit(make_config: MakeConfig, tmp_path: Path) -> None:
    for where in ("forward", "evaluation"):
        with memory_for(0, where), pytest.raises(UserError, match=r"a single example .* data.max_length"):
            carry_out(config_of(make_config, tmp_path, where))
        assert not (tmp_path / where / "DONE").exists()


def test_other_bounds_are_another_matter(make_config: MakeConfig, tmp_path: Path) -> None:
    """Who changes the key has changed the machine, or followed the advice: what was noted before is over."""
    config = config_of(make_config, tmp_path, "out", micro_batch_size=32)
    with memory_for(3, from_update=2):
        assert carry_out(config, stop_after=6) == 0
    with memory_for(2) as failed:
        assert carry_out({**config, "micro_batch_size": 31}) == 0
    assert failed


def test_tokens_of_another_kind_are_another_matter(make_config: MakeConfig, tmp_path: Path) -> None:
    """Where padding is computed a bound is of other tokens than where it is not."""
    config = config_of(make_config, tmp_path, "out")
    with memory_for(3, from_update=2):
        assert carry_out(config, stop_after=6) == 0
    with memory_for(3) as failed:
        assert carry_out({**config, "padding_free": False}, stop_after=8) == 0
    assert failed


@pytest.mark.whole_run
def test_two_processes_agree(make_config: MakeConfig, tmp_path: Path) -> None:
    """One of two fails: in the forward pass of the only micro-batch, of one of several, and in a backward pass that
    no other process waits for. Where the other one waits it ends, and what is started again is smaller."""
    small = config_of(make_config, tmp_path, "small", micro_batch_size=2)
    first = config_of(make_config, tmp_path, "first", micro_batch_size=16)
    later = config_of(make_config, tmp_path, "later", micro_batch_size=6)
    backward = config_of(make_config, tmp_path, "backward", micro_batch_size=6)
    judged = config_of(make_config, tmp_path, "judged", micro_batch_size=6)
    launch(
        [
            {"config": small},
            {"config": first, "lacking": {"rows": 3, "rank": 1}},
            {"config": later, "lacking": {"rows": 2, "rank": 0, "from_update": 5}},
            {"config": backward, "lacking": {"rows": 2, "rank": 1, "where": "backward", "from_update": 5}},
            {"config": judged, "lacking": {"rows": 6, "rank": 1, "where": "evaluation"}},
        ],
        2,
        tmp_path,
    )
    for config in (first, later, backward, judged):
        same(config, small)
    assert list(figures(tmp_path / "later", "train/micro_batch_size")) == [5]


@pytest.mark.whole_run
def test_where_others_wait_the_next_start_is_smaller(make_config: MakeConfig, tmp_path: Path) -> None:
    """The last backward pass of an update carries the gradients of all: it cannot be made again by one process."""
    cuts = {"padding_free": False}  # into groups of one length, of which a half fits
    small = config_of(make_config, tmp_path, "small", micro_batch_size=4, **cuts)
    config = config_of(make_config, tmp_path, "lost", micro_batch_size=16, **cuts)
    job = {"config": config, "lacking": {"rows": 6, "where": "last", "from_update": 6}}
    with pytest.raises(AssertionError, match=r"update \d+: out of memory .* Set micro_batch_size=\d"):
        launch([job], 2, tmp_path)
    assert [path.name for path in (tmp_path / "lost" / "checkpoints").iterdir()] == ["update-00000004"]
    launch([job, {"config": small}], 2, tmp_path)
    same(config, small)
