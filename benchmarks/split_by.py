"""Hold out whole groups of rows. `python -m benchmarks.split_by SOURCE COLUMN FOLDER [test=0.2] [validation=0.1]`.

For data that come without a split of their own. SOURCE is one as in a config. Rows that agree in COLUMN (the article
of a question, the author of a text) stay together, so that nothing is judged on what it was trained with. Groups are
taken in the order of their hashes: the same data give the same files on any machine. Writes FOLDER/train.parquet and
one file for each share; where one of these is there already, nothing is written.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasets import concatenate_datasets, disable_progress_bars

from data.errors import UserError
from data.source import Source, check_columns, open_rows
from data.text_files import LINE


def shared_out(groups: list[str], shares: dict[str, float]) -> dict[str, str]:
    """Return the role of each group: in the order of their hashes, each role until it has its share of the rows."""
    sizes = Counter(groups)
    ahead = sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).digest())
    roles = {}
    for role, share in shares.items():
        rows = 0
        while ahead and rows < share * len(groups):
            group = ahead.pop()
            rows += sizes[group]
            roles[group] = role
    if not ahead:
        raise UserError(f"nothing is left to train on: {len(sizes)} groups of {len(groups)} rows, shares {shares}")
    return {**roles, **dict.fromkeys(ahead, "train")}


def split(source: str, column: str, folder: Path, shares: dict[str, float]) -> dict[str, int]:
    """Write the files; return the rows of each."""
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        opened = open_rows(Source(path=source), "train", skip_bad=False, cache=Path(cache), token=None)
        check_columns(opened, [column], "the column that keeps rows together")
        try:
            dataset = concatenate_datasets([rows.dataset for rows in opened])
        except ValueError as error:
            raise UserError(f"{source}: the files have not the same columns: {error}") from error
        if LINE in dataset.column_names:
            dataset = dataset.remove_columns(LINE)
        values = dataset[:][column]
        if missing := values.count(None):
            raise UserError(f"{source}: {missing:,} rows have no {column!r}, so nothing tells what they belong to")
        roles = shared_out(groups := [str(value) for value in values], shares)
        if there := [name for role in ("train", *shares) if (name := folder / f"{role}.parquet").exists()]:
            raise UserError(f"{there[0]} is there already: name another folder, or move it away")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}") from error
        sizes = {}
        for role in ("train", *shares):
            mine = dataset.select([row for row, group in enumerate(groups) if roles[group] == role])
            mine.to_parquet(folder / f"{role}.parquet")
            sizes[role] = len(mine)
            print(f"{role}: {len(mine):,} rows, {sum(found == role for found in roles.values())} groups")
    return sizes


def share(text: str) -> tuple[str, float]:
    """Return role and share of "test=0.2"; argparse tells what is wrong with any other."""
    role, _, value = text.partition("=")
    if role not in ("test", "validation"):
        raise argparse.ArgumentTypeError(f"{text!r}: test=0.2 or validation=0.1, a part of all rows")
    if not (re.fullmatch(r"0?\.\d+", value) and float(value)):
        raise argparse.ArgumentTypeError(f"{text!r}: the share must be more than 0 and less than 1, as in {role}=0.2")
    return role, float(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, or 2 for something to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("column", metavar="COLUMN")
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("shares", metavar="ROLE=SHARE", nargs="*", type=share, help="default: test=0.2")
    options = parser.parse_args(arguments)
    if len(dict(options.shares)) < len(options.shares):
        parser.error("a share is given twice")
    try:
        split(options.source, options.column, options.folder, dict(options.shares) or {"test": 0.2})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
