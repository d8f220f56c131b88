"""Preconditioners: operators P near A with P⁻¹ X, P^(-1/2) X and log det P, and the method values that build them.

A preconditioner is an operator like any other: ``P @ X`` and ``P.logdet()`` are differentiable in ``P.tensors()``,
and those hang on A's tensors when P was built with gradients enabled. A solve does not depend on P, so it takes P as
a constant; a preconditioned log-determinant does depend on it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DomainError, OperandError
from ..numerics import full_precision
from ..operators import Counting, Declared, Identity, LinearOperator, Scaled, Sum
from .system import Product

Shift = float | Tensor


class Preconditioner(LinearOperator):
    """A Hermitian positive definite operator that is easy to invert."""

    @abstractmethod
    def solve(self, X: Tensor) -> Tensor:
        """P⁻¹ X for a block (n, k)."""

    @abstractmethod
    def invsqrt(self, X: Tensor) -> Tensor:
        """P^(-1/2) X, the Hermitian positive root, for a block (n, k)."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """log det P, a real scalar, differentiable in :meth:`tensors`."""

    def matmat(self, X: Tensor) -> Tensor:
        """P X for a block (n, k), differentiable in :meth:`tensors` and X."""
        return self._matmat(X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self._matmat(X)


class DiagonalPreconditioner(Preconditioner):
    """P = diag(d) with positive entries (n,); for Jacobi, d is A's diagonal."""

    def __init__(self, entries: Tensor, dtype: torch.dtype | None = None) -> None:
        n = entries.shape[0]
        d = entries.real if entries.is_complex() else entries
        super().__init__((n, n), dtype or entries.dtype, entries.device, psd=True)
        bad = (~(d.detach() > 0)).nonzero()
        if bad.numel():
            i = int(bad[0])
            raise DomainError(
                f"a diagonal preconditioner needs positive entries; {bad.shape[0]} of {n} are not, the first is "
                f"d[{i}] = {float(d[i]):.3g}: A is not positive definite, or needs a shift"
            )
        self.entries = d

    def _matmat(self, X: Tensor) -> Tensor:
        return self.entries.unsqueeze(1) * X

    def solve(self, X: Tensor) -> Tensor:
        return X / self.entries.unsqueeze(1)

    def invsqrt(self, X: Tensor) -> Tensor:
        return X * self.entries.rsqrt().unsqueeze(1)

    def logdet(self) -> Tensor:
        return self.entries.log().sum()

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.entries,)

    def diagonal(self) -> Tensor:
        return self.entries.to(self.dtype)


class LowRankPreconditioner(Preconditioner):
    """P = F Fᴴ + σ² I with F (n, r) and σ² > 0, inverted through the singular values s and vectors U of F.

        P⁻¹ = (I − U Uᴴ)/σ² + U diag(1/(s² + σ²)) Uᴴ,       P^(-1/2) likewise with square roots.

    This is Woodbury's identity with the subtraction done where it is harmless: the projection I − U Uᴴ is applied
    twice, so that what remains of the large directions is not blown up by 1/σ² (in one pass P⁻¹ loses its
    definiteness at s²/σ² ≈ 1/eps, that is 1e7 in float32). The small factors are computed in float64.

    Args:
        factor: F (n, r).
        shift: σ², a number or a tensor of one element (which then gets gradients).
    """

    def __init__(self, factor: Tensor, shift: Shift) -> None:
        n = factor.shape[0]
        super().__init__((n, n), factor.dtype, factor.device, psd=True)
        value = float(shift.detach() if isinstance(shift, Tensor) else shift)
        if not (value > 0 and value < float("inf")):
            raise DomainError(f"a low-rank preconditioner needs a shift σ² > 0; got {value:.3g}: build(A, shift=...)")
        self.factor = factor
        self.noise = shift
        self.pivots: Tensor | None = None
        with torch.no_grad(), full_precision():
            Q, R = torch.linalg.qr(_wide(factor.detach()))
            u, s, _ = torch.linalg.svd(R, full_matrices=False)
            self._U = (Q @ u).to(factor.dtype)
            self._far = 1.0 / value  # eigenvalue of P⁻¹ off the span of F
            self._near = (1.0 / (s * s + value)).to(factor.dtype).unsqueeze(1)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.factor @ (self.factor.mH @ X) + self.noise * X

    def _split(self, X: Tensor) -> tuple[Tensor, Tensor]:
        T = self._U.mH @ X
        Y = X - self._U @ T
        again = self._U.mH @ Y
        return Y - self._U @ again, T + again

    def solve(self, X: Tensor) -> Tensor:
        Y, T = self._split(X)
        return Y * self._far + self._U @ (self._near * T)

    def invsqrt(self, X: Tensor) -> Tensor:
        Y, T = self._split(X)
        return Y * self._far**0.5 + self._U @ (self._near.sqrt() * T)

    def logdet(self) -> Tensor:
        """n log σ² + log det(I + Fᴴ F/σ²), the latter as 2 Σ log |R_ii| with [F/σ; I] = Q R."""
        F = _wide(self.factor)
        n, r = F.shape
        noise = torch.as_tensor(self.noise, dtype=F.real.dtype, device=F.device).reshape(())
        out = n * noise.log()
        if r:
            stacked = torch.cat([F / noise.sqrt(), torch.eye(r, dtype=F.dtype, device=F.device)])
            out = out + 2 * torch.linalg.qr(stacked).R.diagonal().abs().log().sum()
        return out.to(self.factor.real.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.factor, self.noise) if isinstance(self.noise, Tensor) else (self.factor,)

    def diagonal(self) -> Tensor:
        return (self.factor.abs() ** 2).sum(1).to(self.dtype) + self.noise


@dataclass(frozen=True)
class Jacobi:
    """The diagonal of A as a preconditioner.

    Cost: ``A.diagonal()``, which for a bare callable takes n products.
    """

    def build(self, A: LinearOperator, shift: Shift = 0.0) -> DiagonalPreconditioner:
        """P = diag(A) + shift."""
        return DiagonalPreconditioner(A.diagonal() + shift, A.dtype)


@dataclass(frozen=True)
class PivotedCholesky:
    """Partial Cholesky factorisation of K with the largest remaining diagonal entry as the next pivot.

    For A = K + σ² I (as ``A.shift(σ²)`` makes it) P = F Fᴴ + σ² I with F Fᴴ = K[:, S] K[S, S]⁻¹ K[S, :].

    Args:
        rank: columns of F at most; fewer where K is exhausted before.

    Cost: r columns and the diagonal of K (r columns once more where gradients are wanted), O(n r²) arithmetic,
    2 n r numbers.
    Gradient: pivots fixed, entries of the columns K[:, S] and σ² on the graph.
    Reference: Harbrecht, Peters, Schneider, On the low-rank approximation by the pivoted Cholesky decomposition, 2012.
    """

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise OperandError(f"{type(self).__name__}(rank={self.rank}): expected at least 1")

    def build(self, A: LinearOperator, shift: Shift | None = None) -> LowRankPreconditioner:
        """The preconditioner of A + shift·I.

        Args:
            A: Hermitian positive semidefinite (n, n). Terms that are a multiple of the identity are found in a sum
                and belong to σ², not to K.
            shift: a further multiple of the identity; a number or a tensor of one element.

        Where neither A nor ``shift`` has a multiple of the identity, the mean of the diagonal that the factor leaves
        over takes the place of σ² (a constant).

        Raises:
            DomainError: for a negative diagonal or a shift that is not positive.
        """
        K, noise = split_shift(A)
        if shift is not None:
            noise = shift if noise is None else noise + shift
        pivots, C, left = self._select(K)
        if torch.is_grad_enabled():
            C = K.columns(pivots)
        factor, pivots = _nystrom(C, pivots)
        if noise is None:
            mean = float(K.diagonal().detach().real.mean())
            noise = max(left / K.shape[0], torch.finfo(K.dtype).eps * mean)
        P = LowRankPreconditioner(factor, noise)
        P.pivots = pivots
        return P

    def _pivot(self, d: Tensor, step: int) -> int:
        return int(d.argmax())

    def _select(self, K: LinearOperator) -> tuple[Tensor, Tensor, float]:
        """Pivots (r,), the columns K[:, pivots] (n, r) without a graph, and the trace that is left over."""
        n = K.shape[0]
        with torch.no_grad(), full_precision():
            d = K.diagonal().real.to(torch.float64)
            top = float(d.max())
            tol = 100 * torch.finfo(K.dtype).eps * max(top, 0.0)
            if bool((d < -tol).any()) or top < 0:
                raise DomainError(
                    f"pivoted Cholesky needs a positive semidefinite operator; diagonal entry {int(d.argmin())} is "
                    f"{float(d.min()):.3g}: drop psd=True, or check which multiple of the identity belongs to A"
                )
            rows = min(self.rank, n)
            F = torch.zeros(rows, n, dtype=torch.promote_types(K.dtype, torch.float64), device=K.device)
            pivots: list[int] = []
            columns = []
            for i in range(rows):
                d = d.clamp_min(0.0)
                if float(d.max()) <= tol:
                    break
                p = self._pivot(d, i)
                if float(d[p]) <= tol:
                    p = int(d.argmax())
                column = K.columns([p])
                g = column.squeeze(1).to(F.dtype) - F[:i].mT @ F[:i, p].conj()
                F[i] = g / d[p].sqrt()
                d = d - F[i].abs() ** 2
                d[p] = 0.0
                pivots.append(p)
                columns.append(column)
            C = torch.cat(columns, 1) if columns else torch.zeros(n, 0, dtype=K.dtype, device=K.device)
            return torch.tensor(pivots, dtype=torch.long, device=K.device), C, float(d.clamp_min(0.0).sum())


@dataclass(frozen=True)
class RandomlyPivotedCholesky(PivotedCholesky):
    """Partial Cholesky factorisation of K with pivots drawn in proportion to the remaining diagonal.

    As :class:`PivotedCholesky`, but near-optimal in expectation for every K, where greedy pivots run after outliers.

    Args:
        rank: columns of F at most.
        seed: decides the pivots (numbers drawn on the CPU; the same on every device up to rounding).

    Reference: Chen, Epperly, Tropp, Webber, Randomly pivoted Cholesky, 2024, Algorithm 1.
    """

    seed: int = 0

    def _pivot(self, d: Tensor, step: int) -> int:
        u = torch.rand(self.rank, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)[step]
        total = d.cumsum(0)
        return min(int(torch.searchsorted(total, (u.to(d.device) * total[-1]).reshape(1), right=True)), len(d) - 1)


def split_shift(A: LinearOperator) -> tuple[LinearOperator, Shift | None]:
    """K and σ² with A = K + σ² I, found among the terms of a sum; σ² is None where there is no such term."""
    if isinstance(A, (Counting, Declared)):
        K, noise = split_shift(A.children[0])
        return (A, None) if noise is None else (A.rebuild([K]), noise)
    if not isinstance(A, Sum):
        return A, None
    rest, noise = [], None
    for term in A.terms:
        value = _multiple(term)
        if value is None:
            rest.append(term)
        else:
            noise = value if noise is None else noise + value
    if not rest or noise is None:
        return A, None
    return (rest[0] if len(rest) == 1 else Sum(rest)), noise


def as_product(P: Any, A: LinearOperator) -> Product:
    """What a user gave as ``preconditioner=``, as the product X -> P⁻¹ X."""
    if hasattr(P, "build"):
        with torch.no_grad():
            P = P.build(A)
    if hasattr(P, "solve"):
        shape = getattr(P, "shape", A.shape)
        if tuple(shape) != A.shape:
            raise OperandError(f"the preconditioner has shape {tuple(shape)}; the operator has shape {A.shape}")
        return P.solve
    if callable(P):
        return P
    raise OperandError(
        f"preconditioner is a {type(P).__name__}; expected a value such as Jacobi() or RandomlyPivotedCholesky(50), "
        "an object with solve(X) = P⁻¹ X, or a callable X -> P⁻¹ X (for an operator M near A⁻¹: lambda X: M @ X)"
    )


def _multiple(A: LinearOperator) -> Shift | None:
    """c where A is c·I."""
    if isinstance(A, Identity):
        return 1.0
    if isinstance(A, Scaled):
        inner = _multiple(A.operator)
        return None if inner is None else A.scalar * inner
    return None


def _nystrom(C: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
    """F = C L⁻ᴴ with L Lᴴ = C[pivots], so that F Fᴴ = K[:, S] K[S, S]⁻¹ K[S, :]; differentiable in C."""
    W = _wide(C)
    S = W[pivots]
    L, order = torch.linalg.cholesky_ex((S + S.mH) / 2)
    if int(order) > 0:  # rounding exhausted K before the threshold did: keep the leading minor that is definite
        return _nystrom(C[:, : int(order) - 1], pivots[: int(order) - 1])
    return torch.linalg.solve_triangular(L.mH, W, upper=True, left=False).to(C.dtype), pivots


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float64))


__all__: Sequence[str] = [
    "DiagonalPreconditioner",
    "Jacobi",
    "LowRankPreconditioner",
    "PivotedCholesky",
    "Preconditioner",
    "RandomlyPivotedCholesky",
    "split_shift",
]
