"""R⁻¹ for a preconditioner P = R Rᴴ, and the operator B = R⁻¹ A R⁻ᴴ that a preconditioned Krylov run sees.

Both are operators like any other, with their own pairing: what is computed from B has its gradient in A *and* in P.
docs/derivations/preconditioning.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DomainError
from ..numerics import full_precision, has_tangent, in_transform, unwrap
from ..operators import LinearOperator
from ..operators.base import Gradients
from ..product import product

Shift = float | Tensor

# Newton steps for the root of I + G/σ²: about log₂ √(condition) of them to come near, five more to converge.
NEWTON_STEPS = 40


def wide(x: Tensor) -> Tensor:
    """x in double precision."""
    return x.to(torch.promote_types(x.dtype, torch.float64))


def frozen(x: Tensor) -> Tensor:
    """A copy on the graph of x, also where gradients are off: changes of x in place do not reach it."""
    with torch.enable_grad():
        return x.clone()


class InverseRoot(LinearOperator):
    """(F Fᴴ + σ² I)^(-1/2), Hermitian positive definite, by the singular values s and vectors U of F.

        P^(-1/2) X = X/σ + U diag(1/√(s² + σ²) − 1/σ) Uᴴ X,

    in double precision whatever the dtype of X: the two terms cancel in the directions of U down to σ/√(s² + σ²),
    which in float32 would leave nothing at s²/σ² = 1e14, and few digits at 1e7.

    Its pairing is the Fréchet derivative of x^(-1/2) at P, in the basis (U, its complement): r×r divided differences
    −1/(√p √q (√p + √q)), which do not cancel; eigenvectors are not differentiated, so ties do no harm.

    Args:
        factor: F (n, r), double precision.
        shift: σ² > 0, a number or a tensor of one element. Both are copied: the operator stays what it was made from.
        dtype: of the operator; that of the factor by default.
        own: F is nobody else's, and is kept without a copy.

    Cost: a product with k vectors 4 n r k operations, set-up 4 n r²; 2 n r numbers in double precision, F and Q of
    F = QR (F R⁻¹ in place of Q would lose what the condition of F is).
    Gradient: F and σ²; the first derivative by the pairing, further ones by Newton's iteration for the root.
    """

    def __init__(self, factor: Tensor, shift: Shift, dtype: torch.dtype | None = None, *, own: bool = False) -> None:
        n = factor.shape[0]
        super().__init__((n, n), dtype or factor.dtype, factor.device, psd=True)
        value = float(unwrap(shift).detach() if isinstance(shift, Tensor) else shift)
        if not 0 < value < float("inf"):
            raise DomainError(f"a low-rank preconditioner needs a shift σ² > 0; got {value:.3g}: build(A, shift=...)")
        self.factor = factor if own else frozen(factor)
        self.shift_ = frozen(shift) if isinstance(shift, Tensor) else shift
        with torch.no_grad(), full_precision():
            self._Q, R = torch.linalg.qr(wide(unwrap(factor).detach()))
            self._u, s, self._wh = torch.linalg.svd(R, full_matrices=False)
            self.singular = s
            self.sigma2 = value
            self._roots = (s * s + value).sqrt()  # √p of the near directions
        self._sigma = value**0.5

    # -- in the basis U ---------------------------------------------------------------------------------------------

    def coefficients(self, X: Tensor) -> Tensor:
        """Uᴴ X, for X in double precision."""
        return self._u.mH @ (self._Q.mH @ X)

    def spread(self, T: Tensor) -> Tensor:
        """U T."""
        return self._Q @ (self._u @ T)

    def inverse(self, X: Tensor) -> Tensor:
        """P⁻¹ X, in X's dtype.

        The projection I − U Uᴴ is applied twice, so that what remains of the large directions is not blown up by
        1/σ²: in one pass P⁻¹ loses its definiteness at s²/σ² ≈ 1/eps.
        """
        Y = wide(X)
        T = self.coefficients(Y)
        Y = Y - self.spread(T)
        again = self.coefficients(Y)
        small = (T + again) / self._roots.square().unsqueeze(1) - again / self.sigma2
        return (Y / self.sigma2 + self.spread(small)).to(X.dtype)

    def _numeric(self, X: Tensor) -> Tensor:
        with torch.no_grad(), full_precision():
            Y, root, sigma = wide(X), self._roots, self._sigma
            small = -self.singular.square() / (root * sigma * (root + sigma))
            return (Y / sigma + self.spread(small.unsqueeze(1) * self.coefficients(Y))).to(X.dtype)

    # -- the operator -----------------------------------------------------------------------------------------------

    def _matmat(self, X: Tensor) -> Tensor:
        return product(self, X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return product(self, X)

    def _recorded(self, X: Tensor, *tensors: Tensor) -> Tensor:
        """(X + F h(FᴴF) FᴴX)/σ with h(g) = −1/(σ² q (1 + q)), q = √(1 + g/σ²); differentiable to any order."""
        F = wide(tensors[0])
        known = torch.tensor(self.sigma2, dtype=torch.float64, device=F.device)
        sigma2 = wide(tensors[1]).reshape(()) if len(tensors) > 1 else known
        eye = torch.eye(F.shape[1], dtype=F.dtype, device=F.device)
        root = newton_root(eye + (F.mH @ F) / sigma2)
        Y = wide(X)
        small = torch.linalg.solve(root @ (eye + root), F.mH @ Y)
        return ((Y - F @ small / sigma2) / sigma2.sqrt()).to(X.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.factor, self.shift_) if isinstance(self.shift_, Tensor) else (self.factor,)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        L, Q = wide(unwrap(Lam)), wide(unwrap(Q))
        a, b, root, sigma = self.coefficients(L), self.coefficients(Q), self._roots, self._sigma
        M = a @ b.mH  # Uᴴ (Λ Qᴴ) U
        near = -1 / (root.unsqueeze(1) * root * (root.unsqueeze(1) + root))  # f[p_i, p_j]
        far = (-1 / (sigma * root * (sigma + root))).unsqueeze(1)  # f[σ², p_j]
        grads: list[Tensor | None] = [None]
        if self.factor.requires_grad:
            N = self.singular.unsqueeze(1) * self._wh  # Uᴴ F
            to_L, to_Q = b.mH @ (far * N), a.mH @ (far * N)
            inside_U = (near * (M + M.mH)) @ N - a @ to_L - b @ to_Q
            to_F = self.spread(inside_U).addmm_(L, to_L).addmm_(Q, to_Q)  # n r numbers: one array of them
            grads = [to_F.to(self.factor.dtype)]
        if isinstance(self.shift_, Tensor):
            inside = M.diagonal().real
            outside = (L * Q.conj()).real.sum() - inside.sum()
            value = -0.5 * ((inside / root**3).sum() + outside / sigma**3)
            grads.append(value.to(self.shift_.dtype).reshape(self.shift_.shape))
        return tuple(grads)


def gram(F: Tensor) -> Tensor:
    """FᴴF, differentiable to any order."""
    return F.mH @ F if in_transform() or has_tangent(F) else _Gram.apply(F)


class _Gram(torch.autograd.Function):
    """FᴴF, with F (Ḡ + Ḡᴴ) for a gradient: one array like F where autograd's own rule makes three."""

    @staticmethod
    def forward(F: Tensor) -> Tensor:
        return F.mH @ F

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Tensor:
        (F,) = ctx.saved_tensors
        out: Tensor = F @ (G + G.mH)
        return out


class Preconditioned(LinearOperator):
    """B = R⁻¹ A R⁻ᴴ with R⁻¹ an operator: Hermitian, and positive semidefinite, where A is.

    The pairing reaches A's tensors without a further product; those of R⁻¹ need A R⁻ᴴ Q, one block product of the
    pairing's width (two where Λ is not a multiple of Q column by column, as it is for quadratic forms).
    """

    def __init__(self, operator: LinearOperator, root: LinearOperator) -> None:
        super().__init__(
            operator.shape, operator.dtype, operator.device, hermitian=operator.hermitian, psd=operator.psd
        )
        self.operator, self.root = operator, root

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.operator, self.root)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Preconditioned(*children)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.root._matmat(self.operator._matmat(self.root._rmatmat(X)))

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.root._matmat(self.operator._rmatmat(self.root._rmatmat(X)))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.operator.tensors() + self.root.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        multiple = _multiples(Lam, Q)
        Y = self.root._rmatmat(Q)
        Z = self.root._rmatmat(Lam) if multiple is None else multiple * Y
        inner = self.operator.pair(Z, Y)
        if not any(t.requires_grad for t in self.root.tensors()):
            return inner + (None,) * len(self.root.tensors())
        W = self.operator._matmat(Y)
        if multiple is not None and self.operator.hermitian:
            return inner + self.root.pair(2 * Lam, W)
        both = torch.cat([W, self.operator._rmatmat(Z)], 1)
        return inner + self.root.pair(torch.cat([Lam, Q], 1), both)


def _multiples(Lam: Tensor, Q: Tensor) -> Tensor | None:
    """c (k,) where Λ is Q diag(c) up to rounding, as for a single quadratic form of a column; None otherwise."""
    size = Q.abs().square().sum(0)
    c = (Q.conj() * Lam).sum(0).real / torch.where(size > 0, size, 1.0)
    off = (Lam - c * Q).abs().square().sum(0)
    limit = (8 * torch.finfo(Q.dtype).eps) ** 2 * Lam.abs().square().sum(0)
    return c if bool((off <= limit).all()) else None


def newton_root(M: Tensor) -> Tensor:
    """M^(1/2) of a Hermitian positive definite (r, r) matrix by the coupled Newton iteration, in recorded operations.

    Reference: Denman, Beavers 1976; Higham, Functions of Matrices, 2008, equation (6.15).
    """
    X, Y = M, torch.eye(M.shape[0], dtype=M.dtype, device=M.device)
    for _ in range(NEWTON_STEPS):
        X_next = 0.5 * (X + torch.linalg.inv(Y))
        Y = 0.5 * (Y + torch.linalg.inv(X))
        change = float(torch.linalg.matrix_norm((X_next - X).detach()))
        X = X_next
        if change <= 1e-14 * float(torch.linalg.matrix_norm(X.detach())):
            break
    return X
