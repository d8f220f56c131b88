"""Diagonal matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Structure
from .products import square_sum, writable


@dataclass(frozen=True)
class Diagonal(Structure):
    """diag(c). Π takes the diagonal.

    Storage: d. Cost: d m for K X and for Π(U Uᵀ), d for K M and Π(Kᵀ K).

    >>> import torch
    >>> from ritz.operators.structured import Diagonal
    >>> M = torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> Diagonal().to_dense(Diagonal().project(M), 4).tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 8.0, 0.0], [0.0, 0.0, 0.0, 10.0]]
    """

    @property
    def symmetric(self) -> bool:
        return True

    def numel(self, d: int) -> int:
        return d

    def identity(self, d: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        return torch.ones(d, dtype=dtype, device=device)

    def _from_dense(self, M: Tensor) -> Tensor:
        return M.diagonal(dim1=-2, dim2=-1).clone(memory_format=torch.contiguous_format)

    def _to_dense(self, flat: Tensor, d: int) -> Tensor:
        return torch.diag_embed(flat)

    def _double_(self, flat: Tensor, d: int) -> None:
        pass  # diagonal entries are their own mirror images

    def _apply(self, flat: Tensor, X: Tensor, transposed: bool, out: Tensor | None = None) -> Tensor:
        return torch.mul(flat.unsqueeze(-1), X, out=out)

    def _multiply(self, left: Tensor, right: Tensor, d: int) -> Tensor:
        return left * right

    def _gram(self, flat: Tensor, d: int) -> Tensor:
        return flat.square()

    def _outer(self, U: Tensor) -> Tensor:
        return square_sum(U)

    def _square(self, flat: Tensor, d: int) -> Tensor | None:
        return flat.square()

    def apply_square(self, square: Tensor, X: Tensor, overwrite: bool = False) -> Tensor:
        self._check_product(square, X)
        return self._apply(square, X, False, X if overwrite and writable(square, X) else None)

    def _diagonal(self, flat: Tensor, d: int) -> Tensor:
        return flat

    def apply_cost(self, d: int, width: int) -> float:
        return float(d * width)

    def describe(self, d: int) -> str:
        return "diagonal"
