"""Gradients of a whole update: their norm, and the memory of those of which an update touches a few rows only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

LARGE = 2**20
"""Numbers of a table of embeddings for which it is worth it."""


@dataclass(frozen=True)
class Tables:
    """Tables of embeddings whose gradients are 0 between updates, but for the rows that an update has touched.

    PyTorch makes them anew in every micro-batch, zeros of the size of the whole table: of MiniLM's update on SST-2 in
    bf16, on two cores, 7 to 32 ms of 170, where AdamW takes 11. Asked for sparse gradients it gives the rows alone.
    Here these are given to an optimizer that takes rows (`adamw`); or put among zeros that are kept, and cleared
    afterwards. What is learned is the same.
    """

    zeros: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    """By table; made when they are first needed, which is never where rows are taken."""
    touched: dict[nn.Parameter, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Of this update: int64 (R,), which rows, in their order, and their gradients, (R, d)."""
    by_rows: bool = False
    """Whether the optimizer takes them from `touched`; then nothing is made whole."""

    def bound(self) -> None:
        """After each micro-batch: let a gradient be whole where there are more rows by now than the table has."""
        for table in self.zeros:
            grad = table.grad
            if grad is not None and grad.is_sparse and grad._nnz() > len(table):
                table.grad = None
                table.grad = grad.to_dense()

    def spread(self) -> None:
        """Note what is touched, and let sparse gradients be whole ones for who needs them."""
        for table in self.zeros:
            sparse = table.grad
            if sparse is None or not sparse.is_sparse:  # it does not learn, or is used otherwise too
                continue
            rows, values = sparse._indices()[0], sparse._values()
            touched, places = rows.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            sums = values.new_zeros(len(touched), values.shape[1])
            self.touched[table] = touched, sums.index_add_(0, places, values)  # as PyTorch adds; `coalesce` may not
            if not self.by_rows:
                if not len(self.zeros[table]):
                    self.zeros[table] = torch.zeros_like(table)
                table.grad = None
                table.grad = self.zeros[table].index_copy_(0, *self.touched[table])

    def clear(self) -> None:
        """Let all be 0 again, whatever has become of the rows: a gradient that is not a number too."""
        for table, (rows, _) in self.touched.items():
            if not self.by_rows:
                self.zeros[table].index_fill_(0, rows, 0)
        self.touched.clear()

    def part(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a parameter's gradient: of a table the rows that are touched, all else is 0."""
        return self.touched[parameter][1] if parameter in self.touched else parameter.grad


def sparse_tables(model: nn.Module, *, by_rows: bool = False) -> Tables:
    """Ask for sparse gradients of the large tables of a model that learns in fp32 on a CPU, in one process.

    Not of one that is used elsewhere, as by an output layer, whose gradient is whole. On a GPU zeros take no time.
    by_rows: whether the optimizer takes rows.
    """
    learning = [each for each in model.parameters() if each.requires_grad]
    if any(each.device.type != "cpu" or each.dtype != torch.float32 for each in learning):
        return Tables()
    owners = [id(each) for module in model.modules() for each in module.parameters(recurse=False)]
    found = [module for module in model.modules() if type(module) is nn.Embedding and _can(module, owners)]
    for module in found:
        module.sparse = True
    empty = {cast("nn.Parameter", module.weight): module.weight.new_empty(0) for module in found}
    return Tables(empty, by_rows=by_rows)


def _can(module: nn.Embedding, owners: list[int]) -> bool:
    weight = module.weight
    plain = module.max_norm is None and not module.scale_grad_by_freq and weight.is_contiguous()
    return plain and weight.requires_grad and weight.numel() >= LARGE and owners.count(id(weight)) == 1


def norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together.

    On CPUs of rows first: PyTorch takes a whole tensor in one thread, and of an embedding's 12 million values in fp32
    loses 5 in 10,000.
    """
    if any(gradient.device.type != "cpu" for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    wide = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    pairs = zip(gradients, wide, strict=True)
    rows = [torch.linalg.vector_norm(gradient, dim=-1, dtype=dtype).flatten() for gradient, dtype in pairs]
    return torch.linalg.vector_norm(torch.cat(rows)) if rows else torch.zeros(())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be shared out as an ordinary one; a collective where it is."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
