"""Exact Gaussian-process regression: likelihood and posterior, by Cholesky for few points, by products for many."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OperandError
from ..kernels.backends import Backend, Stored, for_iteration
from ..kernels.base import Kernel
from ..kernels.parameters import assign, positive
from ..kernels.stored import StoredOperator
from ..methods import Auto, Lanczos
from ..numerics import check_finite
from ..operators import Diagonal, LinearOperator
from ..result import Info, OnFailure
from ..solve import CG, Direct
from ..stochastic.probes import Hutchinson
from . import likelihood, looc, means
from .means import ConstantMean
from .noise import Noise
from .posterior import Posterior
from .priors import checked_priors, log_density

# Up to here Auto() factorises the dense matrix: exact, any derivative, and faster (benchmarked on two cores).
DENSE_UP_TO = 2000
NOISE_FLOOR = 1e-6

Solver = Auto | CG | Direct
LogDet = Auto | tuple[Hutchinson, Lanczos]


class ExactGP(nn.Module):
    """y = f(x) + ε with f a Gaussian process and ε independent noise: N(m(X), K(X, X) + σ² I).

    Args:
        kernel: covariance of f; the output scale lives in it (``Scale(RBF())`` or ``2.0 * RBF()``).
        mean: callable (n, d) -> (n,), or (n, p) for p outputs; None is a learned constant, ``ZeroMean()`` is zero.
        noise: a number, the start value of σ² which is learned: ``gp.noise`` is softplus(``raw_noise``) +
            ``noise_floor``, assignable. Or :class:`~ritz.gp.FixedNoise`, :class:`~ritz.gp.HeteroscedasticNoise`.
        solver: ``Auto()``, ``Direct()`` (Cholesky), or ``CG(...)``, which forces the iterative path and says how well
            K̂⁻¹(y − m) is to be solved.
        logdet: ``Auto()``, or ``(Hutchinson(m), Lanczos(k))``, which forces the iterative path.
        preconditioner: of the iterative path: None; a value such as ``RandomlyPivotedCholesky(100)`` that is built
            anew for every covariance; a built one; or ``Auto()``, which builds ``RandomlyPivotedCholesky()`` and keeps
            it unless the log-determinant's standard error is clearly larger with it.
        backend: how products with the kernel matrix are computed, as in ``kernel(X, backend=...)``; ``Auto()`` is
            what :func:`ritz.kernels.for_iteration` says: the stored matrix up to 1 GiB (n = 16 384 in float32, 11 585
            in float64; on a CPU half of it is kept), and tiles beyond.
        priors: densities of hyper-parameters by attribute path, such as ``{"kernel.outputscale": LogNormal(0.0, 1.0),
            "noise": ...}``: torch.distributions objects, or others with ``log_prob(tensor)``, evaluated at the positive
            values (not at the raw ones), summed over their entries. :meth:`log_prior` is their sum; it is what
            :func:`~ritz.gp.fit` adds to the likelihood, which is free of it. Settings, not part of ``state_dict()``.
        noise_floor: smallest learned noise variance.

    Auto() is a function of n alone: Cholesky in float64 for n ≤ 2000, and beyond ``(Hutchinson(10),
    Lanczos(rtol=1e-3))``. ``info.method`` says what ran, ``info.details`` which ``backend`` and ``preconditioner``.

    The covariance is exactly ``gp.kernel(X) + gp.noise·I``, or ``+ diag(noise)``: nothing is added to it.

    Targets y (n, p) are p independent outputs with one kernel and one noise: they share the factor, or every product
    and the log-determinant. Outputs that depend on each other: :class:`~ritz.gp.MultiOutputGP`.

    Raises:
        OperandError: settings of a kind not named here; a prior whose path or shape does not fit.

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
        preconditioner: Any = Auto(),
        backend: Backend = Auto(),
        priors: Mapping[str, Any] | None = None,
        noise_floor: float = NOISE_FLOOR,
    ) -> None:
        super().__init__()
        if not isinstance(kernel, nn.Module):
            raise OperandError(f"kernel is a {type(kernel).__name__}; expected a ritz kernel such as Scale(RBF())")
        self.kernel = kernel
        self.mean = ConstantMean() if mean is None else mean
        self.solver, self.logdet = solver, logdet
        self.preconditioner, self.backend = preconditioner, backend
        self.noise_floor = float(noise_floor)
        self.noise_model = noise if isinstance(noise, Noise) else None
        if self.noise_model is None:
            self.raw_noise = nn.Parameter(torch.zeros(()))
            self.noise = noise
        else:
            self.register_parameter("raw_noise", None)
        _check_methods(solver, logdet, preconditioner)
        self.priors = checked_priors(self, priors)

    # -- noise ----------------------------------------------------------------------------------------------------

    @property
    def noise(self) -> Tensor:
        """The noise variance σ², a scalar.

        Raises:
            OperandError: where it differs from point to point; ``noise_at(X)`` is then what to ask for.
        """
        if self.noise_model is None:
            return positive(self.raw_noise, self.noise_floor)
        value = getattr(self.noise_model, "value", None)
        if isinstance(value, Tensor) and value.ndim == 0:
            return value
        raise OperandError(f"{self.noise_model} has no single variance; ask for noise_at(X), or observed_noise(X)")

    @noise.setter
    def noise(self, value: Any) -> None:
        if self.noise_model is not None:
            raise OperandError(f"the noise is {self.noise_model}, which is not assigned to; make another process")
        assign(self.raw_noise, value, "noise", self.noise_floor)

    def observed_noise(self, X: Tensor) -> Tensor:
        """Noise variances of the observations at X (n, d): a scalar or (n,)."""
        return self.noise if self.noise_model is None else self.noise_model(X)

    def noise_at(self, X: Tensor) -> Tensor:
        """Noise variances of new observations at X (n*, d): a scalar or (n*,).

        Raises:
            OperandError: ``FixedNoise`` with a variance for each observation and none for new ones.
        """
        return self.noise if self.noise_model is None else self.noise_model.new(X)

    def rows(self, index: Tensor) -> ExactGP:
        """The process of the observations ``index`` (m,) alone, with the same parameters (not copies).

        It differs from ``self`` only where the noise is known for every observation.
        """
        if self.noise_model is None or (chosen := self.noise_model.rows(index)) is self.noise_model:
            return self
        other = copy.copy(self)
        other._modules = {**self._modules, "noise_model": chosen}
        return other

    # -- covariance -----------------------------------------------------------------------------------------------

    def covariance(self, X: Tensor) -> LinearOperator:
        """K(X, X) plus the noise on its diagonal, as an operator."""
        K = self._kernel_matrix(X)
        noise = self.observed_noise(X)
        return K.shift(noise) if noise.ndim == 0 else K + Diagonal(noise.to(K.dtype))

    def _kernel_matrix(self, X: Tensor) -> LinearOperator:
        """K(X, X) as an operator to be multiplied by tens of times."""
        n, backend = X.shape[0], self.backend
        return self.kernel(X, backend=for_iteration(n, n, X.dtype) if isinstance(backend, Auto) else backend)

    def dense_covariance(self, X: Tensor) -> Tensor:
        """K(X, X) plus the noise on its diagonal (n, n) in float64, differentiable to any order."""
        noise = self.observed_noise(X).double()
        return self.kernel.evaluate(X.double()) + torch.diag_embed(noise.expand(X.shape[0]))

    def method(self, n: int) -> Direct | tuple[Hutchinson, Lanczos]:
        """What evaluates the likelihood of a covariance of size n: a pure function of n and of the settings."""
        if isinstance(self.solver, Direct):
            return self.solver
        if isinstance(self.logdet, tuple):
            return self.logdet
        if isinstance(self.solver, Auto) and n <= DENSE_UP_TO:
            return Direct()
        return Hutchinson(10), Lanczos(rtol=1e-3)

    # -- objectives -----------------------------------------------------------------------------------------------

    def log_marginal_likelihood(
        self, X: Tensor, y: Tensor, *, return_info: bool = False, on_failure: OnFailure = "warn"
    ) -> Any:
        """log p(y | X) = −½ (y − m)ᵀ K̂⁻¹ (y − m) − ½ log det K̂ − (n/2) log 2π, the sum over points and outputs.

        Args:
            X: points (n, d).
            y: targets (n,), or (n, p) for p independent outputs, of the same dtype.
            return_info: also return an :class:`~ritz.result.Info`. On the iterative path: ``standard_error`` of the
                value (from the log-determinant's probes), ``residual`` of every column of the block (the true one of
                K̂⁻¹(y − m) first), ``depth``, ``num_matvecs``, and in ``details`` ``quadratic``, ``logdet``,
                ``quadratic_residual``, ``preconditioner`` with the ``standard_errors`` that it was chosen by,
                ``backend``, and ``rounding``, which should be far below 1. For y (n, p) ``outputs`` has the p terms.
            on_failure: "warn", "raise" or "ignore" when an adaptive depth misses its tolerance; "ignore" also silences
                the warning of rounding, which "raise" leaves a warning.

        Returns:
            A scalar, deterministic: the probes are fixed by the seed of ``Hutchinson``. Priors are not in it.

        Raises:
            DomainError: a covariance that is not positive definite in floating point.
            OperandError, NonFiniteError: operands that do not fit, or memory that ``Direct(max_bytes=...)`` does not
                allow; NaN or Inf.

        Cost: n³ operations and a few n² numbers on the dense path. Iterative: one block product of m + p columns per
            Lanczos step and (m + p)·k·n numbers for the basis; the gradient is one pairing of width about 10 (m + p).
            Beside the stored matrix a preconditioner of rank r takes 2 n r numbers in double precision, 4 in backward.
        Gradient: in X, y, the parameters of noise, kernel and mean; first order, any order on the dense path.
        Reference: docs/derivations/kernels.md; one block for both terms as in Gardner et al., GPyTorch, 2018.
        """
        X, y = self._check(X, y)
        r = self.residual(X, y)
        method = self.method(X.shape[0])
        if isinstance(method, Direct):
            value, info = self._dense(X, y)
        else:
            A = self.covariance(X)
            solver = self.solver if isinstance(self.solver, CG) else None
            value, info = likelihood.iterative(A, r, method, solver, on_failure, preconditioner=self.preconditioner)
            P = info.details.get("preconditioner")
            noise = self._smallest_noise(X)
            rounding = likelihood.warn_of_rounding(A, noise, preconditioned=P is not None, on_failure=on_failure)
            info.details.update(rounding=rounding, backend=_backend_of(A))
        return (value, info) if return_info else value

    def residual(self, X: Tensor, y: Tensor) -> Tensor:
        """y − m(X), of the shape of y."""
        return y - means.evaluate(self.mean, X, None if y.ndim == 1 else y.shape[1])

    def _dense(self, X: Tensor, y: Tensor) -> tuple[Tensor, Info]:
        """The likelihood by Cholesky in float64, whatever the size."""
        r = self.residual(X, y).double()
        likelihood.check_memory(self.solver, r.shape[0])
        value, info = likelihood.dense(self.dense_covariance(X), r, self._points(X), self._smallest_noise(X))
        return value.to(y.dtype), info

    def _points(self, X: Tensor) -> Tensor:
        """One row for each row of the covariance; only for saying which are equal."""
        return X

    def _latent(self, K: LinearOperator) -> LinearOperator:
        """The covariance of f, from the kernel's K(X, X)."""
        return K

    def _smallest_noise(self, X: Tensor) -> Tensor:
        return self.observed_noise(X).detach().min()

    def leave_one_out(self, X: Tensor, y: Tensor, *, return_info: bool = False) -> Any:
        """Σ_i log p(y_i | all others): the log predictive density of every observation left out, in closed form.

        Less sensitive to a wrong model than the marginal likelihood, and no log-determinant.

        Args:
            X, y: as in :meth:`log_marginal_likelihood`; for p outputs, the sum over all of them.
            return_info: also return an :class:`~ritz.result.Info`, with ``mean`` and ``variance`` of each observation
                given the others in ``details``, of the shape of y.

        Returns:
            A scalar, exact, by Cholesky in float64.

        Raises:
            OperandError: more than 2000 points without ``solver=Direct()``, which lifts the limit: every entry of the
                diagonal of K̂⁻¹ is needed, and the score is not linear in them, so that an estimate would be biased.
            DomainError: a covariance that is not positive definite in floating point.

        Cost: as the marginal likelihood's dense path, and the inverse from the factor.
        Gradient: as the marginal likelihood's; any order.
        Reference: Rasmussen, Williams, Gaussian processes for machine learning, 2006, equations 5.10 to 5.12;
            Sundararajan, Keerthi, 2001.
        """
        X, y = self._check(X, y)
        r = self.residual(X, y).double()
        if r.shape[0] > DENSE_UP_TO and not isinstance(self.solver, Direct):
            raise OperandError(
                f"leave-one-out of a covariance of size {r.shape[0]} needs the whole diagonal of its inverse, by "
                f"Cholesky, which solver=Auto() does up to {DENSE_UP_TO}: use fewer points, or solver=Direct()"
            )
        likelihood.check_memory(self.solver, r.shape[0])
        points, noise = self._points(X), self._smallest_noise(X)
        value, info = looc.log_pseudo_likelihood(self.dense_covariance(X), r, y.double(), points, noise)
        return (value.to(y.dtype), info) if return_info else value.to(y.dtype)

    def log_prior(self) -> Tensor:
        """log p(hyper-parameters), the sum over ``priors``: a scalar in float64, 0 without any.

        It is −inf where a value is outside of what its prior allows. Gradient: any order.
        """
        return log_density(self, self.priors)

    def noise_curve(self, X: Tensor, y: Tensor, noises: Tensor) -> Tensor:
        """The log marginal likelihood (s,) for every noise variance in ``noises`` (s,), the kernel and mean as is.

        One run for the whole curve: Krylov spaces do not see a multiple of the identity. Meant for finding a noise to
        start from; the process' own noise plays no part.

        Cost: one eigendecomposition of K(X, X) for n ≤ 2000; beyond, or where the iterative path is forced, one
            Lanczos run to the depth that the smallest noise needs.
        Gradient: in X, y, noises, the parameters of kernel and mean; first order.

        Raises:
            OperandError: noises that are not a tensor (s,) of positive numbers.
        """
        X, y = self._check(X, y)
        noises = torch.as_tensor(noises, dtype=torch.float64, device=X.device)
        if noises.ndim != 1 or noises.numel() == 0 or not bool((noises > 0).all()):
            raise OperandError(f"noises is {noises.tolist()}; expected a tensor (s,) of positive variances, s >= 1")
        check_finite(noises, "noises")
        r, method = self.residual(X, y), self.method(X.shape[0])
        likelihood.check_memory(method, X.shape[0])
        logdet, quadratic = likelihood.noise_curve(self._kernel_matrix(X), r, noises, method)
        outputs = 1 if r.ndim == 1 else r.shape[1]
        value = quadratic.double() + outputs * (logdet.double() + r.shape[0] * math.log(2 * math.pi))
        return (-0.5 * value).to(y.dtype)

    # -- posterior ------------------------------------------------------------------------------------------------

    def condition(self, X: Tensor, y: Tensor) -> Any:
        """The posterior given observations X (n, d), y (n,) or (n, p).

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
        if X.ndim != 2 or X.shape[0] == 0 or y.ndim not in (1, 2) or y.shape[0] != X.shape[0] or y.numel() == 0:
            raise OperandError(
                f"X has shape {tuple(X.shape)} and y {tuple(y.shape)}; expected (n, d) and (n,), or (n, p) for p "
                "outputs, n >= 1"
            )
        if (X.dtype, X.device) != (y.dtype, y.device):
            raise OperandError(f"X is {X.dtype} on {X.device} and y {y.dtype} on {y.device}; convert one of them")
        check_finite(X, "X")
        check_finite(y, "y")
        return X, y

    def extra_repr(self) -> str:
        settings = {name: getattr(self, name) for name in ("solver", "logdet", "preconditioner", "backend")}
        parts = [f"{name}={value}" for name, value in settings.items() if value != Auto()]
        if self.noise_model is None:
            parts.insert(0, f"noise={_short(self.noise.detach())}")
        if self.priors:
            parts.append(f"priors of {', '.join(self.priors)}")
        return ", ".join(parts)


def _short(value: Tensor) -> str:
    return f"{float(value):.4g}" if value.ndim == 0 else "(" + ", ".join(f"{v:.4g}" for v in value.tolist()) + ")"


def _backend_of(A: LinearOperator) -> Any:
    """What makes the products of the kernel's part of a covariance; the first where there are several."""
    if isinstance(A, StoredOperator):
        return Stored(_backend_of(A.operator) or Auto())
    backend = getattr(A, "backend", None)
    if backend is not None:
        return backend
    return next((b for b in map(_backend_of, A.children) if b is not None), None)


def _check_methods(solver: Any, logdet: Any, preconditioner: Any) -> None:
    if not isinstance(solver, (Auto, CG, Direct)):
        raise OperandError(f"solver={solver!r}; expected Auto(), CG(...) or Direct()")
    ready = preconditioner is None or isinstance(preconditioner, Auto)
    if not ready and not hasattr(preconditioner, "build") and not hasattr(preconditioner, "solve"):
        raise OperandError(
            f"preconditioner={preconditioner!r}; expected Auto(), None, a value such as RandomlyPivotedCholesky(100), "
            "or what its build(A) gave"
        )
    if isinstance(logdet, Auto):
        return
    kinds = tuple(type(part) for part in logdet) if isinstance(logdet, tuple) else ()
    if kinds != (Hutchinson, Lanczos):
        raise OperandError(f"logdet={logdet!r}; expected Auto() or (Hutchinson(m), Lanczos(k))")
    if isinstance(solver, Direct):
        raise OperandError("solver=Direct() gives the log-determinant as well; logdet= must be Auto() then")
