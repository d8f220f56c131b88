"""Structures: classes of d×d matrices that are closed under products, stored as flat tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ...errors import OperandError
from .matrix import StructuredMatrix


class Structure(ABC):
    """A linear class 𝒮 of real d×d matrices, for every d, that contains I and all products of its members.

    A member K is stored as p = ``numel(d)`` numbers along the last axis of a tensor; the axes before are a batch, and
    broadcast between operands. Structures are values: frozen dataclasses with pure functions, in any floating-point
    dtype, on any device, recorded by autograd where a graph is wanted.

    The map Π takes a symmetric M to the member N with ⟨M, E + Eᵀ⟩ = ½⟨N + Nᵀ, E + Eᵀ⟩ for all members E: it carries
    the derivative of a function of K Kᵀ to the class. Diagonal entries and symmetric blocks are copied, an entry whose
    mirror image is structurally zero is doubled, and entries that are tied to each other are averaged first, so
    that Π = (doubling) ∘ (entries on the pattern), which is how all of it is computed here.

    A subclass gives the functions with a leading underscore; the public ones check their arguments and call them.
    Shapes are checked by :class:`~ritz.errors.OperandError`.

    Reference: W. Lin, F. Dangel, R. Eschenhagen, K. Neklyudov, A. Kristiadi, R. Turner, A. Makhzani, Structured
    inverse-free natural gradient (2024). There Π is given class by class; the characterisation above is ours.
    """

    @property
    def symmetric(self) -> bool:
        """Whether every member is a symmetric matrix."""
        return False

    # -- what a subclass gives ------------------------------------------------------------------------------------

    @abstractmethod
    def numel(self, d: int) -> int:
        """Stored numbers of a d×d member."""

    @abstractmethod
    def identity(self, d: int, *, dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        """The identity, (p,)."""

    @abstractmethod
    def _from_dense(self, M: Tensor) -> Tensor:
        """Entries of M on the pattern, tied ones averaged, in fresh memory."""

    @abstractmethod
    def _to_dense(self, flat: Tensor, d: int) -> Tensor: ...

    @abstractmethod
    def _double_(self, flat: Tensor, d: int) -> None:
        """Double, in place, the entries whose mirror image is structurally zero."""

    @abstractmethod
    def _apply(self, flat: Tensor, X: Tensor, transposed: bool, out: Tensor | None = None) -> Tensor:
        """K X or Kᵀ X, written into ``out`` where given (only where nothing is recorded)."""

    @abstractmethod
    def _multiply(self, left: Tensor, right: Tensor, d: int) -> Tensor: ...

    @abstractmethod
    def _gram(self, flat: Tensor, d: int) -> Tensor:
        """``_from_dense(Kᵀ K)``, in fresh memory."""

    @abstractmethod
    def _outer(self, U: Tensor) -> Tensor:
        """``_from_dense(U Uᵀ)``, in fresh memory."""

    def _square(self, flat: Tensor, d: int) -> Tensor | None:
        """K Kᵀ, for every d or for none."""
        return None

    @abstractmethod
    def _diagonal(self, flat: Tensor, d: int) -> Tensor: ...

    @abstractmethod
    def apply_cost(self, d: int, width: int) -> float:
        """Multiplications of K X for X (d, width), roughly; to choose between equivalent forms of a computation."""

    @abstractmethod
    def describe(self, d: int) -> str:
        """A short name, such as "hierarchical(15, 15)"."""

    # -- conversion -----------------------------------------------------------------------------------------------

    def from_dense(self, M: Tensor) -> Tensor:
        """The member closest to M in Frobenius norm, (..., d, d) -> (..., p); M itself where M is a member."""
        self._check_square(M)
        return self._from_dense(M)

    def to_dense(self, flat: Tensor, d: int) -> Tensor:
        """The matrix, (..., p) -> (..., d, d); for ``Dense`` a view of ``flat``."""
        self._check_flat(flat, d)
        return self._to_dense(flat, d)

    def project(self, M: Tensor) -> Tensor:
        """Π(M) of a symmetric M, (..., d, d) -> (..., p). That M is symmetric is not checked."""
        self._check_square(M)
        flat = self._from_dense(M)
        self._double_(flat, M.shape[-1])
        return flat

    # -- products -------------------------------------------------------------------------------------------------

    def matmul(self, flat: Tensor, X: Tensor) -> Tensor:
        """K X for X (..., d, m)."""
        self._check_product(flat, X)
        return self._apply(flat, X, False)

    def rmatmul(self, flat: Tensor, X: Tensor) -> Tensor:
        """Kᵀ X for X (..., d, m)."""
        self._check_product(flat, X)
        return self._apply(flat, X, True)

    def multiply(self, left: Tensor, right: Tensor, d: int) -> Tensor:
        """The product of two members within the class, (..., p)."""
        self._check_flat(left, d)
        self._check_flat(right, d)
        return self._multiply(left, right, d)

    def gram(self, flat: Tensor, d: int) -> Tensor:
        """Π(Kᵀ K), (..., p)."""
        self._check_flat(flat, d)
        result = self._gram(flat, d)
        self._double_(result, d)
        return result

    def outer(self, U: Tensor) -> Tensor:
        """Π(U Uᵀ) for U (..., d, m), (..., p)."""
        if U.ndim < 2:
            raise OperandError(f"U has shape {tuple(U.shape)}; {type(self).__name__}.outer needs (..., d, m)")
        result = self._outer(U)
        self._double_(result, U.shape[-2])
        return result

    def square(self, flat: Tensor, d: int) -> Tensor | None:
        """K Kᵀ in a form that :meth:`apply_square` takes, (..., q); None where two products are as good as any.

        For most classes that is not their flat storage: K Kᵀ may be no member, or lie in memory with gaps.
        """
        self._check_flat(flat, d)
        return self._square(flat, d)

    def apply_square(self, square: Tensor, X: Tensor, overwrite: bool = False) -> Tensor:
        """K Kᵀ X for X (..., d, m), from what :meth:`square` returned; with ``overwrite`` X may be where it is put."""
        return self.matmul(square, X)

    # -- numbers --------------------------------------------------------------------------------------------------

    def diagonal(self, flat: Tensor, d: int) -> Tensor:
        """The diagonal, (..., d)."""
        self._check_flat(flat, d)
        return self._diagonal(flat, d)

    def trace(self, flat: Tensor, d: int) -> Tensor:
        """The sum of the diagonal, (...,)."""
        return self.diagonal(flat, d).sum(-1)

    def norm(self, flat: Tensor, d: int) -> Tensor:
        """The Frobenius norm of the matrix, (...,); a number that stands for several entries counts several times."""
        self._check_flat(flat, d)
        return torch.linalg.vector_norm(flat, dim=-1)

    def storage(self, d: int, dtype: torch.dtype) -> int:
        """Bytes of a stored d×d member."""
        return self.numel(d) * dtype.itemsize

    def matrix(self, flat: Tensor, d: int) -> StructuredMatrix:
        """The matrix behind ``flat`` (p,) as a linear operator."""
        return StructuredMatrix(self, d, flat)

    # -- checks ---------------------------------------------------------------------------------------------------

    def _check_flat(self, flat: Tensor, d: int) -> None:
        if flat.ndim < 1 or flat.shape[-1] != self.numel(d):
            raise OperandError(
                f"a {self.describe(d)} matrix of size {d} came with stored numbers of shape {tuple(flat.shape)}; "
                f"expected (..., {self.numel(d)})"
            )

    def _check_product(self, flat: Tensor, X: Tensor) -> None:
        if X.ndim < 2:
            raise OperandError(f"X has shape {tuple(X.shape)}; a structured product needs a block (..., d, m)")
        self._check_flat(flat, X.shape[-2])
        if flat.dtype != X.dtype:
            raise OperandError(f"X is {X.dtype} and the matrix is {flat.dtype}; convert one of them with .to(...)")

    def _check_square(self, M: Tensor) -> None:
        if M.ndim < 2 or M.shape[-1] != M.shape[-2]:
            raise OperandError(f"M has shape {tuple(M.shape)}; a structure reads square matrices (..., d, d)")


def check_whole(owner: Structure, name: str, value: Any, least: int) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OperandError(f"{type(owner).__name__} got {name}={value!r}; expected a whole number of at least {least}")


def check_flag(owner: Structure, name: str, value: Any) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise OperandError(f"{type(owner).__name__} got {name}={value!r}; expected True or False")
