"""Hold out whole groups of rows. `python -m benchmarks.split_by SOURCE COLUMN FOLDER [test=0.2] [validation=0.1]`.

For data that come without a split of their own. SOURCE is one as in a config. Rows that agree in COLUMN (the article
of a question, the author of a text) stay together, so that nothing is judged on what it was trained with. Groups are
taken in the order of their hashes: the same data give the same files on any machine. Writes FOLDER/train.parquet and
one file for each share.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections import Counter
from pathlib import Path

from datasets import concatenate_datasets, disable_progress_bars

from data.errors import UserError
from data.source import Source, open_rows
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


def main(source: str, column: str, folder: str, *assignments: str) -> dict[str, int]:
    """Write the files; return the rows of each."""
    shares = {role: float(share) for role, share in (each.split("=") for each in assignments)} or {"test": 0.2}
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        opened = open_rows(Source(path=source), "train", skip_bad=False, cache=Path(cache), token=None)
        dataset = concatenate_datasets([rows.dataset for rows in opened])
        if LINE in dataset.column_names:
            dataset = dataset.remove_columns(LINE)
        groups = [str(value) for value in dataset[:][column]]
        roles = shared_out(groups, shares)
        Path(folder).mkdir(parents=True, exist_ok=True)
        sizes = {}
        for role in ("train", *shares):
            mine = dataset.select([row for row, group in enumerate(groups) if roles[group] == role])
            mine.to_parquet(Path(folder) / f"{role}.parquet")
            sizes[role] = len(mine)
            print(f"{role}: {len(mine):,} rows, {sum(found == role for found in roles.values())} groups")
    return sizes


if __name__ == "__main__":
    main(*sys.argv[1:])
