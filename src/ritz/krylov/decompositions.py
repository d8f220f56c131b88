"""The public decompositions: Krylov runs attached to autograd by their adjoint recurrences.

One starting vector (n,) gives plain matrices; a block (n, m) runs m independent iterations that share every product,
and the results carry a leading batch dimension m.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..errors import OperandError
from ..numerics import as_block, check_finite
from ..operators.base import LinearOperator, check_square
from ..operators.convert import aslinearoperator
from ..pairing import Cotangents, Pair, Run
from .arnoldi import adjoint_arnoldi, run_arnoldi
from .golub_kahan import adjoint_golub_kahan, run_golub_kahan
from .lanczos import adjoint_lanczos, run_lanczos


class Tridiagonal(NamedTuple):
    """A Q = Q T + r e_kᵀ with T = tridiag(beta, alpha, beta). Leading batch dimension for a block of vectors."""

    Q: Tensor  # (n, k), orthonormal columns; zero past depth
    alpha: Tensor  # (k,), real; alpha[0] past depth, a harmless filler
    beta: Tensor  # (k - 1,), real and >= 0; zero past depth
    residual: Tensor  # (n,), r, not normalised
    norm: Tensor  # (), ‖v‖
    depth: Tensor  # (), int64: columns that exist


class Hessenberg(NamedTuple):
    """A Q = Q H + r e_kᵀ with H upper Hessenberg. Leading batch dimension for a block of vectors."""

    Q: Tensor  # (n, k)
    H: Tensor  # (k, k); past depth zero but for H[0, 0] on the diagonal
    residual: Tensor  # (n,)
    norm: Tensor  # ()
    depth: Tensor  # ()


class Bidiagonal(NamedTuple):
    """A V = U B, Aᴴ U = V Bᴴ + r e_kᵀ with B upper bidiagonal. Leading batch dimension for a block of vectors."""

    U: Tensor  # (p, k)
    alpha: Tensor  # (k,), diagonal of B
    beta: Tensor  # (k - 1,), superdiagonal of B
    V: Tensor  # (n, k)
    residual: Tensor  # (n,)
    norm: Tensor  # ()
    depth: Tensor  # ()


def lanczos(A: LinearOperator, v: Tensor, k: int, *, reorthogonalize: bool = True) -> Tridiagonal:
    """k steps of Lanczos from v, differentiable in A's tensors and v by the adjoint recurrence.

    Args:
        A: Hermitian operator (n, n); one of unknown symmetry is taken to be Hermitian.
        v: starting vector (n,), or a block (n, m) of independent ones.
        k: number of steps. At breakdown (invariant subspace) the iteration ends: ``depth`` says where, the rest is
            masked, and gradients stay finite.
        reorthogonalize: against the whole basis by classical Gram–Schmidt, twice a step.

    Returns:
        :class:`Tridiagonal`. ``depth`` is not differentiable.

    Raises:
        OperandError: A is known not to be Hermitian; wrong shapes. NonFiniteError: NaN or Inf.

    Cost: k products, 4 readings of the basis a step; backward k adjoint products and one pairing of width k.
    Gradient: that of the computed factorisation, first order. With ``reorthogonalize`` it is the derivative of the
        orthogonalised loop for any perturbation of A, symmetric or not, without it that of the three-term recurrence;
        the two agree on Hermitian perturbations.
    Reference: Krämer, Moreno-Muñoz, Roy, Hauberg 2024; docs/derivations/lanczos.md.
    """
    A = aslinearoperator(A)
    A = aslinearoperator(A)
    check_square(A, "Lanczos")
    if A.hermitian is False:
        raise OperandError("Lanczos needs a Hermitian operator; use arnoldi, or A.declare(hermitian=True) if it is")
    A = A if A.hermitian else A.declare(hermitian=True)
    V = _start(A, v, k, A.shape[0])
    with Run(A, V) as run:
        state = run_lanczos(run.matmat, V.detach(), k, reorthogonalize=reorthogonalize)

        def rule(
            Q_bar: Tensor | None,
            alpha_bar: Tensor | None,
            beta_bar: Tensor | None,
            r_bar: Tensor | None,
            norm_bar: Tensor | None,
        ) -> Cotangents:
            Lam, V_bar = adjoint_lanczos(
                run.adjoint(V.shape[1]),
                state,
                Q_bar=Q_bar,
                alpha_bar=alpha_bar,
                beta_bar=beta_bar,
                residual_bar=r_bar,
                norm_bar=norm_bar,
                reorthogonalize=reorthogonalize,
            )
            return Cotangents([Pair(Lam)], [V_bar])

    values = (state.Q, state.alpha, state.beta[:, :-1], state.residual, state.norm)
    Q, alpha, beta, residual, norm = run.attach(values, rule, [state.Q], name="krylov.lanczos")
    out = (Q.mT, alpha, beta, residual, norm, state.depth)
    return Tridiagonal(*_unbatch(out, v))


def arnoldi(A: LinearOperator, v: Tensor, k: int, *, reorthogonalize: bool = True) -> Hessenberg:
    """k steps of Arnoldi from v, differentiable in A's tensors and v by the adjoint recurrence.

    Arguments, errors, cost and gradient as in :func:`lanczos`, for any square operator; without ``reorthogonalize``
    one pass of classical Gram–Schmidt a step.
    """
    A = aslinearoperator(A)
    A = aslinearoperator(A)
    check_square(A, "Arnoldi")
    V = _start(A, v, k, A.shape[0])
    with Run(A, V) as run:
        state = run_arnoldi(run.matmat, V.detach(), k, reorthogonalize=reorthogonalize)

        def rule(
            Q_bar: Tensor | None, H_bar: Tensor | None, r_bar: Tensor | None, norm_bar: Tensor | None
        ) -> Cotangents:
            Lam, V_bar = adjoint_arnoldi(
                run.adjoint(V.shape[1]),
                state,
                Q_bar=Q_bar,
                H_bar=H_bar,
                residual_bar=r_bar,
                norm_bar=norm_bar,
                reorthogonalize=reorthogonalize,
            )
            return Cotangents([Pair(Lam)], [V_bar])

    values = (state.Q, state.H, state.residual, state.norm)
    Q, H, residual, norm = run.attach(values, rule, [state.Q], name="krylov.arnoldi")
    return Hessenberg(*_unbatch((Q.mT, H, residual, norm, state.depth), v))


def golub_kahan(A: LinearOperator, v: Tensor, k: int, *, reorthogonalize: bool = True) -> Bidiagonal:
    """k steps of Golub–Kahan bidiagonalisation of A (p, n) from v (n,), differentiable in A's tensors and v.

    Arguments, errors and gradient as in :func:`lanczos`, for any operator, rectangular or not.
    Cost: k products and k adjoint products; backward the same again and two pairings of width k.
    """
    A = aslinearoperator(A)
    A = aslinearoperator(A)
    V = _start(A, v, k, A.shape[1])
    with Run(A, V) as run:
        rmatmat = _late_adjoint(run, V.shape[1])
        state = run_golub_kahan(run.matmat, rmatmat, V.detach(), k, reorthogonalize=reorthogonalize)

        def rule(
            U_bar: Tensor | None,
            alpha_bar: Tensor | None,
            beta_bar: Tensor | None,
            V_bar: Tensor | None,
            r_bar: Tensor | None,
            norm_bar: Tensor | None,
        ) -> Cotangents:
            Lam, Mu, v_bar = adjoint_golub_kahan(
                run.matmat,
                run.adjoint(V.shape[1]),
                state,
                U_bar=U_bar,
                V_bar=V_bar,
                alpha_bar=alpha_bar,
                beta_bar=beta_bar,
                residual_bar=r_bar,
                norm_bar=norm_bar,
                reorthogonalize=reorthogonalize,
            )
            return Cotangents([Pair(Lam), Pair(Mu)], [v_bar])

    values = (state.U, state.alpha, state.beta, state.V, state.residual, state.norm)
    blocks, through_adjoint = [state.V, state.U], [False, True]
    outs = run.attach(values, rule, blocks, adjoint=through_adjoint, name="krylov.golub_kahan")
    U, alpha, beta, right, residual, norm = outs
    return Bidiagonal(*_unbatch((U.mT, alpha, beta, right.mT, residual, norm, state.depth), v))


def _start(A: LinearOperator, v: Tensor, k: int, size: int) -> Tensor:
    V = as_block(v, size, "v", dtype=A.dtype, device=A.device)
    check_finite(V, "v")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise OperandError(f"k={k!r} steps were asked for; expected a whole number >= 1")
    return V


def _unbatch(parts: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, ...]:
    return tuple(p.squeeze(0) for p in parts) if v.ndim == 1 else parts


def _late_adjoint(run: Run, width: int) -> Callable[[Tensor], Tensor]:
    """The adjoint product, taken once the first product has bound the operator's callables."""
    inner: list[Callable[[Tensor], Tensor]] = []

    def product(X: Tensor) -> Tensor:
        if not inner:
            inner.append(run.adjoint(width))
        return inner[0](X)

    return product


__all__ = ["Bidiagonal", "Hessenberg", "Tridiagonal", "arnoldi", "golub_kahan", "lanczos"]
