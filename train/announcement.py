"""What a run says before it begins."""

from __future__ import annotations

import logging
from pathlib import Path

from data.batches import Feed
from train import adapter, compilation, files, frozen, hardware, recomputation, shards
from train.config import RunConfig
from train.idle import is_set
from train.ingredients import Ingredients
from train.journal import Journal

log = logging.getLogger("train")


def describe(config: RunConfig, ingredients: Ingredients, batches: Feed) -> str:
    """Say what a batch holds, how many there are, and how much padding is computed with them."""
    padding = "padding is not computed"
    if not ingredients.padding_free:  # to know it, rows from everywhere are looked at
        padding = f"padding efficiency {batches.padding_efficiency():.3f}"
    return f"{config.batch_size} examples, {batches}; {padding}"


def announce(config: RunConfig, ingredients: Ingredients, batches: Feed, updates: int, journal: Journal) -> None:
    """Say what will happen, before it does."""
    accelerator, splits = ingredients.accelerator, ingredients.splits
    parameters = f"{sum(shards.size(parameter).numel() for parameter in ingredients.model.parameters()):,} parameters"
    if config.adapter:
        parameters = adapter.describe(ingredients.model, config.adapter)
    new = f"; new: {', '.join(ingredients.new_parameters)}" if ingredients.new_parameters else ""
    processes = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
    examples = ", ".join(
        f"{role} {'a stream, of which the first' if encoded.partial else ''} {len(encoded.dataset):,}".replace(
            "  ", " "
        )
        for role, encoded in splits.items()
    )
    journal.say(f"task    {ingredients.task}")
    journal.say(f"model   {config.model.origin}, {parameters}{new}")
    if held := frozen.describe(ingredients.model):
        journal.say(f"        {held}")
    journal.say(f"where   {processes}, {hardware.describe(accelerator.device)}, {ingredients.precision}")
    if decided := recomputation.describe(ingredients.model):
        journal.say(f"memory  {decided}")
    if compiled := compilation.describe(ingredients.model):
        journal.say(f"compile {compiled}; texts are written without")
    journal.say(
        f"data    {examples} examples; {splits['train'].longest:,} of train reach {ingredients.max_length} tokens"
    )
    for role, encoded in splits.items():
        if encoded.skipped and not encoded.partial:  # a stream's are told when it comes upon them
            journal.say(f"        {len(encoded.skipped):,} rows of {role} skipped, the first: {encoded.skipped[0]}")
            if journal.speaks:
                files.write(Path(config.output) / f"skipped_rows_{role}.txt", "\n".join(encoded.skipped) + "\n")
    journal.say(f"plan    {updates:,} updates of {describe(config, ingredients, batches)}")
    if journal.speaks and (why := computed_padding(config, ingredients)):
        log.warning("padding_free: %s; it has no effect", why)
    if journal.first:
        journal.say(f"resume  after update {journal.first}")


def computed_padding(config: RunConfig, ingredients: Ingredients) -> str:
    """Return why padding is not left out where the user has asked for it; else an empty text.

    Where nobody asked it is no news: by default encoders do without it as far as they can.
    """
    asked = config.padding_free and is_set(config, "padding_free")
    if not asked or ingredients.padding_free:
        return ""
    return ingredients.padded or "adapter.also_train copies parts of the layers, so padding is computed"
