"""Checkpoints that are whole or do not exist, and what they remember besides the weights."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from data.errors import UserError
from train import manifest, shards, together, weights
from train.background import Background
from train.learned import Learned
from train.snapshot import Snapshot

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

log = logging.getLogger("train")

STATE = "state.json"


@dataclass
class State:
    """Everything a run knows besides weights and optimizer. No generator state: randomness is derived."""

    update: int = 0
    best_update: int = 0
    best_value: float | None = None
    waited: int = 0
    """Evaluations since the best one."""
    evaluated: int = 0
    """The last update after which there was an evaluation."""
    data: str = ""
    """Fingerprint of the encoded training data: positions mean nothing without it."""
    judged: str = ""
    """Fingerprint of the encoded validation rows: what was best was so on these."""
    position: dict[str, Any] | None = None
    """Where a stream stands; None where the update says it."""
    started_from: str = ""
    """sha256 of the weights of the starting model; empty if there were none, or none on this machine."""
    seconds: float = 0.0
    tokens: int = 0
    computed: int = 0


class Checkpoints:
    """The checkpoints of a run, under `folder`, named by update; all methods are called on every process.

    Each is written beside, flushed, completed by a manifest of hashes and renamed; only then are older ones removed,
    all but the newest `keep` and the best. A failed save is reported, harms nothing and stops nothing. All that is done
    `in_background`, one at a time, from a copy, if there is the memory for one.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        learned: Learned,
        *,
        keep: int,
        best: str | None,
        higher_is_better: bool,
        patience: int | None,
        in_background: bool = True,
    ) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.learned = learned
        self.keep = keep
        self.best = best
        self.higher_is_better = higher_is_better
        self.patience = patience
        self.state = State()
        self._settled_best: tuple[int, float | None] = (0, None)
        """The best whose checkpoint is written."""
        self._written_best: tuple[int, float | None] = (0, None)
        """The best of the checkpoint at hand."""
        self.failed = False
        """Whether the last save failed."""
        self._background = Background(accelerator)
        self._snapshot = Snapshot(accelerator.device) if in_background else None

    def path(self, update: int) -> Path:
        """Return the folder of the checkpoint after `update` updates."""
        return self.folder / f"update-{update:08d}"

    def _beside(self, update: int) -> Path:
        return self.folder / f".{self.path(update).name}.writing"

    def judge(self, update: int, figures: Mapping[str, float]) -> None:
        """Note an evaluation: is it the best so far?"""
        self.state.evaluated = update
        if self.best is None:
            return
        self.settle()  # is the best so far kept?
        if self.best not in figures:
            raise UserError(f"checkpoint.best: no evaluation reports {self.best!r}; there are {', '.join(figures)}")
        value, best = figures[self.best], self.state.best_value
        better = best is None or (value > best if self.higher_is_better else value < best)
        if better and not math.isnan(value):
            self.state.best_update, self.state.best_value, self.state.waited = update, value, 0
            if update == self.state.update and not self.failed:  # made up for: its checkpoint is written
                self._settled_best = update, value
        else:
            self.state.waited += 1

    def is_best(self, update: int) -> bool:
        """Whether the evaluation after `update` was the best so far, so that its model must be kept."""
        return self.best is not None and self.state.best_update == update

    def out_of_patience(self) -> bool:
        """Whether `patience` evaluations in a row were no better than the best."""
        return self.patience is not None and self.state.waited >= self.patience

    def save(self, update: int) -> None:
        """Begin to write the checkpoint after `update` updates, on all processes together, as it is now."""
        self.settle()
        self.state.update = update
        writing, final = self._beside(update), self.path(update)
        learned, first = self.learned.tensors(), self.accelerator.is_main_process
        copied: Any = learned
        if self._snapshot is not None and not self.learned.copied:
            copied = self._snapshot.take(learned)
        self._written_best = self.state.best_update, self.state.best_value
        state = json.dumps(asdict(self.state), indent=1) if first else ""
        write = partial(self._write, writing, copied or learned, state)
        steps: list[Callable[[], None]] = [_nothing, write, _nothing, _nothing]
        if first:
            steps = [partial(_make, writing), write, partial(manifest.publish, writing, final), self._rotate]
        self._background.begin(steps, partial(self._clear, update) if first else _unsaid)
        if self._snapshot is None or copied is None:
            self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint at hand is written, or has failed; on all processes together."""
        if not self._background.busy:
            return
        self.failed = self._background.end() != ""
        if not self.failed:
            self._settled_best = self._written_best
        elif self.is_best(self.state.update):  # a best model that could not be kept is no best
            self.state.best_update, self.state.best_value = self._settled_best

    def leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """Give the checkpoint at hand the time that it needs: the process ends. Not if that is to be at once."""
        if kind is not KeyboardInterrupt:
            self._background.leave()

    def _clear(self, update: int, problem: str) -> None:
        """Remove what was written of a save that failed, at once, for others need the space; say so."""
        room = _room(self.folder.parent)
        shutil.rmtree(self._beside(update), ignore_errors=True)
        log.warning(
            "the checkpoint after update %d could not be written (%s; %s). Training goes on; "
            "older checkpoints are whole. Free space, or mend the permissions of %s",
            update,
            problem,
            room,
            self.folder,
        )

    def ahead(self) -> str:
        """Say from where the run will go on."""
        return "from the newest checkpoint, since its own could not be written" if self.failed else "from there"

    def load(self, update: int) -> None:
        """Bring model, optimizer and state back to the checkpoint after `update` updates."""
        try:
            self.state = State(**json.loads((self.path(update) / STATE).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError) as error:  # whole, but not what this version writes
            raise self._of_another_version(update, f"{STATE}: {error}") from error
        self._settled_best = self.state.best_update, self.state.best_value
        self.load_weights(update)

    def load_weights(self, update: int) -> None:
        """Bring model and optimizer back, but leave the state as it is."""
        for part in ("model", "optimizer"):
            if not (self.path(update) / part).is_dir():
                raise self._of_another_version(update, f"there is no folder {part}")
        try:
            self.learned.load(self.path(update))
        except ValueError as error:
            reason = str(error).strip().splitlines()[0]
            if isinstance(error, shards.FormerError):
                raise self._of_another_version(update, reason) from error
            raise UserError(
                f"{self.path(update)}: this checkpoint is not of the model or optimizer that the config names "
                f"({reason}). Give them back, or choose another output folder"
            ) from error

    def _of_another_version(self, update: int, reason: str) -> UserError:
        return UserError(
            f"{self.path(update)}: this checkpoint is whole, but another version of this program wrote it ({reason}). "
            "Go on with the version that did (launches.jsonl says when that was), or train anew in another output "
            "folder; from a model that it exported a new run can start with model.path"
        )

    def has_best(self) -> bool:
        """Whether the best checkpoint is there and whole; the same on all processes. Says so if it is not."""
        found = [True]
        if self.accelerator.is_main_process:
            problem = manifest.problem(self.path(self.state.best_update))
            if problem is not None:
                log.warning("the best checkpoint, of update %d, is lost: %s", self.state.best_update, problem)
            found = [problem is None]
        together.wait()
        broadcast_object_list(found)
        return found[0]

    def newest(self) -> int | None:
        """Return the update of the newest checkpoint that verifies, or None; the same on all processes.

        Damaged ones are reported and set aside as `damaged-update-...`. The main process reads every byte of each.
        """
        found: list[int | None] = [self._newest() if self.accelerator.is_main_process else None]
        together.wait()
        broadcast_object_list(found)
        return found[0]

    def check_data(self, train: str, validation: str, *, anyway: bool) -> None:
        """Refuse to go on with other training rows than the checkpoint was made from, or to choose a best by others."""
        if self.state.data not in ("", train) and not anyway:
            raise UserError(
                "data.train: the rows are not those that this run began with, so its order of examples has no "
                "meaning. Bring them back, choose another output folder, or go on with --resume-anyway"
            )
        if self.best and self.state.judged not in ("", validation) and not anyway:
            raise UserError(
                "data.validation: the rows are not those by which checkpoint.best was chosen so far. Bring them back, "
                "choose another output folder, or go on with --resume-anyway"
            )
        self.state.data, self.state.judged = train, validation

    def check_start(self, path: str | None, revision: str | None, *, anyway: bool) -> None:
        """Refuse to go on with another starting model than the run began with. The main process reads its weights."""
        found = [weights.fingerprint(path, revision) if self.accelerator.is_main_process else None]
        together.wait()
        broadcast_object_list(found)
        then, now, output = self.state.started_from, found[0], self.folder.parent
        weights.check_same(path, then, now, output, anyway=anyway, speaks=self.accelerator.is_main_process)
        self.state.started_from = then or now or ""  # what it did start from, whatever is there today

    def _newest(self) -> int | None:
        for leftover in [*self.folder.glob(".*.writing"), *self.folder.glob(".*.replaced")]:  # of a kill
            shutil.rmtree(leftover, ignore_errors=True)
        for folder in sorted(self.folder.glob("update-*"), reverse=True):
            problem = manifest.problem(folder)
            if problem is None:
                return int(folder.name.removeprefix("update-"))
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(folder, aside)
            log.warning("rejected the checkpoint %s: %s. It is kept as %s", folder.name, problem, aside.name)
        return None

    def _write(self, writing: Path, learned: Mapping[str, Mapping[str, Tensor]], state: str) -> None:
        for part, tensors in learned.items():
            shards.save(tensors, writing / part, group=self._background.group)
        if state:
            (writing / STATE).write_text(state, encoding="utf-8")

    def _rotate(self) -> None:
        """Remove old checkpoints. A failure to do so is no harm."""
        folders = sorted(self.folder.glob("update-*"), reverse=True)
        for folder in folders[self.keep :]:
            if folder != self.path(self.state.best_update):
                shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _room(folder: Path) -> str:
    """Say how much a disk has room for; it may be gone, which is why a save has failed."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:.1f} MB free on the disk"
    except OSError as error:
        return f"the disk does not answer: {error}"


def _nothing() -> None:
    """What other processes do meanwhile."""


def _unsaid(problem: str) -> None:
    """The first process says it."""
