"""Structures made of two structures, with and without a dense block that couples them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import OperandError
from .base import Structure, check_flag
from .products import add_product_, as_matrix, empty_product, pieces, writable


class _TwoBlocks(Structure):
    """[[S₁, B], [0, S₂]], [[S₁, 0], [B, S₂]] or diag(S₁, S₂), stored as S₁, B (by rows), S₂.

    Where d leaves nothing for one of the two, a member is one of the other structure.
    """

    first: Structure
    second: Structure
    split: int

    @property
    @abstractmethod
    def _side(self) -> int:
        """Where B stands: 1 above the diagonal, −1 below it, 0 for no B."""

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            if not isinstance(getattr(self, name), Structure):
                raise OperandError(
                    f"{type(self).__name__} got {name}={getattr(self, name)!r}; expected a structure such as Dense()"
                )
        if isinstance(self.split, bool) or not isinstance(self.split, int) or self.split == 0:
            raise OperandError(
                f"{type(self).__name__} got split={self.split!r}; expected a whole number other than 0 (negative ones "
                "count from the end)"
            )

    def _sizes(self, d: int) -> tuple[int, int]:
        """Rows of S₁ and of S₂."""
        d1 = min(self.split, d) if self.split > 0 else max(d + self.split, 0)
        return d1, d - d1

    def _alone(self, d: int) -> Structure | None:
        """The only structure that a matrix of this size has room for, if it is one."""
        d1, d2 = self._sizes(d)
        return self.first if d2 == 0 else (self.second if d1 == 0 else None)

    def _shape(self, d: int) -> tuple[int, int]:
        """Shape of B."""
        d1, d2 = self._sizes(d)
        return ((d1, d2) if self._side > 0 else (d2, d1)) if self._side else (0, 0)

    def _parts(self, flat: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
        """Storage of S₁, the matrix B, storage of S₂; views."""
        d1, d2 = self._sizes(d)
        rows, columns = self._shape(d)
        a, B, b = pieces(flat, self.first.numel(d1), rows * columns, self.second.numel(d2))
        return a, as_matrix(B, rows, columns), b

    def numel(self, d: int) -> int:
        if alone := self._alone(d):
            return alone.numel(d)
        d1, d2 = self._sizes(d)
        rows, columns = self._shape(d)
        return self.first.numel(d1) + rows * columns + self.second.numel(d2)

    def identity(self, d: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        if alone := self._alone(d):
            return alone.identity(d, dtype=dtype, device=device)
        d1, d2 = self._sizes(d)
        rows, columns = self._shape(d)
        middle = torch.zeros(rows * columns, dtype=dtype, device=device)
        ends = [s.identity(k, dtype=dtype, device=device) for s, k in ((self.first, d1), (self.second, d2))]
        return torch.cat([ends[0], middle, ends[1]])

    # -- conversion -----------------------------------------------------------------------------------------------

    def _from_dense(self, M: Tensor) -> Tensor:
        d = M.shape[-1]
        if alone := self._alone(d):
            return alone._from_dense(M)
        d1, _ = self._sizes(d)
        parts = [self.first._from_dense(M[..., :d1, :d1]), self.second._from_dense(M[..., d1:, d1:])]
        if self._side:
            parts.insert(1, (M[..., :d1, d1:] if self._side > 0 else M[..., d1:, :d1]).flatten(-2))
        return torch.cat(parts, -1)

    def _to_dense(self, flat: Tensor, d: int) -> Tensor:
        if alone := self._alone(d):
            return alone._to_dense(flat, d)
        d1, d2 = self._sizes(d)
        a, B, b = self._parts(flat, d)
        M = flat.new_zeros(flat.shape[:-1] + (d, d))
        M[..., :d1, :d1] = self.first._to_dense(a, d1)
        M[..., d1:, d1:] = self.second._to_dense(b, d2)
        if self._side > 0:
            M[..., :d1, d1:] = B
        elif self._side < 0:
            M[..., d1:, :d1] = B
        return M

    def _double_(self, flat: Tensor, d: int) -> None:
        if alone := self._alone(d):
            return alone._double_(flat, d)
        d1, d2 = self._sizes(d)
        a, B, b = self._parts(flat, d)
        self.first._double_(a, d1)
        self.second._double_(b, d2)
        B.mul_(2)

    # -- products -------------------------------------------------------------------------------------------------

    def _apply(self, flat: Tensor, X: Tensor, transposed: bool, out: Tensor | None = None) -> Tensor:
        d = X.shape[-2]
        if alone := self._alone(d):
            return alone._apply(flat, X, transposed, out)
        d1, _ = self._sizes(d)
        a, B, b = self._parts(flat, d)
        X1, X2 = X[..., :d1, :], X[..., d1:, :]
        side = self._side
        if transposed:
            side, B = -side, B.mT
        if not writable(flat, X):
            Y1, Y2 = self.first._apply(a, X1, transposed), self.second._apply(b, X2, transposed)
            Y1, Y2 = (Y1 + B @ X2 if side > 0 else Y1), (Y2 + B @ X1 if side < 0 else Y2)
            return torch.cat([Y1, Y2], -2)
        out = empty_product(flat, X) if out is None else out
        Y1, Y2 = out[..., :d1, :], out[..., d1:, :]
        self.first._apply(a, X1, transposed, Y1)
        self.second._apply(b, X2, transposed, Y2)
        if side > 0:
            add_product_(Y1, B, X2)
        elif side < 0:
            add_product_(Y2, B, X1)
        return out

    def _multiply(self, left: Tensor, right: Tensor, d: int) -> Tensor:
        if alone := self._alone(d):
            return alone._multiply(left, right, d)
        d1, d2 = self._sizes(d)
        a, B, b = self._parts(left, d)
        a2, B2, b2 = self._parts(right, d)
        parts = [self.first._multiply(a, a2, d1), self.second._multiply(b, b2, d2)]
        if self._side > 0:  # S₁ B' + B S₂'
            coupling = self.first._apply(a, B2, False) + self.second._apply(b2, B.mT, True).mT
            parts.insert(1, coupling.flatten(-2))
        elif self._side < 0:  # S₂ B' + B S₁'
            coupling = self.second._apply(b, B2, False) + self.first._apply(a2, B.mT, True).mT
            parts.insert(1, coupling.flatten(-2))
        return torch.cat(parts, -1)

    def _gram(self, flat: Tensor, d: int) -> Tensor:
        if alone := self._alone(d):
            return alone._gram(flat, d)
        d1, d2 = self._sizes(d)
        a, B, b = self._parts(flat, d)
        first, second = self.first._gram(a, d1), self.second._gram(b, d2)
        if self._side > 0:  # S₁ᵀ S₁, S₁ᵀ B, S₂ᵀ S₂ + Bᵀ B
            coupling = self.first._apply(a, B, True)
            return torch.cat([first, coupling.flatten(-2), second + self.second._outer(B.mT)], -1)
        if self._side < 0:  # S₁ᵀ S₁ + Bᵀ B, S₂ᵀ B, S₂ᵀ S₂
            coupling = self.second._apply(b, B, True)
            return torch.cat([first + self.first._outer(B.mT), coupling.flatten(-2), second], -1)
        return torch.cat([first, second], -1)

    def _outer(self, U: Tensor) -> Tensor:
        d = U.shape[-2]
        if alone := self._alone(d):
            return alone._outer(U)
        d1, _ = self._sizes(d)
        U1, U2 = U[..., :d1, :], U[..., d1:, :]
        parts = [self.first._outer(U1), self.second._outer(U2)]
        if self._side:
            parts.insert(1, (U1 @ U2.mT if self._side > 0 else U2 @ U1.mT).flatten(-2))
        return torch.cat(parts, -1)

    # -- numbers --------------------------------------------------------------------------------------------------

    def _diagonal(self, flat: Tensor, d: int) -> Tensor:
        if alone := self._alone(d):
            return alone._diagonal(flat, d)
        d1, d2 = self._sizes(d)
        a, _, b = self._parts(flat, d)
        return torch.cat([self.first._diagonal(a, d1), self.second._diagonal(b, d2)], -1)

    def norm(self, flat: Tensor, d: int) -> Tensor:
        self._check_flat(flat, d)
        if alone := self._alone(d):
            return alone.norm(flat, d)
        d1, d2 = self._sizes(d)
        a, B, b = self._parts(flat, d)
        norms = [self.first.norm(a, d1), torch.linalg.vector_norm(B, dim=(-2, -1)), self.second.norm(b, d2)]
        return torch.linalg.vector_norm(torch.stack(norms, -1), dim=-1)

    def apply_cost(self, d: int, width: int) -> float:
        if alone := self._alone(d):
            return alone.apply_cost(d, width)
        d1, d2 = self._sizes(d)
        rows, columns = self._shape(d)
        ends = self.first.apply_cost(d1, width) + self.second.apply_cost(d2, width)
        return ends + float(rows * columns * width)

    def _describe(self, name: str, d: int) -> str:
        if alone := self._alone(d):
            return alone.describe(d)
        d1, d2 = self._sizes(d)
        return f"{name}({self.first.describe(d1)} | {self.second.describe(d2)} at {d1})"


@dataclass(frozen=True)
class BlockTriangular(_TwoBlocks):
    """[[S₁, B], [0, S₂]], or [[S₁, 0], [B, S₂]], with B dense and S₁, S₂ of any two structures.

    Closed under products because S₁ and S₂ are, for whatever B. Π acts on S₁ and S₂ by theirs and doubles B.

    Args:
        first, second: structures of S₁ and S₂.
        split: rows of S₁, which takes all of a d up to it; a negative one is counted from the end: S₂ has −split rows.
        upper: B stands above the diagonal.

    Raises:
        OperandError: not two structures, a split that is 0 or not a whole number, or upper not True or False.

    Storage and cost: those of the two, and split·(d − split) for B, times m in K X and Π(U Uᵀ).

    >>> import torch
    >>> from ritz.operators.structured import BlockTriangular, Dense, Diagonal
    >>> S = BlockTriangular(Dense(), Diagonal(), 2)
    >>> M = torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> S.to_dense(S.project(M), 4).tolist()
    [[1.0, 2.0, 6.0, 8.0], [2.0, 5.0, 12.0, 14.0], [0.0, 0.0, 8.0, 0.0], [0.0, 0.0, 0.0, 10.0]]
    """

    first: Structure
    second: Structure
    split: int
    upper: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "upper", self.upper)

    @property
    def _side(self) -> int:
        return 1 if self.upper else -1

    def describe(self, d: int) -> str:
        return self._describe("block upper" if self.upper else "block lower", d)


@dataclass(frozen=True)
class DirectSum(_TwoBlocks):
    """diag(S₁, S₂) with S₁, S₂ of any two structures. Π acts on each by its own.

    Args:
        first, second: structures of S₁ and S₂.
        split: rows of S₁, which takes all of a d up to it; a negative one is counted from the end: S₂ has −split rows.

    Raises:
        OperandError: not two structures, or a split that is 0 or not a whole number.

    Storage and cost: those of the two.

    >>> import torch
    >>> from ritz.operators.structured import Dense, Diagonal, DirectSum
    >>> S = DirectSum(Dense(), Diagonal(), 2)
    >>> M = torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> S.to_dense(S.project(M), 4).tolist()
    [[1.0, 2.0, 0.0, 0.0], [2.0, 5.0, 0.0, 0.0], [0.0, 0.0, 8.0, 0.0], [0.0, 0.0, 0.0, 10.0]]
    """

    first: Structure
    second: Structure
    split: int

    @property
    def symmetric(self) -> bool:
        return self.first.symmetric and self.second.symmetric

    @property
    def _side(self) -> int:
        return 0

    def describe(self, d: int) -> str:
        return self._describe("direct sum", d)
