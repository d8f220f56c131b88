"""The posterior of a Gaussian process at new points: mean, variance, covariance, samples, from what is cached once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..methods import Auto
from ..operators.base import LinearOperator
from ..result import Info
from ..solve import CG, Direct
from . import means, pathwise
from .blocks import block_rows, check_points, in_blocks
from .inverse import ENTRIES_AT_ONCE, Factor, Products, Reduced, variance_info
from .pathwise import Exact, Features, Paths, SquareRoot
from .projection import Basis, Projection

if TYPE_CHECKING:
    from .exact import ExactGP

# Conditioning is done once and asked for many points: up to here a dense factor (n³/3 operations, n² numbers) costs
# less than the tens of products for every test point's variance that CG would need. solver=CG(...) overrides it.
FACTOR_UP_TO = 20000
DOUBLE_UP_TO = 5000  # in float64 up to here, beyond in the dtype of the points
COVARIANCE_UP_TO = 4000  # points of a full covariance: n·n* and n*² numbers are held

VarianceMethod = Auto | CG | Projection


class Posterior:
    """N(mean(Xs), covariance(Xs)) given the observations that it was made with.

    The hyper-parameters are a copy, so that later training of the process does not reach into what is cached here.
    Gradients flow to the test points. Test points are taken in blocks: beside the results and what is cached, at most
    about 300 MB are held for any number of them, also with gradients (a block is then computed again in backward).

    Attributes:
        X, y: observations (n, d); (n,), or (n, p) for p independent outputs, which share every factor and product.
        weights: K̂⁻¹ (y − m), of the shape of y.
        info: report of the solve behind the weights; ``residual`` is the true one, a number per output (before the
            weights are rounded to the dtype of y).

    Cost: n ≤ 20000: one factorisation, in float64 for n ≤ 5000 and in the dtype of X beyond, then n² per test point.
    Larger n, or ``solver=CG(...)``: one preconditioned CG solve, n per test point for the mean, and for variances what
    their ``method`` says.
    """

    def __init__(self, gp: ExactGP, X: Tensor, y: Tensor) -> None:
        self.gp: ExactGP = copy.deepcopy(gp).requires_grad_(False)
        self.X, self.y = X, y
        self._basis: tuple[tuple[int, int], Basis] | None = None
        solver, n = self.gp.solver, X.shape[0]
        with torch.no_grad():
            self._inverse: Factor | Products
            if isinstance(solver, Direct) or (not isinstance(solver, CG) and n <= FACTOR_UP_TO):
                self._inverse = Factor(self.gp, X, double=n <= DOUBLE_UP_TO or isinstance(solver, Direct))
            else:
                self._inverse = Products(self.gp, X, solver if isinstance(solver, CG) else CG())
            r = self.gp.residual(X, y)
            w, self.info = self._inverse.solve(r.reshape(n, -1))
            self.weights = w.to(y.dtype).reshape(y.shape)

    @property
    def outputs(self) -> int | None:
        """p for y (n, p), None for y (n,)."""
        return None if self.y.ndim == 1 else self.y.shape[1]

    # -- moments --------------------------------------------------------------------------------------------------

    def mean(self, Xs: Tensor) -> Tensor:
        """m(Xs) + K(Xs, X) K̂⁻¹ (y − m), shape (n*,) or (n*, p); differentiable in Xs."""
        Xs = self._check(Xs)
        return means.evaluate(self.gp.mean, Xs, self.outputs) + self.kernel(Xs, self.X) @ self.weights

    def variance(
        self, Xs: Tensor, *, noise: bool = False, method: VarianceMethod = Auto(), return_info: bool = False
    ) -> Any:
        """The variance of f(Xs), or with ``noise=True`` that of a new observation there, shape (n*,).

        It is the same for all outputs, never negative, and never below the truth by more than rounding. Dense path:
        k** − ‖L⁻¹k*‖², where only rounding, at most n·eps·k**, is cut off. Iterative path: k** − (2 k*ᵀx − xᵀK̂x) with
        x ≈ K̂⁻¹k*. What is subtracted is k*ᵀK̂⁻¹k* − ‖x − K̂⁻¹k*‖²_K̂, so that an inexact x can only enlarge the variance,
        and the error is the square of that of x.

        Args:
            Xs: points (n*, d).
            noise: add ``gp.noise_at(Xs)``.
            method: where x comes from, on the iterative path: ``CG(...)``, a solve for every point;
                ``Projection(rank, rtol)``, a basis that is cached, and a solve where its error bound is too large;
                ``Auto()``, the ``CG(...)`` that was given as ``solver=`` of the process, or else ``Projection()``.
            return_info: also return an :class:`~ritz.result.Info`: ``residual`` (n*,) bounds by how much each variance
                is too large, ``details["solved"]`` counts the points that needed a linear solve, ``status`` is the
                worst of these solves. A failure warns once, whatever the number of blocks.

        Gradient: in Xs, first order (a second one is refused by name); any order on the dense path.
        """
        Xs = self._check(Xs)
        chosen = self._variance_method(method)
        basis = self._basis_of(chosen) if isinstance(chosen, Projection) and Xs.shape[0] else None
        rows = block_rows(self.X.shape[0], self._inverse.dtype)
        spent: list[tuple[int, int, Info | None]] = []

        def one(P: Tensor) -> tuple[Tensor, Tensor]:
            v, reduced = self._variance(P, chosen, basis)
            spent.append(reduced[2:])
            return v, reduced.gap

        v, gap = in_blocks(one, Xs, rows) if Xs.shape[0] else (Xs.new_zeros(0), torch.zeros(0, dtype=torch.float64))
        info = variance_info(chosen, gap, spent)
        v = v + self.gp.noise_at(Xs).to(v.dtype) if noise else v
        return (v, info) if return_info else v

    def covariance(self, Xs: Tensor, *, noise: bool = False) -> Tensor:
        """The covariance of f(Xs), or of new observations there, shape (n*, n*); the same for all outputs.

        Symmetric; positive semidefinite up to rounding: no eigenvalue is below −(n + n*)·eps·‖K(Xs, Xs)‖, eps that of
        the coarser of the factor's dtype and that of Xs. On the iterative path it is an upper bound in the order of
        symmetric matrices, by the same form as the variance. Gradient: as that of the variance.

        Raises:
            OperandError: more than 4000 points.

        Cost: n²·n* + n·n*² operations (a solve for every point on the iterative path), n·n* + n*² numbers.
        """
        Xs = self._check(Xs)
        S = self._covariance(Xs).to(Xs.dtype)
        return S + torch.diag_embed(self.gp.noise_at(Xs).to(S.dtype).expand(Xs.shape[0])) if noise else S

    def predict(self, Xs: Tensor, *, noise: bool = False, method: VarianceMethod = Auto()) -> tuple[Tensor, Tensor]:
        """(mean, variance) at Xs; with ``noise=True`` the variance of a new observation."""
        return self.mean(Xs), self.variance(Xs, noise=noise, method=method)

    # -- samples --------------------------------------------------------------------------------------------------

    def sample(
        self,
        Xs: Tensor,
        num_samples: int = 1,
        *,
        noise: bool = False,
        method: Exact | Features | SquareRoot | Auto = Auto(),
        seed: int = 0,
        generator: torch.Generator | None = None,
        return_info: bool = False,
    ) -> Any:
        """Joint samples of f(Xs), or of new observations there, shape (num_samples, n*) or (num_samples, n*, p).

        Args:
            Xs: points (n*, d).
            num_samples: how many; outputs are independent of each other.
            noise: add independent noise of variance ``gp.noise_at(Xs)``.
            method: ``Exact()``, from the covariance matrix; ``Features(m)`` and ``SquareRoot(rtol)``, by pathwise
                conditioning of prior samples. ``Auto()`` is Exact on the dense path for n* ≤ 1000, otherwise Features
                where the kernel's spectral density is known (stationary kernels, their sums, products, scales) and
                SquareRoot where it is not.
            seed, generator: of all random numbers; ``generator`` overrides ``seed``.
            return_info: also return an :class:`~ritz.result.Info`, see the methods.

        No gradient; :meth:`sample_paths` gives differentiable functions.
        """
        Xs = self._check(Xs).detach()
        if num_samples < 1:
            raise OperandError(f"num_samples={num_samples}; expected at least 1")
        generator = generator or torch.Generator().manual_seed(seed)
        with torch.no_grad():
            values, info = pathwise.sample(self, Xs, num_samples, method, generator)
            if noise:
                scale = self.gp.noise_at(Xs).to(values.dtype).sqrt().expand(Xs.shape[0])
                extra = pathwise.normal(tuple(values.shape), generator, values)
                values = values + extra * (scale if self.outputs is None else scale.unsqueeze(1))
        return (values, info) if return_info else values

    def sample_paths(
        self,
        num_paths: int = 1,
        *,
        method: Features | Auto = Auto(),
        seed: int = 0,
        generator: torch.Generator | None = None,
    ) -> Paths:
        """Samples of f as functions: ``paths(Xs)`` has shape (num_paths, n*) or (num_paths, n*, p) at any Xs.

        The same function every time it is called, differentiable in Xs. ``Auto()`` is ``Features(2048)``.

        Raises:
            OperandError: for a kernel without a known spectral density; :meth:`sample` serves it.
        """
        generator = generator or torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return pathwise.paths(self, num_paths, Features() if isinstance(method, Auto) else method, generator)

    # -- parts ----------------------------------------------------------------------------------------------------

    def kernel(self, Xs: Tensor, Z: Tensor | None = None) -> LinearOperator:
        """The prior covariance as an operator, never stored: there may be many test points."""
        return self.gp.kernel(Xs) if Z is None else self.gp.kernel(Xs, Z)

    def solve(self, B: Tensor) -> tuple[Tensor, Info]:
        """K̂⁻¹ B for a block (n, k), and its report, from what is cached."""
        W, info = self._inverse.solve(B)
        return W.to(B.dtype), info

    @property
    def is_dense(self) -> bool:
        """Whether a Cholesky factor is cached."""
        return isinstance(self._inverse, Factor)

    def _cross(self, Xs: Tensor) -> Tensor:
        """K(X, Xs) (n, b) as a matrix."""
        X = self.X.to(Xs.dtype)
        rows = [self.kernel(P, X).to_dense() for P in Xs.split(max(1, ENTRIES_AT_ONCE // X.shape[0])) if P.shape[0]]
        return torch.cat(rows).mT if rows else Xs.new_zeros(X.shape[0], 0)

    def _covariance(self, Xs: Tensor) -> Tensor:
        """The covariance of f(Xs) in the dtype of what is cached."""
        if Xs.shape[0] > COVARIANCE_UP_TO:
            raise OperandError(
                f"the covariance of {Xs.shape[0]} points was asked for; it is made for at most {COVARIANCE_UP_TO}: "
                "use variance(Xs), or sample(Xs) with method=Features(m), which need no matrix"
            )
        points = Xs.to(self._inverse.dtype)
        if not Xs.shape[0]:
            return points.new_zeros(0, 0)
        S = self.kernel(points).to_dense() - self._inverse.gram(self._cross(points))
        return 0.5 * (S + S.mT)

    def _variance(self, Xs: Tensor, method: Any, basis: Basis | None) -> tuple[Tensor, Reduced]:
        """Variances of one block, and what made them."""
        points = Xs.to(self._inverse.dtype)
        prior, C = self.kernel(points).diagonal(), self._cross(points)
        if isinstance(self._inverse, Factor):
            reduced = self._inverse.reduce(C)
        elif basis is None:
            reduced = self._inverse.reduce(C, method)
        else:
            reduced = basis.reduce(C)
            if method.rtol is not None:
                certain = (prior.detach() - reduced.value.detach() - reduced.gap).clamp_min(0.0)
                (index,) = torch.where(reduced.gap > method.rtol * certain)
                if index.numel():
                    better = self._inverse.reduce(C[:, index])
                    value = reduced.value.index_copy(0, index, better.value)
                    gap = reduced.gap.index_copy(0, index, better.gap)
                    reduced = Reduced(value, gap, *better[2:])
        return (prior - reduced.value).clamp_min(0.0).to(Xs.dtype), reduced

    def _variance_method(self, method: VarianceMethod) -> Direct | CG | Projection:
        if not isinstance(method, (Auto, CG, Projection)):
            raise OperandError(f"method={method!r}; expected Auto(), CG(...) or Projection(...)")
        if isinstance(self._inverse, Factor):
            if not isinstance(method, Auto):
                raise OperandError(f"method={method!r} came to a posterior with a Cholesky factor; leave it at Auto()")
            return Direct()
        if isinstance(method, Auto):
            return self.gp.solver if isinstance(self.gp.solver, CG) else Projection()
        return method

    def _basis_of(self, method: Projection) -> Basis:
        key = (method.rank, method.seed)
        if self._basis is None or self._basis[0] != key:
            assert isinstance(self._inverse, Products)
            self._basis = key, method.build(self.kernel(self.X), self._inverse.A, self._inverse.noise)
        return self._basis[1]

    def _check(self, Xs: Tensor) -> Tensor:
        return check_points(Xs, self.X)

    def __repr__(self) -> str:
        how = f"{self._inverse.method}" if isinstance(self._inverse, Products) else "Cholesky factor"
        return f"Posterior({self.X.shape[0]} observations, {how})"
