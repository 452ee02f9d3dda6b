"""The command line: `accelerate launch -m train CONFIG [key=value …]`, also under torchrun and plain python."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import traceback

from data.errors import UserError
from train import signals

EPILOG = """\
examples:
  python -m train configs/quickstart.yaml
  python -m train configs/sst2.yaml data.train=sst2/train.parquet optim.lr=3e-5 epochs=2
  torchrun --nproc-per-node 2 -m train configs/sst2.yaml                  several CPU processes or GPUs
  accelerate launch --config_file accelerate_configs/ddp.yaml -m train configs/sst2.yaml

Run the same command again after an interruption: it goes on from the newest checkpoint in `output`.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code: 0 done or stopped on request, 1 checkpoint lost, 2 something to mend."""
    options = _parser().parse_args(arguments)
    signals.install()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    speaks = os.environ.get("RANK", "0") == "0"  # several processes meet the same problem; one tells it
    try:
        from train import config

        if options.schema:
            print(json.dumps(config.schema(), indent=1))
            return 0
        if options.config is None:
            raise UserError("name a config file, such as configs/quickstart.yaml; --help shows more")
        wrong = [text for text in options.overrides if "=" not in text]
        if wrong:
            raise UserError(f"after the config file come key=value pairs; {wrong[0]!r} is none")
        settings = config.read(options.config, options.overrides)

        from train.run import run  # the slow imports: torch, transformers, accelerate, datasets

        return run(settings, resume_anyway=options.resume_anyway)
    except UserError as error:
        if options.traceback:
            traceback.print_exc()
        elif speaks:
            print(f"error: {error}", file=sys.stderr)
        return 2


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
