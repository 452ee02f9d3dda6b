"""Stopped or killed anywhere, and resumed: the same examples, the same updates, the same weights to the last bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import figures
from tests.distributed import ROOT, launch, zygote
from tests.worker import carry_out
from train import gradients
from train.adamw import AdamW

UPDATES = 30
MakeConfig = Callable[..., dict[str, Any]]


def with_dropout(make_config: MakeConfig, output: Path, **changes: Any) -> dict[str, Any]:
    """30 updates over 2.3 epochs in fp32, dropout on, in micro-batches."""
    settings: dict[str, Any] = {"updates": UPDATES, "precision": "fp32", "model__config": {}, "micro_batch_size": 11}
    return make_config(train=400, output=str(output), **{**settings, **changes})


def weights(output: Path) -> str:
    return hashlib.sha256((output / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_dropout_is_on(make_config: MakeConfig, tmp_path: Path) -> None:
    losses = []
    for place, config in enumerate(({}, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})):
        output = tmp_path / str(place)
        assert carry_out(with_dropout(make_config, output, model__config=config, updates=3)) == 0
        losses.append(figures(output, "train/loss"))
    assert losses[0] != losses[1]


def stopped_on_one_process(make_config: MakeConfig, tmp_path: Path, stops: Iterable[int], **changes: Any) -> None:
    """Hold runs that stopped after these updates, and went on, against one that did not."""
    assert carry_out(with_dropout(make_config, tmp_path / "whole", **changes)) == 0
    expected = weights(tmp_path / "whole")
    losses = figures(tmp_path / "whole", "train/loss")
    assert len(losses) == UPDATES
    for stop in stops:
        output = tmp_path / f"stopped-{stop}"
        config = with_dropout(make_config, output, **changes)
        assert carry_out(config, stop_after=stop) == 0
        assert not (output / "DONE").exists()
        assert max(figures(output, "train/loss")) == stop
        assert carry_out(config) == 0
        assert (output / "DONE").exists()
        assert weights(output) == expected, stop
        assert figures(output, "train/loss") == losses, stop


def stopped_on(world: int, make_config: MakeConfig, tmp_path: Path, stops: Sequence[int]) -> None:
    """Hold runs that stopped after these updates, and went on, against one that did not, on several processes."""
    whole = with_dropout(make_config, tmp_path / "whole")
    jobs: list[dict[str, Any]] = [{"config": whole}]
    for stop in stops:
        config = with_dropout(make_config, tmp_path / f"stopped-{stop}")
        jobs += [{"config": config, "stop_after": stop}, {"config": config}]
    launch(jobs, world, tmp_path)
    expected = weights(tmp_path / "whole")
    assert [weights(tmp_path / f"stopped-{stop}") for stop in stops] == [expected] * len(stops)


def test_a_stop_does_not_matter(make_config: MakeConfig, tmp_path: Path) -> None:
    """The first and the last update, in the middle of an epoch and at the end of one (13)."""
    stopped_on_one_process(make_config, tmp_path, (1, 13, 20, 29))


@pytest.mark.parametrize("micro_batch_size", [11, 32])
def test_a_stop_does_not_matter_in_bf16(
    micro_batch_size: int, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights are kept rounded, and AdamW takes of tables the rows that an update has touched."""
    taken, real = list[Any](), AdamW.take

    def take(self: AdamW, model: Any, *, rounded: bool) -> Any:
        taken.append(real(self, model, rounded=rounded))
        return taken[-1]

    monkeypatch.setattr(gradients, "LARGE", 1)
    monkeypatch.setattr(AdamW, "take", take)
    changes: dict[str, Any] = {"precision": "bf16", "micro_batch_size": micro_batch_size}
    stopped_on_one_process(make_config, tmp_path, (1, 13, 20), **changes)
    assert len(taken) == 7 and all(tables.zeros and tables.by_rows and halves.kept for tables, halves in taken)


@pytest.mark.whole_run
def test_a_stop_does_not_matter_on_two_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    stopped_on(2, make_config, tmp_path, (1, 13, 20, 29))


@pytest.mark.slow
def test_a_stop_does_not_matter_on_four_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    """Of more than two, the order in which they are summed matters too."""
    stopped_on(4, make_config, tmp_path, (13,))


@pytest.mark.slow
def test_stopped_after_every_update(make_config: MakeConfig, tmp_path: Path) -> None:
    """Last run: 2026-11-26, all 29 bit-equal."""
    stopped_on_one_process(make_config, tmp_path, range(1, UPDATES))


@pytest.mark.slow
def test_stopped_after_every_update_on_two_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    """Last run: 2026-11-26, all 29 bit-equal."""
    stopped_on(2, make_config, tmp_path, range(1, UPDATES))


@pytest.mark.whole_run
def test_two_then_one_then_three_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    config, record = make_config(output=str(tmp_path / "moved")), tmp_path / "moved.jsonl"
    launch([{"config": config, "stop_after": 7, "record": str(record)}], 2, tmp_path)
    carry_out(config, stop_after=13, record=str(record))
    launch([{"config": config, "record": str(record)}], 3, tmp_path)
    still, alone = make_config(output=str(tmp_path / "still")), tmp_path / "still.jsonl"
    carry_out(still, record=str(alone))
    assert len(record.read_text().splitlines()) == 20
    assert record.read_text() == alone.read_text()
    golden = json.loads((ROOT / "tests" / "golden" / "losses.json").read_text())["single_label"]
    assert list(figures(tmp_path / "moved", "train/loss").values()) == pytest.approx(golden, rel=1e-9)


def killed(make_config: MakeConfig, tmp_path: Path, wanted: int) -> None:
    """Kill runs at `wanted` random moments, start them again until they end, and hold them against one left alone."""
    changes: dict[str, Any] = {"checkpoint__every": 3}
    reference = with_dropout(make_config, tmp_path / "whole", **changes)
    began = time.monotonic()
    assert zygote().wait(zygote().start({"config": reference})) == 0
    seconds = time.monotonic() - began
    expected, losses = weights(tmp_path / "whole"), figures(tmp_path / "whole", "train/loss")
    generator, kills, finished = random.Random(5), 0, 0
    while kills < wanted:
        output = tmp_path / f"killed-{finished}"
        config = with_dropout(make_config, output, **changes)
        while not (output / "DONE").exists():
            child = zygote().start({"config": config})
            if kills < wanted:
                time.sleep(generator.uniform(0, 0.8 * seconds))
                os.kill(child, signal.SIGKILL)
            code = zygote().wait(child)
            assert code in (0, -signal.SIGKILL)
            kills += code == -signal.SIGKILL
        finished += 1
        assert weights(output) == expected
        assert figures(output, "train/loss") == losses
    assert kills == wanted
    assert finished >= max(1, wanted // 15)


@pytest.mark.slow
def test_kill_9_at_thirty_random_moments(make_config: MakeConfig, tmp_path: Path) -> None:
    """Whatever the moments, the runs end with the same weights. Last run: 2026-11-26, all equal."""
    killed(make_config, tmp_path, 30)
