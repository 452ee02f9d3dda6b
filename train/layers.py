"""Which layer each parameter belongs to, found in what the model does: no table of names, nothing of a family."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from data.errors import UserError

Span = tuple[int, int]
"""When something was used first and last."""


def depths(model: nn.Module, forward: Callable[[], object], new: Collection[str] = ()) -> dict[str, int]:
    """Return how far below the head each parameter is, by name: 0 the head, 1 the top block, the most the embeddings.

    Blocks are the items of a ModuleList; several stacks of them (encoder and decoder) count in parallel, each from its
    top, as in https://arxiv.org/abs/1910.10683, section 3.5.1. Embeddings are what is used before the first block of
    its stack. The head is what is used after the last (final norm, pooler, output layer), or is `new`. A parameter with
    several places has the highest of them: input embeddings tied to the output layer are of the head.

    The order of use is watched in one `forward()`, without gradients. Names and the order of registration do
    not tell it: XLM-R registers its head first, OPT its last norm, BART the norm of its embeddings after its blocks.
    Raises `UserError` where the model has no blocks.
    """
    found = dict(stacks(model))
    if not found:
        raise UserError(
            f"optim.layer_decay, optim.unfreeze: {type(model).__name__} has no layers that can be told apart (no "
            "ModuleList of blocks); leave these keys out"
        )
    named = dict(model.named_parameters())
    aliases = list(model.named_parameters(remove_duplicate=False))
    place: dict[Tensor, int] = {}
    for blocks in found.values():
        for depth, block in enumerate(reversed(blocks), 1):
            place.update((parameter, min(depth, place.get(parameter, depth))) for parameter in block.parameters())
    uses = _uses(model, named.values(), forward)
    spans = {
        path: [_union(uses[parameter] for parameter in block.parameters() if parameter in uses) for block in blocks]
        for path, blocks in found.items()
    }
    bottom = max(len(blocks) for blocks in found.values()) + 1
    for name, parameter in named.items():
        if parameter not in place:
            place[parameter] = _outside(name, uses.get(parameter), spans, bottom)
    place.update((parameter, 0) for name, parameter in aliases if name in new)
    return {name: place[parameter] for name, parameter in named.items()}


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is called by way of torch.compile: by us (`compilation`), or by who made it."""
    return module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield path and blocks of every stack: lists that lie in no other list, the lowest block first.

    A list of single layers (projections, norms) is a part of the stack if it is as long as the stack, as in XLM.
    """
    lists = list(_outermost(model, ""))
    composite = [any(True for block in blocks for _ in block.children()) for _, blocks in lists]
    lengths = {len(blocks) for (_, blocks), has_parts in zip(lists, composite, strict=True) if has_parts}
    for (path, blocks), has_parts in zip(lists, composite, strict=True):
        if has_parts or len(blocks) in lengths:
            yield path, blocks


def _outermost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList]]:
    for name, child in module.named_children():
        if not isinstance(child, nn.ModuleList):
            yield from _outermost(child, f"{path}{name}.")
        elif any(True for _ in child.parameters()):
            yield f"{path}{name}.", child


def _outside(name: str, use: Span | None, spans: Mapping[str, list[Span | None]], bottom: int) -> int:
    """Return the depth of a parameter outside all blocks; a parameter that is not used is of the head."""
    seen = {path: [span for span in blocks if span] for path, blocks in spans.items() if any(blocks)}
    assert seen, "no block was used"
    if use is None or use[1] > max(span[1] for blocks in seen.values() for span in blocks):
        return 0
    nearest = max(seen, key=lambda path: _shared(path, name))
    begun = sum(span[0] < use[0] for span in seen[nearest])
    if begun == 0:
        return bottom
    return 0 if use[0] > seen[nearest][-1][1] else len(seen[nearest]) - begun + 1


def _shared(path: str, other: str) -> int:
    """Return how many modules, from the outermost in, two paths have in common."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _union(spans: Iterable[Span]) -> Span | None:
    spans = list(spans)
    return (min(first for first, _ in spans), max(last for _, last in spans)) if spans else None


def unused(model: nn.Module, forward: Callable[[], object]) -> list[str]:
    """Return the trainable parameters that one `forward()` does not use: those of experts that were not chosen, or the
    second bias of an untied BERT head. It is watched without gradients."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    uses = _uses(model, named.values(), forward)
    return [name for name, parameter in named.items() if parameter not in uses]


def named_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that the parts of a model name as such, but for those with the input embedding in them.

    They are what is shared out one by one, and what is compiled. Accelerate shares the embedding out by itself, and
    would do so a second time.
    """
    names: set[str] = set()
    embeddings: set[nn.Module] = set()
    module: Any
    for module in model.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
        if hasattr(module, "get_input_embeddings"):
            embeddings.add(module.get_input_embeddings())
    for module in model.modules():
        if type(module).__name__ in names and embeddings.isdisjoint(module.modules()):
            yield module


class _Watch(TorchFunctionMode):
    """Notes when each parameter is used: in any operation that makes a tensor (asking for its dtype is none)."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.parameters = set(parameters)
        self.uses: dict[Tensor, Span] = {}
        self.clock = itertools.count()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(True for _ in tensors(result)):
            now = next(self.clock)
            for tensor in tensors((args, kwargs or {})):
                if tensor in self.parameters:
                    self.uses[tensor] = (self.uses.get(tensor, (now, now))[0], now)
        return result


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def _uses(model: nn.Module, parameters: Iterable[Tensor], forward: Callable[[], object]) -> dict[Tensor, Span]:
    """Watch one forward pass, as in training: RWKV divides its weights in place when it is evaluated."""
    training = model.training
    model.train()
    watch = _Watch(parameters)
    with torch.no_grad(), watch:
        forward()
    model.train(training)
    return watch.uses
