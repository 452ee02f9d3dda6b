"""Where the real tokens of a batch are, and the way to them and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from train import row_attention


@dataclass(frozen=True)
class Layout:
    """Where the real tokens of a batch are."""

    rows: int
    width: int
    places: Tensor
    """int64 (N,): the place of each real token in the rows, one after the other."""
    size: int
    """M, of N real tokens and what is added to them."""
    starts: Tensor
    """int32 (B + 1,): where each row begins among the real tokens."""
    groups: row_attention.Groups | None
    """Of rows that are attended to at once, on a CPU."""
    by_ids: bool
    """Whether the model was given ids, and not what they stand for."""
    config: Any
    """Of the model, which asks for this attention."""
    attention: str
    noted: dict[Any, Any] = field(default_factory=dict)
    """What others have found out about the batch."""

    def flat(self, tensor: Tensor) -> Tensor:
        """(B or 1, T, …) → (1, M, …)."""
        whole = tensor if len(tensor) == self.rows else tensor.expand(self.rows, *tensor.shape[1:])
        return self.filled(whole.reshape(self.rows * self.width, *tensor.shape[2:])[self.places][None])

    def flat_once(self, tensor: Tensor) -> Tensor:
        """The same of what does not learn: of rotations, which all blocks are given, it is made for the first."""
        if id(tensor) not in self.noted:
            self.noted[id(tensor)] = tensor, self.flat(tensor)  # the first is kept, that no other has its number
        flat: Tensor = self.noted[id(tensor)][1]
        return flat

    def padded(self, tensor: Tensor) -> Tensor:
        """(1, M, …) → (B, T, …), zero where there is no token."""
        whole, real = tensor.new_zeros(self.rows * self.width, *tensor.shape[2:]), tensor[0, : len(self.places)]
        return whole.index_copy(0, self.places, real).view(self.rows, self.width, *tensor.shape[2:])

    def filled(self, tensor: Tensor) -> Tensor:
        """(1, N, …) → (1, M, …)."""
        more = self.size - len(self.places)
        return nn.functional.pad(tensor, (*(0, 0) * (tensor.dim() - 2), 0, more)) if more else tensor
