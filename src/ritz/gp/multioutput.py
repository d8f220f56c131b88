"""Several outputs that depend on each other: the intrinsic coregionalisation model, K(X, X) ⊗ B plus noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OperandError
from ..kernels.backends import Backend
from ..kernels.base import Kernel
from ..kernels.parameters import assign, positive
from ..methods import Auto, Lanczos
from ..numerics import full_precision
from ..operators import Dense, Diagonal, Kronecker, LinearOperator, identity
from ..result import Info
from ..solve import CG, Direct
from ..stochastic.probes import Hutchinson
from . import means, pathwise
from .blocks import check_points, in_blocks
from .exact import NOISE_FLOOR, ExactGP, LogDet, Solver
from .inverse import Factor, Products, variance_info
from .means import ConstantMean
from .noise import Noise
from .posterior import COVARIANCE_UP_TO
from .priors import checked_priors

# Size n·p of the covariance up to which a posterior factorises it in float64: n³p³/3 operations, and n²p² numbers.
FACTOR_UP_TO = 6000
BLOCK_BYTES = 64 * 2**20  # of cross-covariances that are held at a time


class MultiOutputGP(ExactGP):
    """y_a(x) = f_a(x) + ε_a with cov(f_a(x), f_b(x')) = B_ab·k(x, x') and B = W Wᵀ + diag(κ).

    Targets are (n, p), every output observed at every point. Flattened by rows, y.reshape(-1), their covariance is

        K(X, X) ⊗ B + I ⊗ diag(σ²)                       with the Kronecker product of ``torch.kron``

    (texts that stack outputs one after the other write B ⊗ K). The scale of the outputs lives in B, so that the kernel
    needs no ``Scale``. Outputs that only share a kernel are cheaper with :class:`~ritz.gp.ExactGP` and y (n, p).

    Args:
        kernel: k, the same for all outputs.
        outputs: p.
        rank: columns of W, 1 ≤ rank ≤ p.
        mean: callable (n, d) -> (n, p) or (n,); None is a learned constant for each output.
        noise: start value of σ², a number or one per output, (p,). All are learned.
        solver, logdet, preconditioner, backend, priors, noise_floor: as in :class:`~ritz.gp.ExactGP`.
        seed: of the start value of W, normal numbers of variance ½/rank (κ starts at ½): at W = 0 the outputs would
            stay independent, because the gradient in W vanishes there.

    Attributes:
        output_factor: W (p, rank), a parameter.
        output_variance: κ (p,), positive, assignable.
        output_covariance: B (p, p).
        noise: σ² (p,), assignable.

    ``log_marginal_likelihood``, ``leave_one_out`` and ``condition`` are those of ExactGP with n·p in place of n; a
    product with the covariance costs one with K(X, X) of p times as many columns.

    Reference: Bonilla, Chai, Williams, Multi-task Gaussian process prediction, 2007; Álvarez, Rosasco, Lawrence,
    Kernels for vector-valued functions, 2012, section 4.2.

    Example:
        >>> import torch, ritz
        >>> X = torch.linspace(0, 1, 30).unsqueeze(1)
        >>> y = torch.cat([torch.sin(6 * X), torch.sin(6 * X) + X], 1)
        >>> gp = MultiOutputGP(ritz.kernels.RBF(lengthscale=0.3), 2, noise=0.01)
        >>> mean, variance = gp.condition(X, y).predict(X)
        >>> mean.shape, bool((mean - y).abs().max() < 0.1)
        (torch.Size([30, 2]), True)
    """

    def __init__(
        self,
        kernel: Kernel,
        outputs: int,
        rank: int = 1,
        mean: Callable[[Tensor], Tensor] | None = None,
        noise: Any = 0.1,
        solver: Solver = Auto(),
        logdet: LogDet = Auto(),
        *,
        preconditioner: Any = Auto(),
        backend: Backend = Auto(),
        priors: Mapping[str, Any] | None = None,
        noise_floor: float = NOISE_FLOOR,
        seed: int = 0,
    ) -> None:
        if outputs < 1 or not 1 <= rank <= outputs:
            raise OperandError(f"outputs={outputs} came with rank={rank}; expected 1 <= rank <= outputs")
        if isinstance(noise, Noise):
            raise OperandError(f"noise is {noise}; a process of several outputs learns one number for each of them")
        super().__init__(
            kernel,
            ConstantMean(outputs=outputs) if mean is None else mean,
            0.1,
            solver,
            logdet,
            preconditioner=preconditioner,
            backend=backend,
            noise_floor=noise_floor,
        )
        self.outputs = outputs
        W = torch.randn(outputs, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.output_factor = nn.Parameter((W * (0.5 / rank) ** 0.5).to(torch.get_default_dtype()))
        self.raw_output_variance = nn.Parameter(torch.zeros(outputs))
        self.output_variance = 0.5
        self.raw_noise = nn.Parameter(torch.zeros(outputs))
        self.noise = noise
        self.priors = checked_priors(self, priors)

    @property
    def output_variance(self) -> Tensor:
        """κ (p,): the part of each output's variance that is its own."""
        return positive(self.raw_output_variance)

    @output_variance.setter
    def output_variance(self, value: Any) -> None:
        assign(self.raw_output_variance, value, "output_variance")

    @property
    def output_covariance(self) -> Tensor:
        """B = W Wᵀ + diag(κ), (p, p)."""
        return self.output_factor @ self.output_factor.mT + torch.diag_embed(self.output_variance)

    def observed_noise(self, X: Tensor) -> Tensor:
        """Noise variances of the flattened observations at X (n, d): (n p,)."""
        return self.noise.repeat(X.shape[0])

    def covariance(self, X: Tensor) -> LinearOperator:
        """K(X, X) ⊗ B + I ⊗ diag(σ²) as an operator (n p, n p)."""
        K = self._kernel_matrix(X)
        noise = Diagonal(self.noise.to(K.dtype))
        return self._latent(K) + Kronecker(identity(K.shape[0], dtype=K.dtype, device=K.device), noise)

    def _latent(self, K: LinearOperator) -> LinearOperator:
        return Kronecker(K, Dense(self.output_covariance.to(K.dtype), hermitian=True, psd=True))

    def dense_covariance(self, X: Tensor) -> Tensor:
        """K(X, X) ⊗ B + I ⊗ diag(σ²) (n p, n p) in float64, differentiable to any order."""
        K = torch.kron(self.kernel.evaluate(X.double()), self.output_covariance.double())
        return K + torch.diag_embed(self.observed_noise(X).double())

    def method(self, n: int) -> Direct | tuple[Hutchinson, Lanczos]:
        """What evaluates the likelihood of n points: that of ExactGP at the size n·p."""
        return super().method(n * self.outputs)

    def residual(self, X: Tensor, y: Tensor) -> Tensor:
        """y − m(X), flattened by rows (n p,)."""
        return (y - means.evaluate(self.mean, X, self.outputs)).reshape(-1)

    def _points(self, X: Tensor) -> Tensor:
        index = torch.arange(self.outputs, dtype=X.dtype, device=X.device).repeat(X.shape[0])
        return torch.cat([X.repeat_interleave(self.outputs, 0), index.unsqueeze(1)], 1)

    def noise_curve(self, X: Tensor, y: Tensor, noises: Tensor) -> Tensor:
        """Refused: the noise is not a multiple of the identity."""
        raise OperandError("noise_curve needs one noise for everything; a process of several outputs has one for each")

    def condition(self, X: Tensor, y: Tensor) -> MultiOutputPosterior:
        """The posterior given observations X (n, d), y (n, p); hyper-parameters are copied as they are now."""
        X, y = self._check(X, y)
        return MultiOutputPosterior(self, X.detach(), y.detach())

    def _check(self, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(y, Tensor) or y.ndim != 2 or y.shape[1] != self.outputs:
            what = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise OperandError(f"y is {what}; expected (n, {self.outputs}), every output at every point")
        return super()._check(X, y)


class MultiOutputPosterior:
    """Mean and (co)variance of every output at new points, given the observations that it was made with.

    Attributes:
        X, y: observations (n, d), (n, p).
        weights: K̂⁻¹ (y − m) as (n, p).
        info: report of the solve behind the weights; ``residual`` (1,) is the true one.

    Cost: n·p ≤ 6000, or ``solver=Direct()``: one factorisation in float64, then p columns (n p)² per test point.
    Beyond, or ``solver=CG(...)``: one preconditioned solve, n p per test point for the mean, and CG on p columns per
    test point for variances.
    """

    def __init__(self, gp: MultiOutputGP, X: Tensor, y: Tensor) -> None:
        self.gp: MultiOutputGP = copy.deepcopy(gp).requires_grad_(False)
        self.X, self.y = X, y
        solver = self.gp.solver
        with torch.no_grad():
            self._inverse: Factor | Products
            if isinstance(solver, Direct) or (not isinstance(solver, CG) and y.numel() <= FACTOR_UP_TO):
                self._inverse = Factor(self.gp, X, double=True)
            else:
                self._inverse = Products(self.gp, X, solver if isinstance(solver, CG) else CG())
            w, self.info = self._inverse.solve(self.gp.residual(X, y).unsqueeze(1))
            self.weights = w.to(y.dtype).reshape(y.shape)

    def mean(self, Xs: Tensor) -> Tensor:
        """m(Xs) + K(Xs, X) [K̂⁻¹ (y − m)] B, shape (n*, p); differentiable in Xs."""
        Xs = check_points(Xs, self.X)
        B = self.gp.output_covariance.to(Xs.dtype)
        m = means.evaluate(self.gp.mean, Xs, self.gp.outputs)
        return m + (self.gp.kernel(Xs, self.X, backend=self.gp.backend) @ self.weights) @ B

    def variance(self, Xs: Tensor, *, noise: bool = False, return_info: bool = False) -> Any:
        """The variance of every f_a(Xs), or with ``noise=True`` that of a new observation, shape (n*, p).

        Never negative: B_aa k** − ‖L⁻¹ c‖² up to rounding on the dense path, and on the iterative one
        B_aa k** − (2 cᵀx − xᵀK̂x) with x ≈ K̂⁻¹ c, where an unconverged x can only enlarge the variance.

        Args:
            Xs: points (n*, d).
            noise: add the noise of each output.
            return_info: also return an :class:`~ritz.result.Info`, as that of :meth:`Posterior.variance`, with
                ``residual`` (n*, p).

        Gradient: in Xs, first order (a second one is refused by name); any order on the dense path.
        """
        Xs = check_points(Xs, self.X)
        p = self.gp.outputs
        spent: list[tuple[int, int, Info | None]] = []

        def one(P: Tensor) -> tuple[Tensor, Tensor]:
            points = P.to(self._inverse.dtype)
            reduced = self._inverse.reduce(self._cross(points))
            spent.append(reduced[2:])
            prior = self.gp._latent(self.gp.kernel(points)).diagonal()
            return (prior - reduced.value).clamp_min(0.0).to(P.dtype).reshape(-1, p), reduced.gap.reshape(-1, p)

        rows = max(1, min(512, BLOCK_BYTES // (8 * self.y.numel() * p)))
        empty = Xs.new_zeros(0, p), Xs.new_zeros(0, p, dtype=torch.float64)
        v, gap = in_blocks(one, Xs, rows) if Xs.shape[0] else empty
        method = self._inverse.method if isinstance(self._inverse, Products) else Direct()
        info = variance_info(method, gap, spent)
        v = v + self.gp.noise_at(Xs).to(v.dtype) if noise else v
        return (v, info) if return_info else v

    def covariance(self, Xs: Tensor, *, noise: bool = False) -> Tensor:
        """The covariance of all f_a(Xs), or of new observations, (n* p, n* p): that of ``mean(Xs).reshape(-1)``.

        Symmetric, positive semidefinite up to rounding, on the iterative path from above, as
        :meth:`Posterior.covariance`. Gradient: as that of the variance.

        Raises:
            OperandError: n*·p above 4000.
        """
        Xs = check_points(Xs, self.X)
        S = self._covariance(Xs).to(Xs.dtype)
        return S + torch.diag_embed(self.gp.noise_at(Xs).to(S.dtype).repeat(Xs.shape[0])) if noise else S

    def predict(self, Xs: Tensor, *, noise: bool = False) -> tuple[Tensor, Tensor]:
        """(mean, variance) at Xs, each (n*, p); with ``noise=True`` the variance of a new observation."""
        return self.mean(Xs), self.variance(Xs, noise=noise)

    def sample(self, Xs: Tensor, num_samples: int = 1, *, noise: bool = False, seed: int = 0) -> Tensor:
        """Joint samples of all outputs at Xs, or of new observations there, (num_samples, n*, p), from the covariance.

        No gradient. Cost: that of :meth:`covariance`, and a factorisation of that matrix.
        """
        if num_samples < 1:
            raise OperandError(f"num_samples={num_samples}; expected at least 1")
        Xs, generator = check_points(Xs, self.X).detach(), torch.Generator().manual_seed(seed)
        with torch.no_grad(), full_precision():
            S = self._covariance(Xs).double()
            S = S + torch.diag_embed(self.gp.noise_at(Xs).to(S.dtype).repeat(Xs.shape[0])) if noise else S
            L, _ = pathwise.root(S)
            Z = L @ pathwise.normal((S.shape[0], num_samples), generator, L)
            return self.mean(Xs) + Z.mT.to(Xs.dtype).reshape(num_samples, Xs.shape[0], self.gp.outputs)

    def _cross(self, points: Tensor) -> Tensor:
        """K(X, Xs) ⊗ B (n p, b p) as a matrix."""
        K = self.gp.kernel(self.X.to(points.dtype), points).to_dense()
        return torch.kron(K, self.gp.output_covariance.to(K.dtype))

    def _covariance(self, Xs: Tensor) -> Tensor:
        """The covariance of all f_a(Xs) in the dtype of what is cached."""
        size = Xs.shape[0] * self.gp.outputs
        if size > COVARIANCE_UP_TO:
            raise OperandError(
                f"the covariance of {Xs.shape[0]} points and {self.gp.outputs} outputs was asked for, of size {size}; "
                f"it is made up to {COVARIANCE_UP_TO}: take fewer points, or variance(Xs), which needs no matrix"
            )
        points = Xs.to(self._inverse.dtype)
        if not size:
            return points.new_zeros(0, 0)
        S = self.gp._latent(self.gp.kernel(points)).to_dense() - self._inverse.gram(self._cross(points))
        return 0.5 * (S + S.mT)

    def __repr__(self) -> str:
        how = f"{self._inverse.method}" if isinstance(self._inverse, Products) else "Cholesky factor"
        return f"MultiOutputPosterior({self.y.shape[0]} observations of {self.y.shape[1]} outputs, {how})"
