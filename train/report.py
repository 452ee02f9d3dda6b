"""The results of a run, for programs (result.json) and for people (the model card)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data import package
from train.adapter import ROWS
from train.checkpoint import State
from train.config import RunConfig
from train.tasks.base import Task

OWN_CODE = """
Its head is none that transformers has: the Python files in this folder define it, and `trust_remote_code=True` runs
them. Read them first. The weights are safetensors.
"""


def results(
    figures: Mapping[str, float],
    state: State,
    *,
    path: str | None,
    examples: int,
    world: int,
    precision: str,
    restarts: int,
) -> dict[str, Any]:
    """Return the contents of result.json. `seconds` and tokens are those of training, over all resumptions.

    `path` is the starting model's; `restarts` are the starts of the run after the first.
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
        "restarts": restarts,
        "best_update": state.best_update or None,
        "started_from": {"path": path, "sha256": state.started_from or None},
    }


def card(
    config: RunConfig,
    figures: Mapping[str, float],
    task: Task,
    *,
    updates: int,
    own_code: bool,
    new: Sequence[str] = (),
) -> str:
    """Return the README.md of the exported model: what it is, how it scores, how to use it, how it was made.

    `own_code`: transformers needs the code that lies beside the weights. `new`: what was not in the starting model.
    """
    alone = config.adapter is not None and not config.adapter.merge
    usage = "\n".join(_on_base(config, task, new)) if alone else _usage(task, own_code)
    head = {
        "library_name": "peft" if alone else task.library,
        **({"pipeline_tag": task.pipeline} if task.pipeline else {}),
        **({"base_model": config.model.path} if _is_hub_name(config.model.path) else {}),
        "tags": ["lockstep"],
    }
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---

# {config.task.name.replace("_", " ")}{" from" * bool(config.model.path)} {config.model.origin}

{"Fine-tuned" if config.model.path else "Trained"} with Lockstep: {updates:,} updates of {config.batch_size} examples{
        f", {config.adapter}" * bool(config.adapter)
    }.

| figure | value |
|---|---|
{rows or "| none | |"}

```python
{usage}
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
    if task.usage:
        return task.usage
    given = '"path/to/this/folder"' + ", trust_remote_code=True" * own_code
    if task.pipeline:
        return f'from transformers import pipeline\n\npredict = pipeline("{task.pipeline}", model={given})'
    names = f"{task.model_class}, AutoTokenizer"
    loads = (f"{name} = {kind}.from_pretrained({given})" for name, kind in
             (("model", task.model_class), ("tokenizer", "AutoTokenizer")))  # fmt: skip
    return "\n".join((f"from transformers import {names}", "", *loads))


def _on_base(config: RunConfig, task: Task, new: Sequence[str]) -> Iterator[str]:
    """Yield the lines that put an adapter on its base, and use it."""
    path, revision = str(config.model.path), config.model.revision
    kind = task.model_class  # a name: with a class of ours the adapter is merged
    writes = kind in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
    names = ["AutoConfig", kind, "AutoTokenizer", *["GenerationConfig"] * writes]
    if path.startswith(package.SCHEME):
        yield "from importlib.resources import files"
        yield ""
    yield "from peft import PeftModel"
    yield f"from transformers import {', '.join([*names, *['pipeline'] * bool(task.pipeline)])}"
    yield ""
    yield 'folder = "path/to/this/folder"'
    if path.startswith(package.SCHEME):
        name, _, inside = path.removeprefix(package.SCHEME).partition("/")
        yield f'start = files("{name}") / "{inside}"'
    else:
        yield f'start = "{path}"'
    yield "config, tokenizer = (kind.from_pretrained(folder) for kind in (AutoConfig, AutoTokenizer))"
    code = f', revision="{revision}"' * bool(revision) + ", trust_remote_code=True" * config.model.trust_remote_code
    code += ", ignore_mismatched_sizes=True" * bool(new)  # a head for other labels may be in its place
    yield f"base = {kind}.from_pretrained(start, config=config{code})"
    if any(name.endswith(ROWS) for name in new):
        yield "if len(tokenizer) > base.get_input_embeddings().num_embeddings:"
        yield "    base.resize_token_embeddings(len(tokenizer))"
    yield "model = PeftModel.from_pretrained(base, folder).merge_and_unload()"
    if writes:
        yield "model.generation_config = GenerationConfig.from_pretrained(folder)"
    if task.pipeline:
        yield ""
        yield f'predict = pipeline("{task.pipeline}", model=model, tokenizer=tokenizer)'
