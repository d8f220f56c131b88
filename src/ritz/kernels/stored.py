"""A kernel matrix that is kept: filled once by tiles, multiplied and differentiated by tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics import full_precision
from ..operators import Sum
from ..operators.base import Gradients, LinearOperator
from .backends import Stored
from .torch_tiles import multiply


class StoredOperator(LinearOperator):
    """The matrix of ``operator`` (n, m), made at the first product and anew when a tensor of it has changed.

    Memory: n·m numbers. Gradient: the operator's own pairing, by tiles; the second derivative through its dense matrix.
    """

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            operator.shape, operator.dtype, operator.device, hermitian=operator.hermitian, psd=operator.psd
        )
        self.operator = operator
        self._matrix: Tensor | None = None
        self._versions: tuple[int, ...] = ()

    @property
    def backend(self) -> Stored:
        """``Stored(tiles)`` with the tiles that fill the matrix and contract gradients (the first ones, for a sum)."""
        operator: Any = self.operator
        while isinstance(operator, Sum):
            operator = operator.terms[0]
        return Stored(getattr(operator, "backend", Stored().tiles))

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, backend={self.backend})"

    @property
    def deferrable(self) -> bool:
        return self.operator.deferrable

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """The matrix as numbers, without a graph."""
        versions = tuple(t._version for t in self.operator.tensors())
        if self._matrix is None or versions != self._versions:
            self._matrix = None  # before the new one is there, or both would be held
            self._matrix, self._versions = self.operator.to_dense().detach(), versions
        return self._matrix

    def _matmat(self, X: Tensor) -> Tensor:
        from ..pairing import product

        return product(self, X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        if self.hermitian:
            return self._matmat(X)
        if torch.is_grad_enabled():
            return self.operator._rmatmat(X)
        with full_precision():
            return multiply(self.matrix().mT, X, same=False)

    @torch.no_grad()
    def _numeric(self, X: Tensor) -> Tensor:
        with full_precision():
            return multiply(self.matrix(), X, same=bool(self.hermitian))

    def _recorded(self, X: Tensor, *tensors: Tensor) -> Tensor:
        return _recorded(self.operator, X, tensors)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.operator.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return self.operator.pair(Lam, Q)

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        """The columns K[:, idx]; differentiable."""
        return self.operator.columns(idx)

    def diagonal(self) -> Tensor:
        """The diagonal; differentiable."""
        return self.operator.diagonal()

    def to_dense(self) -> Tensor:
        return self.operator.to_dense()


def _recorded(operator: Any, X: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The product in plain differentiable operations on the tensors, for an operator that has it or a sum of such."""
    if not isinstance(operator, Sum):
        out: Tensor = operator._recorded(X, *tensors)
        return out
    total, position = None, 0
    for term in operator.terms:
        count = len(term.tensors())
        part = _recorded(term, X, tensors[position : position + count])
        total, position = part if total is None else total + part, position + count
    assert total is not None
    return total
