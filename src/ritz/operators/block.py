"""Block-diagonal operators: independent operators side by side, also the library's form of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import OperandError
from .algebra import _all, _check_alike
from .base import Gradients, LinearOperator
from .convert import aslinearoperator


class BlockDiagonal(LinearOperator):
    """diag(A₁, A₂, …) of operators or matrices; blocks may be rectangular.

    Args:
        blocks: operators or matrices of shapes (nᵢ, mᵢ); the result is (∑nᵢ, ∑mᵢ).

    Raises:
        OperandError: no block, or blocks that differ in dtype or device.

    Cost: one product of every block. Gradient: every block gets its own pairing on its rows.
    """

    def __init__(self, blocks: Sequence[LinearOperator | Tensor]) -> None:
        if not blocks:
            raise OperandError("a block-diagonal operator came without blocks; give at least one")
        operators = tuple(aslinearoperator(b) for b in blocks)
        _check_alike(operators, "a block-diagonal operator")
        self._rows = [b.shape[0] for b in operators]
        self._columns = [b.shape[1] for b in operators]
        super().__init__(
            (sum(self._rows), sum(self._columns)),
            operators[0].dtype,
            operators[0].device,
            hermitian=self._flag([b.hermitian for b in operators]),
            psd=self._flag([b.psd for b in operators]),
        )
        self.blocks = operators

    def _flag(self, flags: list[bool | None]) -> bool | None:
        """With square blocks the whole has a property just where all blocks have it."""
        if self._rows == self._columns and any(f is False for f in flags):
            return False
        return _all(flags)

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return self.blocks

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return BlockDiagonal(children)

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.cat([b._matmat(x) for b, x in zip(self.blocks, X.split(self._columns), strict=True)])

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.adjoint_product(X.shape[1])(X)

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        products = [b.adjoint_product(width) for b in self.blocks]
        return lambda X: torch.cat([p(x) for p, x in zip(products, X.split(self._rows), strict=True)])

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for b in self.blocks for t in b.tensors())

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        parts = zip(self.blocks, Lam.split(self._rows), Q.split(self._columns), strict=True)
        return tuple(g for b, lam, q in parts for g in b.pair(lam, q))

    def diagonal(self) -> Tensor:
        if self._rows != self._columns:
            return super().diagonal()  # the blocks' diagonals do not lie on that of the whole
        return torch.cat([b.diagonal() for b in self.blocks])
