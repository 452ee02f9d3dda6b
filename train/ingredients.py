"""What a run is made from: rows, tokenizer, model, task and encoded examples, opened and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.encode import encode_sources
from data.encoded import Encoded
from data.errors import UserError
from data.source import Rows, check_columns, open_rows
from data.stream import Stream
from train import adapter, dropout, hardware, metrics, plugins, strategy, tasks
from train.config import RunConfig
from train.last_layer import enable, enabled
from train.limits import longest_input
from train.model import load_model, place
from train.padding_free import obstacle
from train.quantization import quantize
from train.streams import Streamed, look
from train.streams import known as known_streams
from train.tasks.base import Task
from train.tokenizer import ids, load_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Ingredients:
    """What a run is made from. To read it writes nothing, so bad input leaves no trace."""

    accelerator: Accelerator
    precision: str
    tokenizer: Any
    model: Any
    new_parameters: list[str]
    task: Task
    splits: dict[str, Encoded]
    """By role; of a stream the first examples only."""
    max_length: int
    streams: Sequence[Stream] = ()
    """The sources of data.train, if they are streamed."""
    padding_free: bool = False
    """Whether the model computes real tokens only."""
    padded: str = ""
    """Why it was found that it cannot."""


def cache_folder(config: RunConfig) -> Path:
    """Return where what is made once is kept: data.cache, or a folder beside the cache of `datasets`."""
    from datasets import config as datasets_config

    return Path(config.data.cache or datasets_config.HF_DATASETS_CACHE / "lockstep").expanduser()


def read(config: RunConfig) -> Ingredients:
    """Open rows, tokenizer and model, and encode the rows (or map what is encoded already)."""
    from datasets import disable_progress_bars

    disable_progress_bars()
    accelerator, precision = hardware.build_accelerator(config.precision, config.distributed.timeout)
    strategy.check(accelerator, **_asked(config))
    token = config.hub_token.get_secret_value() if config.hub_token else None
    cache = cache_folder(config)
    rows, streamed = _open(config, cache, token)
    train_rows = [part for source in rows["train"] for part in source]
    tokenizer, known = load_tokenizer(config.model, train_rows, cache, token, config.task.text_columns)
    plugin = plugins.load(tasks, "task", config.task.name)
    task: Task = plugin.task.prepare(config.task, train_rows, tokenizer)
    choices = [metrics.parse(entry) for entry in config.metrics or task.default_metrics]
    if config.checkpoint.best:
        metrics.check_best(config.checkpoint.best, metrics.reported(choices))
    for choice in choices:
        metrics.check(choice, task.kind)
        if choice.name not in metrics.names():  # one of the Hub: better missed now than at the first evaluation
            metrics.load(choice)
        labels = tuple(task.model_config.get("id2label", {}).values())
        metrics.rehearse(choice, task.kind, labels, getattr(task, "scheme", None))
    dtype = torch.float64 if precision == "fp64" else torch.float32
    model: Any
    model, new = load_model(
        config.model, task.model_class, task.model_config, tokenizer,
        known=known, dtype=dtype, seed=config.seed, token=token,
    )  # fmt: skip
    if config.adapter:
        quantize(model, config.adapter, new, accelerator.device, precision)
    place(model, accelerator.device)
    with accelerator.autocast():  # what is proved of a kernel is true of this device and precision only
        task.check_model(model)
        padded = _leave_padding_out(config, model)
    max_length = _max_length(config, model, tokenizer)
    splits = {}
    for role, sources in rows.items():
        for source in sources:
            check_columns(source, task.columns, f"data.{role}")
        encoded = encode_sources(
            sources, task, tokenizer, max_length, skip_bad=config.data.on_bad_row == "skip", cache=cache
        )
        splits[role] = replace(encoded, alone=encoded.size > hardware.free_memory())
    streams: Sequence[Stream] = ()
    if streamed:
        streams = streamed.streams(config.data, config.seed, task, tokenizer, max_length)
        splits["train"] = known_streams(splits["train"], streams)
    task = task.informed(splits["train"])
    task.initialize(model, new if config.model.path else [name for name, _ in model.named_parameters()], splits)
    if config.adapter:
        model = adapter.attach(model, config.adapter, new, ids(tokenizer), config.seed, config.model)
    dropout.enable(model)
    return Ingredients(
        accelerator, precision, tokenizer, model, new, task, splits, max_length, streams, enabled(model), padded
    )


def _leave_padding_out(config: RunConfig, model: Any) -> str:
    """Let the model compute real tokens only, where it may; return why it cannot."""
    if not config.padding_free:
        return ""
    if config.compile and model.device.type == "cpu":  # where rows are grouped for attention, in Python
        return "compile is on, and layers that are compiled for a CPU compute padding"
    return "" if enable(model) else obstacle(model)


def _max_length(config: RunConfig, model: Any, tokenizer: Any) -> int:
    """Return the tokens that an example may have. Raises `UserError` if the model does not take as many as asked."""
    limit = longest_input(model, tokenizer)
    max_length = config.data.max_length or min(512, limit)
    if max_length > limit:
        raise UserError(
            f"data.max_length: {max_length} is more than the {limit} tokens that the model takes: {config.model.origin}"
        )
    return max_length


def _asked(config: RunConfig) -> dict[str, bool]:
    """Return what not every strategy can."""
    return {
        "merges": config.adapter is not None and config.adapter.merge,
        "unfreezes": config.optim.unfreeze is not None,
        "compiles": config.compile,
        "recomputes": config.activation_checkpointing is True,
        "few_bytes": config.optim.few_bytes,
    }


def _open(config: RunConfig, cache: Path, token: str | None) -> tuple[dict[str, list[list[Rows]]], Streamed | None]:
    """Return the rows of each role by source and file; of a stream the first ones, and the stream."""
    skip_bad = config.data.on_bad_row == "skip"
    streamed = look(config.data, token) if config.data.streaming else None
    roles = {"train": config.data.train, "validation": config.data.validation, "test": config.data.test}
    rows = {
        role: streamed.rows
        if streamed and role == "train"
        else [open_rows(source, role, skip_bad=skip_bad, cache=cache, token=token) for source in sources]
        for role, sources in roles.items()
        if sources
    }
    return rows, streamed
