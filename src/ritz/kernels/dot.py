"""Kernels of the inner product of two points: linear, which is of low rank, and polynomial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OperandError
from ..numerics import full_precision, unwrap
from ..operators.base import Gradients, LinearOperator
from .backends import TileBackend
from .base import ActiveKernel
from .parameters import assign, positive


class Linear(ActiveKernel):
    """Σ_a v_a x_a z_a: Bayesian linear regression without an intercept, with prior variances v of the weights.

    Args:
        ard_num_dims: number of variances, one per column of the points; None for one that all share.
        variance: start value of v, a number or one per column.
        active_dims: the columns of the points that the kernel sees; None for all.

    ``variance`` (1, 1) or (1, d) is softplus(``raw_variance``) + 1e-8 and may be assigned. The operator has rank d: a
    product takes O(n·d) operations and no tiles.
    """

    def __init__(
        self, ard_num_dims: int | None = None, variance: Any = 1.0, *, active_dims: Sequence[int] | None = None
    ) -> None:
        super().__init__(ard_num_dims, active_dims)
        self.raw_variance = nn.Parameter(torch.zeros(1, ard_num_dims or 1))
        self.variance = variance

    @property
    def variance(self) -> Tensor:
        """Variances of the weights, (1, 1) or (1, ard_num_dims)."""
        return positive(self.raw_variance)

    @variance.setter
    def variance(self, value: Any) -> None:
        assign(self.raw_variance, value, "variance")

    def evaluate(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        X, Z = self._check(X, Z)
        return InnerProductOperator(X, Z, self.raw_variance, (), self._columns).to_dense()

    def operator(
        self, X: Tensor, Z: Tensor | None, raw_scales: Sequence[Tensor], backend: TileBackend
    ) -> LinearOperator:
        X, Z = self._check(X, Z)
        return InnerProductOperator(X, Z, self.raw_variance, raw_scales, self._columns)


class InnerProductOperator(LinearOperator):
    """s·X diag(v) Zᵀ (n, m), v = softplus(raw_variance) + 1e-8: a product takes O((n + m)·d) operations per vector.

    Args:
        X: points (n, d).
        Z: points (m, d), or None for X itself; the operator is then Hermitian positive semidefinite.
        raw_variance: (1, 1) or (1, number of columns).
        raw_scales: raw factors s of one element each; nested scalings multiply.
        columns: the columns of the points that count; None for all.

    Gradient: of X, Z, the variances and the scales, to any order.
    """

    def __init__(
        self,
        X: Tensor,
        Z: Tensor | None,
        raw_variance: Tensor,
        raw_scales: Sequence[Tensor] = (),
        columns: tuple[int, ...] | None = None,
    ) -> None:
        same = Z is None
        rows, others = X.shape[0], (X if Z is None else Z).shape[0]
        super().__init__((rows, others), X.dtype, X.device, hermitian=same or None, psd=same or None)
        self.X, self.Z, self.raw_variance, self.raw_scales = X, Z, raw_variance, tuple(raw_scales)
        self._columns = columns

    def _pick(self, P: Tensor) -> Tensor:
        return P if self._columns is None else P[:, list(self._columns)]

    @property
    def _right(self) -> Tensor:
        return self._pick(self.X if self.Z is None else self.Z)

    def _weights(self) -> Tensor:
        """s·v, (1, 1) or (1, d)."""
        w = positive(self.raw_variance).to(self.dtype)
        for raw in self.raw_scales:
            w = w * positive(raw).to(self.dtype).reshape(())
        return w

    def _matmat(self, X: Tensor) -> Tensor:
        return (self._pick(self.X) * self._weights()) @ (self._right.mT @ X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return (self._right * self._weights()) @ (self._pick(self.X).mT @ X)

    def tensors(self) -> tuple[Tensor, ...]:
        second = () if self.Z is None else (self.Z,)
        return (self.X, *second, self.raw_variance, *self.raw_scales)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        with torch.no_grad(), full_precision():
            X, Z = self._pick(unwrap(self.X).detach()), unwrap(self._right).detach()
            raw, *raw_scales = (unwrap(t).detach() for t in (self.raw_variance, *self.raw_scales))
            w = unwrap(self._weights()).detach()
            left, right = X.mT @ Lam, Z.mT @ Q  # (d, k)
            to_X, to_Z = Lam @ right.mT * w, Q @ left.mT * w
            points = [to_X + to_Z] if self.Z is None else [to_X, to_Z]
            grads = [_spread(G, self._columns, self.X.shape[1]) for G in points]
            each = (left * right).sum(1).double() * w.double()  # ⟨Λ, dK Q⟩ for a relative change of one variance
            each = each if raw.shape[1] > 1 else each.sum().reshape(1)
            to_raw = each / positive(raw).double().reshape(-1) * torch.sigmoid(raw).double().reshape(-1)
            grads.append(to_raw.to(raw.dtype).reshape(raw.shape))
            for s in raw_scales:
                g = each.sum() / positive(s).double() * torch.sigmoid(s).double()
                grads.append(g.to(s.dtype).reshape(s.shape))
        return tuple(g if t.requires_grad else None for g, t in zip(grads, self.tensors(), strict=True))

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        """The columns K[:, idx] (n, len(idx)); differentiable."""
        index = torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1)
        with full_precision():
            return (self._pick(self.X) * self._weights()) @ self._right[index].mT

    def diagonal(self) -> Tensor:
        """The diagonal; differentiable."""
        size = min(self.shape)
        return (self._pick(self.X)[:size] * self._weights() * self._right[:size]).sum(1)

    def to_dense(self) -> Tensor:
        with full_precision():
            return (self._pick(self.X) * self._weights()) @ self._right.mT

    def _recorded(self, X: Tensor, *tensors: Tensor) -> Tensor:
        """The product for other tensors in the order of :meth:`tensors`."""
        P, rest = tensors[0], tensors[1:]
        Z, rest = (None, rest) if self.Z is None else (rest[0], rest[1:])
        return InnerProductOperator(P, Z, rest[0], rest[1:], self._columns)._matmat(X)


def _spread(G: Tensor, columns: tuple[int, ...] | None, d: int) -> Tensor:
    if columns is None:
        return G
    index = torch.tensor(columns, dtype=torch.long, device=G.device)
    return torch.zeros(G.shape[0], d, dtype=G.dtype, device=G.device).index_add_(1, index, G)


class Polynomial(ActiveKernel):
    """(xᵀz + c)^power: all monomials up to that degree, by tiles.

    Args:
        power: degree, an integer of at least 1, fixed.
        offset: start value of c.
        active_dims: the columns of the points that the kernel sees; None for all.

    ``offset`` (1,) is softplus(``raw_offset``) + 1e-8 and may be assigned. Points far from the origin make entries
    of very different size: standardise them.
    """

    def __init__(self, power: int = 2, offset: Any = 1.0, *, active_dims: Sequence[int] | None = None) -> None:
        super().__init__(None, active_dims)
        if not isinstance(power, int) or power < 1:
            raise OperandError(f"Polynomial(power={power!r}); expected an integer of at least 1")
        self.power = power
        self.raw_offset = nn.Parameter(torch.zeros(1))
        self.offset = offset

    @property
    def offset(self) -> Tensor:
        """The offset c, (1,)."""
        return positive(self.raw_offset)

    @offset.setter
    def offset(self, value: Any) -> None:
        assign(self.raw_offset, value, "offset")

    def evaluate(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        X, Z = self._check(X, Z)
        X = X if self._columns is None else X[:, list(self._columns)]
        Z = X if Z is None else (Z if self._columns is None else Z[:, list(self._columns)])
        return (X @ Z.mT + self.offset.to(X.dtype)).pow(self.power)

    def extra_repr(self) -> str:
        return f"power={self.power}, active_dims={self._columns}"
