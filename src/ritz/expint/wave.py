"""u'' = −A u for a positive semidefinite A: cos(t√A) and sin(t√A)/√A by Lanczos on half the vector length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions.exponential import BACKWARD, LARGE
from ..functions.inputs import one_time
from ..functions.space import as_hermitian, choose
from ..functions.table import table_multiply
from ..functions.timed import Wave
from ..methods import Auto, Frechet, KrylovMethod, Lanczos
from ..numerics import as_block
from ..operators import LinearOperator, aslinearoperator
from ..result import Info, Joined, OnFailure, Status, report

MOST = 2**14  # pieces of the time, before it is given up that a space might serve for one


def wave_multiply(
    A: Any,
    u0: Tensor,
    v0: Tensor | None = None,
    t: float | Tensor = 1.0,
    *,
    method: KrylovMethod = Auto(),
    gradient: Frechet = Frechet(),
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """Solve u'' = −A u from u(0) = u0, u'(0) = v0 up to the time t, exactly up to the Krylov error.

    u(t) = cos(t√A) u0 + sin(t√A)/√A v0 and u'(t) = −√A sin(t√A) u0 + cos(t√A) v0: one Lanczos run on vectors half as
    long as those of the first-order system, without its long orthogonalisation.

    Args:
        A: Hermitian positive semidefinite operator (n, n), such as ``WaveOperator`` or a negative Laplacian.
        u0, v0: displacement and velocity, (n,) or (n, m); v0 None is zero, and costs nothing then.
        t: real number or tensor of no dimension, of either sign.
        method: ``Lanczos(...)`` or ``Auto()``, which is ``Lanczos()`` with adaptive depth, from n = 1000 on the plain
            three-term recurrence. Where that ends at ``max_matvecs``, the time is halved until a space serves, and
            every piece goes on from the state before.
        gradient: ``Frechet()``; the other rules are not there for this function.

    Returns:
        (u(t), u'(t)) of u0's shape; with ``return_info`` ((u, u'), info), ``info.residual`` an estimate of the relative
        error, the sum over pieces; ``info.details["substeps"]`` their number.

    Raises:
        DomainError: a negative Ritz value beyond rounding.
        OperandError, NonFiniteError: wrong shape, dtype, device; NaN or Inf.

    Cost: about t√‖A‖ + 10 block products of the width of (u0, v0); backward as many with the cotangents. Memory: as
        many blocks, until backward. In pieces, the products of the spaces that were too short come on top.
    Gradient: first order in A's tensors, u0, v0 and t.
    """
    A = aslinearoperator(A)
    if A.hermitian is False:
        raise OperandError(
            f"wave_multiply came with {A!r}; expected a Hermitian positive semidefinite operator (a wave equation with "
            "variable speed is similar to one: ritz.expint.WaveOperator)"
        )
    if not isinstance(gradient, Frechet):
        raise OperandError(f"wave_multiply has gradient=Frechet() only; got {gradient!r}")
    chosen = choose(A, Lanczos(reorthogonalize=A.shape[0] < LARGE) if isinstance(method, Auto) else method)
    if not isinstance(chosen, Lanczos):
        raise OperandError(f"method={method!r}; wave_multiply takes Lanczos(...) or Auto()")
    A = as_hermitian(A, chosen)
    U = as_block(u0, A.shape[0], "u0", dtype=A.dtype, device=A.device)
    time = one_time(t, A)
    if time.is_complex():
        raise OperandError("t is complex; expected a real time")
    W = None
    if v0 is not None:
        W = as_block(v0, A.shape[0], "v0", dtype=A.dtype, device=A.device)
        if v0.shape != u0.shape:
            raise OperandError(f"v0 has shape {tuple(v0.shape)} and u0 {tuple(u0.shape)}; expected the same shape")
    (u, v), info = _in_pieces(A, U, W, time, chosen, gradient, on_failure)
    pair = (u.squeeze(1), v.squeeze(1)) if u0.ndim == 1 else (u, v)
    return (pair, info) if return_info else pair


Found = tuple[list[Tensor], Info]


def _in_pieces(
    A: LinearOperator, U: Tensor, W: Tensor | None, t: Tensor, method: Lanczos, gradient: Frechet, on_failure: OnFailure
) -> Found:
    """One space for the whole time, or one each for as many equal pieces of it as the depth asks for."""
    whole = found = _one(A, U, W, t, method, gradient, on_failure)
    pieces, lost = 1, 0
    while found[1].status is Status.MAX_STEPS and pieces < MOST:
        pieces, lost = 2 * pieces, lost + found[1].num_matvecs
        share = replace(method, rtol=max(method.tolerance(U.dtype) / pieces, 1e-15))
        back = gradient
        if gradient.method is None:  # a cotangent's space may be deeper than the one that chose the pieces
            back = replace(gradient, method=replace(share, max_matvecs=int(BACKWARD * method.max_matvecs) + 8))
        found = _one(A, U, W, t / pieces, share, back, on_failure)
    if pieces == 1 or not found[1].status.success:
        whole[1].num_matvecs += lost
        report(whole[1], what="the wave", target=method.tolerance(U.dtype), on_failure=on_failure)
        return whole
    values, infos = found[0], [found[1]]
    while len(infos) < pieces:
        values, info = _one(A, values[0], values[1], t / pieces, share, back, on_failure)
        infos.append(info)
    joined = Joined(infos)
    joined.num_matvecs += lost
    report(joined, what="the wave", target=method.tolerance(U.dtype), on_failure=on_failure)
    return values, joined


def _one(
    A: LinearOperator, U: Tensor, W: Tensor | None, t: Tensor, method: Lanczos, gradient: Frechet, on_failure: OnFailure
) -> Found:
    """[u(t), u'(t)] from one space, whose failure the caller reports."""
    s = float(t.detach())
    cos = Wave(0, s)
    table = [[cos, Wave(1, s)], [Wave(2, s), cos]]
    V = U.unsqueeze(1) if W is None else torch.stack([U, W], 1)
    return table_multiply(
        table if W is not None else [row[:1] for row in table],
        A,
        V,
        t,
        method=method,
        gradient=gradient,
        on_failure=on_failure,
        what="the wave",
        quiet=True,
    )
