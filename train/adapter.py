"""Adapters on a pretrained model, with peft: what is frozen, what learns, and how it is called."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from data.errors import UserError, nearest
from data.order import derive
from train.adapter_config import AdapterConfig
from train.weights import is_adapter

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

INSIDE = "base_model.model."
"""Where peft keeps the model that it adapts."""

OWN = "default"
"""peft's name for the adapter that is learned."""

ROWS = " rows of the embedding"
"""How new rows of the embedding stand among the names of new parameters, after their number."""


def attach(
    model: PreTrainedModel, settings: AdapterConfig, new: Collection[str], tokens: int, seed: int, origin: Any
) -> PeftModel:
    """Freeze the model but for what is `new`, and put adapters beside its layers; it computes what it did before.

    `new` is what `load_model` returned; `tokens`, how many ids the tokenizer has, tells which rows of the embedding
    that may mean: they learn too, alone. The adapters are drawn from `seed`, in float32 whatever the model's dtype.
    `origin` (the config's `model`) is what is named as the base. Raises `UserError` with the remedy.
    """
    import peft
    import torch
    from transformers.pytorch_utils import Conv1D

    if not settings.merge and not type(model).__module__.startswith("transformers."):
        raise UserError(
            f"adapter.merge: must be true with a {type(model).__name__}: transformers does not have it, so an adapter "
            "alone could not be loaded by others"
        )
    if not settings.merge and is_adapter(origin.path, origin.revision):
        raise UserError(
            f"adapter.merge: must be true: model.path {origin.path} is an adapter itself, and one on another could not "
            "be loaded by others. Or give adapter.merge=true to the run that made that one"
        )
    modules = dict(model.named_modules())
    whole = _whole(model, modules, settings.also_train)
    fresh = _fresh(model, new, whole)
    targets = _targets(model, modules, settings.target_modules, _layers(model, modules, fresh, whole))
    count = next((int(name.removesuffix(ROWS)) for name in new if name.endswith(ROWS)), 0)
    rows = _rows(model, modules, list(range(tokens - count, tokens)))
    torch.manual_seed(derive(seed, "adapter"))
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        use_dora=settings.kind == "dora",
        use_rslora=settings.kind == "rslora",
        target_modules=targets,
        modules_to_save=whole or None,
        trainable_token_indices=rows or None,
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in targets),
        revision=origin.revision,
    )
    training = model.training
    _part_ways(model, modules, whole, targets, rows)
    with quiet():
        adapted: PeftModel = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    config.base_model_name_or_path = origin.path
    for parameter in fresh:
        parameter.requires_grad_(True)
    if rows:
        _prove_rows(model)
    adapted.train(training)
    return adapted


def describe(model: PeftModel, settings: AdapterConfig) -> str:
    """Say how much of the model learns, and where the adapters are."""
    from peft.tuners.lora import LoraLayer

    learning, total = model.get_nb_trainable_parameters()
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    return (
        f"{total:,} parameters, {learning:,} of them ({learning / total:.2%}) learn: {settings} on {layers} "
        f"layers{''.join(f', {name}' for name in settings.also_train)}"
    )


def renamed(model: nn.Module, names: Collection[str]) -> list[str]:
    """Return the names that these parameters have in the model now: others, where there are adapters."""
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if plain(name) in names]


def plain(name: str) -> str:
    """Return the name that a parameter had before there were adapters."""
    return name.removeprefix(INSIDE).replace(f".modules_to_save.{OWN}.", ".")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what peft says of things that are none of the user's: an old name in transformers, Conv1D."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        yield


def _fresh(model: nn.Module, new: Collection[str], whole: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters all of whose names are `new`, but those in modules that learn as a whole.

    They learn in place rather than in a copy (peft's modules_to_save), which would part tied ones: BERT's head for
    masked language modelling shares a matrix with the embedding, and two biases with itself.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [
        parameter
        for parameter, known in names.items()
        if set(known) <= set(new) and not any(name.startswith(f"{place}.") for place in whole for name in known)
    ]


def _whole(model: PreTrainedModel, modules: Mapping[str, nn.Module], wanted: Sequence[str]) -> list[str]:
    """Return the full names of the modules to be trained as a whole."""
    from torch import nn

    found: list[str] = []
    for end in wanted:
        there = _named(
            end, {name: module for name, module in modules.items() if name and any(True for _ in module.parameters())}
        )
        if not there:
            raise UserError(f"adapter.also_train: the model has no module {end!r}{_nearest(end, modules)}")
        for name in there:
            inner = set(modules[name].parameters())
            outside = {
                parameter
                for other, parameter in model.named_parameters(remove_duplicate=False)
                if not other.startswith(f"{name}.")
            }
            if isinstance(modules[name], nn.ModuleList | nn.ModuleDict) or inner & outside:
                why = "shares weights with the rest of the model" if inner & outside else "is a list of modules"
                raise UserError(f"adapter.also_train: {name} {why} and cannot be trained alone; name others")
        found += there
    return [name for name in dict.fromkeys(found) if not any(name.startswith(f"{other}.") for other in found)]


def _part_ways(
    model: Any, modules: Mapping[str, nn.Module], whole: Sequence[str], targets: Collection[str], rows: Collection[str]
) -> None:
    """Let go of the shorter ways through what PEFT will copy or wrap: they were proved of what was there before."""
    from train import last_layer, output_layer, padding_free
    from train.layers import stacks

    output = model.get_output_embeddings()
    if any(modules[name] is output for name in (*whole, *targets)):
        output_layer.disable(model)
    inside = {block for _, blocks in stacks(model) for layer in blocks for block in layer.modules()}
    if any(modules[name] in inside for name in whole):
        last_layer.disable(model)
    if rows:
        padding_free.look_up_rows(model)


def frozen_layers(model: PreTrainedModel, new: Collection[str], also_train: Sequence[str]) -> dict[str, nn.Module]:
    """Return the linear layers, by name, that stay as they are beside an adapter; not the output layer."""
    modules = dict(model.named_modules())
    whole = _whole(model, modules, also_train)
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    found = _layers(model, modules, _fresh(model, new, whole), whole)
    return {name: layer for name, layer in found.items() if layer is not output}


def _layers(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], fresh: Sequence[nn.Parameter], whole: Sequence[str]
) -> dict[str, nn.Module]:
    """Return the layers that can have an adapter, by name: linear, not learning as a whole, not the embedding again."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    learning = set(fresh)
    embedding: Any = model.get_input_embeddings()
    inside = tuple(
        f"{name}." for name, module in modules.items() if name in whole or isinstance(module, nn.MultiheadAttention)
    )  # (MultiheadAttention never calls its layer, it reads the weight)
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and module.weight is not embedding.weight
        and not learning.intersection(module.parameters())
        and not f"{name}.".startswith(inside)
    }


def _targets(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], wanted: Any, layers: Mapping[str, nn.Module]
) -> list[str]:
    """Return the full names of those of `layers` that get an adapter."""
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    chosen = [name for name, layer in layers.items() if layer is not output] if wanted == "auto" else []
    if wanted == "auto" and not chosen:
        raise UserError(
            f"adapter.target_modules: a {type(model).__name__} has no linear layer that auto could take; name others, "
            "or train the model as a whole"
        )
    for end in () if wanted == "auto" else wanted:
        there = _named(end, layers)
        if not there and _named(end, modules):
            raise UserError(
                f"adapter.target_modules: {end!r} is no linear layer, or shares the embedding's weights, or learns as "
                f"a whole; there are {', '.join(_ends(layers)[:12])}"
            )
        if not there:
            raise UserError(f"adapter.target_modules: the model has no layer {end!r}{_nearest(end, layers)}")
        chosen += there
    return list(dict.fromkeys(chosen))


def _named(end: str, modules: Mapping[str, Any]) -> list[str]:
    """Return the names that are, or end in, `end`."""
    return [name for name in modules if name == end or name.endswith(f".{end}")]


def _ends(modules: Mapping[str, Any]) -> list[str]:
    """Return the last parts of the names, each once, but for numbers."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in modules if name)
    return [end for end in ends if not end.isdecimal()]


def _nearest(end: str, modules: Mapping[str, Any]) -> str:
    """Return a hint at what may have been meant, or at what there is."""
    words = _ends(modules)
    return nearest(end, [*words, *modules]) or f"; there are {', '.join(words[:12])}"


def _rows(model: PreTrainedModel, modules: Mapping[str, nn.Module], rows: list[int]) -> dict[str, list[int]]:
    """Return the new rows to be learned, by the name of the embedding; of an output layer of its own too.

    Raises `UserError` where the output layer has a bias: peft would leave it out.
    """
    if not rows:
        return {}
    table, output = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if getattr(output, "bias", None) is not None:
        raise UserError(
            f"adapter: the {len(rows)} new rows of the embedding cannot be learned in a {type(model).__name__}, whose "
            "output layer has a bias, which peft leaves out. Leave model.add_tokens out, or add the tokens in a stage "
            "before this one, without an adapter"
        )
    names = {module: name for name, module in modules.items()}
    found = {names[table]: rows}
    if output is not None and output.weight is not table.weight:
        found[names[output]] = rows
    return found


def _prove_rows(model: PreTrainedModel) -> None:
    """Raise `UserError` unless the new rows are learned wherever the embedding's weights are used."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    table: Any = model.get_input_embeddings()
    wrapped = {id(module.base_layer) for module in model.modules() if isinstance(module, TrainableTokensLayer)}
    for name, module in model.named_modules():
        holds = "weight" in module._parameters and module.weight is table.weight
        if holds and id(module) not in wrapped:
            raise UserError(
                f"adapter: the new rows of the embedding cannot be learned in a {type(model).__name__}: {name} shares "
                "them, and peft does not know of it. Add the tokens in a stage before this one, without an adapter"
            )
