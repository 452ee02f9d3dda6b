"""What a run says while it goes on: to the console, to its files and to the trackers."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.batches import Batch, Places
from train import logs
from train.checkpoint import State
from train.files import write
from train.tracking import Tracker
from train.update import Learner, Report

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger("train")

UNSETTLED = 50
"""Updates after which it is asked, at the latest, whether they were left out: to ask is to wait for the device."""


class Journal:
    """Counts what is done and reports it: a live bar on a terminal, one line per log interval elsewhere.

    Every process has one; only the main process's (`speaks`) writes.
    """

    def __init__(
        self,
        tracker: Tracker,
        learner: Learner,
        output: Path,
        state: State,
        *,
        updates: int,
        speaks: bool,
    ) -> None:
        self.tracker = tracker
        self.learner = learner
        self.skips = output / "skipped_updates.jsonl"
        self.bad_rows = output / "skipped_rows_train.txt"
        """Of a stream: line by line, with the update before which it came upon them."""
        self.places: dict[int, Callable[[], Places]] = {}
        """Of the examples of updates that may yet turn out to be left out."""
        self.state = state
        self.updates = updates
        self.speaks = speaks
        self.began = self.counted = self.logged = time.perf_counter()
        self.first = state.update
        self.tokens = 0
        """Real tokens since the last log."""
        self.live = speaks and sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None
        if speaks and self.skips.exists():  # what comes after the checkpoint happens again, and is recorded again
            lines = self.skips.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] <= state.update]
            write(self.skips, "".join(kept))
        if speaks and state.position is not None and self.bad_rows.exists():
            lines = self.bad_rows.read_text(encoding="utf-8").splitlines(keepends=True)
            write(self.bad_rows, "".join(line for line in lines if _update(line) <= state.update))

    def count(self, number: int, batch: Batch) -> None:
        """Take note of update `number`."""
        self.state.position = batch.position
        self.places[number] = batch.places
        if batch.skipped:
            self._skipped_rows(number, batch.skipped)
        self.tokens += batch.tokens
        self.state.tokens += batch.tokens
        self.state.computed += batch.computed
        if self.learner.memory and (halved := self.learner.memory.figures(number)):
            self.tracker.log(number, halved)
        on_cpu = self.learner.accelerator.device.type == "cpu"  # where there is nothing to wait for
        if self.learner.unsettled >= (self.learner.max_nonfinite if on_cpu else UNSETTLED):
            self._left_out()  # a run that only leaves out updates must not go on for long
        if self.live and self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=self.updates, initial=self.first, unit="update", dynamic_ncols=True)
        if self.bar is not None:
            self.bar.update(number - self.bar.n)

    def log(self, number: int, report: Report) -> None:
        """Report the loss and rate of update `number`, and the speed since the last report. Waits for the device."""
        figures = report.figures()
        now = time.perf_counter()
        figures["train/tokens_per_second"] = self.tokens / (now - self.logged)
        self.logged, self.tokens = now, 0
        self.settle()
        self.tracker.log(number, figures)
        shown = f"loss {figures['train/loss']:.4f}  lr {figures['train/lr']:.2e}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{shown}  {figures['train/tokens_per_second']:,.0f} tokens/s")
        else:
            left = (now - self.began) / max(1, number - self.first) * (self.updates - number)
            rate = f"{figures['train/tokens_per_second']:,.0f} tokens/s  {clock(left)} left"
            self.say(f"update {number}/{self.updates}  {shown}  {rate}")

    def evaluated(self, number: int, figures: Mapping[str, float]) -> None:
        """Report an evaluation after update `number`. Its time does not count as training's."""
        self.tracker.log(number, figures)
        self.say(f"update {number}/{self.updates}  " + "  ".join(f"{name} {figures[name]:.4f}" for name in figures))
        self.counted = self.logged = time.perf_counter()
        self.tokens = 0

    def settle(self) -> None:
        """Bring the state's clock up to date, and record updates that were left out. Waits for the device."""
        now = time.perf_counter()
        self.state.seconds += now - self.counted
        self.counted = now
        self._left_out()

    def _left_out(self) -> None:
        self.learner.skipped(self._record)
        self.places.clear()

    def _skipped_rows(self, number: int, lines: Sequence[str]) -> None:
        if not self.speaks:
            return
        with self.bad_rows.open("a", encoding="utf-8") as stream:
            stream.writelines(f"update {number}: {line}\n" for line in lines)
        log.warning(
            "%d unusable rows skipped before update %d, the first: %s; all are in %s",
            len(lines), number, lines[0], self.bad_rows,
        )  # fmt: skip

    def _record(self, number: int, examples: list[int]) -> None:
        if not self.speaks:
            return
        record = {"update": number, "examples": examples, **self.places[number]()}
        with self.skips.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        log.warning("update %d was left out: its loss or gradient is not finite; see %s", number, self.skips)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one; on the main process only."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        elif self.speaks:
            print(text, flush=True)
        if self.speaks:
            logs.say(text)

    def close(self) -> None:
        """Leave the bar as it stands. May be repeated."""
        if self.bar is not None:
            self.bar.close()
        self.live, self.bar = False, None


def _update(line: str) -> float:
    number = line.removeprefix("update ").partition(":")[0]
    return int(number) if line.endswith("\n") and number.isdecimal() else math.inf


def clock(seconds: float) -> str:
    """Return "1:02:03" or "2:03"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
