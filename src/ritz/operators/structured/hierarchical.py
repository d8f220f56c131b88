"""Hierarchical matrices: dense rows first and last around a diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import OperandError
from .base import Structure, check_whole
from .products import add_product_, add_scaled_, as_matrix, empty_product, pieces, product, square_sum, writable


@dataclass(frozen=True)
class Hierarchical(Structure):
    """[[A, B₁, B₂], [0, diag c, 0], [0, D, E]] with A top×top and E bottom×bottom.

    Stored as the dense rows T = [A B₁ B₂] (top, d), then c, then the dense rows W = [D E] (bottom, d − top), so that
    K X is one product with these rows and one elementwise pass. A small d fills A first, then E, then c.
    K Kᵀ and its inverse are diagonal plus low rank, and couple all coordinates.
    Π doubles B₁, B₂ and D.

    Args:
        top, bottom: sizes of A and E, at least 0 and not both 0.

    Raises:
        OperandError: top or bottom is not a whole number, negative, or both are 0.

    Storage: about (top + bottom) d. Cost: (top + bottom) d m for K X and for Π(U Uᵀ), (top² + bottom²) d for K M and
    Π(Kᵀ K), top·bottom·d more.

    Reference: W. Lin et al., Structured inverse-free natural gradient (2024), table 1.

    >>> import torch
    >>> from ritz.operators.structured import Hierarchical
    >>> S, M = Hierarchical(1, 1), torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> S.to_dense(S.project(M), 4).tolist()
    [[1.0, 4.0, 6.0, 8.0], [0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 8.0, 0.0], [0.0, 14.0, 18.0, 10.0]]
    """

    top: int
    bottom: int

    def __post_init__(self) -> None:
        check_whole(self, "top", self.top, 0)
        check_whole(self, "bottom", self.bottom, 0)
        if self.top == self.bottom == 0:
            raise OperandError("Hierarchical got top=0 and bottom=0; use Diagonal() for a matrix without dense rows")

    def _sizes(self, d: int) -> tuple[int, int, int]:
        """Rows of A, c and E."""
        t = min(self.top, d)
        b = min(self.bottom, d - t)
        return t, d - t - b, b

    def _parts(self, flat: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
        """T (..., top, d), c (..., middle) and W (..., bottom, d − top); views."""
        t, p, b = self._sizes(d)
        T, c, W = pieces(flat, t * d, p, b * (p + b))
        return as_matrix(T, t, d), c, as_matrix(W, b, p + b)

    @staticmethod
    def _pack(T: Tensor, c: Tensor, W: Tensor) -> Tensor:
        return torch.cat([T.flatten(-2), c, W.flatten(-2)], -1)

    @staticmethod
    def _dense_rows(T: Tensor, W: Tensor) -> Tensor:
        """Dense rows of the matrix, (..., top + bottom, d): one product with these is faster than two with T and W."""
        if W.shape[-2] == 0:
            return T
        return torch.cat([T, torch.nn.functional.pad(W, (T.shape[-2], 0))], -2)

    def numel(self, d: int) -> int:
        t, p, b = self._sizes(d)
        return t * d + p + b * (p + b)

    def identity(self, d: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        t, p, b = self._sizes(d)
        flat = torch.zeros(self.numel(d), dtype=dtype, device=device)
        T, c, W = self._parts(flat, d)
        T[:, :t].diagonal().fill_(1)
        c.fill_(1)
        W[:, p:].diagonal().fill_(1)
        return flat

    def _from_dense(self, M: Tensor) -> Tensor:
        t, p, _ = self._sizes(M.shape[-1])
        c = M[..., t : t + p, t : t + p].diagonal(dim1=-2, dim2=-1)
        return self._pack(M[..., :t, :], c, M[..., t + p :, t:])

    def _to_dense(self, flat: Tensor, d: int) -> Tensor:
        t, p, _ = self._sizes(d)
        T, c, W = self._parts(flat, d)
        M = flat.new_zeros(flat.shape[:-1] + (d, d))
        M[..., :t, :] = T
        M[..., t : t + p, t : t + p].diagonal(dim1=-2, dim2=-1).copy_(c)
        M[..., t + p :, t:] = W
        return M

    def _double_(self, flat: Tensor, d: int) -> None:
        t, p, _ = self._sizes(d)
        T, _, W = self._parts(flat, d)
        T[..., t:].mul_(2)
        W[..., :p].mul_(2)

    def _apply(self, flat: Tensor, X: Tensor, transposed: bool, out: Tensor | None = None) -> Tensor:
        d = X.shape[-2]
        t, p, _ = self._sizes(d)
        T, c, W = self._parts(flat, d)
        rows, c, middle = self._dense_rows(T, W), c.unsqueeze(-1), X[..., t : t + p, :]
        if out is None and writable(flat, X):
            out = empty_product(flat, X)
        if transposed:
            Y = product(rows.mT, torch.cat([X[..., :t, :], X[..., t + p :, :]], -2), out)
            add_scaled_(Y[..., t : t + p, :], c, middle)
            return Y
        Z = rows @ X
        if out is None:
            return torch.cat([Z[..., :t, :], c * middle, Z[..., t:, :]], -2)
        out[..., :t, :], out[..., t + p :, :] = Z[..., :t, :], Z[..., t:, :]
        torch.mul(c, middle, out=out[..., t : t + p, :])
        return out

    def _multiply(self, left: Tensor, right: Tensor, d: int) -> Tensor:
        t, p, _ = self._sizes(d)
        T, c, W = self._parts(left, d)
        T2, c2, W2 = self._parts(right, d)
        scale = c2.unsqueeze(-2)
        new_T = T[..., :t] @ T2  # A [A' B₁' B₂'] + [0, B₁ diag c', 0] + B₂ [0, D', E']
        add_product_(new_T[..., t:], T[..., t + p :], W2)
        add_scaled_(new_T[..., t : t + p], T[..., t : t + p], scale)
        new_W = W[..., p:] @ W2  # E [D' E'] + [D diag c', 0]
        add_scaled_(new_W[..., :p], W[..., :p], scale)
        return self._pack(new_T, c * c2, new_W)

    def _gram(self, flat: Tensor, d: int) -> Tensor:
        t, p, _ = self._sizes(d)
        T, c, W = self._parts(flat, d)
        new_c = c.square() + T[..., t : t + p].square().sum(-2) + W[..., :p].square().sum(-2)
        new_W = W[..., p:].mT @ W  # Eᵀ [D E] + B₂ᵀ [B₁ B₂]
        add_product_(new_W, T[..., t + p :].mT, T[..., t:])
        return self._pack(T[..., :t].mT @ T, new_c, new_W)

    def _outer(self, U: Tensor) -> Tensor:
        t, p, _ = self._sizes(U.shape[-2])
        rows = torch.cat([U[..., :t, :], U[..., t + p :, :]], -2) @ U.mT
        return self._pack(rows[..., :t, :], square_sum(U[..., t : t + p, :]), rows[..., t:, t:])

    def _square(self, flat: Tensor, d: int) -> Tensor | None:
        """K Kᵀ is an arrow: diag(c²) in the middle, dense rows R first and last, and their mirror image; R, then c²."""
        t, p, b = self._sizes(d)
        T, c, W = self._parts(flat, d)
        rows = self._dense_rows(T, W)
        border = rows[..., :t], rows[..., t : t + p], rows[..., t + p :]
        left = border[0] @ T[..., :t].mT + border[1] @ T[..., t : t + p].mT + border[2] @ T[..., t + p :].mT
        middle = border[1] * c.unsqueeze(-2)
        right = border[1] @ W[..., :p].mT + border[2] @ W[..., p:].mT
        return torch.cat([torch.cat([left, middle, right], -1).flatten(-2), c.square()], -1)

    def apply_square(self, square: Tensor, X: Tensor, overwrite: bool = False) -> Tensor:
        d = X.shape[-2]
        t, p, b = self._sizes(d)
        R, c2 = square.split([(t + b) * d, p], -1)
        R, c2 = as_matrix(R, t + b, d), c2.unsqueeze(-1)
        border, middle = R @ X, X[..., t : t + p, :]
        outer = torch.cat([X[..., :t, :], X[..., t + p :, :]], -2)
        if not writable(square, X):
            inner = c2 * middle + R[..., t : t + p].mT @ outer
            return torch.cat([border[..., :t, :], inner, border[..., t:, :]], -2)
        out = X if overwrite else empty_product(square, X)
        add_product_(torch.mul(c2, middle, out=out[..., t : t + p, :]), R[..., t : t + p].mT, outer)
        out[..., :t, :], out[..., t + p :, :] = border[..., :t, :], border[..., t:, :]
        return out

    def _diagonal(self, flat: Tensor, d: int) -> Tensor:
        t, p, _ = self._sizes(d)
        T, c, W = self._parts(flat, d)
        return torch.cat([T[..., :t].diagonal(dim1=-2, dim2=-1), c, W[..., p:].diagonal(dim1=-2, dim2=-1)], -1)

    def apply_cost(self, d: int, width: int) -> float:
        return float(self.numel(d) * width)

    def describe(self, d: int) -> str:
        return f"hierarchical({self.top}, {self.bottom})"
