"""Figures of a run: a file of lines that is always right, and trackers that can never hold up or stop the run."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data.section import Section, operational
from train import signals, wandb_files
from train.durations import Interval
from train.tracking_feed import Backend, Feed, Ledger

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker

logger = logging.getLogger("train")

DISCREET = {
    "silent": True,  # else it prints, and asks for an API key on a terminal
    "x_disable_meta": True,  # else: argv, host, user, paths, git, packages
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
    "host": "",
    "program": "",
    "save_code": False,
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "label_disable": True,  # else it reads the main script
    "console": "off",
    "symlink": False,  # a folder of files can be copied anywhere
    "x_transaction_log_flush_interval": 0.1,  # the seconds of figures that a kill loses when offline
    "finish_timeout_raises": True,
    "reinit": "finish_previous",
}
"""With these W&B records the config, the figures, and which Python and libraries ran on what kind of system."""


HURRIED = 8.0
"""Seconds that trackers have left once the process has been asked to stop."""


class TrackingConfig(Section):
    """How often figures are written to metrics.jsonl, and which trackers get them too."""

    log_every: Interval = operational(10, "Between two lines of figures; there is always one at the end.")
    trackers: list[Literal["wandb", "tensorboard"]] = operational([], "Trackers that get the figures too.")
    project: str = operational("lockstep", "The project at W&B.", pattern=r"^[^/\\#?%:]+$", max_length=128)
    name: str | None = operational(None, "The name of the run. Default: the name of the output folder.")
    group: str | None = operational(None, "Runs of one group are shown together at W&B.", min_length=1, max_length=128)
    tags: list[str] = operational([], "Tags of the run at W&B.")
    mode: Literal["auto", "online", "offline"] = operational("auto", "auto: what WANDB_MODE says, or else online.")
    timeout: float = operational(20, "Seconds for which trackers may hold up the start, and the end, of a run.", gt=0)


class Tracker:
    """Writes figures to `output/metrics.jsonl` and brings them to trackers; does nothing but on the main process.

    metrics.jsonl has one JSON object a line, in order of update: {"update": 12, "train/loss": 0.53}; a figure that is
    not finite is null. After any number of kills and resumptions it holds each figure of each update once.

    Trackers get the same figures from threads. One that is slow, down, missing or misconfigured costs at most one
    warning; metrics.jsonl keeps what it missed, and it gets that when the run resumes. The run is one run there too,
    over all resumptions, and the updates it is sent are strictly increasing.
    """

    def __init__(
        self, accelerator: Accelerator, output: Path, settings: TrackingConfig, config: dict[str, Any], start: int
    ) -> None:
        """Cut metrics.jsonl back to update `start`, after which the run goes on, and start the trackers.

        `config` is what trackers record of the run. Waits until trackers are imported, at most `settings.timeout`;
        their servers are waited for by nobody.
        """
        self._is_main = _is_main(accelerator)
        self._feeds: list[Feed] = []
        self._timeout = settings.timeout
        if not self._is_main:
            return
        self._start = start
        file = output / "metrics.jsonl"
        self._known = roll_back(file, start)
        self._file = file.open("ab", buffering=0)
        self._warned = False
        # W&B would send its own errors home with their stack traces, and wait for that at exit.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        ledger = Ledger(output / "tracking.json")
        deadline = time.monotonic() + settings.timeout
        for kind in dict.fromkeys(settings.trackers):
            self._feeds.append(Feed(BACKENDS[kind](output, settings, config), file, ledger))
            self._feeds[-1].start(max(0, deadline - time.monotonic()))

    def log(self, update: int, figures: Mapping[str, float]) -> None:
        """Write figures of `update`, which is not before the last one logged. Never raises, never waits for a tracker.

        Figures of update `start` that the file has already, from before the interruption, are not written again.
        """
        assert "update" not in figures, "the line has the update under this name"
        if not self._is_main or (update == self._start and figures.keys() <= self._known):
            return
        values = {name: _plain(value) for name, value in figures.items()}
        self._append(json.dumps({"update": update, **values}).encode() + b"\n")
        for feed in self._feeds:
            feed.wake()

    def summary(self, figures: Mapping[str, float]) -> None:
        """Set the final figures, which W&B shows in its table of runs. They arrive with `finish`."""
        for feed in self._feeds:
            feed.summary.update(figures)

    def finish(self, *, complete: bool = True) -> None:
        """Wait, at most `timeout` seconds, until trackers have everything; then give up with a warning.

        A process that is asked to stop, or was already, waits no longer than `HURRIED` seconds from then on.

        complete: False if the run will be resumed. Then the last update is held back, since the resumed run may add an
        evaluation to it, and W&B shows the run as preempted, not as finished.
        """
        if not self._is_main:
            return
        self._file.close()
        deadline, hurried = time.monotonic() + self._timeout, False
        for feed in self._feeds:
            feed.close(complete=complete)
        for feed in self._feeds:
            while feed.busy and time.monotonic() < deadline:
                feed.join(0.1)
                if signals.stopping() and not hurried:
                    deadline, hurried = min(deadline, time.monotonic() + HURRIED), True
            feed.give_up()

    def _append(self, line: bytes) -> None:
        """Write a line or, with a warning, nothing: a full disk must not leave half of one, nor end the run."""
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            if not self._warned:
                self._warned = True
                logger.warning("metrics.jsonl: figures are lost: %s", error)


def roll_back(file: Path, start: int) -> set[str]:
    """Cut off the lines after update `start`, and a line torn by a kill; return the names of figures of `start` itself.

    The lines are in order, so all that goes is at the end, and cutting the end off a file happens wholly or not at all.
    """
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    while lines and _update(lines[-1]) > start:
        lines.pop()
    with file.open("ab") as stream:
        stream.truncate(sum(len(line) for line in lines))
        os.fsync(stream.fileno())
    names: set[str] = set()
    while lines and _update(lines[-1]) == start:
        names |= json.loads(lines.pop()).keys()
    return names


def _update(line: bytes) -> float:
    """Return the update of a line; infinity for a torn one."""
    try:
        return int(json.loads(line)["update"]) if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf


def _plain(value: float) -> float | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


def _is_main(accelerator: Accelerator) -> bool:
    """Whether this is the process that writes; under DeepSpeed on CPU every process's Accelerator says that it is."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return bool(accelerator.is_main_process)


class WandB(Backend):
    """Weights & Biases, through Accelerate's tracker."""

    name = module = "wandb"

    def __init__(self, output: Path, settings: TrackingConfig, config: dict[str, Any]) -> None:
        self._output, self._settings, self._config = output, settings, config

    def start(self, run_id: str, *, first: bool) -> GeneralTracker:
        import wandb
        from accelerate.tracking import WandBTracker
        from wandb.sdk.lib.import_hooks import unregister_all_post_import_hooks

        seconds = 0.75 * self._settings.timeout  # so that it is W&B that says what is wrong, before it is given up
        settings = wandb.Settings(**DISCREET, x_service_wait=seconds, init_timeout=seconds, finish_timeout=seconds)
        wandb.setup(settings)
        tracker = WandBTracker(
            self._settings.project,
            id=run_id,
            resume="allow",
            name=self._settings.name or self._output.resolve().name,
            group=self._settings.group,
            tags=self._settings.tags or None,  # an empty list would take away those given at W&B
            dir=self._output,
            mode=None if self._settings.mode == "auto" else self._settings.mode,
            settings=settings,
        )
        try:
            tracker.start()
        finally:
            # They report each import of the run's own to W&B's service; if that has died, the import fails.
            unregister_all_post_import_hooks()
        Path(tracker.tracker.dir, "../logs/debug-core.log").unlink(missing_ok=True)  # a link to the home directory
        tracker.store_init_configuration(self._config)
        return tracker

    def arrived(self, tracker: GeneralTracker, before: int) -> int | None:
        # What a kill caught on its way was sent, but never arrived: the server knows best, and without one the files.
        run = tracker.tracker
        if run.disabled:
            return None
        if not run.offline:
            return int(run.starting_step) - 1
        own = Path(run.dir).parent
        last = wandb_files.last_step(own.parent, run.id, newest=own)
        return None if last is None else max(last, before)

    def log(self, tracker: GeneralTracker, update: int, figures: dict[str, float]) -> None:
        tracker.log(figures, step=update, commit=True)  # else it waits for the next update, and a kill loses it

    def finish(self, tracker: GeneralTracker, summary: Mapping[str, float], *, complete: bool) -> None:
        run = tracker.tracker
        run.summary.update(dict(summary))
        if not complete:
            run.mark_preempting()
        folder = Path(run.dir).parent
        try:
            run.finish(exit_code=0 if complete else 1)
        except TimeoutError:
            raise TimeoutError(f"not everything was uploaded in time; `wandb sync {folder}` uploads the rest") from None

    def release(self) -> None:
        import wandb

        wandb.teardown()  # its exit hook would wait for its service, however long that takes


class TensorBoard(Backend):
    """TensorBoard, through Accelerate's tracker: event files in output/tensorboard.

    The library puts the host's name into the names of these files.
    """

    name = "tensorboard"
    module = "torch.utils.tensorboard"

    def __init__(self, output: Path, settings: TrackingConfig, config: dict[str, Any]) -> None:
        self._output, self._config = output, config

    def start(self, run_id: str, *, first: bool) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker

        tracker = TensorBoardTracker("tensorboard", self._output)
        tracker.main_process_only = False  # only the main process gets here; need no process group to know that
        tracker.start()
        if first:
            tracker.log({"config": _text(self._config)}, step=0)
        if "launch" in self._config:  # one each time that the run is started, at the update from which it goes on
            tracker.log({"launch": _text(self._config["launch"])}, step=self._config["launch"]["update"])
        return tracker

    def finish(self, tracker: GeneralTracker, summary: Mapping[str, float], *, complete: bool) -> None:
        tracker.finish()


def _text(value: Any) -> str:
    return f"```\n{json.dumps(value, indent=1)}\n```"


BACKENDS: dict[str, type[WandB | TensorBoard]] = {"wandb": WandB, "tensorboard": TensorBoard}
