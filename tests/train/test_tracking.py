"""The metrics file, and trackers that are slow, broken or missing: all in this process, with stand-ins for trackers."""

from __future__ import annotations

import json
import logging
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from train import tracking_feed
from train.tracking import Tracker, TrackingConfig, roll_back

CONFIG = {"seed": 1, "optim": {"lr": 0.1}}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The messages that the user sees."""
    caplog.set_level(logging.WARNING)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("train").addHandler(handler)
    yield messages
    logging.getLogger("train").removeHandler(handler)


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def tensorboard(output: Path) -> list[tuple[int, str, float]]:
    """All scalars in the event files, in the order in which they were written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(output / "tensorboard"), purge_orphaned_data=False).Reload()
    return [
        (event.step, name, event.value)
        for name in accumulator.Tags()["scalars"]
        for event in accumulator.Scalars(name)
    ]  # fmt: skip


def test_one_object_a_line_and_null_for_what_is_not_finite(accelerator: Accelerator, tmp_path: Path) -> None:
    tracker = Tracker(accelerator, tmp_path, TrackingConfig(), CONFIG, 0)
    tracker.log(1, {"train/loss": 0.5, "train/examples": 32})
    tracker.log(2, {"train/loss": float("nan"), "train/norm": float("inf")})
    tracker.log(2, {"validation/loss": 0.25})
    tracker.summary({"test/loss": 1.0})
    tracker.finish()
    assert read(tmp_path) == [
        {"update": 1, "train/loss": 0.5, "train/examples": 32},
        {"update": 2, "train/loss": None, "train/norm": None},
        {"update": 2, "validation/loss": 0.25},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_any_kill_and_any_roll_back_leave_whole_lines_in_order(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    records: list[dict[str, Any]] = [
        {"update": 0, "a": 1},
        {"update": 2, "a": 1},
        {"update": 2, "b": 0.5},
        {"update": 10, "a": None},
    ]
    whole = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    cases = 0
    for size in range(len(whole) + 1):
        for start in (0, 2, 9):
            file.write_bytes(whole[:size])
            known = roll_back(file, start)
            left = read(tmp_path)
            expected = [record for record in records[: whole[:size].count(b"\n")] if record["update"] <= start]
            assert left == expected
            assert known - {"update"} == {
                name for name in "ab" if any(name in record for record in left if record["update"] == start)
            }
            cases += 1
    assert cases > 250


def test_what_the_last_update_lacks_is_added_after_a_resumption_but_nothing_twice(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    for _ in range(3):
        tracker = Tracker(accelerator, tmp_path, TrackingConfig(), CONFIG, 2)
        tracker.log(2, {"validation/loss": 0.5})
        tracker.log(3, {"train/loss": 0.25})
        tracker.finish()
    assert read(tmp_path) == [{"update": 2, "validation/loss": 0.5}, {"update": 3, "train/loss": 0.25}]


def test_a_full_disk_costs_figures_and_one_warning(
    accelerator: Accelerator, tmp_path: Path, warnings: list[str]
) -> None:
    tracker = Tracker(accelerator, tmp_path, TrackingConfig(), CONFIG, 0)
    tracker.log(1, {"train/loss": 0.5})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # the next line fits in part
    try:
        tracker.log(2, {"train/loss": 0.5})
        tracker.log(3, {"train/loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.log(4, {"train/loss": 0.5})
    tracker.finish()
    assert [record["update"] for record in read(tmp_path)] == [1, 4]
    assert len(warnings) == 1


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    class Other:
        is_main_process = False

    other: Any = Other()
    tracker = Tracker(other, tmp_path, TrackingConfig(trackers=["tensorboard"]), CONFIG, 0)
    tracker.log(1, {"train/loss": 0.5})
    tracker.summary({"train/loss": 0.5})
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_update_once_over_resumptions(accelerator: Accelerator, tmp_path: Path) -> None:
    settings = TrackingConfig(trackers=["tensorboard"])
    tracker = Tracker(accelerator, tmp_path, TrackingConfig(), CONFIG, 0)  # its figures are caught up on
    tracker.log(1, {"train/loss": 1.0})
    tracker.finish()
    for start, stop in ((1, 6), (3, 9)):  # the second goes back to 3: what was sent is not sent again
        tracker = Tracker(accelerator, tmp_path, settings, CONFIG, start)
        if start == 3:
            tracker.log(3, {"validation/made_up": 3.0})
        for update in range(start + 1, stop + 1):
            tracker.log(update, {"train/loss": float(update)})
            if update % 3 == 0:
                tracker.log(update, {"validation/loss": float(update)})
        tracker.finish(complete=stop == 9)
    assert sorted(tensorboard(tmp_path)) == sorted(
        [(update, "train/loss", float(update)) for update in range(1, 10)]
        + [(update, "validation/loss", float(update)) for update in (3, 6, 9)]
    )
    steps = [step for step, name, _ in tensorboard(tmp_path) if name == "train/loss"]
    assert steps == sorted(set(steps))
    assert json.loads((tmp_path / "tracking.json").read_text())["sent"] == {"tensorboard": 9}


def test_an_evaluation_that_a_stop_left_out_joins_its_update(accelerator: Accelerator, tmp_path: Path) -> None:
    settings = TrackingConfig(trackers=["tensorboard"])
    tracker = Tracker(accelerator, tmp_path, settings, CONFIG, 0)
    tracker.log(4, {"train/loss": 4.0})
    tracker.finish(complete=False)
    tracker = Tracker(accelerator, tmp_path, settings, CONFIG, 4)
    tracker.log(4, {"validation/loss": 4.5})
    tracker.finish()
    assert sorted(tensorboard(tmp_path)) == [(4, "train/loss", 4.0), (4, "validation/loss", 4.5)]


def cost(tracker: Tracker, updates: int = 300) -> float:
    """The median seconds of one `log`."""
    seconds = []
    for update in range(1, updates + 1):
        began = time.perf_counter()
        tracker.log(update, {f"train/figure_{index}": 1 / update for index in range(10)})
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def test_a_tracker_that_blocks_costs_nothing_but_its_timeout(
    accelerator: Accelerator, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(TensorBoardTracker, "log", lambda *_, **__: release.wait())
    tracker = Tracker(accelerator, tmp_path, TrackingConfig(trackers=["tensorboard"], timeout=1), CONFIG, 0)
    assert cost(tracker) < 1e-3
    began = time.perf_counter()
    tracker.finish()
    assert time.perf_counter() - began < 3
    assert len(read(tmp_path)) == 300
    assert len(warnings) == 1 and "still busy" in warnings[0]
    release.set()


def test_a_tracker_that_raises_costs_one_warning(
    accelerator: Accelerator, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def log(self: TensorBoardTracker, values: dict[str, float], step: int) -> None:
        if step > 0:
            raise RuntimeError("the figures are not welcome\nand more")

    monkeypatch.setattr(TensorBoardTracker, "log", log)
    tracker = Tracker(accelerator, tmp_path, TrackingConfig(trackers=["tensorboard"]), CONFIG, 0)
    assert cost(tracker) < 1e-3
    tracker.finish()
    assert len(read(tmp_path)) == 300
    assert len(warnings) == 1 and "RuntimeError: the figures are not welcome;" in warnings[0]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_costs_one_warning(
    accelerator: Accelerator, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    began = time.perf_counter()
    tracker = Tracker(accelerator, tmp_path, TrackingConfig(trackers=[name]), CONFIG, 0)
    assert cost(tracker) < 1e-3
    tracker.finish()
    assert time.perf_counter() - began < 5
    assert len(read(tmp_path)) == 300
    assert len(warnings) == 1 and warnings[0].startswith(name)


def test_a_tracker_that_starts_late_gets_everything(
    accelerator: Accelerator, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, attempts = TensorBoardTracker.start, []

    def late(self: TensorBoardTracker) -> None:
        attempts.append(self)
        if len(attempts) < 3:
            raise ConnectionError("down")
        start(self)

    monkeypatch.setattr(tracking_feed, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(TensorBoardTracker, "start", late)
    tracker = Tracker(accelerator, tmp_path, TrackingConfig(trackers=["tensorboard"]), CONFIG, 0)
    for update in range(1, 6):
        tracker.log(update, {"train/loss": float(update)})
    while len(attempts) < 3:
        time.sleep(0.01)
    tracker.finish()
    assert [step for step, _, _ in tensorboard(tmp_path)] == [1, 2, 3, 4, 5]
    assert len(warnings) == 1 and "did not start: ConnectionError: down" in warnings[0]


def test_a_run_of_a_sweep_has_the_id_that_its_agent_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the sweep would wait for figures of a run that nobody makes. An id alone could be that of another stage."""
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    monkeypatch.setenv("WANDB_RUN_ID", "r4nd0m")
    assert tracking_feed.Ledger(tmp_path / "own.json").run_id != "r4nd0m"
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert tracking_feed.Ledger(tmp_path / "sweep.json").run_id == "r4nd0m"
    monkeypatch.delenv("WANDB_RUN_ID")
    assert tracking_feed.Ledger(tmp_path / "sweep.json").run_id == "r4nd0m", "over all resumptions"
