"""u'' = K u as a system of first order, for those K that are not Hermitian (or to start from (u, u') as one vector)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..operators import LinearOperator, aslinearoperator
from ..operators.base import Gradients


class FirstOrder(LinearOperator):
    """[[0, I], [K, 0]]: (u, u')' for u'' = K u, twice the size of K.

    Where K is similar to a symmetric matrix, as c²Δ is, :func:`ritz.expint.wave_multiply` on the symmetric one works
    on half the length.

    Args:
        K: square operator (n, n).

    Cost: a product with K. Gradient: K's own.
    """

    def __init__(self, K: Any) -> None:
        K = aslinearoperator(K)
        if K.shape[0] != K.shape[1]:
            raise OperandError(f"FirstOrder came with an operator of shape {K.shape}; expected a square one")
        super().__init__((2 * K.shape[0], 2 * K.shape[0]), K.dtype, K.device, hermitian=False)
        self.K = K

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.K,)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return FirstOrder(children[0])

    def _matmat(self, X: Tensor) -> Tensor:
        u, v = X.tensor_split(2)
        return torch.cat([v, self.K._matmat(u)])

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.adjoint_product(X.shape[1])(X)

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        inner = self.K.adjoint_product(width)

        def apply(X: Tensor) -> Tensor:
            u, v = X.tensor_split(2)
            return torch.cat([inner(v), u])

        return apply

    def tensors(self) -> tuple[Tensor, ...]:
        return self.K.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        n = self.K.shape[0]
        return self.K.pair(Lam[n:], Q[:n])
