"""Addresses of the form `package:NAME/path`: files that an installed Python package carries."""

from __future__ import annotations

import glob
import importlib.util
from pathlib import Path

from data.errors import UserError

SCHEME = "package:"


def resolve(address: str) -> str:
    """Return `address` with `package:NAME/path` replaced by the file's path; other addresses come back unchanged.

    The package is only located: none of its code is imported.
    """
    if not address.startswith(SCHEME):
        return address
    name, _, inside = address.removeprefix(SCHEME).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{address}: no package {name!r} is installed here; install it with pip, or give another path")
    found = Path(next(iter(spec.submodule_search_locations))) / inside
    if not found.exists() and not glob.glob(str(found), recursive=True):
        raise UserError(f"{address}: the package {name!r} is installed, but {found} does not exist")
    return str(found)
