"""The command line: `python -m train.grid CONFIG optim.lr=1e-5,3e-5 seed=1,2`: the runs of a sweep, one a line.

Without --index a table; with it the arguments of that run, each ended by a zero byte, as `slurm/sweep.sbatch` reads
them. With --name those of a run whose values somebody else has chosen (W&B's agent), in a folder of that name.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from data.errors import UserError
from train import config
from train.__main__ import split


def runs(file: str, assignments: Sequence[str]) -> list[list[str]]:
    """Return the arguments of `python -m train` for each run of the grid that `key=a,b` spans, the last key fastest.

    Each has an output folder of its own, named after what makes it different, in the folder OUTPUT-sweep, and all are
    one group at W&B. Commas inside brackets or quotes do not part values. Raises `UserError` for a config that cannot
    be, with any of the values, and for a sweep of one run.
    """
    choices = [(key, values(value)) for key, _, value in (assignment.partition("=") for assignment in assignments)]
    varied = [key for key, several in choices if len(several) > 1]
    if not varied:
        raise UserError("nothing varies: give a key several values, as in optim.lr=1e-5,3e-5")
    if "output" in varied:
        raise UserError("output: one folder for the sweep; each run gets a folder in it")
    found, names = [], set[str]()
    for point in itertools.product(*(several for _, several in choices)):
        chosen = [f"{key}={value}" for (key, _), value in zip(choices, point, strict=True)]
        settings = config.read(file, chosen)
        base = Path(settings.output)
        name = "_".join(text for text in chosen if text.partition("=")[0] in varied)
        name = re.sub(r"[^\w.,=+-]+", "-", name)[:200]
        if name in names:
            raise UserError(f"two runs of the sweep would write into {name}; leave out what is given twice")
        names.add(name)
        folder = base.with_name(f"{base.name}-sweep")
        alone = settings.tracking.group is None and "wandb" in settings.tracking.trackers
        group = [f"tracking.group={base.name}"] * alone
        kept = [text for text in chosen if not text.startswith("output=")]
        found.append([file, *kept, f"output={folder / name}", *group])
    return found


def chosen_elsewhere(file: str, assignments: Sequence[str], name: str) -> list[str]:
    """Return the arguments of a run of a sweep at W&B, with the folder OUTPUT-sweep/NAME. Raises `UserError`."""
    settings = config.read(file, assignments)
    if "wandb" not in settings.tracking.trackers:
        raise UserError("tracking.trackers: a sweep at W&B learns from the figures there; add wandb")
    base = Path(settings.output)
    kept = [text for text in assignments if not text.startswith("output=")]
    return [file, *kept, f"output={base.with_name(f'{base.name}-sweep') / name}"]


def values(text: str) -> list[str]:
    """Part a text at its commas, but not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        depth += 0 if quote else (sign in "[{(") - (sign in "]})")
        if sign == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def write(arguments: Sequence[str]) -> None:
    """Print arguments as `mapfile -d ''` reads them."""
    print("".join(f"{argument}\0" for argument in arguments), end="")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 0, or 2 for something to mend."""
    parser = argparse.ArgumentParser(prog="python -m train.grid", description=__doc__, allow_abbrev=False)
    parser.add_argument("arguments", nargs="*", metavar="CONFIG, key=a,b")
    parser.add_argument("--index", type=int, help="which run, from 0: its arguments alone")
    parser.add_argument("--name", help="of a run of a sweep at W&B: its arguments alone")
    options = parser.parse_intermixed_args(arguments)
    try:
        files, assignments = split(options.arguments)
        if any(assignment.partition("=")[0] == "hub_token" for assignment in assignments):
            raise UserError("hub_token: Slurm shows a job's command line to others; set HF_TOKEN in the environment")
        if len(files) > 1:
            raise UserError("a sweep is of one config; run stages one after the other")
        if options.name:
            write(chosen_elsewhere(files[0], assignments, options.name))
            return 0
        found = runs(files[0], assignments)
        last = len(found) - 1
        if options.index is not None and not 0 <= options.index <= last:
            raise UserError(f"there is no run {options.index}: submit the array with --array=0-{last}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.index is not None:
        print(f"run {options.index} of 0 to {last}: {shlex.join(found[options.index])}", file=sys.stderr)
        write(found[options.index])
        return 0
    for number, run in enumerate(found):
        print(f"{number}  {shlex.join(run)}")
    print(f"sbatch --array=0-{last} slurm/sweep.sbatch {shlex.join(options.arguments)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
