"""A process of a distributed test: carries out runs that a JSON file lists, one after the other, in one process group.

torchrun starts it, so that many runs cost one start: [{"config": {...}, "stop_after": 7, "record": file}, ...].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from train import run, signals, update
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


def main() -> None:
    """Carry out every run of the list, each from a fresh Accelerator but in the same process group."""
    from accelerate.state import AcceleratorState, GradientState

    for job in json.loads(Path(sys.argv[1]).read_text()):
        code = carry_out(job["config"], job.get("stop_after"), job.get("record"), tuple(job.get("poison", ())))
        assert code == job.get("code", 0), f"exit code {code}"
        AcceleratorState._reset_state()
        GradientState._reset_state()


if __name__ == "__main__":
    main()
