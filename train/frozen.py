"""Weights that do not learn, held in the precision of computation: cast once, not in every micro-batch.

Autocast casts a frozen weight anew whenever it is used, and its copy stays until the backward pass: six bytes a weight
where two do. A product with what was cast once is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from train.layers import tensors

if TYPE_CHECKING:
    from accelerate import Accelerator

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions in which autocast computes products."""

PRODUCTS = (functional.linear, torch.addmm)
"""What casts all that it is given: that of linear layers, and of those of GPT-2."""

_originals: WeakKeyDictionary[nn.Module, dict[nn.Parameter, Tensor | None]] = WeakKeyDictionary()
"""What a model's held weights were before, in the memory of the host; None: what they are, in fp32."""


def hold(
    model: Any, forward: Callable[[], object], accelerator: Accelerator, precision: str, *, merges: bool = False
) -> None:
    """Hold the frozen weights of an adapted model in the precision of computation, where that changes nothing.

    It is tried: a weight is held if all that `forward()` does with it, on all processes, is what autocast casts it for,
    and only if the loss is the same to the last bit. Not of embeddings, norms, DoRA's layers, output layers that share
    the embedding; not where the model is shared out, which has a precision of its own. With `merges` what they were is
    kept for `restore`, on the host: on a CPU, where that would save nothing, those that the cast would round stay.
    """
    if precision not in HALF or accelerator.is_fsdp2 or accelerator.distributed_type.value == "DEEPSPEED":
        return
    _cast_inputs_no_further(model)
    base = model.get_base_model()
    if hasattr(base, "generate"):  # texts are written by the base alone, of whose parts nobody else sets the precision
        base.generate = accelerator.autocast()(base.generate)
    found = _used_in_products(model, forward, HALF[precision])
    fixed = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    flags = torch.tensor([float(parameter in found) for parameter in fixed], device=accelerator.device)
    everywhere: Any = accelerator.reduce(flags, "sum")
    chosen = [
        parameter
        for parameter, count in zip(fixed, everywhere.tolist(), strict=True)
        if count == accelerator.num_processes
    ]
    expected = _loss(forward)
    kept = _cast(chosen, HALF[precision], leave_rounded=merges and accelerator.device.type == "cpu")
    same = torch.tensor(float(torch.equal(_loss(forward), expected)), device=accelerator.device)
    agreed: Any = accelerator.reduce(same, "sum")
    if agreed.item() < accelerator.num_processes:
        _give_back(kept)
        return
    _originals[model] = kept if merges else dict.fromkeys(kept)


def restore(model: nn.Module) -> None:
    """Give a model that was held with `merges` its weights back as they were: into these an adapter is merged."""
    _give_back(_originals.pop(model, {}))


def describe(model: nn.Module) -> str:
    """Say how many weights are held so; "" where none is."""
    held = list(_originals.get(model, {}))
    if not held:
        return ""
    count = sum(parameter.numel() for parameter in held)
    kind = str(held[0].dtype).removeprefix("torch.")
    return f"{count:,} weights that do not learn are held in {kind}, which saves {2 * count / 1e6:,.0f} MB"


def _cast_inputs_no_further(model: nn.Module) -> None:
    """Let PEFT give an adapter its input as it is: it would make fp32 of it, of which autocast makes what it was.

    Not where dropout stands between the two, which is rounded otherwise.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            drops = any(not isinstance(each, nn.Identity) for each in module.lora_dropout.values())
            module.cast_input_dtype_enabled = drops


def _cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype, *, leave_rounded: bool) -> dict[Any, Tensor | None]:
    """Cast these weights; return what they were where they are not that any more."""
    kept: dict[Any, Tensor | None] = {}
    for parameter in parameters:
        half = parameter.data.to(dtype)
        exact = torch.equal(half.float(), parameter.data)
        if exact or not leave_rounded:
            kept[parameter] = None if exact else parameter.data.cpu()
            parameter.data = half
    return kept


def _give_back(kept: dict[nn.Parameter, Tensor | None]) -> None:
    for parameter, before in kept.items():
        parameter.data = (parameter.data if before is None else before).to(parameter.device, torch.float32)


def _loss(forward: Callable[[], object]) -> Tensor:
    """Return the loss, always with the same dropout."""
    torch.manual_seed(0)
    with torch.no_grad():
        found: Any = forward()
    return found  # type: ignore[no-any-return]


def _used_in_products(model: nn.Module, forward: Callable[[], object], dtype: torch.dtype) -> set[Tensor]:
    """Return the frozen fp32 parameters that are used, and only in what autocast casts to `dtype`."""
    watch = _Watch((each for each in model.parameters() if not each.requires_grad), dtype)
    with watch:
        _loss(forward)
    return {each for each in watch.used - watch.elsewhere if each.dtype == torch.float32}


class _Watch(TorchFunctionMode):
    """Notes which parameters are used, and which otherwise than to be cast.

    To ask for a dtype is such a use: T5 casts by it what a layer is given, and gradients would be rounded elsewhere.
    """

    def __init__(self, parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.parameters, self.dtype = set(parameters), dtype
        self.used: set[Tensor] = set()
        self.elsewhere: set[Tensor] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function == Tensor.dtype.__get__:  # type: ignore[attr-defined]
            self.elsewhere |= self.parameters.intersection(args)
        elif any(True for _ in tensors(result)):
            given = self.parameters.intersection(tensors((args, kwargs or {})))
            self.used |= given
            if given and not self._casts(function, args, next(iter(given)).device.type):
                self.elsewhere |= given
        return result

    def _casts(self, function: Any, args: Any, kind: str) -> bool:
        if function in PRODUCTS:
            return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == self.dtype
        return bool(function == Tensor.to) and args[1:] == (self.dtype,)  # the output layer does so itself
