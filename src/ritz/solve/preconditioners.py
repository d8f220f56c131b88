"""Preconditioners: operators P near A with P⁻¹ X, R⁻¹ X for a root P = R Rᴴ, and log det P; the diagonal one.

A preconditioner is an operator like any other: ``P @ X``, ``P.invsqrt(X)`` and ``P.logdet()`` are differentiable in
``P.tensors()``, and those hang on A's tensors when P was built with gradients enabled. A solve does not depend on P,
so it takes P as a constant; a preconditioned log-determinant does depend on it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DomainError, OperandError
from ..operators import Diagonal, LinearOperator
from .root import Shift
from .system import Product


class Preconditioner(LinearOperator):
    """A Hermitian positive definite operator that is easy to invert."""

    @abstractmethod
    def solve(self, X: Tensor) -> Tensor:
        """P⁻¹ X for a block (n, k), with P a constant."""

    @abstractmethod
    def inverse_root(self) -> LinearOperator:
        """R⁻¹ with P = R Rᴴ as an operator, differentiable in :meth:`tensors`.

        R is the Hermitian positive root, but for P = F Fᴴ + D with a diagonal D.
        """

    @abstractmethod
    def logdet(self) -> Tensor:
        """log det P, a real scalar, differentiable in :meth:`tensors`."""

    def log_forms(self, Z: Tensor) -> Tensor | None:
        """zᴴ log(P) z of every column of Z, (m,) in double precision without a graph; None where that is not cheap."""
        return None

    def invsqrt(self, X: Tensor) -> Tensor:
        """R⁻¹ X for a block (n, k), differentiable in :meth:`tensors` and X."""
        return self.inverse_root()._matmat(X)

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

    def inverse_root(self) -> LinearOperator:
        root = Diagonal(self.entries.rsqrt().to(self.dtype))
        return root.declare(hermitian=True, psd=True)

    def logdet(self) -> Tensor:
        return self.entries.log().sum()

    @torch.no_grad()
    def log_forms(self, Z: Tensor) -> Tensor:
        return (self.entries.double().log().unsqueeze(1) * Z.abs().double().square()).sum(0)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.entries,)

    def diagonal(self) -> Tensor:
        return self.entries.to(self.dtype)


@dataclass(frozen=True)
class Jacobi:
    """The diagonal of A as a preconditioner.

    Cost: ``A.diagonal()``, which for a bare callable takes n products.
    """

    def build(self, A: LinearOperator, shift: Shift | None = None) -> DiagonalPreconditioner:
        """P = diag(A) + shift, the shift a number, a tensor of one element, or one per row (n,)."""
        return DiagonalPreconditioner(A.diagonal() if shift is None else A.diagonal() + shift, A.dtype)


def as_preconditioner(P: Any, A: LinearOperator) -> Preconditioner:
    """What a user gave as ``preconditioner=`` of a log-determinant, built for A with gradients where they are on.

    Raises:
        OperandError: neither a value with ``build`` nor a :class:`Preconditioner`; a shape that does not fit.
    """
    if hasattr(P, "build"):
        P = P.build(A)
    if not (hasattr(P, "inverse_root") and hasattr(P, "logdet")):
        raise OperandError(
            f"preconditioner is a {type(P).__name__}; expected Auto(), a value such as RandomlyPivotedCholesky(50), or "
            "what its build(A) returns: a log-determinant needs log det P and a root of P, not only P⁻¹ X"
        )
    _check_shape(P, A)
    return P  # type: ignore[no-any-return]


def as_product(P: Any, A: LinearOperator) -> Product:
    """What a user gave as ``preconditioner=`` of a solve, as the product X -> P⁻¹ X."""
    if hasattr(P, "build"):
        with torch.no_grad():
            P = P.build(A)
    if hasattr(P, "solve"):
        _check_shape(P, A)
        return P.solve  # type: ignore[no-any-return]
    if callable(P):
        return P  # type: ignore[no-any-return]
    raise OperandError(
        f"preconditioner is a {type(P).__name__}; expected a value such as Jacobi() or RandomlyPivotedCholesky(50), "
        "an object with solve(X) = P⁻¹ X, or a callable X -> P⁻¹ X (for an operator M near A⁻¹: lambda X: M @ X)"
    )


def _check_shape(P: Any, A: LinearOperator) -> None:
    shape = getattr(P, "shape", A.shape)
    if tuple(shape) != A.shape:
        raise OperandError(f"the preconditioner has shape {tuple(shape)}; the operator has shape {A.shape}")
