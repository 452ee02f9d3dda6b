"""Metrics: a name in the config becomes an `evaluate.Metric` that needs no network, or one of the Hub.

A metric is a file in this folder and its name is the file's name; nothing is registered. `_contract.Module` says what
the file offers. This module is light: `evaluate` is imported by `load`, not before.
"""

from __future__ import annotations

import importlib
import numbers
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import ValidationError

from data.errors import UserError, nearest
from data.section import Section
from train.metrics._contract import Choice, Kind, Module

if TYPE_CHECKING:
    import evaluate
    from numpy.typing import NDArray

__all__ = [
    "Choice", "Kind", "Module", "check", "check_best", "compute", "figures", "higher_is_better", "load", "names",
    "parse", "rehearse", "reported",
]  # fmt: skip

# What no file here computes, but a task or the Hub may report.
ERRORS = ("loss", "mae", "rmse", "mape", "smape", "mase", "wer", "cer", "ter", "brier_score")


def names() -> list[str]:
    """Return the names of the metrics in this folder, sorted; they need no network."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def parse(entry: str | Mapping[str, Any]) -> Choice:
    """Return the metric that a config entry means: "accuracy", or {name: f1, average: macro}.

    The key `prefix` is put before the result names, so that one metric can be chosen twice. Options of a metric of this
    folder are validated here; those of a Hub metric go to its `compute` as they are. Raises UserError.
    """
    options = {"name": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, Mapping) else {}
    name, prefix = options.pop("name", None), options.pop("prefix", "")
    if not isinstance(name, str) or not isinstance(prefix, str):
        raise UserError(
            f"a metric is a name (accuracy) or a mapping with one ({{name: f1, average: macro, prefix: dev_}}); "
            f"got {entry!r}; names that need no network: {', '.join(names())}"
        )
    if name in names():
        options = _validate(name, options).model_dump(exclude_unset=True)
    return Choice(name, options, prefix)


def figures(choice: Choice) -> list[str]:
    """Return the names of all that a metric of this folder may report; with * where the data give the names."""
    own, added = (getattr(_module(choice.name), name, None) for name in ("FIGURES", "FIGURES_WITH"))
    average = choice.options.get("average", "auto")
    results = [*(own or [choice.name if average == "auto" else f"{choice.name}_{average}"])]
    results += [name for option, names in (added or {}).items() if choice.options.get(option) for name in names]
    return [choice.prefix + name for name in results]


HINTS = {"tags": ". (Tags of entities are such as O, B-PER and I-PER: see task.scheme)"}
"""By kind of task: why it might not be the one that was meant."""


def check(choice: Choice, kind: Kind) -> None:
    """Raise UserError, with the metrics that fit, where the metric cannot score this kind of task.

    Light, so that a config can be refused at once. Of a Hub metric nothing is known before it runs.
    """
    if choice.name not in names() or kind in _module(choice.name).KINDS:
        return
    fitting = ", ".join(name for name in names() if kind in _module(name).KINDS)
    raise UserError(
        f"metric {choice.name!r} is for {' and '.join(_module(choice.name).KINDS)} tasks, this one is {kind}; "
        f"metrics that fit: {fitting}{HINTS.get(kind, '')}"
    )


def reported(choices: Sequence[Choice]) -> list[str]:
    """Return the names of all figures that these metrics report; none where one is of the Hub: only a run can tell."""
    local = all(choice.name in names() for choice in choices)
    return [name for choice in choices for name in figures(choice)] if local else []


def check_best(best: str, reported: Sequence[str]) -> None:
    """Raise UserError for a `checkpoint.best` that is neither the loss nor among the figures `reported`, if any."""
    known, name = ["loss", *dict.fromkeys(reported)], best.removeprefix("validation/")
    if reported and not any(fnmatchcase(name, pattern) for pattern in known):
        there = f"there are {', '.join(known)}{nearest(name, known)}"
        raise UserError(f"checkpoint.best: no metric of this config reports {best!r}; {there}")


def load(choice: Choice) -> evaluate.EvaluationModule:
    """Return the metric, ready for `compute` of this module and for its own `compute` and `add_batch`.

    A metric of this folder uses no network and leaves nothing on disk. Any other name goes to `evaluate.load`, which
    downloads code and runs it (and takes a script in a folder of that name before the Hub); it is seeded, and keeps
    what it collects in memory, so that runs never meet in a cache. Raises UserError when there is no such metric or no
    way to it.
    """
    if choice.name in names():
        from train.metrics._offline import OfflineMetric

        return OfflineMetric(choice, _module(choice.name), _validate(choice.name, choice.options))
    return _load_from_hub(choice)


def rehearse(choice: Choice, kind: Kind, labels: Sequence[str], scheme: str | None = None) -> None:
    """Raise UserError now for what this task's labels, or the scheme of its tags, would refuse at the first evaluation.

    `labels` are none where each row has its own choices, of which there are no scores.
    """
    if choice.name not in names() or kind not in ("single_label", "multi_label", "regression", "entities"):
        return
    if not choice.options and (labels or kind != "single_label"):
        return
    outputs: dict[str, Any]
    if kind == "entities":
        words, tags = np.arange(len(labels)), [list(labels)]
        outputs = {"predictions": words, "references": words, "tag_predictions": tags, "tag_references": tags}
        outputs["scheme"] = scheme
    elif kind == "regression" or not labels:
        outputs = {"predictions": np.arange(3.0), "references": np.arange(3.0)}
    else:
        scores = np.eye(len(labels))
        ids = np.arange(len(labels)) if kind == "single_label" else scores.astype(np.int64)
        outputs = {"predictions": ids, "references": ids, "scores": scores}
    compute([load(choice)], outputs, kind)


def compute(metrics: Iterable[evaluate.EvaluationModule], outputs: Mapping[str, Any], kind: Kind) -> dict[str, float]:
    """Return all figures of metrics that came from `load`, as one flat dict of Python floats.

    `outputs` of a task that predicts classes, labels or numbers has "predictions" and "references": (n,) class ids,
    (n, L) labels of 0 and 1, or (n,) floats (regression); and, where there are any, "scores": (n, C) or (n, L)
    probabilities. Other kinds have entries of their own, which the metrics for them name. The same outputs, in any
    order, give the same figures to the last bit (which a Hub metric does not promise). Of a Hub metric's result only
    numbers and mappings of numbers are kept. Raises UserError where a metric does not fit the task, where two results
    have one name, and where there is no example.
    """
    if any(len(entry) == 0 for entry in outputs.values()):
        raise UserError("there are no examples to evaluate; give a split that has some")
    scores = outputs.get("scores")
    classes = scores.shape[1] if scores is not None and kind == "single_label" else None
    told = {"classes": classes, "scheme": outputs.get("scheme")}
    figures: dict[str, float] = {}
    for metric in metrics:
        choice: Choice = metric.choice
        check(choice, kind)
        # A local one not through metric.compute: Arrow takes 4 s for 100,000 rows of 28 labels, this way 0.05 s.
        takes, against = _entries(choice)
        if takes not in outputs or against not in outputs:
            raise _lacks(choice, kind, outputs)
        if choice.name in names():
            results = metric.figures(outputs[takes], outputs[against], **told)
        else:
            results = _ask_hub_metric(metric, outputs[takes], outputs[against])
        for name, value in results.items():
            if choice.prefix + name in figures:
                raise UserError(
                    f"two metrics both report {choice.prefix + name!r}; tell them apart with a prefix: "
                    f"{{name: {choice.name}, …, prefix: other_}}"
                )
            figures[choice.prefix + name] = value
    return figures


def higher_is_better(name: str) -> bool:
    """Say whether the larger of two results is the better one; decides which checkpoint is the best.

    `name` is a result name, with or without prefix, path and average ("f1_macro", "eval/loss", "dev_mse"). False for
    the loss, for the metrics of this folder that say so, and for the usual error measures (ERRORS); True for all else.
    """
    lower = [*ERRORS, *(each for each in names() if not _module(each).HIGHER_IS_BETTER)]
    words = f"_{re.sub(r'[^a-z0-9]+', '_', name.rsplit('/', 1)[-1].lower())}_"
    return not any(f"_{error}_" in words for error in lower)


def _module(name: str) -> Module:
    return cast(Module, importlib.import_module(f"{__name__}.{name}"))


def _validate(name: str, options: Mapping[str, Any]) -> Section:
    section = _module(name).Options
    try:
        return section.model_validate(dict(options))
    except ValidationError as error:
        problems = [_explain(section, dict(problem)) for problem in error.errors()]
        raise UserError("\n".join(f"metric {name!r}: {problem}" for problem in problems)) from None


def _explain(section: type[Section], problem: dict[str, Any]) -> str:
    """Say one of pydantic's problems in words: where, what, what is allowed, the nearest name."""
    key, value, fields = ".".join(map(str, problem["loc"])), problem["input"], section.model_fields
    if problem["type"] == "extra_forbidden":
        known = [*fields, "prefix"]
        return f"no option {key!r}; options are {', '.join(known)}{nearest(key, known)}"
    if problem["type"] == "literal_error":
        allowed = problem["ctx"]["expected"]
        hint = nearest(str(value), re.findall(r"'(.*?)'", allowed))
        return f"{key} is {value!r}; allowed are {allowed}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key} is {value!r}; {message}" if key else message


def _load_from_hub(choice: Choice) -> evaluate.EvaluationModule:
    import evaluate
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:  # evaluate does not know this variable and would wait for every connection to time out
        evaluate.config.HF_EVALUATE_OFFLINE = True
    try:
        metric = evaluate.load(choice.name, module_type="metric", keep_in_memory=True, seed=0)
    except Exception as error:  # a metric of the Hub is a script: it can fail in any way
        raise UserError(
            f"metric {choice.name!r} is none of those that need no network ({', '.join(names())})"
            f"{nearest(choice.name, names())}; and it could not be loaded from the Hub: {type(error).__name__}: {error}"
        ) from error
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    if set(features) != {"predictions", "references"}:
        raise UserError(
            f"metric {choice.name!r} of the Hub needs {', '.join(features)}; "
            "it can be given only predictions and references"
        )
    metric.choice = choice
    return metric


def _ask_hub_metric(
    metric: evaluate.EvaluationModule, predictions: NDArray[Any], references: NDArray[Any]
) -> dict[str, float]:
    name, options = metric.choice.name, metric.choice.options
    try:
        results = dict(_numbers(metric.compute(predictions=predictions, references=references, **options)))
    except (TypeError, ValueError) as error:
        problem = f"metric {name!r} of the Hub cannot score this task with options {dict(options)}: {error}"
        raise UserError(problem) from error
    if not results:
        raise UserError(f"metric {name!r} of the Hub reports no number, so there is nothing to log; choose another")
    return results


def _numbers(results: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, float]]:
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{name}_")
        elif isinstance(value, numbers.Real):
            yield f"{path}{name}", float(value)


def _entries(choice: Choice) -> tuple[str, str]:
    """Return the names of the outputs that a metric takes, and that it is held against."""
    if choice.name not in names():
        return "predictions", "references"
    module = _module(choice.name)
    return module.TAKES, getattr(module, "AGAINST", "references")


def _lacks(choice: Choice, kind: Kind, outputs: Mapping[str, Any]) -> UserError:
    fitting = [name for name in names() if kind in _module(name).KINDS]
    usable = [name for name in fitting if {*_entries(Choice(name))} <= set(outputs)]
    takes, against = _entries(choice)
    missing = takes if takes not in outputs else against
    return UserError(
        f"metric {choice.name!r} needs {missing}, and this task gives {', '.join(outputs)}; "
        f"choose from {', '.join(usable)}"
    )
