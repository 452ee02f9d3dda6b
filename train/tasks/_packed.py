"""Rows of packed documents through a model that writes texts, by the shortest way that is proved to be right."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from train import documents
from train.tasks import _proof
from train.tasks._losses import token_losses
from train.tasks.base import IGNORED

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from train.chunked_loss import Wanted


def places(labels: NDArray[Any]) -> Tensor:
    """Return where there are targets in labels (B, T), int64 (M,), as if the rows lay one after the other.

    Found before the labels go to a GPU, where it would have to be waited for.
    """
    import torch

    return torch.from_numpy(np.flatnonzero(labels != IGNORED))


def check(model: nn.Module, *, isolated: bool, remedy: str = _proof.REMEDY) -> None:
    """Prove that later tokens have no influence and, if documents are `isolated`, that others of a row have none.

    The model takes shorter ways from here on, as far as it can: an attention that knows documents, an output layer
    where there are targets alone. What is proved is proved of these. Raises `UserError`.
    """
    from train import output_layer  # needs torch

    output_layer.enable(model)
    _proof.prove_causal(model)
    if not isolated:
        return
    if not by_documents(model):
        _proof.prove_isolated(model, remedy)


def by_documents(model: nn.Module) -> bool:
    """Let a model attend by documents, if it can and keeps them apart; return whether."""
    if not documents.enable(model):
        return False
    try:
        _proof.prove_isolated(model)
    except UserError:
        documents.disable(model)
        return False
    return True


def loss(model: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """Return the cross entropy of all targets, in nats: summed. Not the model's own loss, which shifts labels.

    tensors: input_ids and labels, which stand where they are predicted, (B, T); `places` of the targets, (M,); where
    documents are isolated also position_ids (B, T) and their sizes, `pieces` (B, P).
    """
    found, answered = _asked(model, tensors, "sum")
    return found if answered else token_losses(found, tensors["labels"]).sum()


def losses_and_hits(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return each token's loss, and 1 where its target is the likeliest, (B, T); 0 where there is none."""
    found, answered = _asked(model, tensors, "hits")
    labels = tensors["labels"]
    if not answered:
        return token_losses(found, labels), (found.argmax(2) == labels).long()
    every = found.new_zeros(2, labels.numel())
    losses, hits = every.index_copy(1, tensors["places"], found).view(2, *labels.shape)
    return losses, hits.long()


def _asked(model: nn.Module, tensors: dict[str, Tensor], wanted: Wanted) -> tuple[Tensor, bool]:
    """Return what the model gives as logits, and whether it is the answer to the question."""
    from train import output_layer

    inputs = {name: tensors[name] for name in ("input_ids", "position_ids") if name in tensors}
    targets = tensors["labels"].flatten()[tensors["places"]]
    with _apart(tensors), output_layer.asking(targets, tensors["places"], wanted) as question:
        found: Tensor = model(**inputs, use_cache=False).logits  # with a cache packing leaks
    return found, question.answered


def _apart(tensors: dict[str, Tensor]) -> AbstractContextManager[None]:
    return documents.known(tensors["pieces"]) if "position_ids" in tensors else nullcontext()
