"""The metrics of this folder as `evaluate.Metric`. Imports `evaluate`: from `load` only."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any, final

import evaluate
import numpy as np
from datasets import Features, List, Value
from numpy.typing import ArrayLike, NDArray

from data.errors import UserError
from data.section import Section
from train.metrics._contract import Choice, Module

SOURCES = {"classes": "the scores have", "scheme": "the task says"}
"""The options that outputs can tell, and who tells them."""


@final
class OfflineMetric(evaluate.Metric):
    """A metric of this folder behind the interface of `evaluate`: `compute`, `add`, `add_batch`.

    No network, no file, no lock. All numbers travel as float64, so neither class ids nor values are rounded on the way
    through Arrow. `compute` takes the number of classes as `classes=`, which the average "auto" depends on.
    """

    def __init__(self, choice: Choice, module: Module, options: Section) -> None:
        self.choice, self._module, self._options = choice, module, options
        # evaluate makes a folder even when it keeps all in memory; in the shared cache, unless told otherwise.
        with tempfile.TemporaryDirectory() as folder:
            super().__init__(cache_dir=folder, keep_in_memory=True, seed=0)
        self.info.module_name = choice.name

    def figures(self, predictions: ArrayLike, references: ArrayLike, **told: Any) -> dict[str, float]:
        """Return results by name; shapes as in `train.metrics.compute`, scores as `predictions` if it takes those.

        `told` are options that the outputs know (see SOURCES); None where they do not.
        """
        options = self._options_for(told)
        if self._columns:
            return self._module.compute(predictions, references, options)
        takes, against = self._module.TAKES, getattr(self._module, "AGAINST", "references")
        whole = "regression" not in self._module.KINDS
        taken = self._integers(predictions) if whole and takes == "predictions" else _reals(predictions)
        held = self._integers(references) if whole and against == "references" else _reals(references)
        return self._module.compute(taken, held, options)

    @property
    def _columns(self) -> Any:
        return getattr(self._module, "columns", None)

    def _info(self) -> evaluate.MetricInfo:
        if self._columns:
            prediction, reference = self._columns()
            alternatives = [Features(predictions=prediction, references=reference)]
            return evaluate.MetricInfo(
                description=self._module.__doc__ or "", citation="", inputs_description="", features=alternatives
            )
        row, number = List(Value("float64")), Value("float64")
        # Rows first: a row of one number would pass for a number.
        alternatives = [Features(predictions=row, references=row)] if "multi_label" in self._module.KINDS else []
        if self._module.KINDS != ("multi_label",):
            taken = row if self._module.TAKES == "scores" else number
            alternatives.append(Features(predictions=taken, references=number))
        inputs = (
            f"predictions: {self._module.TAKES}; references: class ids, labels or values; classes: how many there are"
        )
        return evaluate.MetricInfo(
            description=self._module.__doc__ or "", citation="", inputs_description=inputs, features=alternatives
        )

    def _compute(
        self, *, predictions: ArrayLike, references: ArrayLike, classes: int | None = None, scheme: str | None = None
    ) -> dict[str, float]:
        return self.figures(predictions, references, classes=classes, scheme=scheme)

    def _integers(self, values: ArrayLike) -> NDArray[np.int64]:
        given = np.asarray(values)
        with np.errstate(invalid="ignore"):
            whole = given.astype(np.int64)
        if not np.array_equal(whole, given):
            wrong = given[whole != given][0]
            raise UserError(f"metric {self.choice.name!r} takes class ids or labels of 0 and 1; got {wrong}")
        return whole

    def _options_for(self, told: Mapping[str, Any]) -> Section:
        fields: dict[str, Any] = dict(self._options)
        known = {name: value for name, value in told.items() if value is not None and name in fields}
        for name, value in known.items():
            if fields[name] not in (None, value):
                raise UserError(
                    f"metric {self.choice.name!r}: {name} is {fields[name]}, {SOURCES[name]} {value}; leave it out"
                )
        return self._options.model_copy(update=known) if known else self._options


def _reals(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)
