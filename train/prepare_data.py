"""Everything of a run but the training: for a login node without a GPU, so that the run finds all in its cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from train import output
from train.config import RunConfig
from train.durations import in_updates, total_updates
from train.ingredients import cache_folder, read
from train.optim import rate
from train.run import plan_batches
from train.stages import Stage

log = logging.getLogger("train")


def prepare(stages: Sequence[Stage], *, resume_anyway: bool) -> None:
    """Fetch models and data of all stages, encode the rows into the cache, and check all that needs no GPU.

    Writes nothing but caches. Raises `UserError` for what the run would refuse. A stage that is finished, or whose
    model or rows an earlier stage has yet to make, is left out, which is said.
    """
    to_come: list[Path] = []
    for stage in stages:
        config = stage.config
        if output.claim(config, resume_anyway=resume_anyway):
            print(f"{stage.file}: finished; its results are in {config.output}", flush=True)
            continue
        waits = [folder for folder in to_come if _reads_from(config, folder)]
        to_come.append(Path(config.output).absolute())
        if waits:
            print(f"{stage.file}: reads from {waits[0]}, which is yet to be made: prepared when it begins", flush=True)
        else:
            _prepare(stage)


def _prepare(stage: Stage) -> None:
    """Go through what comes before training as the run does, in a precision that every machine has, not quantized."""
    config = stage.config
    changes: dict[str, object] = {"precision": "fp64" if config.precision == "fp64" else "fp32"}
    if config.adapter is not None and config.adapter.quantize is not None:
        log.warning("%s: whether this model can be quantized is seen on the GPU", stage.file)
        changes["adapter"] = config.adapter.model_copy(update={"quantize": None})
    if config.task.refers:
        log.warning("%s: what the starting model says of the examples is computed when the run begins", stage.file)
    ingredients = read(config.model_copy(update=changes))
    batches, _ = plan_batches(config, ingredients)
    per_epoch = batches.updates_per_epoch
    updates = total_updates(config.epochs, config.updates, per_epoch)
    warmup, decay = (in_updates(value, per_epoch, updates) for value in (config.optim.warmup, config.optim.decay))
    rate(config.optim, updates, warmup, decay)
    examples = ", ".join(f"{role} {len(encoded.dataset):,}" for role, encoded in ingredients.splits.items())
    print(
        f"{stage.file}: prepared: {examples} examples, {updates:,} updates of {config.batch_size}; "
        f"encoded in {cache_folder(config)}",
        flush=True,
    )


def _reads_from(config: RunConfig, folder: Path) -> bool:
    """Whether the model, the tokenizer or any rows of a run lie in a folder."""
    data = config.data
    sources = [source.path for role in (data.train, data.validation, data.test) for source in role or ()]
    paths = [path for path in (config.model.path, config.model.tokenizer, *sources) if isinstance(path, str)]
    return any(Path(path).expanduser().absolute().is_relative_to(folder) for path in paths)
