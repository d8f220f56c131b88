"""Rank-k triangular matrices: a strip of dense rows or columns, and a diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Structure, check_flag, check_whole
from .products import add_scaled_, as_matrix, empty_product, pieces, product, square_sum, writable


@dataclass(frozen=True)
class RankTriangular(Structure):
    """A diagonal matrix with ``rank`` dense rows or columns, first or last.

    ============  ======================  ======================
    \\             first=True              first=False
    ============  ======================  ======================
    rows=True     [[A, B], [0, diag c]]   [[diag c, 0], [B, A]]
    rows=False    [[A, 0], [B, diag c]]   [[diag c, B], [0, A]]
    ============  ======================  ======================

    Stored as the strip of dense rows (rank, d) or columns (d, rank), then c; a small d fills A first. Either K Kᵀ or
    its inverse is diagonal plus a matrix of rank ``rank``. Π doubles B.

    Args:
        rank: number of dense rows or columns, at least 1.
        rows: the strip consists of rows.
        first: the strip comes first.

    Raises:
        OperandError: rank is not a whole number of at least 1, or a flag is not True or False.

    Storage: about (rank + 1) d. Cost: (rank + 1) d m for K X and for Π(U Uᵀ), rank² d for K M and Π(Kᵀ K).

    >>> import torch
    >>> from ritz.operators.structured import RankTriangular
    >>> S, M = RankTriangular(1), torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> S.to_dense(S.project(M), 4).tolist()
    [[1.0, 4.0, 6.0, 8.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 8.0, 0.0], [0.0, 0.0, 0.0, 10.0]]
    """

    rank: int
    rows: bool = True
    first: bool = True

    def __post_init__(self) -> None:
        check_whole(self, "rank", self.rank, 1)
        check_flag(self, "rows", self.rows)
        check_flag(self, "first", self.first)

    def _places(self, d: int) -> tuple[slice, slice]:
        """Where the dense rows or columns are, and where the diagonal is."""
        k = min(self.rank, d)
        return (slice(0, k), slice(k, d)) if self.first else (slice(d - k, d), slice(0, d - k))

    def _parts(self, flat: Tensor, d: int) -> tuple[Tensor, Tensor]:
        """The strip (..., k, d) or (..., d, k), and c (..., d − k); views."""
        k = min(self.rank, d)
        S, c = pieces(flat, k * d, d - k)
        return (as_matrix(S, k, d) if self.rows else as_matrix(S, d, k)), c

    @staticmethod
    def _pack(S: Tensor, c: Tensor) -> Tensor:
        return torch.cat([S.flatten(-2), c], -1)

    def numel(self, d: int) -> int:
        k = min(self.rank, d)
        return k * d + d - k

    def identity(self, d: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        flat = torch.zeros(self.numel(d), dtype=dtype, device=device)
        S, c = self._parts(flat, d)
        self._corner(S, d).diagonal().fill_(1)
        c.fill_(1)
        return flat

    def _corner(self, S: Tensor, d: int) -> Tensor:
        """A, within the strip."""
        a, _ = self._places(d)
        return S[..., :, a] if self.rows else S[..., a, :]

    def _from_dense(self, M: Tensor) -> Tensor:
        a, r = self._places(M.shape[-1])
        return self._pack(M[..., a, :] if self.rows else M[..., :, a], M[..., r, r].diagonal(dim1=-2, dim2=-1))

    def _to_dense(self, flat: Tensor, d: int) -> Tensor:
        a, r = self._places(d)
        S, c = self._parts(flat, d)
        M = flat.new_zeros(flat.shape[:-1] + (d, d))
        if self.rows:
            M[..., a, :] = S
        else:
            M[..., :, a] = S
        M[..., r, r].diagonal(dim1=-2, dim2=-1).copy_(c)
        return M

    def _double_(self, flat: Tensor, d: int) -> None:
        _, r = self._places(d)
        S, _ = self._parts(flat, d)
        (S[..., :, r] if self.rows else S[..., r, :]).mul_(2)

    def _apply(self, flat: Tensor, X: Tensor, transposed: bool, out: Tensor | None = None) -> Tensor:
        d = X.shape[-2]
        a, r = self._places(d)
        S, c = self._parts(flat, d)
        c, rest = c.unsqueeze(-1), X[..., r, :]
        if transposed:
            S = S.mT
        if self.rows == transposed:  # the strip, as it acts here, consists of columns
            Y = product(S, X[..., a, :], out)
            add_scaled_(Y[..., r, :], c, rest)
            return Y
        if not writable(flat, X):
            parts = [S @ X, c * rest]
            return torch.cat(parts if self.first else parts[::-1], -2)
        out = empty_product(flat, X) if out is None else out
        product(S, X, out[..., a, :])
        torch.mul(c, rest, out=out[..., r, :])
        return out

    def _multiply(self, left: Tensor, right: Tensor, d: int) -> Tensor:
        a, r = self._places(d)
        S, c = self._parts(left, d)
        S2, c2 = self._parts(right, d)
        if self.rows:  # the dense rows of K, times M: A [A' B'] + [0, B diag c']
            new = S[..., :, a] @ S2
            add_scaled_(new[..., :, r], S[..., :, r], c2.unsqueeze(-2))
        else:  # K times the dense columns of M: [A; B] A' + [0; diag c B']
            new = S @ S2[..., a, :]
            add_scaled_(new[..., r, :], c.unsqueeze(-1), S2[..., r, :])
        return self._pack(new, c * c2)

    def _gram(self, flat: Tensor, d: int) -> Tensor:
        a, r = self._places(d)
        S, c = self._parts(flat, d)
        if self.rows:
            B = S[..., :, r]
            return self._pack(S[..., :, a].mT @ S, c.square() + B.square().sum(-2))
        corner, coupling = S.mT @ S, c.unsqueeze(-1) * S[..., r, :]
        parts = [corner, coupling] if self.first else [coupling, corner]
        return self._pack(torch.cat(parts, -2), c.square())

    def _outer(self, U: Tensor) -> Tensor:
        a, r = self._places(U.shape[-2])
        S = U[..., a, :] @ U.mT if self.rows else U @ U[..., a, :].mT
        return self._pack(S, square_sum(U[..., r, :]))

    def _diagonal(self, flat: Tensor, d: int) -> Tensor:
        S, c = self._parts(flat, d)
        parts = [self._corner(S, d).diagonal(dim1=-2, dim2=-1), c]
        return torch.cat(parts if self.first else parts[::-1], -1)

    def apply_cost(self, d: int, width: int) -> float:
        return float(self.numel(d) * width)

    def describe(self, d: int) -> str:
        return f"rank-{self.rank} triangular({'rows' if self.rows else 'columns'} {'first' if self.first else 'last'})"
