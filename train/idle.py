"""Keys that the user has set and that cannot take effect: said once, never passed over in silence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data.section import Section

if TYPE_CHECKING:
    from data.source import Source
    from train.config import RunConfig


def idle_keys(config: RunConfig) -> list[str]:
    """Return "key: why it has no effect" for every such key that was set."""
    found = [f"{path}: {why}" for path, why in _conditions(config) if is_set(config, path)]
    for role in ("train", "validation", "test"):
        sources = getattr(config.data, role) or ()
        for place, source in enumerate(sources):
            prefix = f"data.{role}" if len(sources) == 1 else f"data.{role}.{place}"
            found += [f"{prefix}.{key}: {why}" for key, why in _source(source, role, len(sources))]
    return found


def is_set(config: RunConfig, path: str) -> bool:
    """Whether the user has set a key.

    A resolved config (output/config.yaml) sets all keys: there only those count that differ from their default.
    """
    keys = {name for name, field in type(config).model_fields.items() if not field.exclude}
    resolved = keys <= config.model_fields_set
    *sections, name = path.split(".")
    section: Section = config
    for part in sections:
        section = getattr(section, part)
    default = type(section).model_fields[name].get_default(call_default_factory=True)
    return name in section.model_fields_set and not (resolved and getattr(section, name) == default)


def _conditions(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the keys that this config leaves without effect, set or not."""
    optim, tracking, data = config.optim, config.tracking, config.data
    if not data.validation:
        yield "evaluate.every", "there is no data.validation"
        if not data.test:
            if not config.task.refers:  # the starting model is asked in such micro-batches too
                yield "evaluate.batch_tokens", "there is neither data.validation nor data.test"
            yield "metrics", "there is neither data.validation nor data.test"
    if not data.streaming:
        for key in ("readers", "shuffle_buffer"):
            yield f"data.{key}", "data.streaming is off"
    if data.grouping != "window":
        yield "data.window", f"data.grouping is {data.grouping}"
    if config.checkpoint.best is None:
        yield "checkpoint.best_is", "checkpoint.best is not given"
    for key in ("betas", "eps") if optim.name == "sgd" else ("momentum",):
        yield f"optim.{key}", f"optim.name is {optim.name}"
    for key, schedule in (("power", "polynomial"), ("decay", "wsd")):
        if optim.schedule != schedule:
            yield f"optim.{key}", f"optim.schedule is {optim.schedule}, not {schedule}"
    if optim.schedule == "constant":
        yield "optim.min_lr_ratio", "optim.schedule is constant"
    if "wandb" not in tracking.trackers:
        for key in ("project", "name", "group", "tags", "mode"):
            yield f"tracking.{key}", "tracking.trackers has no wandb"
    if not tracking.trackers:
        yield "tracking.timeout", "tracking.trackers is empty"
    places = [place for place in (config.model.path, config.model.tokenizer) if isinstance(place, str)]
    if all(_is_local(place) for place in places):
        yield "model.revision", f"{' and '.join(places) or 'a model from scratch'} is not on the Hub"
    if not places:
        yield "model.trust_remote_code", "a model from scratch comes with no code"
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told != "no" and config.precision not in ("auto", told):
        yield "precision", f"accelerate was told {told}, and its setting wins"


def _source(source: Source, role: str, count: int) -> Iterator[tuple[str, str]]:
    if source.weight is not None and (role != "train" or count == 1):
        yield "weight", "only several sources of data.train are mixed by weight"
    if not _is_local(source.path):
        return
    folder = Path(source.path).expanduser().is_dir()
    for key in ("name", "revision") if folder else ("name", "revision", "split"):
        if getattr(source, key) is not None:
            yield key, f"{source.path} is not on the Hub" if folder else f"{source.path} is a file"


def _is_local(path: str) -> bool:
    return path.startswith("package:") or Path(path).expanduser().exists() or any(sign in path for sign in "*?[")
