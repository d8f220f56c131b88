"""Kronecker products of operators, multiplied by reshaping and never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import OperandError
from .algebra import _all, _check_alike, wanted
from .base import Gradients, LinearOperator
from .convert import aslinearoperator

Block = Callable[[Tensor], Tensor]


class Kronecker(LinearOperator):
    """A₁ ⊗ A₂ ⊗ …: of any operators or matrices, square or rectangular.

    The convention is that of ``torch.kron``: the operand is a row-major array, so that with X (m₁, m₂)

        (A ⊗ B) X.reshape(-1) = (A X Bᵀ).reshape(-1).

    Args:
        factors: operators or matrices of shapes (n₁, m₁), (n₂, m₂), …; the product is (∏nᵢ, ∏mᵢ).

    Raises:
        OperandError: no factor, or factors that differ in dtype or device.

    Cost: a product with k vectors is one product of every Aᵢ with k·∏_{j≠i} vectors; factors that shrink go first.
    Gradient: every factor gets its own pairing, with blocks made by forward products of the other factors.

    Example:
        >>> A, B = torch.arange(4.0).reshape(2, 2), torch.ones(3, 3)
        >>> x = torch.arange(6.0)
        >>> torch.equal(Kronecker(A, B) @ x, torch.kron(A, B) @ x)
        True
    """

    def __init__(self, *factors: LinearOperator | Tensor) -> None:
        if not factors:
            raise OperandError("a Kronecker product came without factors; give at least one")
        operators = tuple(aslinearoperator(f) for f in factors)
        _check_alike(operators, "a Kronecker product")
        super().__init__(
            (math.prod(f.shape[0] for f in operators), math.prod(f.shape[1] for f in operators)),
            operators[0].dtype,
            operators[0].device,
            hermitian=_all([f.hermitian for f in operators]),
            psd=_all([f.psd for f in operators]),
        )
        self.factors = operators
        # Whatever makes the array smaller first, whatever makes it larger last.
        self._order = sorted(range(len(operators)), key=lambda i: operators[i].shape[0] / max(operators[i].shape[1], 1))

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return self.factors

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Kronecker(*children)

    def _matmat(self, X: Tensor) -> Tensor:
        Y = X.reshape(*(f.shape[1] for f in self.factors), X.shape[1])
        for i in self._order:
            Y = _along(self.factors[i]._matmat, Y, i)
        return Y.reshape(self.shape[0], X.shape[1])

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.adjoint_product(X.shape[1])(X)

    def adjoint_product(self, width: int) -> Block:
        rows = [f.shape[0] for f in self.factors]
        sizes, steps = [*rows, width], []
        for i in reversed(self._order):
            steps.append((i, self.factors[i].adjoint_product(math.prod(sizes[:i] + sizes[i + 1 :]))))
            sizes[i] = self.factors[i].shape[1]

        def apply(X: Tensor) -> Tensor:
            Y = X.reshape(*rows, X.shape[1])
            for i, adjoint in steps:
                Y = _along(adjoint, Y, i)
            return Y.reshape(self.shape[1], X.shape[1])

        return apply

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for f in self.factors for t in f.tensors())

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        L = Lam.reshape(*(f.shape[0] for f in self.factors), Lam.shape[1])
        X = Q.reshape(*(f.shape[1] for f in self.factors), Q.shape[1])
        grads: list[Tensor | None] = []
        for i, factor in enumerate(self.factors):
            own = factor.tensors()
            if not wanted(own):
                grads += [None] * len(own)
                continue
            Y = X
            for j in self._order:
                if j != i:
                    Y = _along(self.factors[j]._matmat, Y, j)
            grads += factor.pair(_unfold(L, i), _unfold(Y, i))
        return tuple(grads)

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1) % max(self.shape[1], 1)
        out = torch.ones(1, index.numel(), dtype=self.dtype, device=self.device)
        for factor in reversed(self.factors):  # the last index runs fastest
            own = factor.columns(index % factor.shape[1])
            index = index // factor.shape[1]
            out = (own.unsqueeze(1) * out.unsqueeze(0)).flatten(0, 1)
        return out

    def diagonal(self) -> Tensor:
        if any(f.shape[0] != f.shape[1] for f in self.factors):
            return super().diagonal()  # a diagonal entry of the product is then none of the factors' diagonals
        out = torch.ones(1, dtype=self.dtype, device=self.device)
        for factor in self.factors:
            out = (out.unsqueeze(1) * factor.diagonal().unsqueeze(0)).reshape(-1)
        return out


def _unfold(X: Tensor, axis: int) -> Tensor:
    """The array as a block whose rows run along ``axis``."""
    return X.movedim(axis, 0).flatten(1)


def _along(product: Block, X: Tensor, axis: int) -> Tensor:
    """Multiply the array along one axis."""
    front = X.movedim(axis, 0)
    Y = product(front.flatten(1))
    return Y.reshape(Y.shape[0], *front.shape[1:]).movedim(0, axis)
