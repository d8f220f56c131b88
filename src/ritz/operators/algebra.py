"""Algebra of operators: sum, scale, product, adjoint, declared flags. Flags, tensors and pairings distribute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import refuse_vmap
from .base import Gradients, LinearOperator


def _all(flags: Sequence[bool | None]) -> bool | None:
    """True if all are known true, None otherwise: a sum of non-Hermitian operators may well be Hermitian."""
    return True if all(flags) else None


def wanted(tensors: Sequence[Tensor]) -> bool:
    """Whether one of the tensors asks for a gradient."""
    return any(t.requires_grad for t in tensors)


def _check_alike(operators: Sequence[LinearOperator], what: str) -> None:
    first = operators[0]
    for other in operators[1:]:
        if (other.dtype, other.device) != (first.dtype, first.device):
            raise OperandError(
                f"{what} mixes {first.dtype} on {first.device} with {other.dtype} on {other.device}; convert one"
            )


class Sum(LinearOperator):
    """A₁ + A₂ + …; nested sums are flattened. One product each; gradients go to every term."""

    def __init__(self, terms: Sequence[LinearOperator]) -> None:
        flat: list[LinearOperator] = []
        for term in terms:
            flat.extend(term.children if isinstance(term, Sum) else (term,))
        _check_alike(flat, "a sum")
        for t in flat[1:]:
            if t.shape != flat[0].shape:
                raise OperandError(f"a sum of operators of shapes {flat[0].shape} and {t.shape}; shapes must agree")
        super().__init__(
            flat[0].shape,
            flat[0].dtype,
            flat[0].device,
            hermitian=_all([t.hermitian for t in flat]),
            psd=_all([t.psd for t in flat]),
        )
        self.terms = tuple(flat)

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return self.terms

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Sum(children)

    def _matmat(self, X: Tensor) -> Tensor:
        Y = self.terms[0]._matmat(X)
        for term in self.terms[1:]:
            Y = Y + term._matmat(X)
        return Y

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.adjoint_product(X.shape[1])(X)

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        products = [t.adjoint_product(width) for t in self.terms]

        def apply(X: Tensor) -> Tensor:
            Y = products[0](X)
            for p in products[1:]:
                Y = Y + p(X)
            return Y

        return apply

    def diagonal(self) -> Tensor:
        return torch.stack([t.diagonal() for t in self.terms]).sum(0)

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        return torch.stack([t.columns(idx) for t in self.terms]).sum(0)

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for term in self.terms for t in term.tensors())

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return tuple(g for term in self.terms for g in term.pair(Lam, Q))


class Scaled(LinearOperator):
    """c·A with c a number or a tensor of one element (which gets a gradient)."""

    def __init__(self, operator: LinearOperator, scalar: Any) -> None:
        if isinstance(scalar, Tensor):
            refuse_vmap(scalar, "the scale of an operator")
        value = scalar.detach().reshape(()).item() if isinstance(scalar, Tensor) else scalar
        if isinstance(value, complex) and not operator.dtype.is_complex:
            raise OperandError(f"a complex scale {value} came with a real operator ({operator.dtype}); make it complex")
        real = not isinstance(value, complex) or value.imag == 0
        nonnegative = real and (value.real >= 0)
        hermitian = operator.hermitian if real else None
        super().__init__(
            operator.shape,
            operator.dtype,
            operator.device,
            hermitian=None if value == 0 and not hermitian else hermitian,  # zero times anything square is Hermitian
            psd=operator.psd if (operator.psd and nonnegative) else None,
        )
        self.operator, self.scalar = operator, scalar

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Scaled(children[0], self.scalar)

    def _factor(self) -> Any:
        return self.scalar.to(self.dtype).reshape(()) if isinstance(self.scalar, Tensor) else self.scalar

    def _conj_factor(self) -> Any:
        c = self._factor()
        return c.conj() if isinstance(c, Tensor) else c.conjugate()

    def _matmat(self, X: Tensor) -> Tensor:
        return self._factor() * self.operator._matmat(X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self._conj_factor() * self.operator._rmatmat(X)

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        inner, c = self.operator.adjoint_product(width), self._conj_factor()
        return lambda X: c * inner(X)

    def diagonal(self) -> Tensor:
        return self._factor() * self.operator.diagonal()

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        return self._factor() * self.operator.columns(idx)

    def tensors(self) -> tuple[Tensor, ...]:
        own = (self.scalar,) if isinstance(self.scalar, Tensor) else ()
        return own + self.operator.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        own: Gradients = ()
        if isinstance(self.scalar, Tensor):
            grad = None
            if self.scalar.requires_grad:
                grad = torch.vdot(self.operator._matmat(Q).reshape(-1), Lam.reshape(-1)).reshape(self.scalar.shape)
                grad = (grad if self.scalar.is_complex() else grad.real).to(self.scalar.dtype)
            own = (grad,)
        return own + self.operator.pair(self._conj_factor() * Lam, Q)


class Product(LinearOperator):
    """A B: (n, k) times (k, m). ``A @ A.mH`` is recognised as Hermitian positive semidefinite."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        _check_alike([left, right], "a product")
        if left.shape[1] != right.shape[0]:
            raise OperandError(f"a product of shapes {left.shape} and {right.shape}; inner sizes must agree")
        gram = _is_adjoint_of(left, right) or None
        super().__init__(
            (left.shape[0], right.shape[1]), left.dtype, left.device, hermitian=gram, psd=gram
        )
        self.left, self.right = left, right

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.left, self.right)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        rebuilt = Product(*children)
        rebuilt.hermitian, rebuilt.psd = self.hermitian, self.psd
        return rebuilt

    def _matmat(self, X: Tensor) -> Tensor:
        return self.left._matmat(self.right._matmat(X))

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.right._rmatmat(self.left._rmatmat(X))

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        left, right = self.left.adjoint_product(width), self.right.adjoint_product(width)
        return lambda X: right(left(X))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.left.tensors() + self.right.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        left, right = self.left.tensors(), self.right.tensors()
        # Only what is wanted: the right factor's gradient needs the left one's adjoint, which may not exist.
        return (
            self.left.pair(Lam, self.right._matmat(Q)) if wanted(left) else (None,) * len(left)
        ) + (self.right.pair(self.left._rmatmat(Lam), Q) if wanted(right) else (None,) * len(right))


def product(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """The product of two operators."""
    return Product(left, right)


class Adjoint(LinearOperator):
    """Aᴴ. Its pairing swaps the blocks: Re⟨Λ, dAᴴ Q⟩ = Re⟨Q, dA Λ⟩."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            (operator.shape[1], operator.shape[0]),
            operator.dtype,
            operator.device,
            hermitian=operator.hermitian,
            psd=operator.psd,
        )
        self.operator = operator

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Adjoint(children[0])

    def _matmat(self, X: Tensor) -> Tensor:
        return self.operator._rmatmat(X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.operator._matmat(X)

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        return self.operator._matmat

    def diagonal(self) -> Tensor:
        return self.operator.diagonal().conj().resolve_conj()

    @property
    def mH(self) -> LinearOperator:
        return self.operator

    def tensors(self) -> tuple[Tensor, ...]:
        return self.operator.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return self.operator.pair(Q, Lam)


class Conjugate(LinearOperator):
    """The entrywise complex conjugate of A (real operators never need it)."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            operator.shape, operator.dtype, operator.device, hermitian=operator.hermitian, psd=operator.psd
        )
        self.operator = operator

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Conjugate(children[0])

    def _matmat(self, X: Tensor) -> Tensor:
        # Resolved, because a callable may take its vectors to NumPy.
        return self.operator._matmat(X.conj().resolve_conj()).conj().resolve_conj()

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.operator._rmatmat(X.conj().resolve_conj()).conj().resolve_conj()

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        inner = self.operator.adjoint_product(width)
        return lambda X: inner(X.conj().resolve_conj()).conj().resolve_conj()

    def diagonal(self) -> Tensor:
        return self.operator.diagonal().conj().resolve_conj()

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        return self.operator.columns(idx).conj().resolve_conj()

    def tensors(self) -> tuple[Tensor, ...]:
        return self.operator.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return self.operator.pair(Lam.conj().resolve_conj(), Q.conj().resolve_conj())


class Declared(LinearOperator):
    """An operator with flags that the caller declares and answers for."""

    def __init__(self, operator: LinearOperator, *, hermitian: bool | None = None, psd: bool | None = None) -> None:
        if hermitian is None:
            hermitian = True if psd else operator.hermitian
        super().__init__(
            operator.shape,
            operator.dtype,
            operator.device,
            hermitian=hermitian,
            psd=operator.psd if psd is None else psd,
        )
        self.operator = operator

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Declared(children[0], hermitian=self.hermitian, psd=self.psd)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.operator._matmat(X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self.operator._matmat(X) if self.hermitian else self.operator._rmatmat(X)

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        return self._rmatmat if self.hermitian else self.operator.adjoint_product(width)

    def diagonal(self) -> Tensor:
        return self.operator.diagonal()

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        return self.operator.columns(idx)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.operator.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return self.operator.pair(Lam, Q)


def _is_adjoint_of(left: LinearOperator, right: LinearOperator) -> bool:
    if isinstance(left, Adjoint) and left.operator is right:
        return True
    return isinstance(right, Adjoint) and right.operator is left or (left is right and bool(left.hermitian))
