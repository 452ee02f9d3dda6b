"""Bring the lines of a metrics file to a tracker from a thread of its own: no tracker can hold up or stop the run.

The file is the queue. A tracker that is slow, or comes up late, reads on from where it is; nothing has to be kept in
memory, nothing is dropped, and what a resumed run must send again is read like everything else.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger("train")

FIRST_PAUSE = 60.0
"""Seconds until a tracker that did not start is tried again. Each pause is twice the one before."""


class Ledger:
    """What trackers have been handed, in a JSON file: the run's id and, for each tracker, its highest update, and which
    of them had arrived when it was last started.

    The file is written beside, fsynced and renamed, so it is whole after any kill. Used by several threads.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {}

    @property
    def run_id(self) -> str:
        """The id of the run at its trackers, the same over all resumptions; drawn from the system, not from a seed.

        A run of a sweep at W&B has the id by which the sweep's agent asked for it.
        """
        with self._lock:
            if not self._open():
                chosen = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
                self._state = {"id": chosen or secrets.token_hex(8), "sent": {}, "arrived": {}}
                self._write()
            return str(self._state["id"])

    def sent(self, tracker: str) -> int:
        """The highest update that `tracker` was handed; -1 if none. After `run_id`."""
        with self._lock:
            return int(self._state["sent"].get(tracker, -1))

    def mark(self, tracker: str, update: int) -> None:
        """Note, before it happens, that `tracker` is handed `update`: a kill in between must not send it twice."""
        with self._lock:
            self._state["sent"][tracker] = update
            self._write()

    def arrived(self, tracker: str) -> int:
        """The highest update that had arrived when `tracker` was last started; -1 if none. After `run_id`."""
        with self._lock:
            return int(self._state.get("arrived", {}).get(tracker, -1))

    def confirm(self, tracker: str, update: int) -> None:
        """Note that everything up to `update` has arrived: it is never sent again, whatever is cleaned away later."""
        with self._lock:
            self._state.setdefault("arrived", {})[tracker] = update
            self._write()

    def _open(self) -> bool:
        if not self._state and self._file.exists():
            self._state = json.loads(self._file.read_text(encoding="utf-8"))
        return bool(self._state)

    def _write(self) -> None:
        writing = self._file.with_name(f".{self._file.name}.writing")
        with writing.open("w", encoding="utf-8") as stream:
            json.dump(self._state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(writing, self._file)


class Backend(ABC):
    """How one kind of tracker is started and finished. All but `__init__` runs in the tracker's thread."""

    name: str
    module: str
    """Imported before the run begins, so that no import of the run's own races with it."""

    @abstractmethod
    def start(self, run_id: str, *, first: bool) -> GeneralTracker:
        """Return the tracker, ready to log. `first`: it has never been handed anything of this run."""

    def arrived(self, tracker: GeneralTracker, before: int) -> int | None:
        """Return the highest update of this run that is where the tracker keeps it; None if that cannot be asked.

        before: what had arrived at the start before this one, as far as was known; -1 at the first.
        """
        return None

    def log(self, tracker: GeneralTracker, update: int, figures: dict[str, float]) -> None:
        """Hand over all figures of one update."""
        tracker.log(figures, step=update)

    @abstractmethod
    def finish(self, tracker: GeneralTracker, summary: Mapping[str, float], *, complete: bool) -> None:
        """Hand over the final figures and wait until everything has arrived."""

    def release(self) -> None:  # noqa: B027 (most have nothing to release)
        """Let go of whatever would hold up the interpreter's exit, or a second start."""


class Feed:
    """Follows the metrics file for one tracker and hands it each update once, in strictly increasing order.

    The figures of one update are merged: an update is handed over when a later one appears, or at a complete end.
    Whatever goes wrong costs one warning, and the tracker.
    """

    def __init__(self, backend: Backend, metrics: Path, ledger: Ledger) -> None:
        self.summary: dict[str, float] = {}
        self._backend = backend
        self._metrics = metrics
        self._ledger = ledger
        self._sent = -1
        self._complete = False
        self._warned = False
        self._loaded, self._news, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracking-{backend.name}", daemon=True)

    def start(self, seconds: float) -> None:
        """Start the thread and wait, at most `seconds`, until it has done its imports."""
        self._thread.start()
        if not self._loaded.wait(seconds):
            self._warn(f"not imported after {seconds:g} seconds; the run goes on without waiting for it")

    def wake(self) -> None:
        """Say that there are new lines. Takes microseconds, whatever the tracker does."""
        self._news.set()

    def close(self, *, complete: bool) -> None:
        """Say that there will be no more lines. A run that is not complete will go on: its last update is held back."""
        self._complete = complete
        self._closing.set()
        self._news.set()

    @property
    def busy(self) -> bool:
        """Whether the tracker does not have everything yet."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait until the tracker has everything, at most `seconds`."""
        self._thread.join(seconds)

    def give_up(self) -> None:
        """Give the tracker up if it is still busy, and let the interpreter exit."""
        if self.busy:
            self._warn(f"still busy when its time was up; it may lack figures, {self._metrics} has all of them")
            release = threading.Thread(target=self._release, daemon=True)
            release.start()
            release.join(1)  # of what it does, only the wait at the end takes long, and nobody needs that

    def _work(self) -> None:
        try:
            try:
                importlib.import_module(self._backend.module)
            finally:
                self._loaded.set()
            tracker = self._start()
            if tracker is not None:
                arrived = self._backend.arrived(tracker, self._ledger.arrived(self._backend.name))
                self._sent = self._ledger.sent(self._backend.name) if arrived is None else arrived
                self._ledger.confirm(self._backend.name, self._sent)
                self._follow(tracker)
                self._backend.finish(tracker, self.summary, complete=self._complete)
        except Exception as error:
            self._warn(f"given up: {_brief(error)}; {self._metrics} has all figures")
        finally:
            self._release()

    def _start(self) -> GeneralTracker | None:
        pause = FIRST_PAUSE
        while True:
            try:
                run_id = self._ledger.run_id
                return self._backend.start(run_id, first=self._ledger.sent(self._backend.name) < 0)
            except Exception as error:
                self._warn(f"did not start: {_brief(error)}; once a later attempt succeeds it gets all figures")
                self._release()
            if self._closing.wait(pause):
                return None
            pause *= 2

    def _follow(self, tracker: GeneralTracker) -> None:
        update, figures = -1, dict[str, float]()
        with self._metrics.open("rb") as stream:
            while True:
                closing = self._closing.is_set()  # asked before reading: what was logged before `close` gets read
                line = stream.readline()
                if line.endswith(b"\n"):
                    record = json.loads(line)
                    if record["update"] != update:
                        self._hand_over(tracker, update, figures)
                        update, figures = record["update"], {}
                    del record["update"]
                    figures |= {name: float("nan") if value is None else value for name, value in record.items()}
                    continue
                stream.seek(-len(line), os.SEEK_CUR)  # a line that is being written is read when it is whole
                if closing:
                    break
                self._news.wait()
                self._news.clear()
        if self._complete:
            self._hand_over(tracker, update, figures)

    def _hand_over(self, tracker: GeneralTracker, update: int, figures: dict[str, float]) -> None:
        if figures and update > self._sent:
            self._sent = update
            self._ledger.mark(self._backend.name, update)
            self._backend.log(tracker, update, figures)

    def _release(self) -> None:
        with contextlib.suppress(Exception, SystemExit):
            self._backend.release()

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s: %s", self._backend.name, text)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
