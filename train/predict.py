"""Let a trained model answer rows: `python -m train.predict OUTPUT --input rows.jsonl --output predictions.jsonl`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from data.errors import Unavailable, UserError
from train import signals

EPILOG = """\
examples:
  python -m train.predict runs/sst2 --input reviews.csv --output predictions.jsonl
  python -m train.predict runs/translate --input new.jsonl --output out.jsonl task.generation.beams=4
  torchrun --standalone --nproc-per-node 2 -m train.predict runs/sst2 --input reviews.csv --output predictions.jsonl

OUTPUT is the output folder of a run that is done, or the folder `model` of one. Rows need the columns that the model
reads, no targets; each line of the output says `row` (from 0) and what the model answers. The same file comes out on
any number of processes. Run the same command again after an interruption: it goes on where it stopped.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the rows; return the exit code.

    0: done, or stopped on request. 1: what the rows or the model lie on was away, or another start is at it. 2: there
    is something to mend.
    """
    options = _parser().parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    speaks = os.environ.get("RANK", "0") == "0"
    output = Path(options.output).expanduser()
    try:
        model = _model(Path(options.run).expanduser())
        _check(output)
        columns = dict(_column(text) for text in options.column)
        signals.install()

        from datasets import config as datasets_config  # the slow imports
        from datasets import disable_progress_bars

        from train.prediction import Request, predict

        disable_progress_bars()
        cache = Path(options.cache or datasets_config.HF_DATASETS_CACHE / "lockstep").expanduser()
        request = Request(
            model, options.input, output, columns, options.assignments, options.precision, options.batch_tokens,
            options.part_rows, options.on_bad_row == "skip", cache,
        )  # fmt: skip
        complete = predict(request)
    except UserError as error:
        if options.traceback:
            traceback.print_exc()
        elif speaks:
            print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Unavailable) else 2
    if speaks:
        print(f"predictions in {output}" if complete else "stopped; the same command goes on from there", flush=True)
    return 0


def _model(folder: Path) -> Path:
    """Return the folder of the exported model."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} (looked from {Path.cwd()}); name the output folder of a run")
    if (folder / "model").is_dir():
        return folder / "model"
    if (folder / "config.yaml").exists() and not (folder / "config.json").exists():
        raise UserError(f"{folder}: the run has exported no model yet; finish it first")
    return folder


def _check(output: Path) -> None:
    """Raise `UserError` for an output that cannot be written, or that would be lost."""
    there = output.absolute().parent
    if output.exists():
        raise UserError(f"--output: {output} is there already; move it away, or name another file")
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--output: {there} is no folder that can be written to")


def _column(text: str) -> tuple[str, str]:
    name, equals, own = text.partition("=")
    if not (name and equals and own):
        raise UserError(f"--column {text}: give the name in training and the name here, as in --column text=review")
    return name, own


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.predict",
        usage="%(prog)s OUTPUT --input ROWS --output FILE [task.key=value …] [options]",
        description="Let a trained model answer rows, which need no targets.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="OUTPUT", help="output folder of a run, or an exported model")
    parser.add_argument("assignments", nargs="*", metavar="task.key=value", help="how to answer, as task.generation.*")
    parser.add_argument("--input", required=True, metavar="ROWS", help="file, glob, saved data set or Hub name")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON, a line for each row, in their order")
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=HERE", help="the column NAME of training is called HERE"
    )
    parser.add_argument("--on-bad-row", choices=("error", "skip"), default="error", help="default: error")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16", "fp64"), default="auto")
    parser.add_argument(
        "--batch-tokens", type=_count, default=4096, help="tokens at once; padding counts where it is computed (4096)"
    )
    parser.add_argument("--part-rows", type=_count, default=512, help="rows between two saves (512)")
    parser.add_argument("--cache", help="folder of encoded rows; default: beside the cache of `datasets`")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    return parser


if __name__ == "__main__":
    try:
        exit_code = main()
    except Exception:  # a fault of ours: told as Python would, but the process group is left in order
        traceback.print_exc()
        exit_code = 1
    signals.leave(exit_code)
