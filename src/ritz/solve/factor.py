"""The factor of a partial Cholesky factorisation from the columns that it is made of, in one array of its size.

F = C L⁻ᴴ with L Lᴴ = S, the Hermitian part of C[pivots], so that F Fᴴ = K[:, S] K[S, S]⁻¹ K[S, :]. With Φ the lower
triangle, its diagonal halved, and Ḡ the cotangent of F,

    C̄ = Ḡ L⁻¹,  and in its rows at the pivots besides  S̄ = −herm(L⁻ᴴ Φ(Ḡᴴ F) L⁻¹).

Derivation: docs/derivations/preconditioning.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..numerics import full_precision, has_tangent, in_transform
from .root import wide

ROWS = 4096  # of the gradient made at once in double precision


def factor_of_columns(C: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    """F (n, r) and the pivots (r,), for columns C (n, r) of K at the pivots; differentiable in C to any order.

    In double precision whatever C is; where rounding exhausts K[S, S], its leading definite part is kept.

    Memory: F, which its gradient needs, and for the gradient one array like C.
    """
    with full_precision():
        S = wide(C[pivots])
        L, order = torch.linalg.cholesky_ex((S + S.mH) / 2)
        if int(order) > 0:
            return factor_of_columns(C[:, : int(order) - 1], pivots[: int(order) - 1])
        if in_transform() or has_tangent(C):
            return torch.linalg.solve_triangular(L.mH, wide(C), upper=True, left=False), pivots
        return _Factor.apply(C, pivots, L.detach())[0], pivots


class _Factor(torch.autograd.Function):
    """(F, L) from C, the pivots, and L as numbers.

    L is an output so that second derivatives, which read the first one's formula off F and L, find both on the graph.
    """

    @staticmethod
    def forward(C: Tensor, pivots: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
        F = torch.empty(C.shape, dtype=L.dtype, device=C.device).copy_(C)
        return torch.linalg.solve_triangular(L.mH, F, upper=True, left=False, out=F), L.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.dtype, ctx.pivots = inputs[0].dtype, inputs[1]
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, G: Tensor | None, G_L: Tensor | None) -> tuple[Tensor | None, None, None]:
        F, L = ctx.saved_tensors
        G = torch.zeros_like(F) if G is None else G
        with full_precision():
            inner = -_lower(G.mH @ F)
            if G_L is not None:
                inner = inner + _lower(L.mH @ G_L)
            half = torch.linalg.solve_triangular(L.mH, inner, upper=True)
            S_bar = _divided(half, L)
            S_bar = (S_bar + S_bar.mH) / 2
            if torch.is_grad_enabled():
                return _divided(G, L).index_add(0, ctx.pivots, S_bar).to(ctx.dtype), None, None
            C_bar = torch.empty(F.shape, dtype=ctx.dtype, device=F.device)
            for rows, part in zip(C_bar.split(ROWS), G.split(ROWS), strict=True):
                rows.copy_(_divided(part, L))
            C_bar[ctx.pivots] = (_divided(G[ctx.pivots], L) + S_bar).to(ctx.dtype)  # rounded once, not twice
        return C_bar, None, None


def _divided(G: Tensor, L: Tensor) -> Tensor:
    """G L⁻¹."""
    return torch.linalg.solve_triangular(L, G, upper=False, left=False)


def _lower(M: Tensor) -> Tensor:
    """Φ(M)."""
    return M.tril() - torch.diag_embed(M.diagonal()) / 2
