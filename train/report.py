"""The results of a run, for programs (result.json) and for people (the model card)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from train.checkpoint import State
from train.config import RunConfig
from train.tasks.base import Task

OWN_CODE = """
Its head is none that transformers has: the Python files in this folder define it, and `trust_remote_code=True` runs
them. Read them first. The weights are safetensors.
"""


def results(
    figures: Mapping[str, float], state: State, *, path: str | None, examples: int, world: int, precision: str
) -> dict[str, Any]:
    """Return the contents of result.json. `seconds` and tokens are those of training, over all resumptions.

    `path` is the starting model's.
    """
    return {
        "metrics": dict(figures),
        "updates": state.update,
        "examples": examples,
        "seconds": round(state.seconds, 3),
        "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else None,
        "padding_efficiency": round(state.tokens / state.computed, 4) if state.computed else None,
        "world_size": world,
        "precision": precision,
        "best_update": state.best_update or None,
        "started_from": {"path": path, "sha256": state.started_from or None},
    }


def card(config: RunConfig, figures: Mapping[str, float], task: Task, *, updates: int, own_code: bool) -> str:
    """Return the README.md of the exported model: what it is, how it scores, how to use it, how it was made.

    `own_code`: transformers needs the code that lies beside the weights.
    """
    head = {
        "library_name": "transformers",
        **({"pipeline_tag": task.pipeline} if task.pipeline else {}),
        **({"base_model": config.model.path} if _is_hub_name(config.model.path) else {}),
        "tags": ["lockstep"],
    }
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---

# {config.task.name.replace("_", " ")}{" from" * bool(config.model.path)} {config.model.origin}

{"Fine-tuned" if config.model.path else "Trained"} with Lockstep: {updates:,} updates of {config.batch_size} examples.

| figure | value |
|---|---|
{rows or "| none | |"}

```python
{_usage(task, own_code)}
```
{OWN_CODE * own_code}{f"{chr(10)}{task.hint}{chr(10)}" if task.hint else ""}
The config of the run:

```yaml
{yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True)}```
"""


def _is_hub_name(path: str | None) -> bool:
    """Whether the Hub accepts it as the name of a base model: only its own names."""
    return path is not None and ":" not in path and not Path(path).exists()


def _usage(task: Task, own_code: bool) -> str:
    given = '"path/to/this/folder"' + ", trust_remote_code=True" * own_code
    if task.pipeline:
        return f'from transformers import pipeline\n\npredict = pipeline("{task.pipeline}", model={given})'
    names = f"{task.model_class}, AutoTokenizer"
    loads = (f"{name} = {kind}.from_pretrained({given})" for name, kind in
             (("model", task.model_class), ("tokenizer", "AutoTokenizer")))  # fmt: skip
    return "\n".join((f"from transformers import {names}", "", *loads))
