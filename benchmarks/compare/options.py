"""What is asked for, and what of it cannot be measured here."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from benchmarks.compare.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parent.parent / "results"
HINT = "pip install 'lockstep[benchmarks]'"


def parse(text: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; whoever asks for what makes no sense is told so, with exit code 2."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("cpu", "gpu", "toy"), default="cpu")
    parser.add_argument("--workloads", nargs="+", metavar="WORKLOAD", help=f"only these of: {', '.join(WORKLOADS)}")
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="only these; the first must be ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--updates", type=int, help="of each peer, instead of the workload's; at least 2")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of all peers, instead of the workload's")
    parser.add_argument("--micro", type=int, help="tokens in a micro-batch of ours and the plain loop")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no peer after so many in all")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that a peer may take")
    parser.add_argument("--anyway", action="store_true", help="measure what is made for a GPU on a CPU too: hours")
    parser.add_argument("--busy", action="store_true", help="measure though others use the processors")
    parser.add_argument("--folder", type=Path, help="keep rows, weights and caches here, for the next time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if problems := _problems(options):
        parser.error("; ".join(problems))
    return options


def _problems(options: argparse.Namespace) -> list[str]:
    known = sorted({peer for each in WORKLOADS.values() for peer in (*each.peers, *each.on_request)} | {"trainer_fp32"})
    found = [
        *_unknown("--workloads", options.workloads or (), sorted(WORKLOADS)),
        *_unknown("--peers", options.peers or (), known),
    ]
    if options.peers and options.peers[0] != "ours":
        found.append("--peers: the first must be ours, to which the others are held")
    if options.updates is not None and options.updates < 2:
        found.append("--updates: at least 2, of which the first is not counted")
    if options.rounds < 1:
        found.append(f"--rounds: at least 1, not {options.rounds}")
    if options.micro is not None and options.micro < 1:
        found.append(f"--micro: at least 1 token, not {options.micro}")
    for name in ("seconds", "limit"):
        if not getattr(options, name) > 0:
            found.append(f"--{name}: more than 0, not {getattr(options, name):g}")
    return found


def _unknown(option: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            found.append(f"{option}: no such name: {name}; {meant}")
    return found


def chosen(options: argparse.Namespace) -> list[Workload]:
    """Return the workloads as the options change them. Raises `SystemExit` where they need a GPU and there is none."""
    names = options.workloads or [name for name, each in WORKLOADS.items() if each.suite == options.suite]
    needing = [name for name in names if WORKLOADS[name].suite == "gpu"]
    if needing and not options.anyway and (why := _no_gpu()):
        raise SystemExit(
            f"cannot be measured here: {', '.join(needing)}. They are made for one GPU of 80 GB, and {why}. "
            "`--suite toy` makes all of it end to end on a CPU in minutes; `--anyway` begins nevertheless, for hours."
        )
    return [_changed(WORKLOADS[name], options) for name in names]


def _changed(each: Workload, options: argparse.Namespace) -> Workload:
    if options.precision not in (None, each.precision):
        each = dataclasses.replace(each, precision=options.precision, name=f"{each.name}-{options.precision}")
    if options.updates:
        each = dataclasses.replace(each, updates=options.updates, warm=min(each.warm, options.updates - 1))
    if options.micro:
        each = dataclasses.replace(each, micro=options.micro)
    return each


def _no_gpu() -> str | None:
    """Return why there is no GPU, or None if there is one."""
    import torch

    if torch.cuda.is_available():
        return None
    built = torch.version.cuda
    return f"PyTorch {torch.__version__} " + (f"(CUDA {built}) finds none" if built else "is built without CUDA")


def can_be_measured(each: Workload, peers: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the peers of a workload that are asked for (None: all but those on request): those that can be measured
    here, and those that what they are made of is missing for. Says so, and which are not the workload's."""
    known = (*each.peers, *each.on_request)
    strange = [peer for peer in peers or () if peer not in known]
    if strange:
        print(f"not a peer of {each.name}: {', '.join(strange)}; there are {', '.join(known)}", flush=True)
    asked = [peer for peer in peers or each.peers if peer in known]
    lacking = [peer for peer in asked if peer.startswith("trl")] if importlib.util.find_spec("trl") is None else []
    if lacking:
        print(f"{each.name}: not measured: {', '.join(lacking)}: TRL is not installed; {HINT}", flush=True)
    return [peer for peer in asked if peer not in lacking], lacking
