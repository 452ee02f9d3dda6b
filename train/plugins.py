"""Parts that are files: a part's name is its module's name, so there is nothing to register."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from data.errors import UserError, nearest


def names(package: ModuleType) -> list[str]:
    """Return the parts in a package's folder: its modules, but for `base` and those that begin with "_"."""
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in found if name != "base" and not name.startswith("_"))


def load(package: ModuleType, kind: str, name: str) -> ModuleType:
    """Import the part `name`; raises `UserError` with the parts there are."""
    allowed = names(package)
    if name not in allowed:
        raise UserError(f"there is no {kind} {name!r}; there are {', '.join(allowed)}{nearest(name, allowed)}")
    return importlib.import_module(f"{package.__name__}.{name}")
