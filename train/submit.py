"""The command line: `python -m train.submit CONFIG… --nodes 2 --gpus-per-node 8 --time 4:00:00 [key=value…]`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data.errors import UserError, nearest
from train import accelerate_file, file_systems, stages
from train.__main__ import split
from train.config import RunConfig

SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "train.sbatch"
TIMES = re.compile(r"(\d+)(?::(\d+))?(?::(\d+))?|(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
MICRO_BATCH_TOKENS = 16_384  # `train.run`'s, which is slow to import
LEAD = 10
"""Minutes before the time limit at which train.sbatch lets a run be told to stop, unless --signal says otherwise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 0 submitted, 2 something to mend."""
    parser = _parser()
    given = sys.argv[1:] if arguments is None else list(arguments)
    known = {option for action in parser._actions for option in action.option_strings}
    others = [part for part in given if part.startswith("--") and part.partition("=")[0] not in known]
    options = parser.parse_intermixed_args([part for part in given if part not in others])
    try:
        return _submit(options, others)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _submit(options: argparse.Namespace, others: Sequence[str]) -> int:
    """Check everything, say what will happen, and hand the job to Slurm."""
    _check_directives(options, others)
    files, assignments = split(options.arguments)
    if any(assignment.partition("=")[0].rpartition(":")[2] == "hub_token" for assignment in assignments):
        raise UserError("hub_token: Slurm shows a job's command line to others; set HF_TOKEN in the environment")
    world = options.nodes * options.tasks
    found = stages.read(files, assignments, resume_anyway=options.resume_anyway, world=world)
    problems, warnings = file_systems.check([stage.config for stage in found])
    if problems and not options.local_anyway:
        raise UserError("\n".join(problems) + "\nName folders that all nodes share, or say --local-anyway")
    for warning in [*(problems if options.local_anyway else ()), *warnings]:
        print(f"warning: {warning}", file=sys.stderr)
    for stage in found:
        print(f"{stage.file} → {stage.config.output}: {arithmetic(stage.config, world, options.nodes)}")
    command = _command(options, others)
    print(shlex.join(command), flush=True)
    if options.dry_run:
        print(f"\n{SCRIPT.read_text(encoding='utf-8')}", end="", flush=True)
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: log in where jobs are submitted, or look with --dry-run")
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise UserError(f"Slurm refuses the job: {done.stderr.strip() or done.stdout.strip()}")
    print(done.stdout.strip())
    return 0


def arithmetic(config: RunConfig, world: int, nodes: int) -> str:
    """Say what one process gets of a batch, and in which micro-batches."""
    least, more = divmod(config.batch_size, world)
    each = f"{least} or {least + 1}" if more else f"{least}"
    if config.micro_batch_size:
        bound = f"at most {config.micro_batch_size} at once"
    else:
        bound = f"at most {config.micro_batch_tokens or MICRO_BATCH_TOKENS:,} tokens at once"
    machines = f"{nodes} node{'s' * (nodes > 1)} × {world // nodes} process{'es' * (world // nodes > 1)}"
    return f"{machines} share batches of {config.batch_size} examples: about {each} each, {bound}"


def minutes(time: str) -> int | None:
    """Return a time limit as Slurm reads it, in minutes, rounded up; None for UNLIMITED. Raises `UserError`."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = TIMES.fullmatch(time)
    if match is None:
        raise UserError(
            f"--time: {time!r} is no time; Slurm reads minutes, minutes:seconds, hours:minutes:seconds, days-hours, "
            "days-hours:minutes, days-hours:minutes:seconds"
        )
    one, two, three, days, hours, rest, seconds = (int(part) if part else 0 for part in match.groups())
    if match[4] is not None:
        total = ((days * 24 + hours) * 60 + rest) * 60 + seconds
    elif match[3] is not None:
        total = (one * 60 + two) * 60 + three
    else:
        total = one * 60 + two
    return -(-total // 60)


def _check_directives(options: argparse.Namespace, others: Sequence[str]) -> None:
    """Refuse what Slurm would refuse, or take in another sense than was meant; settle the processes of a node."""
    if options.nodes < 1:
        raise UserError(f"--nodes: {options.nodes} must be at least 1")
    if options.gpus_per_node < 0:
        raise UserError(f"--gpus-per-node: {options.gpus_per_node} must be at least 0: none, for CPU nodes")
    options.tasks = options.ntasks_per_node or options.gpus_per_node or 1
    if options.tasks < 1:
        raise UserError(f"--ntasks-per-node: {options.tasks} must be at least 1")
    if options.gpus_per_node and options.tasks != options.gpus_per_node:
        raise UserError(
            f"--ntasks-per-node: {options.tasks} processes for {options.gpus_per_node} GPUs a node; every GPU needs "
            "one process: leave the option out"
        )
    signals = [re.search(r"@(\d+)$", other) for other in others if other.startswith("--signal=")]
    lead = -(-int(signals[-1][1]) // 60) if signals and signals[-1] else LEAD
    limit = minutes(options.time) if options.time is not None else None
    if limit is not None and limit <= lead:
        raise UserError(
            f"--time: {options.time} is no longer than the {lead} minutes before its end at which the run is told to "
            "stop; ask for more, or for a later signal, as in --signal=USR1@60"
        )
    if options.partition and shutil.which("sinfo"):
        _check_partition(options.partition, options.gpus_per_node)


def _check_partition(partition: str, gpus: int) -> None:
    """Refuse a partition that there is not, or whose nodes have fewer GPUs."""
    done = subprocess.run(["sinfo", "-h", "-o", "%R|%G"], text=True, capture_output=True)
    if done.returncode:  # Slurm cannot be asked now; sbatch will say why
        return
    lines = [line.partition("|") for line in done.stdout.splitlines()]
    known = sorted({name.strip() for name, _, _ in lines})
    for name in partition.split(","):
        if name not in known:
            raise UserError(f"--partition: there is no {name!r}; there are {', '.join(known)}{nearest(name, known)}")
        found = [re.findall(r"gpu(?::[^:,(]+)?:(\d+)", gres) for own, _, gres in lines if own.strip() == name]
        most = max((sum(map(int, counts)) for counts in found), default=0)
        if gpus > most:
            raise UserError(f"--gpus-per-node: the nodes of {name} have {most} at most, not {gpus}")


def _command(options: argparse.Namespace, others: Sequence[str]) -> list[str]:
    if not SCRIPT.exists():
        raise UserError(f"there is no {SCRIPT}: install the repository itself (pip install -e .)")
    shape = [f"--nodes={options.nodes}", f"--gpus-per-node={options.gpus_per_node}"]
    shape.append(f"--ntasks-per-node={options.tasks}")
    shape += [f"--time={options.time}"] * (options.time is not None)
    shape += [f"--partition={options.partition}"] * (options.partition is not None)
    anyway = ["--resume-anyway"] * options.resume_anyway
    spread = options.accelerate_config
    told = ["env", f"ACCELERATE_CONFIG={accelerate_file.find(spread)}"] if spread else []
    return [*told, "sbatch", *shape, *others, os.fspath(SCRIPT), *options.arguments, *anyway]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.submit",
        usage="%(prog)s CONFIG [CONFIG…] --nodes N --gpus-per-node G [options of sbatch] [key=value…] [--dry-run]",
        description="Check a config and what is asked of Slurm, print the job, and submit it (slurm/train.sbatch).",
        epilog="Other options of sbatch are handed on, if they are one word: --account=name --qos=high --mem=0",
        allow_abbrev=False,
    )
    parser.add_argument("arguments", nargs="*", metavar="CONFIG, key=value", help="as for python -m train")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, required=True, help="one process for each; 0: CPU nodes")
    parser.add_argument("--ntasks-per-node", type=int, help="processes on a node without GPUs; default 1")
    parser.add_argument("--time", help="the time limit of one start; the job goes on after it, in the queue again")
    parser.add_argument("--partition")
    parser.add_argument(
        "--accelerate-config", metavar="FILE", help="how model and gradients are spread, such as fsdp2; default: ddp"
    )
    parser.add_argument("--resume-anyway", action="store_true", help="as for python -m train")
    parser.add_argument("--local-anyway", action="store_true", help="although folders are on disks of this machine")
    parser.add_argument("--dry-run", action="store_true", help="print the command and the script, and submit nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
