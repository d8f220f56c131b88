"""Textbook Krylov iterations as naive loops of torch operations, to differentiate through with autograd.

They share no code with the library, take any A with a product, and keep every vector. Real or complex; inner
products conjugate their left argument. They do not handle breakdown: choose k below the dimension of the Krylov
space. An exactly zero divisor raises.

A gradient of `lanczos` with respect to a matrix holds for Hermitian directions only. Outside of them the recurrence,
with and without reorthogonalisation, are different functions, so parametrise A = (M + Mᴴ)/2 or compare Hermitian
parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Bidiagonal", "Hessenberg", "Tridiagonal", "arnoldi", "golub_kahan", "lanczos"]


class Tridiagonal(NamedTuple):
    """A Q = Q T + r e_kᵀ with T = tridiag(beta, alpha, beta).

    Shapes: Q (n, k), alpha (k,), beta (k − 1,), residual r (n,); norm = ‖v‖.
    """

    Q: Tensor
    alpha: Tensor
    beta: Tensor
    residual: Tensor
    norm: Tensor

    @property
    def T(self) -> Tensor:
        """The real symmetric tridiagonal matrix (k, k)."""
        return torch.diag(self.alpha) + torch.diag(self.beta, 1) + torch.diag(self.beta, -1)


class Hessenberg(NamedTuple):
    """A Q = Q H + r e_kᵀ with Q (n, k), upper Hessenberg H (k, k), residual r (n,), norm = ‖v‖."""

    Q: Tensor
    H: Tensor
    residual: Tensor
    norm: Tensor


class Bidiagonal(NamedTuple):
    """A V = U B, Aᴴ U = V Bᵀ + r e_kᵀ with B = diag(alpha) + superdiag(beta), U (m, k), V (n, k), r (n,), norm =
    ‖v‖."""

    U: Tensor
    alpha: Tensor
    beta: Tensor
    V: Tensor
    residual: Tensor
    norm: Tensor

    @property
    def B(self) -> Tensor:
        """The real upper bidiagonal matrix (k, k)."""
        return torch.diag(self.alpha) + torch.diag(self.beta, 1)


def lanczos(A: Any, v: Tensor, k: int, *, reorthogonalize: bool = True) -> Tridiagonal:
    """Run k steps of the Lanczos three-term recurrence for Hermitian A.

    Args:
        A: anything with `A @ x` for x (n,), or a function.
        v: start vector (n,).
        k: steps, at least 1.
        reorthogonalize: subtract the components along the whole basis, twice, in every step.

    Returns:
        Tridiagonal, with real alpha and beta.

    Raises:
        ZeroDivisionError: at an exact breakdown before step k.

    Reference: Y. Saad, Numerical Methods for Large Eigenvalue Problems, 2nd edition 2011, chapter 6.
    """
    product = _product(A)
    norm = torch.linalg.vector_norm(v)
    columns: list[Tensor] = [_divide(v, norm, 0)]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for j in range(_steps(k)):
        q = columns[j]
        w = product(q)
        if j > 0:
            w = w - betas[j - 1] * columns[j - 1]
        alpha = torch.real(torch.vdot(q, w))
        w = w - alpha * q
        if reorthogonalize:
            w = _project_out(w, columns)
            w = _project_out(w, columns)
        alphas.append(alpha)
        if j + 1 < k:
            beta = torch.linalg.vector_norm(w)
            columns.append(_divide(w, beta, j + 1))
            betas.append(beta)
    return Tridiagonal(torch.stack(columns, 1), torch.stack(alphas), _stack(betas, norm), w, norm)


def arnoldi(A: Any, v: Tensor, k: int, *, reorthogonalize: bool = True) -> Hessenberg:
    """Run k steps of Arnoldi's iteration for general square A.

    Args:
        A, v, k: as for `lanczos`.
        reorthogonalize: classical Gram–Schmidt twice; otherwise modified Gram–Schmidt once.

    Returns:
        Hessenberg.

    Raises:
        ZeroDivisionError: at an exact breakdown before step k.

    Reference: Saad (2011), chapter 6.
    """
    product = _product(A)
    norm = torch.linalg.vector_norm(v)
    columns, H_columns = [_divide(v, norm, 0)], []
    for j in range(_steps(k)):
        w = product(columns[j])
        if reorthogonalize:
            Q = torch.stack(columns, 1)
            first = Q.mH @ w
            w = w - Q @ first
            second = Q.mH @ w
            w = w - Q @ second
            h = list(first + second)
        else:
            h = []
            for q in columns:
                h.append(torch.vdot(q, w))
                w = w - h[-1] * q
        if j + 1 < k:
            length = torch.linalg.vector_norm(w)
            columns.append(_divide(w, length, j + 1))
            h.append(length.to(w.dtype))
        H_columns.append(torch.stack(h + [torch.zeros_like(h[0])] * (k - len(h))))
    return Hessenberg(torch.stack(columns, 1), torch.stack(H_columns, 1), w, norm)


def golub_kahan(
    A: Any, v: Tensor, k: int, *, adjoint: Callable[[Tensor], Tensor] | None = None, reorthogonalize: bool = True
) -> Bidiagonal:
    """Run k steps of Golub–Kahan bidiagonalisation from v on the right: B is upper bidiagonal and V e₁ = v/‖v‖.

    Args:
        A: (m, n) with `A @ x`, or a function.
        v: start vector (n,).
        k: steps, at least 1.
        adjoint: x (m,) ↦ Aᴴ x (n,); taken from `A.mH` when None.
        reorthogonalize: of both bases, twice in every step.

    Returns:
        Bidiagonal, with real alpha and beta.

    Raises:
        ZeroDivisionError: at an exact breakdown before step k.

    Reference: G. H. Golub and W. Kahan, Calculating the singular values and pseudo-inverse of a matrix, 1965.
    """
    product = _product(A)
    product_adjoint = adjoint if adjoint is not None else _product(A.mH)
    norm = torch.linalg.vector_norm(v)
    right: list[Tensor] = [_divide(v, norm, 0)]
    left: list[Tensor] = []
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for j in range(_steps(k)):
        u = product(right[j])
        if j > 0:
            u = u - betas[j - 1] * left[j - 1]
            if reorthogonalize:
                u = _project_out(_project_out(u, left), left)
        alphas.append(torch.linalg.vector_norm(u))
        left.append(_divide(u, alphas[j], j))
        w = product_adjoint(left[j]) - alphas[j] * right[j]
        if reorthogonalize:
            w = _project_out(_project_out(w, right), right)
        if j + 1 < k:
            betas.append(torch.linalg.vector_norm(w))
            right.append(_divide(w, betas[j], j + 1))
    return Bidiagonal(torch.stack(left, 1), torch.stack(alphas), _stack(betas, norm), torch.stack(right, 1), w, norm)


def _project_out(w: Tensor, columns: list[Tensor]) -> Tensor:
    """One pass of classical Gram–Schmidt: w − Q Qᴴ w."""
    Q = torch.stack(columns, 1)
    return w - Q @ (Q.mH @ w)


def _product(A: Any) -> Callable[[Tensor], Tensor]:
    return (lambda x: A @ x) if hasattr(A, "__matmul__") else A


def _divide(w: Tensor, length: Tensor, step: int) -> Tensor:
    if length == 0:
        raise ZeroDivisionError(
            f"breakdown at step {step}: the Krylov space has dimension {step}, and this loop does not handle that"
        )
    return w / length


def _steps(k: int) -> int:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return k


def _stack(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values) if values else like.new_zeros(0)
