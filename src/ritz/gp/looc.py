"""The leave-one-out score of a Gaussian process: every observation predicted from all others, from one factor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..numerics import full_precision
from ..result import Info, Status
from ..solve import Direct
from . import likelihood


def log_pseudo_likelihood(K: Tensor, r: Tensor, y: Tensor, X: Tensor, noise: Tensor) -> tuple[Tensor, Info]:
    """Σ_i log N(y_i; μ_i, v_i) with the mean and variance that all other observations give the i-th one.

        α = K⁻¹ r,    v_i = 1/[K⁻¹]_ii,    μ_i = y_i − α_i v_i                                (equations 5.10 to 5.12)

    so that log N(y_i; μ_i, v_i) = ½ (log [K⁻¹]_ii − α_i²/[K⁻¹]_ii − log 2π).

    Args:
        K: covariance with the noise (n, n).
        r: y − m, (n,) or (n, p); y of the same shape.
        X, noise: for the message of a covariance that is not positive definite.

    Returns:
        The score, summed over the entries of y, and an Info with ``mean`` and ``variance`` of the shape of y.

    Reference: Rasmussen, Williams, Gaussian processes for machine learning, 2006, section 5.4.2.
    """
    with full_precision():
        L = likelihood.cholesky(K, X, noise)
        block = r.unsqueeze(1) if r.ndim == 1 else r
        alpha = torch.cholesky_solve(block, L)
        # [K⁻¹]_ii = ‖L⁻¹ e_i‖², a sum of squares, which rounding cannot make negative
        white = torch.linalg.solve_triangular(L, torch.eye(L.shape[0], dtype=L.dtype, device=L.device), upper=False)
        precision = white.square().sum(0).unsqueeze(1)
        value = 0.5 * (precision.log() - alpha.square() / precision - math.log(2 * math.pi)).sum()
    info = Info(Direct(), 0, K.shape[0], status=Status.CONVERGED, standard_error=torch.zeros_like(value.detach()))
    with torch.no_grad():
        info.details["mean"] = y - (alpha / precision).reshape(y.shape)
        info.details["variance"] = (1 / precision).expand(block.shape).reshape(y.shape).clone()
    return value, info
