"""Makes every update take at least $PACE seconds, so that a test can disturb a run in the middle on any machine.

Python imports it at its start, from the PYTHONPATH that the tests give to their jobs.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from types import ModuleType
from typing import Any


class Slowed(importlib.abc.MetaPathFinder):
    """Slows `train.update` down when it is imported."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != "train.update":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        real = spec.loader.exec_module

        def execute(module: Any) -> None:
            real(module)
            update = module.Learner.update

            def paced(self: Any, number: int, batch: Any) -> Any:
                time.sleep(float(os.environ.get("PACE", "0")))
                return update(self, number, batch)

            module.Learner.update = paced

        spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Slowed())
