"""Lower and upper triangular matrices in rectangular packed storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Structure
from .products import add_product_, as_matrix, empty_product, product, symmetric_product, writable


class _Triangular(Structure):
    """Triangular matrices, stored as a lower triangular factor L: K = L, or K = Lᵀ for upper ones.

    With h = ⌈d/2⌉ and L = [[L₁₁, 0], [L₂₁, L₂₂]], L₁₁ h×h, the d(d + 1)/2 numbers form a rectangle with h columns: the
    first h columns of L, and L₂₂ᵀ in the triangle above them that L leaves free; d odd fills a d×h rectangle, d even
    one with a row more on top. So the blocks are read without index tensors, and products cost three quarters of
    dense ones.

    Reference: F. Gustavson, J. Waśniewski, J. Dongarra, J. Langou, Rectangular full packed format for Cholesky's
    algorithm (2010).
    """

    _upper: ClassVar[bool]

    def numel(self, d: int) -> int:
        return d * (d + 1) // 2

    def identity(self, d: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        flat = torch.zeros(self.numel(d), dtype=dtype, device=device)
        for part in self._diagonals(flat, d):
            part.fill_(1)
        return flat

    # -- storage --------------------------------------------------------------------------------------------------

    @staticmethod
    def _places(flat: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where L₁₁ (in its lower triangle), L₂₁ and L₂₂ᵀ (in its upper triangle) are; views."""
        h, odd = (d + 1) // 2, d % 2
        R = as_matrix(flat, d + 1 - odd, h)
        top = 1 - odd
        return R[..., top : top + h, :], R[..., top + h :, :], R[..., : d - h, odd:]

    def _blocks(self, flat: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
        """L₁₁, L₂₁ and L₂₂."""
        first, below, last = self._places(flat, d)
        return first.tril(), below, last.triu().mT

    def _pack(self, N11: Tensor, N21: Tensor, N22: Tensor) -> Tensor:
        """Storage of the lower triangle of [[N₁₁, ·], [N₂₁, N₂₂]]; what lies above the diagonal is ignored."""
        h, k = N11.shape[-1], N22.shape[-1]
        rows = [N11.tril(), N21] if h > k else [torch.zeros_like(N11[..., :1, :]), N11.tril(), N21]
        R = torch.cat(rows, -2)
        R[..., :k, h - k :].add_(N22.mT.triu())  # into the free triangle above L₁₁
        return R.flatten(-2)

    def _diagonals(self, flat: Tensor, d: int) -> tuple[Tensor, Tensor]:
        first, _, last = self._places(flat, d)
        return first.diagonal(dim1=-2, dim2=-1), last.diagonal(dim1=-2, dim2=-1)

    def _from_dense(self, M: Tensor) -> Tensor:
        L, h = M.mT if self._upper else M, (M.shape[-1] + 1) // 2
        return self._pack(L[..., :h, :h], L[..., h:, :h], L[..., h:, h:])

    def _to_dense(self, flat: Tensor, d: int) -> Tensor:
        L11, L21, L22 = self._blocks(flat, d)
        top = torch.cat([L11, torch.zeros_like(L21.mT)], -1)
        L = torch.cat([top, torch.cat([L21, L22], -1)], -2)
        return L.mT if self._upper else L

    def _double_(self, flat: Tensor, d: int) -> None:
        flat.mul_(2)
        for part in self._diagonals(flat, d):
            part.mul_(0.5)

    def _diagonal(self, flat: Tensor, d: int) -> Tensor:
        return torch.cat(self._diagonals(flat, d), -1)

    # -- products -------------------------------------------------------------------------------------------------

    def _apply(self, flat: Tensor, X: Tensor, transposed: bool, out: Tensor | None = None) -> Tensor:
        d = X.shape[-2]
        L11, L21, L22 = self._blocks(flat, d)
        h = L11.shape[-1]
        X1, X2 = X[..., :h, :], X[..., h:, :]
        by_transpose = transposed != self._upper
        if not writable(flat, X):
            if by_transpose:
                return torch.cat([L11.mT @ X1 + L21.mT @ X2, L22.mT @ X2], -2)
            return torch.cat([L11 @ X1, L21 @ X1 + L22 @ X2], -2)
        out = empty_product(flat, X) if out is None else out
        Y1, Y2 = out[..., :h, :], out[..., h:, :]
        if by_transpose:
            add_product_(product(L11.mT, X1, Y1), L21.mT, X2)
            product(L22.mT, X2, Y2)
        else:
            product(L11, X1, Y1)
            add_product_(product(L22, X2, Y2), L21, X1)
        return out

    def _multiply(self, left: Tensor, right: Tensor, d: int) -> Tensor:
        if self._upper:  # Lᵀ Mᵀ = (M L)ᵀ
            left, right = right, left
        L11, L21, L22 = self._blocks(left, d)
        M11, M21, M22 = self._blocks(right, d)
        return self._pack(L11 @ M11, add_product_(L21 @ M11, L22, M21), L22 @ M22)

    def _gram(self, flat: Tensor, d: int) -> Tensor:
        L11, L21, L22 = self._blocks(flat, d)
        if self._upper:  # L Lᵀ
            last = add_product_(symmetric_product(L22), L21, L21.mT)
            return self._pack(symmetric_product(L11), L21 @ L11.mT, last)
        first = add_product_(symmetric_product(L11.mT), L21.mT, L21)
        return self._pack(first, L22.mT @ L21, symmetric_product(L22.mT))

    def _outer(self, U: Tensor) -> Tensor:
        h = (U.shape[-2] + 1) // 2
        U1, U2 = U[..., :h, :], U[..., h:, :]
        return self._pack(symmetric_product(U1), U2 @ U1.mT, symmetric_product(U2))

    def apply_cost(self, d: int, width: int) -> float:
        h = (d + 1) // 2
        return float((d * d - h * (d - h)) * width)


@dataclass(frozen=True)
class LowerTriangular(_Triangular):
    """Lower triangular matrices. Π doubles what is below the diagonal.

    Storage: d(d + 1)/2. Cost: ¾ d² m for K X and for Π(U Uᵀ), half a dense product for K M and Π(Kᵀ K). The class is
    dense up to a factor, and these two form blocks of a d×d matrix.

    >>> import torch
    >>> from ritz.operators.structured import LowerTriangular
    >>> S, M = LowerTriangular(), torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> S.to_dense(S.project(M), 4).tolist()
    [[1.0, 0.0, 0.0, 0.0], [4.0, 5.0, 0.0, 0.0], [6.0, 12.0, 8.0, 0.0], [8.0, 14.0, 18.0, 10.0]]
    """

    _upper: ClassVar[bool] = False

    def describe(self, d: int) -> str:
        return "lower triangular"


@dataclass(frozen=True)
class UpperTriangular(_Triangular):
    """Upper triangular matrices, stored as their transposes. Π doubles what is above the diagonal.

    Storage and cost are those of :class:`LowerTriangular`.

    >>> import torch
    >>> from ritz.operators.structured import UpperTriangular
    >>> S, M = UpperTriangular(), torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> S.to_dense(S.project(M), 4).tolist()
    [[1.0, 4.0, 6.0, 8.0], [0.0, 5.0, 12.0, 14.0], [0.0, 0.0, 8.0, 18.0], [0.0, 0.0, 0.0, 10.0]]
    """

    _upper: ClassVar[bool] = True

    def describe(self, d: int) -> str:
        return "upper triangular"
