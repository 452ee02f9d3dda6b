"""torch.compile, of the layers of a model: once for each kind of layer and way to call it, whatever the lengths."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from data.errors import UserError

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("train")

BACKEND = "inductor"
VARIANTS = 64
"""How often one kind of layer may be compiled. Lengths are variables; what is left to make a difference: training or
not, gradients or not, a mask or none, one row or several, one token or several, and each of these together."""


def compile_layers(model: nn.Module) -> None:
    """Compile the layers of `model` in place, when they are first called.

    Hooks and names, of classes too, stay, so that FSDP2, adapters, checkpoints and exports know nothing of it.
    Only layers are compiled: one graph serves all of a kind, and FSDP2 gathers between them. Hooks are not: they are
    called before and after, and to those that leave padding out every size would be a graph of its own. Nor is what
    computes a layer twice (`recomputation`): that calls the graph twice. Dropout draws what it draws without. Raises
    `UserError` for a model that names no layers.
    """
    from torch._dynamo import config
    from torch._inductor import config as inductor
    from torch.fx.experimental import _config as shapes

    from train import chunked_loss  # needs torch
    from train.layers import named_layers

    found = list(named_layers(model))
    if not found:
        raise UserError(
            f"compile: {type(model).__name__} does not name its layers (_no_split_modules), and only these are "
            "compiled; leave it out"
        )
    config.recompile_limit = VARIANTS
    config.optimize_ddp = False  # it would cut graphs at the borders of buckets; ours end with each layer anyway
    inductor.fallback_random = True  # PyTorch's own generator, in its own order: a run with dropout stays the same run
    shapes.use_duck_shape = False  # else 8 rows of 8 tokens would be a case of their own
    logger = logging.getLogger("torch._dynamo.convert_frame")  # does not propagate
    if not any(isinstance(handler, _Told) for handler in logger.handlers):
        logger.addHandler(_Told())
    # Classes are given another `forward`, not layers: around that of each transformers wraps what computes it twice
    own = [layer for layer in found if "forward" in vars(layer)]
    if own:  # which hides its class's
        log.warning(
            "compile: %d of %d layers (%s) are computed without: somebody has given each a `forward` of its own",
            len(own), len(found), type(own[0]).__name__,
        )  # fmt: skip
    classes = {kind: _compiled(kind) for kind in {type(layer) for layer in found}}
    for layer in found:
        layer.__class__ = classes[type(layer)]
    chunked_loss.compile_arithmetic(BACKEND)  # of language models; of others it is never asked for


def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of layers that compute what those of `kind` do."""
    import torch
    from transformers import modeling_layers

    own: Any = kind.forward
    while own.__globals__ is vars(modeling_layers) and hasattr(own, "__wrapped__"):  # what computes it twice
        own = own.__wrapped__
    named = {name: getattr(kind, name) for name in ("__module__", "__qualname__")}
    return type(kind.__name__, (kind,), {**named, "forward": torch.compile(own, backend=BACKEND, dynamic=True)})


def describe(model: nn.Module) -> str:
    """Return which layers of a model are compiled, in words: "6 BertLayer"; "" where none is."""
    from train.layers import is_compiled  # needs torch

    kinds = Counter(type(module).__name__.removeprefix("FSDP") for module in model.modules() if is_compiled(module))
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


@contextmanager
def explained() -> Iterator[None]:
    """Turn what a compiler fails with, if it is missing above all, into a `UserError` that says what to do."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"compile: the layers of this model cannot be compiled on this machine ({reason}). It takes a C++ compiler "
            "(g++ or clang++, or CXX=path) with the header files of this Python (python3-dev), and Triton for a GPU: "
            "install what is missing, or leave compile out"
        ) from error


def eager() -> AbstractContextManager[Any]:
    """While this lasts, compiled layers are called as they were before: for calls of which no two are alike."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and to import it takes seconds
        return nullcontext()
    import torch

    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class _Told(logging.Handler):
    """Says in our own log, once, that PyTorch has stopped compiling a layer."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on the one record that matters: its arguments are the limit's name and value, function and reason."""
        if "hit config" in record.msg and isinstance(record.args, tuple):
            _, limit, function, reason, *_ = record.args
            log.warning(
                "compile: the layers' %s has been compiled %s times; whatever is new is computed without from "
                "here on, right but slower. The last reason: %s. Leave compile out if it does not pay",
                function, limit, reason,
            )  # fmt: skip
