"""All d×d matrices: the structure without structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Structure
from .products import aligned_product, as_matrix, product, row_length, symmetric_product


@dataclass(frozen=True)
class Dense(Structure):
    """Every d×d matrix, stored by rows. Π is the identity.

    Storage: d². Cost: d² m for K X and for Π(U Uᵀ), d³ for K M and Π(Kᵀ K); a large symmetric product is computed on
    and below its diagonal only.

    >>> import torch
    >>> from ritz.operators.structured import Dense
    >>> M = torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> Dense().to_dense(Dense().project(M), 4).tolist()
    [[1.0, 2.0, 3.0, 4.0], [2.0, 5.0, 6.0, 7.0], [3.0, 6.0, 8.0, 9.0], [4.0, 7.0, 9.0, 10.0]]
    """

    def numel(self, d: int) -> int:
        return d * d

    def identity(self, d: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        return torch.eye(d, dtype=dtype, device=device).flatten()

    def _from_dense(self, M: Tensor) -> Tensor:
        return M.clone(memory_format=torch.contiguous_format).flatten(-2)

    def _to_dense(self, flat: Tensor, d: int) -> Tensor:
        return as_matrix(flat, d, d)

    def _double_(self, flat: Tensor, d: int) -> None:
        pass  # every entry has its mirror image

    def _apply(self, flat: Tensor, X: Tensor, transposed: bool, out: Tensor | None = None) -> Tensor:
        K = self._to_dense(flat, X.shape[-2])
        return product(K.mT if transposed else K, X, out)

    def _multiply(self, left: Tensor, right: Tensor, d: int) -> Tensor:
        return aligned_product(self._to_dense(left, d), self._to_dense(right, d)).flatten(-2)

    def _gram(self, flat: Tensor, d: int) -> Tensor:
        return symmetric_product(self._to_dense(flat, d).mT).flatten(-2)

    def _outer(self, U: Tensor) -> Tensor:
        return symmetric_product(U).flatten(-2)

    def _square(self, flat: Tensor, d: int) -> Tensor | None:
        """K Kᵀ by rows, with gaps between them where alignment asks for some."""
        P = symmetric_product(self._to_dense(flat, d))
        return torch.nn.functional.pad(P, (0, row_length(d, P) - d)).flatten(-2)

    def apply_square(self, square: Tensor, X: Tensor, overwrite: bool = False) -> Tensor:
        d = X.shape[-2]
        return product(as_matrix(square, d, square.shape[-1] // d)[..., :d], X)

    def _diagonal(self, flat: Tensor, d: int) -> Tensor:
        return self._to_dense(flat, d).diagonal(dim1=-2, dim2=-1)

    def apply_cost(self, d: int, width: int) -> float:
        return float(d * d * width)

    def describe(self, d: int) -> str:
        return "dense"
