"""The last layer of a padding-free encoder computes, after its attention, only the tokens that the head reads.

A classifier that reads the first token of each row needs no other one from there on: of MiniLM's six layers that saves
three quarters of one. Whether the head reads nothing else is tried, with what is not a number in all other places.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from train import padding_free, trial
from train.layers import stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def enable(model: PreTrainedModel) -> bool:
    """Let a model compute real tokens only (see `padding_free`); return whether it does.

    On a CPU, where this also gives the same, its last layer computes those that the head reads.
    """
    if not padding_free.enable(model):
        return False
    base: Any = model.base_model
    if base is not model and model.device.type == "cpu":
        narrow = _Narrow(list(next(iter(stacks(base)))[1])[-1])
        if not narrow.proved(model):
            narrow.remove()
    return True


def disable(model: nn.Module) -> None:
    """Let it compute padding, and all tokens, again."""
    trial.unhook(model, _is_ours)


def enabled(model: nn.Module) -> bool:
    """Whether it computes real tokens only."""
    return any(_is_ours(hook) for module in model.modules() for hook in module._forward_pre_hooks.values())


def _is_ours(hook: Any) -> bool:
    return hook in padding_free.HOOKS or isinstance(getattr(hook, "__self__", None), _Narrow)


class _Narrow:
    """Hooks that let go of all tokens but the first of each row, while the model itself is called.

    Whoever calls its encoder directly, or asks for hidden states, gets all of them.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.hooks: list[Any] = []
        self.rest = 0.0
        """What is put in the place of tokens that nobody reads."""
        self.done = 0
        self._within = False

    def proved(self, model: Any) -> bool:
        """Whether logits come out as they do from all tokens, when what is not a number is in the place of the rest."""
        ids, mask = trial.rows(model)
        with trial.evaluating(model):
            try:
                meeting = self._meeting(model, ids, mask)
                if meeting is None:
                    return False
                expected = model(input_ids=ids, attention_mask=mask).logits
                self._hook(model, meeting)
                with self._poisoned():
                    found = model(input_ids=ids, attention_mask=mask).logits
            except Exception:  # a residual that is added elsewhere, a head without logits: many kinds
                return False
        apart, size = (found - expected).abs().max(), expected.abs().max()
        return bool(apart <= trial.rounding(expected) * size) and self.done == 1

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self.hooks:
            hook.remove()

    def _meeting(self, model: Any, ids: Tensor, mask: Tensor) -> nn.Module | None:
        """Return the first module of the block that is given what attention found together with what it came from."""
        found = list[nn.Module]()

        def note(module: nn.Module, given: tuple[Any, ...]) -> None:
            layout = padding_free.layout()
            if layout is not None and sum(_has(each, layout.size) for each in given) == 2:
                found.append(module)

        hooks = [each.register_forward_pre_hook(note) for each in self.block.modules() if each is not self.block]
        try:
            model(input_ids=ids, attention_mask=mask)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None

    def _hook(self, model: nn.Module, meeting: nn.Module) -> None:
        self.hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
            self.block.register_forward_pre_hook(self._find),
            meeting.register_forward_pre_hook(self._keep),
            self.block.register_forward_hook(self._widen, prepend=True),  # before the rows are put together
        ]

    def _enter(self, model: nn.Module, given: Any) -> None:
        self._within = True

    def _leave(self, model: nn.Module, given: Any, output: Any) -> None:
        self._within = False

    def _find(self, block: nn.Module, given: Any) -> None:
        layout = padding_free.layout() if self._within else None
        if layout is not None:
            rows = layout.places // layout.width
            layout.noted[self] = rows.diff(prepend=rows.new_tensor([-1])).nonzero().flatten()

    def _first(self) -> tuple[Tensor | None, int]:
        """Return which of the M tokens begin a row, int64 (rows with tokens,), and M; None where all are computed."""
        layout = padding_free.layout()
        return (None, 0) if layout is None else (layout.noted.get(self), layout.size)

    def _keep(self, module: nn.Module, given: tuple[Any, ...]) -> Any:
        first, count = self._first()
        if first is None:
            return None
        self.done += 1
        return tuple(each.index_select(1, first) if _has(each, count) else each for each in given)

    def _widen(self, block: nn.Module, given: Any, output: Any) -> Any:
        """(1, rows, d) → (1, M, d)."""
        first, count = self._first()
        if first is None:
            return None
        narrow = output[0] if isinstance(output, tuple) else output
        whole = narrow.new_full((1, count, narrow.shape[2]), self.rest).index_copy(1, first, narrow)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    @contextmanager
    def _poisoned(self) -> Iterator[None]:
        self.rest = torch.nan
        try:
            yield
        finally:
            self.rest = 0.0


def _has(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == (1, count)
