"""Look at the data as the model will see it: `python -m train.inspect CONFIG [key=value …] -n 3`. Writes no run."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data.encoded import Encoded
from data.errors import UserError
from data.order import example_keys, permute
from train import config

if TYPE_CHECKING:
    from train.ingredients import Ingredients
    from train.tasks.base import Task

MARK, NOTE, PLAIN = "\033[1;32m", "\033[35m", "\033[0m"
LABELS_SHOWN = 30
CHUNK = 1_000  # examples read at once


def main(arguments: Sequence[str] | None = None) -> int:
    """Show examples and statistics of a config's data; return the exit code: 0, or 2 for something to mend."""
    parser = argparse.ArgumentParser(prog="python -m train.inspect", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("-n", type=_count, default=3, metavar="N", help="examples to show of each split (default 3)")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="mark what is learned")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    color = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
    try:
        settings = config.read(options.config, options.overrides)
        from train import announcement, ingredients, run  # the slow imports

        found = ingredients.read(settings)
        batches, _ = run.plan_batches(settings, found)
        plan = announcement.describe(settings, found, batches)
        for line in _report(found, plan, settings.seed, options.n, color=color):
            print(line)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of examples: 0, 1, 2, ...")
    return int(text)


def _report(found: Ingredients, plan: str, seed: int, shown: int, *, color: bool) -> Iterator[str]:
    """Yield what is to be told; `plan` says what a batch of the training rows holds."""
    yield f"task    {found.task}"
    digests: dict[str, NDArray[np.uint64]] = {}
    for role, encoded in found.splits.items():
        yield f"\n== {role}{': the first examples of a stream' if encoded.partial else ''}"
        for place in permute(np.arange(min(shown, len(encoded.dataset))), len(encoded.dataset), seed).tolist():
            key = (seed, 0) if role == "train" else ("evaluation",)  # what is random about it, as training has it
            yield from _example(found, encoded, place, key, color=color)
        yield from _lengths(encoded, found.max_length)
        if role == "train":
            yield f"batches of {plan}"
        yield from _balance(found.task.balance(encoded))
        digests[role] = inputs = _digests(encoded, found.task)
        copies = len(inputs) - len(np.unique(inputs))
        yield f"copies  {copies:,} texts are equal to an earlier one{_share(copies, len(inputs))}"
    for role, inputs in digests.items():
        if role != "train":
            common = int(np.isin(inputs, digests["train"]).sum())
            warning = ": figures on them flatter the model" if common else ""
            yield f"overlap {common:,} texts of {role} are in train too{_share(common, len(inputs))}{warning}"


def _example(
    found: Ingredients, encoded: Encoded, place: int, key: tuple[int | str, ...], *, color: bool
) -> Iterator[str]:
    """Yield one example as it goes into the model in the first epoch, or in evaluation, what is learned marked."""
    ids = np.array([place])
    features = {**encoded.features(ids), "key": example_keys(ids, *key)}
    tensors = found.task.collate(features)
    marks = _joined(found.task.marks(tensors, found.tokenizer))
    text = "".join(_piece(piece, learned, color=color) for piece, learned in marks)
    row, length = (features[name][0] for name in ("row", "length"))
    yield f"example {place} (row {row}), {length} tokens, {found.task.count(features)} targets"
    yield "\n".join(f"  {line}" for line in text.splitlines())


def _joined(marks: Sequence[tuple[str, str | None]]) -> Iterator[tuple[str, str | None]]:
    """Make one of neighbouring pieces of which nothing is learned, or that are learned as they stand."""
    for kind, group in groupby(marks, key=lambda mark: mark[1] if mark[1] != mark[0].strip() else True):
        members = list(group)
        if kind is True and members[0][0]:
            text = "".join(piece for piece, _ in members)
            yield text, text.strip()
        else:
            yield from members


def _piece(piece: str, learned: str | None, *, color: bool) -> str:
    """Return a piece of text; in colour or in brackets, with what is learned, where something is."""
    if learned is None:
        return piece
    if not piece:
        return f"  {NOTE}→ {learned}{PLAIN}" if color else f"  → {learned}"
    blank = piece[: len(piece) - len(piece.lstrip(" "))]
    note = "" if learned == piece.strip() else learned
    if color:
        return f"{blank}{MARK}{piece.strip(' ')}{PLAIN}{NOTE}{'→' * bool(note)}{note}{PLAIN}"
    return f"{blank}[{piece.strip(' ')}{'→' * bool(note)}{note}]"


def _lengths(encoded: Encoded, max_length: int) -> Iterator[str]:
    lengths = encoded.column("length")
    low, half, high, most = (int(value) for value in np.quantile(lengths, (0, 0.5, 0.95, 1)))
    tokens = int(encoded.column(encoded.real).sum())
    yield f"lengths {len(lengths):,} examples, {tokens:,} tokens, {tokens / len(lengths):.1f} on average"
    yield f"        from {low} to {most}; half have up to {half}, 95 % up to {high}"
    yield f"        {encoded.longest:,} reach max_length {max_length}: cut, packed full, or just as long"
    yield f"targets {int(encoded.column('targets').sum()):,}"
    if encoded.skipped:
        yield f"skipped {len(encoded.skipped):,} rows, the first: {encoded.skipped[0]}"


def _balance(counts: dict[str, int]) -> Iterator[str]:
    total = sum(counts.values())
    for name, count in Counter(counts).most_common(LABELS_SHOWN):
        yield f"label   {count:>9,}{_share(count, total)}  {name}"
    if len(counts) > LABELS_SHOWN:
        yield f"        and {len(counts) - LABELS_SHOWN} more"


def _share(part: int, whole: int) -> str:
    return f" ({part / max(1, whole):.1%})"


def _digests(encoded: Encoded, task: Task) -> NDArray[np.uint64]:
    """Return 64 bits of each text's tokens, (texts,): equal for equal texts. Reads the examples once, in chunks."""
    found = []
    for start in range(0, len(encoded.dataset), CHUNK):
        features = encoded.features(np.arange(start, min(start + CHUNK, len(encoded.dataset))))
        found += [hashlib.blake2b(tokens.tobytes(), digest_size=8).digest() for tokens in task.contents(features)]
    return np.frombuffer(b"".join(found), dtype=np.uint64)


if __name__ == "__main__":
    sys.exit(main())
