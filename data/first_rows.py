"""The first rows of a stream: what columns, types and labels are found in, since nobody reads all rows beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from data.errors import UserError
from data.shards import Shard
from data.source import Rows
from data.stream import Kinds, misfit, typed
from data.text_files import LINE

LOOKED_AT = 4  # shards with rows, as far apart as can be
ROWS = 250  # of each


def first_rows(shards: Sequence[Shard], where: str, *, skip_bad: bool) -> tuple[list[Rows], Kinds | None]:
    """Return the first rows of some shards, and what text files among them tell of the types of all.

    The same on every process. Raises `UserError` for rows that cannot be read, and for a source without any.
    """
    import pyarrow as pa
    from datasets import Dataset, Features, Value

    found: list[Rows] = []
    kinds: dict[str, str] = {}
    schema: Any = None
    places = np.linspace(0, len(shards) - 1, min(LOOKED_AT, len(shards))).astype(int).tolist()
    for place in [*places, *(place for place in range(len(shards)) if place not in places)]:
        shard = shards[place]
        rows = _usable(shard, kinds if shard.loose else None, where, skip_bad=skip_bad)
        if rows and shard.loose:
            table = typed(rows, schema, shard.name)
            schema = table.schema
            found.append(Rows(Dataset(table), where, lines=True, first=True))
        elif rows:
            columns = {name: [row.get(name) for row in rows] for name in rows[0]}
            declared = shard.features()
            features = Features({**declared, LINE: Value("string")}) if declared else None
            found.append(Rows(Dataset.from_dict(columns, features=features), where, lines=True, first=True))
        if len(found) == LOOKED_AT:
            break
    if not found:
        raise UserError(f"{where} holds no usable rows")
    if schema is None:
        return found, None
    fields = [field for field in schema if field.name != LINE]
    return found, Kinds(kinds, pa.schema(fields))


def _usable(shard: Shard, kinds: dict[str, str] | None, where: str, *, skip_bad: bool) -> list[dict[str, Any]]:
    good = []
    for place, row in islice(shard.rows(0, None), ROWS):
        problem = row if isinstance(row, str) else misfit(row, kinds)
        if problem is None:
            assert isinstance(row, dict)
            good.append({**row, LINE: f"{shard.name}, {place}"})
        elif not skip_bad:
            raise UserError(f"{where}: {shard.name}, {place}: {problem}. Mend it, or set data.on_bad_row=skip")
    return good
