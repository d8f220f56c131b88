"""Methods are values: small frozen dataclasses that can be printed, compared and passed around.

How a Krylov space is built (:class:`Lanczos`, :class:`Arnoldi`, :class:`Auto`) and how its result is differentiated
(:class:`Frechet`, :class:`Adjoint`, :class:`Unrolled`) are separate choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import OperandError


@dataclass(frozen=True)
class _Krylov:
    """Depth of a Krylov space, fixed or adaptive.

    Args:
        num_matvecs: fixed depth (products per starting vector). None: adaptive.
        rtol: adaptive depth stops when the error estimate of f(A)v, relative to its norm, is below; None is
            1e-10 in float64 and 1e-5 in float32. Ignored at fixed depth.
        max_matvecs: limit of an adaptive depth; memory is that many vectors per starting vector.
        reorthogonalize: against the whole basis, twice; without it the recurrence is shorter and loses orthogonality.
    """

    num_matvecs: int | None = None
    rtol: float | None = None
    max_matvecs: int = 300
    reorthogonalize: bool = True

    def __post_init__(self) -> None:
        for name in ("num_matvecs", "max_matvecs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise OperandError(f"{name}={value!r}; expected a whole number")
        if self.num_matvecs is not None and self.num_matvecs < 1:
            raise OperandError(f"num_matvecs={self.num_matvecs}; expected at least 1, or None for an adaptive depth")
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise OperandError(f"rtol={self.rtol}; expected a number between 0 and 1")
        if self.max_matvecs < 1:
            raise OperandError(f"max_matvecs={self.max_matvecs}; expected at least 1")

    def tolerance(self, dtype: torch.dtype) -> float:
        """``rtol``, or its default for a dtype."""
        if self.rtol is not None:
            return self.rtol
        return 1e-10 if dtype in (torch.float64, torch.complex128) else 1e-5


@dataclass(frozen=True)
class Lanczos(_Krylov):
    """Lanczos tridiagonalisation, for Hermitian operators (real or complex).

    Args:
        two_pass: keep no basis: every space is gone through twice, for twice the products and the memory of about four
            vectors at any depth (about 20 in backward). For ``funm_multiply`` and ``expm_multiply``, with
            ``reorthogonalize=False`` and ``Frechet()``.
    """

    two_pass: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.two_pass and self.reorthogonalize:
            raise OperandError("two_pass=True keeps no basis to orthogonalise against; give reorthogonalize=False too")


class Arnoldi(_Krylov):
    """Arnoldi iteration, for any square operator."""


@dataclass(frozen=True)
class Auto:
    """The choice left to ritz: a pure function of the operator's size, flags, dtype and device.

    For functions of an operator: :class:`Lanczos` where ``A.hermitian`` is True, :class:`Arnoldi` otherwise, both
    with adaptive depth. For solves see :mod:`ritz.solve`. The result's ``info.method`` says what was chosen.
    """


@dataclass(frozen=True)
class Frechet:
    """Derivative of the limit f(A)v, from Krylov spaces already built (the default).

    A quadratic form needs no further product; f(A)v needs one more Krylov space, from the cotangent, in backward.
    Exact for the operator function up to the Krylov error, also where the Krylov space is exhausted.

    Args:
        rtol: the rank of the pairing is cut where the dropped part is below this, relative in Frobenius norm. None is
            1e-12 in float64 and 1e-7 in float32, or a hundredth of the Krylov space's own error where that is larger:
            columns that carry less than the error are not worth a product under autograd.
        method: Krylov space of the backward pass; None takes the forward's (its effective depth where it was fixed).
    """

    rtol: float | None = None
    method: Lanczos | Arnoldi | None = None

    def tolerance(self, dtype: torch.dtype, error: float = 0.0) -> float:
        """``rtol``, or its default for a dtype and a space whose relative error is about ``error``."""
        if self.rtol is not None:
            return self.rtol
        return max(1e-12 if dtype in (torch.float64, torch.complex128) else 1e-7, min(1e-2 * error, 1e-4))


@dataclass(frozen=True)
class Adjoint:
    """Derivative of the computed quantity, by the adjoint recurrence of the decomposition.

    Exact for the value that was returned, however shallow the depth; one adjoint product per step in backward.
    Lanczos reads A as a Hermitian matrix: where a free matrix merely happens to be symmetric, the part of its gradient
    that would make it unsymmetric is that of the recurrence, not that of f. Symmetrise it ((M + M.mT)/2) or give
    ``method=Arnoldi()``; ``Frechet()`` is right there.
    """


@dataclass(frozen=True)
class Unrolled:
    """Plain autograd through every step: any order of differentiation, memory of the whole loop.

    The derivative of the computed value, with what :class:`Adjoint` says of free symmetric matrices.
    """


KrylovMethod = Lanczos | Arnoldi | Auto
GradientRule = Frechet | Adjoint | Unrolled
