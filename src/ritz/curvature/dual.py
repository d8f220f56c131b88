"""The Gauss–Newton matrix on the side of the data: Rᵀ J Jᵀ R, which has its nonzero eigenvalues."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite
from ..operators import LinearOperator
from .batches import Batch, to_device
from .factored import Factored
from .ggn import GGN
from .losses import CustomLoss
from .preflight import largest_side, refuse

ROWS_AT_ONCE = 64  # of the root that go back through the network together, where layers have no rows


class DualGGN(LinearOperator):
    """c Rᵀ J Jᵀ R over all outputs of the data, (M, M), for G = c Σ Jᵀ R Rᵀ J and Hessian roots R.

    G and its dual have the same nonzero eigenvalues: log det(G + δI) = log det(dual + δI) + (P − M) log δ. Vectors of a
    Krylov space are M long instead of P, the price of a product is the same.

    Args:
        G: the operator; what it keeps is shared.

    Raises:
        OperandError: a loss of one's own, whose Hessian has no root.
    """

    def __init__(self, G: GGN) -> None:
        if type(G) is not GGN or isinstance(G.loss, CustomLoss):
            raise OperandError(
                f"the dual needs a GGN of a loss whose Hessian has a root; got {type(G).__name__} with {G.loss}"
            )
        self.G = G
        with torch.no_grad():
            found = [G.network(G.network.parameters, to_device(b, G.device).x).shape for b in G.batches]
        self._shapes = found
        self._rows = [s.numel() for s in found]
        super().__init__((sum(self._rows),) * 2, G.dtype, G.device, psd=True)

    def to_dense(self) -> Tensor:
        each = self.shape[0] // max(1, sum(b.size for b in self.G.batches))
        most = largest_side(self.dtype) // max(1, each)
        instead = f"at most {most} examples fit, of {each} outputs each; products with it need no matrix"
        refuse(self.shape, self.dtype, "DualGGN.to_dense()", instead)
        return super().to_dense()

    def _matmat(self, X: Tensor) -> Tensor:
        self.G.network.check_unchanged()
        if torch.is_grad_enabled() and X.requires_grad:
            return _Symmetric.apply(self, X)
        return self._product(X)

    def _product(self, X: Tensor) -> Tensor:
        G, k = self.G, X.shape[1]
        with torch.no_grad():
            G._columns += k
            V: Tensor | None = None
            for i, part in enumerate(X.split(self._rows)):
                own = self._adjoint(*G._known(i), part.reshape(*self._shapes[i], k))
                V = own if V is None else V + own
            assert V is not None
            out = [self._forward(*G._known(i), V).reshape(-1, k) for i in range(len(G.batches))]
        found = G.scale * torch.cat(out)
        check_finite(found, "a product with DualGGN")
        return found

    def root_rows(self) -> Tensor:
        """√c Rᵀ J itself, (M, P): the dual is this matrix times its transpose, G its transpose times it."""
        return torch.cat(list(self.root_pieces()))

    def root_pieces(self) -> Iterator[Tensor]:
        """Its rows, those of a batch at a time, or fewer where layers have none."""
        G = self.G
        G.network.check_unchanged()
        with torch.no_grad():
            G._columns += self.shape[0]
            for i, shape in enumerate(self._shapes):
                at, batch = G._known(i)
                if isinstance(at, Factored):
                    yield G.scale**0.5 * at.dense().reshape(-1, G.shape[0])
                    continue
                for first in range(0, shape.numel(), ROWS_AT_ONCE):
                    count = min(ROWS_AT_ONCE, shape.numel() - first)
                    unit = torch.zeros(shape.numel(), count, dtype=self.dtype, device=self.device)
                    unit[first : first + count] = torch.eye(count, dtype=self.dtype, device=self.device)
                    yield G.scale**0.5 * self._adjoint(at, batch, unit.reshape(*shape, count))

    def _adjoint(self, at: Any, batch: Batch, S: Tensor) -> Tensor:
        """Jᵀ R S for S (*shape of f, k), (k, P)."""
        if isinstance(at, Factored):
            return at.adjoint(S.reshape(S.shape[0], at.q, S.shape[-1]))
        return at.vjp(self.G.loss.hessian(at.f, batch.y).root(S.movedim(-1, 0)))

    def _forward(self, at: Any, batch: Batch, V: Tensor) -> Tensor:
        """Rᵀ J V for V (k, P), (*shape of f, k)."""
        if isinstance(at, Factored):
            return at.rows(V)
        return self.G.loss.hessian(at.f, batch.y).root_adjoint(at.jvp(V)).movedim(0, -1)


class _Symmetric(torch.autograd.Function):
    """A product whose derivative in its operand is the same product."""

    @staticmethod
    def forward(ctx: Any, A: DualGGN, X: Tensor) -> Tensor:
        ctx.A = A
        return A._product(X)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[None, Tensor]:
        return None, ctx.A @ G
