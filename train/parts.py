"""The parts of a prediction, in a folder beside its output: each written whole or not at all, then joined."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.errors import Unavailable, UserError
from train import files
from train.journal import clock

log = logging.getLogger("train")

PLAN = "plan.json"
SPOKEN = 5.0  # seconds between two reports of progress


class Parts:
    """The parts of one output, of which `cuts` says where they begin and the last ends; used by several processes."""

    def __init__(self, output: Path, cuts: Sequence[int]) -> None:
        self.output, self.cuts, self.count = output, cuts, len(cuts) - 1
        self.folder = output.with_name(f".{output.name}.parts")
        self._lock = FileLock(self.folder / ".lock", timeout=0)

    def begin(self, plan: Mapping[str, Any]) -> None:
        """Make the folder, or see that what is there is of the same work; keep other starts out until `end`.

        Raises `UserError` for parts of other work, `Unavailable` while another start is at it.
        """
        with self._written(self.folder):
            self.folder.mkdir(exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise Unavailable(f"another start is writing {self.output}; wait for it, or name another") from error
            try:
                known = json.loads((self.folder / PLAN).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                known = None
            same = json.loads(json.dumps(plan))
            if known is not None and known != same:
                different = ", ".join(key for key in same if known.get(key) != same[key])
                raise UserError(
                    f"{self.folder} holds parts of another prediction (different: {different}). Give the options of "
                    "then back, name another --output, or delete that folder"
                )
            files.write_json(self.folder / PLAN, plan)

    def end(self) -> None:
        """Let other starts go on."""
        self._lock.release()

    def there(self, number: int) -> bool:
        """Whether a part is written."""
        return self._part(number).exists()

    @property
    def complete(self) -> bool:
        """Whether all are."""
        return all(self.there(number) for number in range(self.count))

    @property
    def done(self) -> int:
        """How many examples they hold."""
        numbers = [int(file.stem.removeprefix("part-")) for file in self.folder.glob("part-*.jsonl")]
        return sum(self.cuts[number + 1] - self.cuts[number] for number in numbers)

    def write(self, number: int, lines: str) -> None:
        """Write a part. Raises `UserError` where that cannot be."""
        with self._written(self._part(number)):
            files.write(self._part(number), lines)

    def join(self, skipped: Sequence[str]) -> None:
        """Put all of them together, in order, with the list of skipped rows beside; remove them."""
        if skipped:
            files.write(self.output.with_name(f"{self.output.name}.skipped_rows.txt"), "\n".join(skipped) + "\n")
            log.warning("%d rows were skipped, the first: %s", len(skipped), skipped[0])
        writing = self.output.with_name(f".{self.output.name}.writing")
        with self._written(writing):
            try:
                with writing.open("wb") as stream:
                    for number in range(self.count):
                        with self._part(number).open("rb") as part:
                            shutil.copyfileobj(part, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(writing, self.output)
            except OSError:
                writing.unlink(missing_ok=True)
                raise
        shutil.rmtree(self.folder, ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:08d}.jsonl"

    @contextmanager
    def _written(self, file: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{file} could not be written: {error.strerror or error}. Mend that (free space?), and run the same "
                "command again: it goes on from what is there"
            ) from error


class Progress:
    """Says how far all processes are, from the parts that are there: at most every few seconds, on one of them."""

    def __init__(self, parts: Parts, *, speaks: bool) -> None:
        self.parts, self.speaks = parts, speaks
        self.began = self.spoke = time.perf_counter()
        self.before = parts.done

    def report(self) -> None:
        """Report, if it is time or everything is done."""
        now = time.perf_counter()
        if not self.speaks or (now - self.spoke < SPOKEN):
            return
        done, examples, self.spoke = self.parts.done, self.parts.cuts[-1], now
        rate = (done - self.before) / (now - self.began)
        left = clock((examples - done) / rate) if rate else "?"
        print(f"{done:,} of {examples:,}  {rate:,.1f} a second  {left} left", file=sys.stderr, flush=True)
