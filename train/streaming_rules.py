"""What a run that streams its training rows cannot know, and what it therefore has to be told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INTERVALS = (("evaluate", "every"), ("checkpoint", "every"))
DURATIONS = (
    *INTERVALS, ("optim", "warmup"), ("optim", "decay"), ("optim", "unfreeze"), ("tracking", "log_every"),
)  # fmt: skip


def with_intervals(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a config with 10% where a stream would have the default of 1 epoch, which it lacks."""
    result = dict(content)
    if _get(content, "data", "streaming") is not True:
        return result
    for section, key in INTERVALS:
        given = result.get(section) or {}
        if isinstance(given, Mapping) and (section != "evaluate" or _get(content, "data", "validation")):
            result[section] = {key: "10%", **given}
    return result


def between_streaming(content: Mapping[str, Any]) -> list[str]:
    """Return what does not go together with data.streaming. `content` is not checked yet: anything may be in it."""
    if _get(content, "data", "streaming") is not True:
        return []
    problems = []
    if content.get("epochs") is not None:
        problems.append("epochs: how many rows a stream has is not known before they are read; give updates")
    for section, key in DURATIONS:
        value = _get(content, section, key)
        idle = section == "evaluate" and not _get(content, "data", "validation")
        if isinstance(value, str) and "epoch" in value and not idle:
            problems.append(
                f"{section}.{key}: {value!r} has no meaning where data.streaming leaves the number of rows unknown; "
                "give updates (500) or a part of the run (10%)"
            )
    sources = _get(content, "data", "train")
    several = sources if isinstance(sources, list | tuple) and len(sources) > 1 else ()
    if any(isinstance(one, str) or (isinstance(one, Mapping) and one.get("weight") is None) for one in several):
        problems.append(
            "data.train: how many rows each source of a stream has is not known, so give every one a weight, or put "
            "all files into one source with a glob"
        )
    if _get(content, "data", "grouping") == "window":
        problems.append(
            "data.grouping: window sorts the rows of many updates by their lengths before the first of these, and "
            "data.streaming reads the rows of one update after those of another; leave one of them out"
        )
    if isinstance(_get(content, "model", "tokenizer"), Mapping):
        problems.append(
            "model.tokenizer.train reads all training rows, and data.streaming none before training: make the "
            "tokenizer in a short run on a part of them without data.streaming, and name the folder of its model"
        )
    if _get(content, "task", "class_weights") == "balanced":
        problems.append(
            "task.class_weights: balanced counts all training rows, which data.streaming does not; give weights"
        )
    return problems


def between_task(refers: bool) -> list[str]:
    """Return what a task asks that a stream cannot answer."""
    if not refers:
        return []
    return [
        "data.streaming: the starting model is asked about all training rows before the first update, and a stream's "
        "are not known then; leave data.streaming out, or choose a loss without it (task.loss=orpo)"
    ]


def _get(content: Any, *path: str) -> Any:
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return content
