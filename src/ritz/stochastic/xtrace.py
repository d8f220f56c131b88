"""XTrace: every probe builds the range for the others and sees what their range leaves over."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..methods import GradientRule, KrylovMethod
from ..operators.base import LinearOperator
from ..result import Info, OnFailure
from .probes import Hutchinson, gaussian, mean_and_error
from .samples import function_of_probes, is_real, joined
from .xdiag import basis_without_each


@dataclass(frozen=True)
class XTrace:
    """m columns through f(A) in all: p = m/2 probes, and the p vectors of the range that they find.

    With Y = f(A) Ω and Q_i an orthonormal basis of Y without its i-th column, the estimate is the mean over i of

        tr Q_iᴴ f(A) Q_i + (n − p + 1) μᴴ f(A) μ / μᴴμ,   μ = (I − Q_i Q_iᴴ) ω_i,

    each an unbiased estimate, since ω_i is independent of Q_i. The error falls as fast as the eigenvalues of f(A) do,
    exponentially where they do so; where they hardly fall, plain probes of :class:`~ritz.Hutchinson` are as good.

    Args:
        m: columns in all, even, at least 4.
        seed: fixes the probes.

    Gradient: every Q_i is held fixed, which keeps it unbiased; costs a backward pass of f(A) times a block of m.
    Reference: Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace estimation" (2024).
    """

    m: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.m, int) or self.m < 4 or self.m % 2:
            raise OperandError(f"XTrace(m={self.m!r}); expected an even number of columns, at least four")

    def resolve(self, n: int) -> XTrace | Hutchinson:
        """The same on a matrix of size n; where the range would be all of it, unit vectors do it exactly."""
        return Hutchinson(n) if self.m // 2 >= n else self


def xtrace(
    A: LinearOperator,
    f: Any,
    estimator: XTrace,
    *,
    method: KrylovMethod,
    gradient: GradientRule,
    generator: torch.Generator | None,
    on_failure: OnFailure,
) -> tuple[Tensor, Info]:
    """Value () and report."""
    n, p = A.shape[0], estimator.m // 2
    Omega = gaussian(n, p, A.dtype, A.device, estimator.seed, generator)
    options: dict[str, Any] = {"method": method, "gradient": gradient, "on_failure": on_failure}
    Y, first = function_of_probes(A, f, Omega, **options)
    with torch.no_grad():
        Q, _, S = basis_without_each(Y if A.dtype.is_complex else Y.real)
        inside = Q.mH @ Omega
        T = inside - S * (S.conj() * inside).sum(0)  # Q_i Q_iᴴ ω_i = Q t_i
        mu = Omega - Q @ T
        weights = (n - p + 1) / mu.abs().square().sum(0)
    Z, second = function_of_probes(A, f, Q, **options)
    Q, S, T, mu = (x.to(Z.dtype) for x in (Q, S, T, mu))
    H = Q.mH @ Z
    known = H.diagonal().sum() - (S.conj() * (H @ S)).sum(0)
    samples = known + weights * (mu.conj() * (Y - Z @ T)).sum(0)
    if samples.is_complex() and A.hermitian and is_real(f):
        samples = samples.real
    value, error = mean_and_error(samples, False)
    return value, replace(joined(first, second), standard_error=error.abs())
