"""u'' = −A u for a positive semidefinite A: cos(t√A) and sin(t√A)/√A by Lanczos on half the vector length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..functions.inputs import one_time
from ..functions.space import as_hermitian, choose
from ..functions.table import table_multiply
from ..functions.timed import Wave
from ..methods import Auto, Frechet, KrylovMethod, Lanczos
from ..numerics import as_block
from ..operators import aslinearoperator
from ..result import OnFailure


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
        method: ``Lanczos(...)`` or ``Auto()``, which is ``Lanczos()`` with adaptive depth.
        gradient: ``Frechet()``; the other rules are not there for this function.

    Returns:
        (u(t), u'(t)) of u0's shape; with ``return_info`` ((u, u'), info), ``info.residual`` an estimate of the relative
        error.

    Raises:
        DomainError: a negative Ritz value beyond rounding.
        OperandError, NonFiniteError: wrong shape, dtype, device; NaN or Inf.

    Cost: about t√‖A‖ + 10 block products of the width of (u0, v0); backward as many with the cotangents. Splitting t
        into steps saves memory: call it again from (u, u').
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
    chosen = choose(A, Lanczos() if isinstance(method, Auto) else method)
    if not isinstance(chosen, Lanczos):
        raise OperandError(f"method={method!r}; wave_multiply takes Lanczos(...) or Auto()")
    A = as_hermitian(A, chosen)
    U = as_block(u0, A.shape[0], "u0", dtype=A.dtype, device=A.device)
    time = one_time(t, A)
    if time.is_complex():
        raise OperandError("t is complex; expected a real time")
    s = float(time.detach())
    cos = Wave(0, s)
    table = [[cos, Wave(1, s)], [Wave(2, s), cos]]
    if v0 is None:
        V = U.unsqueeze(1)
        table = [row[:1] for row in table]
    else:
        W = as_block(v0, A.shape[0], "v0", dtype=A.dtype, device=A.device)
        if v0.shape != u0.shape:
            raise OperandError(f"v0 has shape {tuple(v0.shape)} and u0 {tuple(u0.shape)}; expected the same shape")
        V = torch.stack([U, W], 1)
    (u, v), info = table_multiply(
        table, A, V, time, method=chosen, gradient=gradient, on_failure=on_failure, what="the wave"
    )
    pair = (u.squeeze(1), v.squeeze(1)) if u0.ndim == 1 else (u, v)
    return (pair, info) if return_info else pair
