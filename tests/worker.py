"""A process of a distributed test: carries out runs that a JSON file lists, one after the other, in one process group.

`distributed.launch` starts it, so that many runs cost one start: [{"config": {...}, "stop_after": 7, "record": file},
...]; with "files" instead of "config", the stages of a command; with "refused", a part of the message with which it
must end; with "wire", a file for what DDP sends (see `wires`); with "strategy", its variables (see `strategies`);
with "backend", what torch.compile hands its graphs to.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from data.errors import UserError
from tests import lacking, phases, wires
from tests.strategies import strategy
from train import compilation, hardware, run, signals, stages, update
from train.config import validate


def carry_out(
    config: dict[str, Any],
    stop_after: int | None = None,
    record: str | None = None,
    poison: tuple[int, ...] = (),
    resume_anyway: bool = False,
) -> int:
    """Run a config and return its exit code.

    Ask it to stop during update `stop_after`; append each update's example ids to the file `record`; make the loss of
    the updates `poison` not a number, on the last process only.
    """
    begun = [0]
    real = update.Learner.update

    def counted(self: update.Learner, number: int, batch: Any) -> update.Report:
        begun[0] = number
        if record and self.accelerator.is_main_process:
            with Path(record).open("a") as stream:
                stream.write(json.dumps([number, batch.examples.tolist()]) + "\n")
        healthy = self.loss
        if number in poison and self.accelerator.process_index == self.accelerator.num_processes - 1:
            self.loss = lambda model, tensors: healthy(model, tensors) * float("nan")
        try:
            return real(self, number, batch)
        finally:
            self.loss = healthy

    update.Learner.update = counted  # type: ignore[method-assign]
    asked = signals.stopping
    signals.stopping = lambda: stop_after is not None and begun[0] >= stop_after
    try:
        return run.run(validate(config, "test"), resume_anyway=resume_anyway)
    finally:
        update.Learner.update = real  # type: ignore[method-assign]
        signals.stopping = asked


def carry_out_and_ask(config: dict[str, Any], phase: str, rank: int, stop_file: str | None = None) -> int:
    """Run a config and return its exit code; ask process `rank` to stop in a phase of it (see `phases`).

    Which must be left soon: all has been written 10 seconds, or what an update takes, after that. What is being
    compiled is compiled to the end.
    """
    with phases.asked(phase, rank, stop_file) as times:
        code = run.run(validate(config, "test"))
    waited = time.monotonic() - times[0] if times else 0
    assert waited < (120 if phase == "compile" else 10), f"left {waited:.1f} seconds after it was asked"
    assert times or int(os.environ.get("RANK", "0")) != rank, f"never in the phase {phase}"
    phases.forget()
    return code


def carry_out_stages(
    files: Sequence[str],
    assignments: Sequence[str] = (),
    stop_after: int | None = None,
    resume_anyway: bool = False,
) -> int:
    """Run stages as the command line does, and return the exit code.

    Ask them to stop during the `stop_after`-th update of this call, on the last process only.
    """
    hardware.forget()
    begun = [0]
    real, asked = update.Learner.update, signals.stopping
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))

    def counted(self: update.Learner, number: int, batch: Any) -> update.Report:
        begun[0] += 1
        return real(self, number, batch)

    update.Learner.update = counted  # type: ignore[method-assign]
    signals.stopping = lambda: asked() or (stop_after is not None and begun[0] >= stop_after and rank == world - 1)
    try:
        found = stages.read(files, assignments, resume_anyway=resume_anyway)
        return stages.carry_out(
            found,
            lambda config: run.run(config, resume_anyway=resume_anyway),
            resume_anyway=resume_anyway,
            speaks=rank == 0,
        )
    finally:
        update.Learner.update = real  # type: ignore[method-assign]
        signals.stopping = asked


def work(listed: str) -> None:
    """Carry out every run of the list, each from a fresh Accelerator but in the same process group."""
    for job in json.loads(Path(listed).read_text()):
        compilation.BACKEND = job.get("backend", "inductor")
        try:
            if "files" in job:
                code = carry_out_stages(job["files"], (), job.get("stop_after"))
            elif "lacking" in job:
                with lacking.memory_for(**job["lacking"]):
                    code = carry_out(job["config"])
            elif "phase" in job:
                code = carry_out_and_ask(job["config"], job["phase"], job["rank"], job.get("stop_file"))
            else:
                poison = tuple(job.get("poison", ()))
                counted = wires.counted(Path(job["wire"])) if "wire" in job else nullcontext()
                with counted, strategy(job["strategy"]) if "strategy" in job else nullcontext():
                    code = carry_out(job["config"], job.get("stop_after"), job.get("record"), poison)
            assert "refused" not in job and code == job.get("code", 0), f"exit code {code}"
        except UserError as error:
            assert "refused" in job and job["refused"] in str(error), error
        hardware.forget()


def serve(listed: str) -> NoReturn:
    """Carry out a list of runs, and leave with what came of it."""
    exit_code = 1
    try:
        work(listed)
        exit_code = 0
    except BaseException:
        traceback.print_exc()
    signals.leave(exit_code)


if __name__ == "__main__":
    serve(sys.argv[1])
