"""The Hessian of a loss in the network's outputs, as a product and as a root R with R Rᵀ = H.

One loss term a row: outputs f (..., C), H acts on each row by itself. Operands may have further axes in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class OutputHessian(Protocol):
    """H of a sum of loss terms, at outputs f; V and U have f's shape, or further axes in front of it."""

    def product(self, V: Tensor) -> Tensor:
        """H V."""

    def root(self, U: Tensor) -> Tensor:
        """R U with R Rᵀ = H; R is square, row by row."""

    def root_adjoint(self, V: Tensor) -> Tensor:
        """Rᵀ V."""


@dataclass(frozen=True)
class SoftmaxHessian:
    """s (diag(p) − p pᵀ) along ``axis`` (negative), with the root √s (diag(√p) − p √pᵀ)."""

    p: Tensor
    scale: Tensor | None = None
    axis: int = -1

    def _times(self, left: Tensor, V: Tensor, a: Tensor, b: Tensor, power: float) -> Tensor:
        """s^power (left ⊙ V − a (bᵀ V))."""
        out = left * V - a * (b * V).sum(self.axis, keepdim=True)
        return out if self.scale is None else self.scale**power * out

    def product(self, V: Tensor) -> Tensor:
        return self._times(self.p, V, self.p, self.p, 1.0)

    def root(self, U: Tensor) -> Tensor:
        root = self.p.sqrt()
        return self._times(root, U, self.p, root, 0.5)

    def root_adjoint(self, V: Tensor) -> Tensor:
        root = self.p.sqrt()
        return self._times(root, V, root, self.p, 0.5)


@dataclass(frozen=True)
class DiagonalHessian:
    """diag(h), h ≥ 0."""

    h: Tensor

    def product(self, V: Tensor) -> Tensor:
        return self.h * V

    def root(self, U: Tensor) -> Tensor:
        return self.h.sqrt() * U

    root_adjoint = root


@dataclass(frozen=True)
class ProductHessian:
    """Known through its product with one tensor of f's shape alone; it has no root."""

    one: Callable[[Tensor], Tensor]
    ndim: int

    def product(self, V: Tensor) -> Tensor:
        if V.ndim == self.ndim:
            return self.one(V)
        own = V.shape[V.ndim - self.ndim :]
        return torch.stack([self.one(v) for v in V.reshape(-1, *own)]).reshape(V.shape)

    def root(self, U: Tensor) -> Tensor:
        from ..errors import OperandError

        raise OperandError(
            "a loss of your own is known through hessian_product alone, and this needs a root R Rᵀ of its Hessian; use "
            "CrossEntropy(), SquaredError(), BinaryCrossEntropy() or Poisson(), or structure='full' without a dual side"
        )

    root_adjoint = root
