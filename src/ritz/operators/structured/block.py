"""Block-diagonal matrices with blocks of one size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Structure, check_whole
from .products import as_matrix, empty_product, pieces, product, writable


@dataclass(frozen=True)
class BlockDiagonal(Structure):
    """diag(A₁, A₂, …) of dense blocks size×size; the last one is smaller where size does not divide d.

    Stored block after block, each by rows. The blocks of a member are not symmetric in general, so that Kᵀ takes true
    transposes. Π takes the diagonal blocks.

    Args:
        size: rows and columns of a block, at least 1.

    Raises:
        OperandError: size is not a whole number of at least 1.

    Storage: size·d. Cost: size·d m for K X and for Π(U Uᵀ), size² d for K M and Π(Kᵀ K).

    >>> import torch
    >>> from ritz.operators.structured import BlockDiagonal
    >>> S, M = BlockDiagonal(3), torch.tensor([[1.0, 2, 3, 4], [2, 5, 6, 7], [3, 6, 8, 9], [4, 7, 9, 10]])
    >>> S.to_dense(S.project(M), 4).tolist()
    [[1.0, 2.0, 3.0, 0.0], [2.0, 5.0, 6.0, 0.0], [3.0, 6.0, 8.0, 0.0], [0.0, 0.0, 0.0, 10.0]]
    """

    size: int

    def __post_init__(self) -> None:
        check_whole(self, "size", self.size, 1)

    def _full(self, d: int) -> tuple[int, int]:
        """Rows covered by full blocks, and rows of the last smaller one."""
        rest = d % self.size
        return d - rest, rest

    def numel(self, d: int) -> int:
        full, rest = self._full(d)
        return full * self.size + rest * rest

    def identity(self, d: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        full, rest = self._full(d)
        one = torch.eye(self.size, dtype=dtype, device=device).flatten()
        return torch.cat([one.repeat(full // self.size), torch.eye(rest, dtype=dtype, device=device).flatten()])

    def _blocks(self, flat: Tensor, d: int) -> tuple[Tensor, Tensor]:
        """The full blocks (..., d // size, size, size), and the last one (..., rest, rest)."""
        full, rest = self._full(d)
        s = self.size
        head, tail = pieces(flat, full * s, rest * rest)
        return head.reshape(head.shape[:-1] + (full // s, s, s)), as_matrix(tail, rest, rest)

    def _rows(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of X in blocks (..., d // size, size, m), and those of the last one; views."""
        full, _ = self._full(X.shape[-2])
        return X[..., :full, :].unflatten(-2, (full // self.size, self.size)), X[..., full:, :]

    def _pack(self, blocks: Tensor, last: Tensor) -> Tensor:
        if last.shape[-1] == 0:
            return blocks.flatten(-3)
        return torch.cat([blocks.flatten(-3), last.flatten(-2)], -1)

    def _on_diagonal(self, M: Tensor) -> tuple[Tensor, Tensor]:
        """The diagonal blocks of M as views, (..., d // size, size, size) and (..., rest, rest)."""
        full, _ = self._full(M.shape[-1])
        q, s = full // self.size, self.size
        grid = M[..., :full, :full].unflatten(-1, (q, s)).unflatten(-3, (q, s))
        return grid.diagonal(dim1=-4, dim2=-2).movedim(-1, -3), M[..., full:, full:]

    def _from_dense(self, M: Tensor) -> Tensor:
        blocks, last = self._on_diagonal(M)
        return self._pack(blocks.clone(memory_format=torch.contiguous_format), last)

    def _to_dense(self, flat: Tensor, d: int) -> Tensor:
        M = flat.new_zeros(flat.shape[:-1] + (d, d))
        for i, value in enumerate(self._blocks(flat, d)):
            self._on_diagonal(M)[i].copy_(value)  # a view anew: autograd refuses one that is older than M's graph
        return M

    def _double_(self, flat: Tensor, d: int) -> None:
        pass  # every entry of a block has its mirror image in the block

    def _apply(self, flat: Tensor, X: Tensor, transposed: bool, out: Tensor | None = None) -> Tensor:
        blocks, last = self._blocks(flat, X.shape[-2])
        if transposed:
            blocks, last = blocks.mT, last.mT
        head, tail = self._rows(X)
        if last.shape[-1] == 0 and out is None:
            return (blocks @ head).flatten(-3, -2)
        if not writable(flat, X):
            return torch.cat([(blocks @ head).flatten(-3, -2), last @ tail], -2)
        out = empty_product(flat, X) if out is None else out
        into_head, into_tail = self._rows(out)
        product(blocks, head, into_head)
        product(last, tail, into_tail)
        return out

    def _multiply(self, left: Tensor, right: Tensor, d: int) -> Tensor:
        pairs = zip(self._blocks(left, d), self._blocks(right, d), strict=True)
        return self._pack(*(a @ b for a, b in pairs))

    def _gram(self, flat: Tensor, d: int) -> Tensor:
        return self._pack(*(A.mT @ A for A in self._blocks(flat, d)))

    def _outer(self, U: Tensor) -> Tensor:
        return self._pack(*(u @ u.mT for u in self._rows(U)))

    def _square(self, flat: Tensor, d: int) -> Tensor | None:
        return self._pack(*(A @ A.mT for A in self._blocks(flat, d)))

    def _diagonal(self, flat: Tensor, d: int) -> Tensor:
        blocks, last = self._blocks(flat, d)
        return torch.cat([blocks.diagonal(dim1=-2, dim2=-1).flatten(-2), last.diagonal(dim1=-2, dim2=-1)], -1)

    def apply_cost(self, d: int, width: int) -> float:
        return float(self.numel(d) * width)

    def describe(self, d: int) -> str:
        return f"block diagonal({self.size})"
