"""What a stage on all points can know before its first step: a noise to start from, a preconditioner to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..kernels import AdditiveKernel, ProductKernel, Scale
from ..kernels.base import Kernel
from ..methods import Auto
from ..result import Info
from ..solve import Landmarks
from . import likelihood

# The depth of the run grows as one over the root of the smallest noise: three times less noise costs 1.7 times more.
LOWEST, HIGHEST, COUNT = 1 / 3, 10.0, 24
LARGEST_FACTOR = 10.0  # of the output scale


@dataclass(frozen=True)
class NoiseStart:
    """What :func:`start_noise` found.

    Attributes:
        before, after: the noise variance.
        scale: factor that the output scale was multiplied with.
        gain: how much log p(y) + log prior rose by it, according to the curve.
    """

    before: float
    after: float
    scale: float
    gain: float


@torch.no_grad()
def start_noise(gp: Any, X: Tensor, y: Tensor) -> NoiseStart:
    """Set noise and output scale to the best on a curve from one Krylov run, length-scales and mean as they are.

    One run gives L(ν) = log det(K + νI) and q(ν) = rᵀ(K + νI)⁻¹r for all ν (Krylov spaces do not see shifts), and
    multiplying a covariance by c needs no run at all: with K̂ = c (K + νI),

        log p = −q(ν)/(2c) − ½ L(ν) − (n/2) log(2πc),        largest at c = q(ν)/n.

    Tried are 25 values of ν from a third to ten times the present noise, each with c = 1 and with the best c (within
    1/10 … 10, and only where the kernel has a learned output scale); priors are added. The noise becomes cν, the output
    scale c times what it was.

    Raises:
        OperandError: a process whose noise is not one learned number.
    """
    check_noise(gp)
    X, y = gp._check(X, y)
    scales = _scales(gp.kernel) or []
    r, before = gp.residual(X, y), float(gp.noise)
    outputs, n = r.numel() // r.shape[0], r.numel()
    up = torch.linspace(math.log(LOWEST), math.log(HIGHEST), COUNT, dtype=torch.float64).exp() * before
    noises = torch.cat([torch.tensor([before], dtype=torch.float64), up[up > 2 * gp.noise_floor]]).to(X.device)
    K = gp.kernel(X, backend=gp.backend)
    logdet, quadratic = likelihood.noise_curve(K, r, noises, gp.method(r.shape[0]))
    old = [s.outputscale.clone() for s in scales]

    def put(c: float, nu: float) -> None:
        gp.noise = max(c * nu, gp.noise_floor * (1 + 1e-6))
        for s, value in zip(scales, old, strict=True):
            s.outputscale = c * value

    def value(c: float, q: float, L: float) -> float:
        return -0.5 * (q / c + outputs * L + n * math.log(2 * math.pi * c)) + float(gp.log_prior())

    tried = []
    for nu, L, q in zip(noises.tolist(), logdet.tolist(), quadratic.tolist(), strict=True):
        best = min(max(q / n, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        for c in (1.0, best) if scales else (1.0,):
            put(c, nu)
            tried.append((value(c, q, L), c, nu))
    sound = [t for t in tried if math.isfinite(t[0])]
    top, c, nu = max(sound, default=(tried[0][0], 1.0, before))
    put(c, nu)
    return NoiseStart(before, float(gp.noise), c, top - tried[0][0])


def check_noise(gp: Any) -> None:
    """Refuse a process for which :func:`start_noise` has nothing to set."""
    raw = getattr(gp, "raw_noise", None)
    if raw is None or raw.ndim != 0 or not raw.requires_grad:
        raise OperandError(
            "start_noise=True needs one learned noise variance; this process has another kind, leave start_noise out"
        )


def kept_preconditioner(asked: Any, info: Info | None) -> Any:
    """The setting that keeps what one likelihood chose: its pivots, or none.

    ``Auto()`` and pivoted Cholesky factorisations choose anew at every evaluation, so that the objective jumps where
    the choice changes; with fixed columns it is smooth. What chooses nothing stays as it was given.
    """
    details = {} if info is None else info.details
    if not hasattr(asked, "build") and not isinstance(asked, Auto) or "preconditioner" not in details:
        return asked
    if details["preconditioner"] is None:
        return None
    pivots = details.get("pivots")
    return Landmarks(tuple(pivots.tolist())) if isinstance(pivots, Tensor) else asked


def _scales(kernel: Kernel) -> list[Scale] | None:
    """Learned output scales that multiply the whole kernel when each is multiplied; None where there are none."""
    if isinstance(kernel, Scale):
        return [kernel] if kernel.raw_outputscale.requires_grad else _scales(kernel.base_kernel)
    if isinstance(kernel, AdditiveKernel):
        found = [_scales(part) for part in kernel.parts()]
        return None if any(f is None for f in found) else [s for f in found for s in f or []]
    if isinstance(kernel, ProductKernel):
        return next((f for part in kernel.parts() if (f := _scales(part)) is not None), None)
    return None
