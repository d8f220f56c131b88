"""Exact Gaussian-process regression: likelihood and posterior, by Cholesky for few points, by products for many."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OperandError
from ..kernels.base import Kernel
from ..kernels.parameters import assign, positive
from ..methods import Auto, Lanczos
from ..numerics import check_finite
from ..operators.base import LinearOperator
from ..result import Info, OnFailure
from ..solve import CG, Direct
from ..stochastic.probes import Hutchinson
from . import likelihood
from .means import ConstantMean
from .posterior import Posterior

# Up to here Auto() factorises the dense matrix: exact, any derivative, and faster (benchmarked on two cores).
DENSE_UP_TO = 2000
NOISE_FLOOR = 1e-6

Solver = Auto | CG | Direct
LogDet = Auto | tuple[Hutchinson, Lanczos]


class ExactGP(nn.Module):
    """y = f(x) + ε with f a Gaussian process and ε independent noise: N(m(X), K(X, X) + σ² I).

    Args:
        kernel: covariance of f; the output scale lives in it (``Scale(RBF())`` or ``2.0 * RBF()``).
        mean: callable (n, d) -> (n,); None is a learned constant, ``ZeroMean()`` is zero.
        noise: start value of σ², the variance; ``gp.noise`` is softplus(``raw_noise``) + ``noise_floor``, assignable.
        solver: ``Auto()``, ``Direct()`` (Cholesky), or ``CG(...)``, which forces the iterative path and says how well
            K̂⁻¹(y − m) is to be solved.
        logdet: ``Auto()``, or ``(Hutchinson(m), Lanczos(k))``, which forces the iterative path.
        noise_floor: smallest noise variance.

    Auto() is a function of n alone: Cholesky in float64 for n ≤ 2000, and beyond ``(Hutchinson(10),
    Lanczos(rtol=1e-3))``. ``info.method`` says what ran.

    The covariance is exactly ``gp.kernel(X) + gp.noise·I``: nothing is added to it.

    Example:
        >>> import torch, ritz
        >>> X = torch.linspace(0, 1, 20).unsqueeze(1)
        >>> gp = ExactGP(ritz.kernels.RBF(lengthscale=0.2), noise=0.01)
        >>> mean, variance = gp.condition(X, torch.sin(6 * X[:, 0])).predict(X)
        >>> bool((mean - torch.sin(6 * X[:, 0])).abs().max() < 0.05)
        True
    """

    def __init__(
        self,
        kernel: Kernel,
        mean: Callable[[Tensor], Tensor] | None = None,
        noise: Any = 0.1,
        solver: Solver = Auto(),
        logdet: LogDet = Auto(),
        *,
        noise_floor: float = NOISE_FLOOR,
    ) -> None:
        super().__init__()
        if not isinstance(kernel, nn.Module):
            raise OperandError(f"kernel is a {type(kernel).__name__}; expected a ritz kernel such as Scale(RBF())")
        self.kernel = kernel
        self.mean = ConstantMean() if mean is None else mean
        self.solver, self.logdet = solver, logdet
        self.noise_floor = float(noise_floor)
        self.raw_noise = nn.Parameter(torch.zeros(()))
        self.noise = noise
        _check_methods(solver, logdet)

    @property
    def noise(self) -> Tensor:
        """The noise variance σ², a scalar."""
        return positive(self.raw_noise, self.noise_floor)

    @noise.setter
    def noise(self, value: Any) -> None:
        assign(self.raw_noise, value, "noise", self.noise_floor)

    def covariance(self, X: Tensor) -> LinearOperator:
        """K(X, X) + σ² I as an operator."""
        return self.kernel(X).shift(self.noise)

    def method(self, n: int) -> Direct | tuple[Hutchinson, Lanczos]:
        """What evaluates the likelihood of n points: a pure function of n and of the settings."""
        if isinstance(self.solver, Direct):
            return self.solver
        if isinstance(self.logdet, tuple):
            return self.logdet
        if isinstance(self.solver, Auto) and n <= DENSE_UP_TO:
            return Direct()
        return Hutchinson(10), Lanczos(rtol=1e-3)

    def log_marginal_likelihood(
        self, X: Tensor, y: Tensor, *, return_info: bool = False, on_failure: OnFailure = "warn"
    ) -> Any:
        """log p(y | X) = −½ (y − m)ᵀ K̂⁻¹ (y − m) − ½ log det K̂ − (n/2) log 2π, the sum over points.

        Args:
            X: points (n, d).
            y: targets (n,), of the same dtype.
            return_info: also return an :class:`~ritz.result.Info`. On the iterative path: ``standard_error`` of the
                value (from the log-determinant's probes), ``residual`` the error estimate of every Lanczos column (that
                of y − m first), ``depth``, ``num_matvecs``, and in ``details`` ``quadratic``, ``logdet``,
                ``quadratic_residual`` and ``rounding`` (eps·tr K̂/σ², which should be far below 1).
            on_failure: "warn", "raise" or "ignore" when an adaptive depth misses its tolerance.

        Returns:
            A scalar, deterministic: the probes are fixed by the seed of ``Hutchinson``.

        Raises:
            DomainError: a covariance that is not positive definite in floating point.
            OperandError, NonFiniteError: operands that do not fit; NaN or Inf.

        Cost: n³ operations and a few n² numbers on the dense path. Iterative: one block product of m + 1 columns per
            Lanczos step and (m + 1)·k·n numbers for the basis; the gradient is one pairing of width about 10 (m + 1).
        Gradient: in X, y, the noise, the kernel's and the mean's parameters; first order, any order on the dense path.
        Reference: docs/derivations/kernels.md; one block for both terms as in Gardner et al., GPyTorch, 2018.
        """
        X, y = self._check(X, y)
        method = self.method(X.shape[0])
        if isinstance(method, Direct):
            value, info = self._dense(X, y)
        else:
            A = self.covariance(X)
            rounding = likelihood.warn_of_rounding(A, self.noise)
            r = y - self.mean(X)
            solver = self.solver if isinstance(self.solver, CG) else None
            value, info = likelihood.iterative(A, r, method, solver, on_failure)
            info.details["rounding"] = rounding
        return (value, info) if return_info else value

    def _dense(self, X: Tensor, y: Tensor) -> tuple[Tensor, Info]:
        value, info = likelihood.dense(self.dense_covariance(X), (y - self.mean(X)).double(), X, self.noise)
        return value.to(y.dtype), info

    def dense_covariance(self, X: Tensor) -> Tensor:
        """K(X, X) + σ² I (n, n) in float64, differentiable to any order."""
        eye = torch.eye(X.shape[0], dtype=torch.float64, device=X.device)
        return self.kernel.evaluate(X.double()) + self.noise.double() * eye

    def condition(self, X: Tensor, y: Tensor) -> Posterior:
        """The posterior given observations X (n, d), y (n,).

        Hyper-parameters are copied as they are now; the posterior is differentiable in its test points only.
        """
        X, y = self._check(X, y)
        return Posterior(self, X.detach(), y.detach())

    def _check(self, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for name, t in (("X", X), ("y", y)):
            if not isinstance(t, Tensor) or not t.is_floating_point():
                what = str(t.dtype) if isinstance(t, Tensor) else type(t).__name__
                raise OperandError(f"{name} is {what}; expected a floating-point tensor")
        X = X.unsqueeze(1) if X.ndim == 1 else X
        if X.ndim != 2 or y.shape != (X.shape[0],) or X.shape[0] == 0:
            raise OperandError(f"X has shape {tuple(X.shape)} and y {tuple(y.shape)}; expected (n, d) and (n,), n >= 1")
        if (X.dtype, X.device) != (y.dtype, y.device):
            raise OperandError(f"X is {X.dtype} on {X.device} and y {y.dtype} on {y.device}; convert one of them")
        check_finite(X, "X")
        check_finite(y, "y")
        return X, y

    def extra_repr(self) -> str:
        return f"noise={float(self.noise.detach()):.4g}, solver={self.solver}, logdet={self.logdet}"


def _check_methods(solver: Any, logdet: Any) -> None:
    if not isinstance(solver, (Auto, CG, Direct)):
        raise OperandError(f"solver={solver!r}; expected Auto(), CG(...) or Direct()")
    if isinstance(logdet, Auto):
        return
    kinds = tuple(type(part) for part in logdet) if isinstance(logdet, tuple) else ()
    if kinds != (Hutchinson, Lanczos):
        raise OperandError(f"logdet={logdet!r}; expected Auto() or (Hutchinson(m), Lanczos(k))")
    if isinstance(solver, Direct):
        raise OperandError("solver=Direct() gives the log-determinant as well; logdet= must be Auto() then")
