"""The command line: `accelerate launch -m train CONFIG [key=value …]`, also under torchrun and plain python."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence

from data.errors import UserError, nearest
from train import signals

log = logging.getLogger("train")

EPILOG = """\
examples:
  python -m train configs/quickstart.yaml
  python -m train configs/sst2.yaml data.train=sst2/train.parquet optim.lr=3e-5 epochs=2
  torchrun --nproc-per-node 2 -m train configs/sst2.yaml                  several CPU processes or GPUs
  accelerate launch --config_file accelerate_configs/ddp.yaml -m train configs/sst2.yaml

Run the same command again after an interruption: it goes on from the newest checkpoint in `output`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code: 0 done or stopped on request, 1 checkpoint lost, 2 something to mend."""
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
    except UserError as error:
        if options.traceback:
            traceback.print_exc()
        elif speaks or _still_alone():
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
            sys.modules["torch.distributed"].destroy_process_group()


def _still_alone() -> bool:
    """Whether only this process has met the problem: had the first one too, all would have been ended by now."""
    time.sleep(5)
    return not signals.stopping()


def _run(options: argparse.Namespace, *, speaks: bool) -> int:
    """Do what is asked for. All that can be refused before the slow imports is refused before them."""
    from train import config, output
    from train.idle import idle_keys

    if options.schema:
        print(json.dumps(config.schema(), indent=1))
        return 0
    if options.config is None or ("=" in options.config and not os.path.exists(options.config)):
        raise UserError("name a config file first, such as configs/quickstart.yaml; --help shows more")
    settings = config.read(options.config, options.overrides)
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdecimal() and settings.batch_size < int(world):
        raise UserError(
            f"batch_size: {settings.batch_size} examples cannot be shared by {world} processes; "
            "raise it, or start fewer"
        )
    if output.claim(settings, resume_anyway=options.resume_anyway):
        if speaks:
            print(f"this run is finished; its results are in {settings.output}")
        return 0
    for line in idle_keys(settings) if speaks else ():
        log.warning("%s; it has no effect", line)
    signals.install()  # a scheduler may signal a process that has just begun

    from train.run import run  # the slow imports: torch, transformers, accelerate, datasets

    return run(settings, resume_anyway=options.resume_anyway)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Fine-tune a pretrained model: a run is a pure function of its config.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the config, such as optim.lr=3e-5"
    )
    parser.add_argument("--resume-anyway", action="store_true", help="go on although config or data have changed")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of the config")
    return parser


if __name__ == "__main__":
    sys.exit(main())
