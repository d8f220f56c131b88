"""The operator: anything with a product.

A subclass gives ``_matmat`` (and, where it can, ``_rmatmat``), names the tensors it depends on (``tensors``) and
contracts a pair of blocks into one gradient per tensor (``pair``). Everything else in ritz asks for no more.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AdjointUnavailableError, OperandError
from ..numerics import as_block, autocast_is_on, full_precision, version

Gradients = tuple[Tensor | None, ...]


class LinearOperator(ABC):
    """A matrix of shape (n, m) known through its products.

    Attributes:
        shape: (rows, columns).
        dtype, device: of the products; operands must agree, nothing is moved or cast silently.
        hermitian: True or False where known, None where nobody said.
        psd: True where the operator is Hermitian positive semidefinite, False where it is not, None where unknown.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        hermitian: bool | None = None,
        psd: bool | None = None,
    ) -> None:
        rows, columns = (int(s) for s in shape)
        if psd and hermitian is False:
            raise OperandError("psd=True came with hermitian=False; a positive semidefinite operator is Hermitian")
        if psd:
            hermitian = True
        if (hermitian or psd) and rows != columns:
            raise OperandError(f"shape ({rows}, {columns}) was declared Hermitian; a Hermitian operator is square")
        self.shape = (rows, columns)
        self.dtype = dtype
        self.device = torch.device(device)
        self.hermitian = hermitian if rows == columns else False
        self.psd = psd if rows == columns else False
        self._detected: tuple[tuple[Tensor, ...], list[int], Callable[[], bool]] | None = None

    # -- what a subclass gives ------------------------------------------------------------------------------------

    @abstractmethod
    def _matmat(self, X: Tensor) -> Tensor:
        """Product with a block (m, k) -> (n, k); plain torch operations, so that autograd can record it."""

    def _rmatmat(self, X: Tensor) -> Tensor:
        """Adjoint (conjugate transposed) product with a block (n, k) -> (m, k)."""
        if self.hermitian:
            return self._matmat(X)
        raise AdjointUnavailableError(
            f"{type(self).__name__} has no adjoint product; implement _rmatmat, or declare hermitian=True if it is"
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the product depends on, in the order of the gradients that :meth:`pair` returns."""
        return ()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        """Gradient of Re⟨Lam, A Q⟩ with respect to every tensor of :meth:`tensors`.

        Args:
            Lam: cotangent of the product, shape (n, k).
            Q: the block that the product is taken with, shape (m, k).

        Returns:
            One gradient per tensor (None where it has no influence), in PyTorch's conjugate convention.
        """
        from ..pairing import pair_by_autograd
        from .capture import nested

        tensors = self.tensors()
        if nested(tensors):
            raise OperandError(
                f"{type(self).__name__}.tensors() names a tensor that is computed from another one that it names; both "
                "would count the same gradient: name only one of the two"
            )
        return pair_by_autograd(self._matmat, tensors, Lam, Q)

    # -- composition: operators made of operators -----------------------------------------------------------------

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        """The operators that this one is made of; empty for a leaf."""
        return ()

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        """The same composition over other children."""
        return self

    @property
    def deferrable(self) -> bool:
        """Whether :meth:`pair` may run later, in backward; False sends the pairing to its recorded form."""
        return all(child.deferrable for child in self.children)

    def check_unchanged(self) -> None:
        """Raise where something that a callable closes over was changed in place since its products ran."""
        for child in self.children:
            child.check_unchanged()

    def capture(self, X: Tensor) -> tuple[Tensor, LinearOperator]:
        """One product without a graph, and this operator with the captured tensors of its callables known."""
        if not self.children:
            with torch.no_grad():
                return self._matmat(X), self
        recorders = [_Recorder(child) for child in self.children]
        with torch.no_grad():
            Y = self.rebuild(recorders)._matmat(X)
        return Y, self.rebuild([r.bound for r in recorders])

    def adjoint_product(self, width: int) -> Callable[[Tensor], Tensor]:
        """Adjoint product for many blocks of one width; a callable records its forward product only once."""
        return self._rmatmat

    def lanczos_loop(self) -> Any:
        """Compiled steps of the Lanczos recurrence of one real vector on the CPU, or None (the rule).

        Called as ``loop(Q, first, w, length, largest, tol)`` with the meaning of
        :func:`ritz.krylov.one.lanczos_steps`, complex vectors as real ones of twice the length. Only operators without
        children have one.
        """
        return None

    def detected(self, tensors: tuple[Tensor, ...], holds: Callable[[], bool]) -> None:
        """Remember that a flag was read off ``tensors`` and not declared; ``holds`` reads it again.

        A tensor that is trained in place changes under the operator: a start value that happened to be symmetric
        would leave ``hermitian=True`` behind, and every answer after the first step would be silently wrong.
        """
        self._detected = (tensors, [version(t) for t in tensors], holds)

    def check_detected(self) -> None:
        """Raise where the tensor was changed in place and the flag that was read off it holds no more."""
        if self._detected is None:
            return
        tensors, before, holds = self._detected
        now = [version(t) for t in tensors]
        if now != before:
            if not holds():
                raise OperandError(
                    f"{self!r}: these flags were read off its tensors, which were changed in place since and have them "
                    "no more; make the operator anew after a step, or declare the flags"
                )
            self._detected = (tensors, now, holds)

    # -- what everybody uses --------------------------------------------------------------------------------------

    def __matmul__(self, other: Any) -> Any:
        """Product with a vector (m,), a block (m, k) or another operator; differentiable in tensors and operand."""
        from .algebra import product

        if isinstance(other, LinearOperator):
            return product(self, other)
        X = as_block(other, self.shape[1], "the operand of A @ x", dtype=self.dtype, device=self.device)
        if autocast_is_on():
            with full_precision():
                Y = self._matmat(X)
        else:
            Y = self._matmat(X)
        if Y is X:  # the identity must not hand out its operand
            Y = X.clone()
        return Y.squeeze(1) if other.ndim == 1 else Y

    @property
    def mH(self) -> LinearOperator:
        """The adjoint (conjugate transpose); the operator itself where it is Hermitian."""
        from .algebra import Adjoint

        return self if self.hermitian else Adjoint(self)

    @property
    def mT(self) -> LinearOperator:
        """The transpose; equal to :attr:`mH` for real dtypes."""
        from .algebra import Conjugate

        return Conjugate(self.mH) if self.dtype.is_complex else self.mH

    def __add__(self, other: Any) -> LinearOperator:
        from .algebra import Sum

        return Sum([self, _operator_like(other, self, "A + B")])

    def __radd__(self, other: Any) -> LinearOperator:
        return _operator_like(other, self, "A + B") + self

    def __sub__(self, other: Any) -> LinearOperator:
        return self + (-1.0) * _operator_like(other, self, "A - B")

    def __neg__(self) -> LinearOperator:
        return (-1.0) * self

    def __mul__(self, scalar: Any) -> LinearOperator:
        from .algebra import Scaled

        if not _is_scalar(scalar):
            raise OperandError(
                f"an operator was multiplied by a {type(scalar).__name__}; expected a number or a tensor of one "
                "element (use @ for products, ritz.operators.Diagonal for elementwise scaling)"
            )
        return Scaled(self, scalar)

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> LinearOperator:
        return self * (1.0 / scalar)

    def shift(self, sigma: float | Tensor) -> LinearOperator:
        """A + sigma·I, differentiable in ``sigma`` (a number or a tensor of one element)."""
        from .basic import identity

        if self.shape[0] != self.shape[1]:
            raise OperandError(f"A + sigma·I needs a square operator; this one has shape {self.shape}")
        return self + sigma * identity(self.shape[0], dtype=self.dtype, device=self.device)

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        """The columns A[:, idx] as a dense (n, len(idx)) tensor; one block product."""
        index = torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1)
        E = torch.zeros(self.shape[1], index.numel(), dtype=self.dtype, device=self.device)
        E[index, torch.arange(index.numel(), device=self.device)] = 1
        return self._matmat(E)

    def diagonal(self) -> Tensor:
        """The diagonal, shape (min(n, m),), by unit vectors in chunks; exact, and as costly as ``to_dense``."""
        size, chunk = min(self.shape), 256
        parts = []
        for start in range(0, size, chunk):
            idx = torch.arange(start, min(start + chunk, size), device=self.device)
            parts.append(self.columns(idx)[idx, torch.arange(idx.numel(), device=self.device)])
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype, device=self.device)

    def to_dense(self) -> Tensor:
        """The matrix (n, m) as a dense tensor, by products with unit vectors; meant for small sizes and checks."""
        size, chunk = self.shape[1], 1024
        parts = [self.columns(range(s, min(s + chunk, size))) for s in range(0, size, chunk)]
        return torch.cat(parts, dim=1) if parts else torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def declare(self, *, hermitian: bool | None = None, psd: bool | None = None) -> LinearOperator:
        """The same operator with flags declared by the caller, who answers for them."""
        from .algebra import Declared

        return Declared(self, hermitian=hermitian, psd=psd)

    def __repr__(self) -> str:
        known = {name: getattr(self, name) for name in ("hermitian", "psd")}
        flags = "".join(f", {name}={value}" for name, value in known.items() if value is not None)
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device='{self.device}'{flags})"


class _Recorder(LinearOperator):
    """Stands in for a child during :meth:`LinearOperator.capture` and remembers the child's bound form."""

    def __init__(self, child: LinearOperator) -> None:
        super().__init__(child.shape, child.dtype, child.device, hermitian=child.hermitian, psd=child.psd)
        self.bound = child

    def _matmat(self, X: Tensor) -> Tensor:
        Y, self.bound = self.bound.capture(X)
        return Y

    def _rmatmat(self, X: Tensor) -> Tensor:
        # Only the forward product shows what a callable closes over: take one on a zero column first.
        n, m = self.shape
        zero = torch.zeros(m, 1, dtype=self.dtype, device=self.device)
        _, self.bound = self.bound.capture(zero)
        return self.bound._rmatmat(X)


def _is_scalar(x: Any) -> bool:
    return isinstance(x, numbers.Number) or (isinstance(x, Tensor) and x.numel() == 1)


def _operator_like(x: Any, like: LinearOperator, what: str) -> LinearOperator:
    from .convert import aslinearoperator

    if isinstance(x, LinearOperator):
        return x
    if isinstance(x, Tensor) and x.ndim == 2 and tuple(x.shape) == like.shape:
        return aslinearoperator(x)
    raise OperandError(
        f"{what} got a {type(x).__name__}; expected an operator or a tensor of shape {like.shape} "
        "(A + sigma·I is A.shift(sigma))"
    )


def check_square(A: LinearOperator, what: str) -> None:
    """Raise unless A is square."""
    if A.shape[0] != A.shape[1]:
        raise OperandError(f"{what} needs a square operator; this one has shape {A.shape}")
