"""The output layer, computed where there is a target and nowhere else: a batch's logits are never all there.

Hooks around the layer take what the model gives it, and put in the place of logits what is asked (`chunked_loss`). The
model's own code does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from train import chunked_loss, trial
from train.chunked_loss import Wanted

if TYPE_CHECKING:
    from torch import nn


@dataclass
class Question:
    """What is to be found out about the rows (B, T) that are being computed."""

    targets: Tensor
    """The token that is right, (M,)."""
    places: Tensor
    """Where, if the rows lay one after the other, (M,)."""
    wanted: Wanted
    answered: bool = False
    """Whether that is what the model gives in the place of logits."""
    hidden: Tensor = field(init=False)


_asked: Question | None = None


def enable(model: Any) -> bool:
    """Let a model that writes texts answer so, if that is tried and gives the same; return whether.

    Not where the logits are more than a linear layer gives (scaled, bounded), and not where the layer is of another
    kind. Called under the autocast in which the model will compute.
    """
    chunked_loss.as_written()  # until somebody compiles
    layer = model.get_output_embeddings()
    half = chunked_loss.precision(model.device.type, model.dtype)
    if type(layer) is not torch.nn.Linear or half == torch.float16:  # whose loss is scaled before gradients are rounded
        return False
    hooks = [layer.register_forward_pre_hook(_before), layer.register_forward_hook(_after)]
    if _proved(model):
        return True
    for hook in hooks:
        hook.remove()
    return False


def disable(model: nn.Module) -> None:
    """Let it give logits to everyone again."""
    trial.unhook(model, lambda hook: hook in (_before, _after))


@contextmanager
def asking(targets: Tensor, places: Tensor, wanted: Wanted) -> Iterator[Question]:
    """While this lasts, a model for which `enable` had success answers this question."""
    global _asked
    _asked = Question(targets, places, wanted)
    try:
        yield _asked
    finally:
        _asked = None


def _before(layer: nn.Module, given: tuple[Any, ...]) -> Any:
    """Keep what the layer is given, (B, T, d), and give it next to nothing."""
    if _asked is None:
        return None
    _asked.hidden = given[0]
    return (given[0][:, :1],)


def _after(layer: Any, given: tuple[Any, ...], output: Tensor) -> Any:
    if _asked is None:
        return None
    _asked.answered = True
    hidden = _asked.hidden.flatten(0, -2)[_asked.places]
    return chunked_loss.of(hidden, layer.weight, layer.bias, _asked.targets, _asked.wanted)


def _proved(model: Any) -> bool:
    """Whether it gives the losses and hits that follow from the model's logits."""
    generator = torch.Generator().manual_seed(0)  # its own: training's is left alone
    weight = model.get_input_embeddings().weight
    ids = torch.randint(len(weight), (2, 7), generator=generator).to(weight.device)
    places = torch.tensor([0, 2, 3, 8, 13], device=weight.device)
    targets = ids.flatten()[places]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model(input_ids=ids, use_cache=False).logits
            with asking(targets, places, "sum"):
                summed = model(input_ids=ids, use_cache=False).logits
            with asking(targets, places, "hits"):
                each = model(input_ids=ids, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except Exception:  # logits that are worked on after the layer, an argument it does not know: many kinds
        return False
    finally:
        model.train(training)
    expected = chunked_loss.scores(logits.flatten(0, 1)[places], targets)[0]
    half = torch.is_autocast_enabled(ids.device.type) or logits.dtype.itemsize < 4
    rounding = 2e-2 if half else 1e-4
    close = [(each[0], expected), (summed, expected.sum())] if each.shape == (2, len(places)) else []
    return bool(close) and all(
        torch.allclose(one.to(other.dtype), other, rtol=rounding, atol=rounding) for one, other in close
    )
