"""The command line: `accelerate launch -m train CONFIG [CONFIG…] [key=value…]`; torchrun and plain python too."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data.errors import Unavailable, UserError, nearest
from train import imports, signals

if TYPE_CHECKING:
    from train.config import RunConfig

log = logging.getLogger("train")

EPILOG = """\
examples:
  python -m train configs/quickstart.yaml
  python -m train configs/sst2.yaml data.train=sst2/train.parquet optim.lr=3e-5 epochs=2
  torchrun --nproc-per-node 2 -m train configs/sst2.yaml                  several CPU processes or GPUs
  accelerate launch --config_file accelerate_configs/ddp.yaml -m train configs/sst2.yaml
  python -m train pretrain.yaml adapt.yaml classify.yaml                  three stages, one after the other

Run the same command again after an interruption: it goes on from the newest checkpoint in `output`.

stages:
  Several configs are run in order, each with an `output` of its own. ${previous} in one (as in `model: {path:
  "${previous}"}`) is the model that the one before exports. Configs, folders and files of all are checked before the
  first begins; one that is finished is not run again. key=value changes all of them, NAME:key=value the one whose file
  is NAME.yaml, and wins over the former: `batch_size=64 classify:optim.lr=1e-4`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code.

    0: done or stopped on request. 1: failed; another start may do better. 2: something to mend first. 75: it has to be
    started again, and will go on (see `signals.Again`).
    """
    parser = _parser()
    options, unknown = parser.parse_known_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    speaks = os.environ.get("RANK", "0") == "0"  # several processes meet the same problem; one tells it
    try:
        if unknown:
            name = unknown[0].partition("=")[0]  # not its value: it may be a secret
            allowed = [option for action in parser._actions for option in action.option_strings]
            raise UserError(f"there is no option {name}; there are {', '.join(allowed)}{nearest(name, allowed)}")
        return _run(options, speaks=speaks)
    except signals.Again as error:  # told by whichever process it happened to
        print(f"error: {error}", file=sys.stderr)
        signals.tell_ending(signals.AGAIN)
        return signals.AGAIN
    except UserError as error:
        code = 1 if isinstance(error, Unavailable) else signals.MEND
        if code == signals.MEND:
            signals.tell_ending(code)
        if options.traceback:
            traceback.print_exc()
        elif speaks or _still_alone():
            print(f"error: {error}", file=sys.stderr)
        return code


def _still_alone() -> bool:
    """Whether only this process has met the problem: had the first one too, all would have been ended by now."""
    time.sleep(5)
    return not signals.stopping()


def _run(options: argparse.Namespace, *, speaks: bool) -> int:
    """Do what is asked for. All that can be refused before the slow imports is refused before them."""
    from train import config, stages

    if options.schema:
        print(json.dumps(config.schema(), indent=1))
        return 0
    files, assignments = split(options.arguments)
    anyway: bool = options.resume_anyway
    found = stages.read(files, assignments, resume_anyway=anyway)
    if options.unfinished:
        for folder in stages.unfinished(found, resume_anyway=anyway):
            print(folder)
        return 0
    if options.prepare_data:
        imports.slow()

        from train.prepare_data import prepare

        prepare(found, resume_anyway=anyway)
        return 0

    def run(settings: RunConfig) -> int:
        signals.install()  # a scheduler may signal a process that has just begun
        imports.slow()

        from train.run import run

        return run(settings, resume_anyway=anyway)

    return stages.carry_out(found, run, resume_anyway=anyway, speaks=speaks)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the config files and the key=value pairs of a command line. What looks like neither is no file."""
    assigned = ["=" in argument and not os.path.exists(argument) for argument in arguments]
    if not arguments or assigned[0]:
        raise UserError("name a config file first, such as configs/quickstart.yaml; --help shows more")
    files, assignments = [arguments[0]], list[str]()
    for argument, is_assigned in zip(arguments[1:], assigned[1:], strict=True):
        is_file = not is_assigned and (argument.endswith((".yaml", ".yml")) or os.path.exists(argument))
        (files if is_file else assignments).append(argument)
    return files, assignments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        usage="%(prog)s CONFIG [CONFIG…] [key=value…] [--resume-anyway] [--prepare-data] [--unfinished] [--traceback] "
        "[--schema]",
        description="Fine-tune a pretrained model: a run is a pure function of its config.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG, key=value",
        help="YAML file of the run, or of each stage in order; changes to the config, such as optim.lr=3e-5",
    )
    parser.add_argument(
        "--resume-anyway", action="store_true", help="go on although config, data or starting model changed"
    )
    parser.add_argument(
        "--prepare-data",
        action="store_true",
        help="fetch model and data, encode the rows and check all that can be checked, without training: needs no GPU",
    )
    parser.add_argument(
        "--unfinished", action="store_true", help="print the output folders of what is not finished, and do nothing"
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of the config")
    return parser


if __name__ == "__main__":
    try:
        exit_code = main()
    except Exception:  # a fault of ours: told as Python would, but the process group is left in order
        traceback.print_exc()
        exit_code = 1
    signals.leave(exit_code)
