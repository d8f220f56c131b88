"""Small systems: the matrix of the derivative itself, once a step, and its exponentials without a Krylov space.

From a few dozen unknowns downwards a Krylov space is exhausted by about as many products as the matrix has columns, and
a step asks for several of them. The gradient is the same: one pairing a step, of the cotangent of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DomainError
from ..operators import LinearOperator
from ..pairing import Cotangents, Pair, Run

SMALL = 48  # unknowns up to which Auto() forms the matrix


def matrix_of(J: LinearOperator) -> Tensor:
    """J as a tensor (n, n) with first derivatives by the pairing, from one block product."""
    n = J.shape[0]
    unit = torch.eye(n, dtype=J.dtype, device=J.device)
    with Run(J) as run:
        value = run.matmat(unit)
        if not run.wants_gradient():
            return value

    def rule(g: Tensor) -> Cotangents:
        # The cotangent is a sum of few rank-one terms, one or two for every product of the step: as many columns do.
        U, s, Vh = torch.linalg.svd(g)
        rank = int((s > torch.finfo(g.dtype).eps * s[0]).sum())
        return Cotangents([Pair(U[:, :rank] * s[:rank].to(U.dtype), Vh[:rank].mH)], [])

    return run.attach([value], rule, [unit], name="odeint")[0]


def phi_dense(M: Tensor, h: float, vectors: Sequence[Tensor | None], thetas: Tensor) -> Tensor:
    """Σ_{j≥0} θ^j φ_j(θhM) w_j for [w_0, w_1, …] at every θ, (len(θ), n): exponentials of [[hM, W], [0, shift]].

    In double precision whatever the dtype: on such matrices it costs nothing.
    """
    n, p = M.shape[0], len(vectors) - 1
    wide = torch.promote_types(M.dtype, torch.float64)
    rows = [torch.zeros(n, dtype=wide, device=M.device) if w is None else w.to(wide) for w in vectors]
    B, start = h * M.to(wide), rows[0]
    if p:
        W = torch.stack(rows[:0:-1], 1)
        size = float(torch.linalg.vector_norm(W.detach(), dim=0).max()) or 1.0
        shift = torch.diag_embed(torch.ones(p - 1, dtype=wide, device=M.device), 1)
        B = torch.cat([torch.cat([B, W / size], 1), torch.cat([B.new_zeros(p, n), shift], 1)])
        start = torch.cat([start, size * torch.eye(p, dtype=wide, device=M.device)[-1]])
    E = torch.linalg.matrix_exp(thetas.to(wide)[:, None, None] * B)
    if not bool(torch.isfinite(E.detach().sum().abs())):
        raise DomainError(
            "the exponential of the step overflows; expected a system that grows less: shorten the time, or the steps"
        )
    return (E @ start)[:, :n].to(M.dtype)
