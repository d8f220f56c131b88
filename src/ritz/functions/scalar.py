"""Scalar functions with exact divided differences, domains, and their values at small general matrices.

Each function is a frozen value: call it on eigenvalues, ask for ``divided_difference(a, b)`` (formulas that do not
cancel on near-ties), or for ``matrix(H)`` at a small dense matrix that need not be normal. Any other callable on a
tensor of eigenvalues becomes a :class:`Custom`.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DomainError
from . import dense
from .divided import derivative, divided_difference


@dataclass(frozen=True)
class ScalarFunction(ABC):
    """Base: a function of eigenvalues.

    Subclasses give ``__call__`` and, where it is known in closed form, ``divided_difference`` and ``matrix``.
    """

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """f(x), elementwise."""

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        """f[a, b], broadcasting; f'(a) on ties."""
        return divided_difference(self, a, b)

    def derivative(self, x: Tensor) -> Tensor:
        """f'(x)."""
        return self.divided_difference(x, x)

    def matrix(self, H: Tensor) -> Tensor:
        """f(H) for a batch (m, k, k) of general square matrices in double precision."""
        return dense.by_eigenvectors(self, H)

    def between(self, A: Tensor, B: Tensor, E: Tensor) -> Tensor:
        """The upper right block of f([[A, E], [0, B]]) for batches of general matrices."""
        return dense.between(self, A, B, E)

    def onset(self, low: float, high: float) -> float:
        """The degree from which on the polynomials that are best on [low, high] converge; 0 where it is not known."""
        return 0.0

    def in_time(self) -> ScalarFunction:
        """The derivative in t of a function that carries a time t, such as exp(t·x)."""
        raise DomainError(f"{self!r} carries no time; expected exp, a φ-function or a wave of a time t")

    @property
    def block_exact(self) -> bool:
        """Whether :meth:`matrix` needs no eigenvectors, so that it may be used on defective block matrices."""
        return True

    def check_domain(self, ritz: Tensor) -> None:
        """Raise DomainError when a real Ritz value lies outside of the domain; here there is no outside."""
        return None


def _positive(ritz: Tensor, name: str, zero: bool = False) -> None:
    smallest = float(ritz.min()) if ritz.numel() else 1.0
    if not (smallest > 0 or zero and smallest == 0):
        raise DomainError(
            f"{name} was asked of an operator with Ritz value {smallest:.6g}; expected all eigenvalues "
            f"{'>=' if zero else '>'} 0: add a shift (A.shift(sigma) with sigma > {max(-smallest, 0.0):.3g}), or check "
            f"that it is positive {'semidefinite and declare psd=True' if zero else 'definite'}"
        )


@dataclass(frozen=True)
class Exp(ScalarFunction):
    """exp(scale·x)."""

    scale: complex | float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return torch.exp(self.scale * x)

    def onset(self, low: float, high: float) -> float:
        # The Chebyshev coefficients are Bessel functions of z = scale times the half-width, J_k(z) or I_k(z) e^{−z}.
        z = 0.5 * (high - low)
        return z * abs(self.scale.imag) + math.sqrt(z * abs(self.scale.real))

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.scale * a, self.scale * b
        if a.is_complex() or b.is_complex():
            # e^m · sinh(h)/h with midpoint m and half the gap h; the quotient where the moduli differ (sinh overflows)
            half = 0.5 * (a - b)
            small, far = half.abs() < 1e-2, half.real.abs() > 1
            h = torch.where(small | far, torch.ones_like(half), half)
            h2 = half * half
            series = 1 + h2 / 6 * (1 + h2 / 20 * (1 + h2 / 42 * (1 + h2 / 72)))
            central = torch.exp(0.5 * (a + b)) * torch.where(small, series, torch.sinh(h) / h)
            quotient = (torch.exp(a) - torch.exp(b)) / torch.where(far, 2 * half, torch.ones_like(half))
            return self.scale * torch.where(far, quotient, central)
        gap = (a - b).abs()
        ratio = torch.where(gap == 0, torch.ones_like(gap), -torch.expm1(-gap) / torch.where(gap == 0, 1.0, gap))
        return self.scale * torch.exp(torch.maximum(a, b)) * ratio

    def matrix(self, H: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(self.scale * H)

    def in_time(self) -> ScalarFunction:
        return Times(self)


@dataclass(frozen=True)
class Log(ScalarFunction):
    """log(x), x > 0."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        small, gap = torch.minimum(a, b), (a - b).abs()
        ratio = gap / small
        logs = torch.where(torch.isinf(ratio), torch.log(gap) - torch.log(small), torch.log1p(ratio))
        return torch.where(gap == 0, 1 / small, logs / torch.where(gap == 0, 1.0, gap))

    def matrix(self, H: Tensor) -> Tensor:
        return dense.logm(H)

    def check_domain(self, ritz: Tensor) -> None:
        _positive(ritz, "log")


@dataclass(frozen=True)
class Sqrt(ScalarFunction):
    """√x, x ≥ 0; no slope at 0."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        return 1 / (torch.sqrt(a) + torch.sqrt(b))

    def matrix(self, H: Tensor) -> Tensor:
        return dense.sqrtm(H)[0]

    def check_domain(self, ritz: Tensor) -> None:
        _positive(ritz, "sqrt", zero=True)


@dataclass(frozen=True)
class RSqrt(ScalarFunction):
    """1/√x, x > 0."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x)

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        ra, rb = torch.sqrt(a), torch.sqrt(b)
        return -1 / (ra * rb * (ra + rb))

    def matrix(self, H: Tensor) -> Tensor:
        return dense.sqrtm(H)[1]

    def check_domain(self, ritz: Tensor) -> None:
        _positive(ritz, "rsqrt")


@dataclass(frozen=True)
class Inverse(ScalarFunction):
    """1/x, x ≠ 0."""

    def __call__(self, x: Tensor) -> Tensor:
        return 1 / x

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        return -1 / (a * b)

    def matrix(self, H: Tensor) -> Tensor:
        return torch.linalg.inv(H)

    def check_domain(self, ritz: Tensor) -> None:
        if bool((ritz == 0).any()):
            raise DomainError("inverse was asked of an operator with Ritz value 0; add a shift (A.shift(sigma))")


@dataclass(frozen=True)
class Power(ScalarFunction):
    """x**p; any x for whole p ≥ 0, x ≠ 0 for whole p < 0, x ≥ 0 for other p > 0 (no slope
    at 0 for p < 1), x > 0 otherwise."""

    p: float

    @property
    def _whole(self) -> bool:
        return float(self.p).is_integer() and abs(self.p) <= 64

    def __call__(self, x: Tensor) -> Tensor:
        return x ** int(self.p) if self._whole else x**self.p

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        if self._whole:
            q = abs(int(self.p))
            # x^q − y^q = (x − y) Σ x^i y^(q−1−i), and x − y = −xy(a − b) for the reciprocals
            x, y = (a, b) if self.p >= 0 else (1 / a, 1 / b)
            total = torch.zeros_like(x * y)
            for i in range(q):
                total = total + x**i * y ** (q - 1 - i)
            return total if self.p >= 0 else -x * (y * total)
        # From the larger of the two powers, so that the other factor is below one.
        small, large, gap = torch.minimum(a, b), torch.maximum(a, b), (a - b).abs()
        ratio = gap / small
        logs = torch.where(torch.isinf(ratio), torch.log(gap) - torch.log(small), torch.log1p(ratio))
        top = large if self.p >= 0 else small
        shrink = torch.expm1(-abs(self.p) * logs) * (-1 if self.p >= 0 else 1)
        quotient = top**self.p * (shrink / torch.where(gap == 0, 1.0, gap))
        return torch.where(gap == 0, self.p * small ** (self.p - 1), quotient)

    def matrix(self, H: Tensor) -> Tensor:
        if self._whole:
            return torch.linalg.matrix_power(H, int(self.p))
        return torch.linalg.matrix_exp(self.p * dense.logm(H))

    def check_domain(self, ritz: Tensor) -> None:
        if not self._whole:
            _positive(ritz, f"power({self.p:g})", zero=self.p > 0)
        elif self.p < 0:
            Inverse().check_domain(ritz)


@dataclass(frozen=True)
class Phi(ScalarFunction):
    """φ_j(scale·x): φ₀ = exp, φ_{j+1}(z) = (φ_j(z) − 1/j!)/z, the entire functions of exponential integrators."""

    j: int
    scale: complex | float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        z = self.scale * x
        small = z.abs() < 1.0 + self.j  # below, the recursion would divide its cancellation by less than it gains
        inner = torch.where(small, z, torch.zeros_like(z))
        series = torch.zeros_like(z)
        for i in range(22 + 4 * self.j, -1, -1):  # Horner: Σ z^i/(i + j)!
            series = series * inner + 1 / math.factorial(i + self.j)
        outer = torch.where(small, torch.ones_like(z), z)
        value = torch.exp(outer)
        for i in range(self.j):
            value = (value - 1 / math.factorial(i)) / outer
        return torch.where(small, series, value)

    def matrix(self, H: Tensor) -> Tensor:
        if self.j == 0:
            return torch.linalg.matrix_exp(self.scale * H)
        k = H.shape[-1]
        big = H.new_zeros((*H.shape[:-2], (self.j + 1) * k, (self.j + 1) * k))
        big[..., :k, :k] = self.scale * H
        for i in range(self.j):
            big[..., i * k : (i + 1) * k, (i + 1) * k : (i + 2) * k] = torch.eye(k, dtype=H.dtype, device=H.device)
        return torch.linalg.matrix_exp(big)[..., :k, self.j * k :]


@dataclass(frozen=True)
class Custom(ScalarFunction):
    """Any callable on a tensor of eigenvalues; derivatives by autograd, divided differences by the generic rule."""

    fn: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        y = self.fn(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = f"a tensor of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise DomainError(
                f"the callable f returned {got} for eigenvalues of shape {tuple(x.shape)}; expected a tensor of that "
                "shape: f acts on every eigenvalue by itself (a constant c is c * torch.ones_like(x))"
            )
        return y if y.is_floating_point() or y.is_complex() else y.to(x.dtype)

    @property
    def block_exact(self) -> bool:
        return False


@dataclass(frozen=True)
class Times(ScalarFunction):
    """x·f(x): the derivative of f(t·x) in t, up to the factor that f carries."""

    f: ScalarFunction

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.f(x)

    def matrix(self, H: Tensor) -> Tensor:
        F = self.f.matrix(H)
        return H.to(F.dtype) @ F


def as_function(f: Any) -> ScalarFunction:
    """A ScalarFunction from one, or from any callable on a tensor of eigenvalues."""
    if isinstance(f, ScalarFunction):
        return f
    if isinstance(f, type) or not callable(f):
        raise DomainError(
            f"f is {f!r}; expected a function from ritz.functions (exp, log, power(2.5), …) or a callable on a tensor "
            "of eigenvalues"
        )
    if f is power or f is phi:
        raise DomainError(f"f is the function {f.__name__} itself; give its argument: ritz.functions.{f.__name__}(2)")
    return next((known for torch_function, known in _BUILTIN if f is torch_function), Custom(f))


exp = Exp()
log = Log()
sqrt = Sqrt()
rsqrt = RSqrt()
inverse = Inverse()


def power(p: float) -> Power:
    """x**p."""
    if not isinstance(p, numbers.Real) or not math.isfinite(p):
        raise DomainError(f"power({p!r}) was asked for; expected a finite real number")
    return Power(float(p))


def phi(j: int) -> Phi:
    """φ_j, j = 0, 1, …"""
    if not isinstance(j, numbers.Integral) or j < 0:
        raise DomainError(f"phi({j!r}) was asked for; expected a whole number j >= 0")
    return Phi(int(j))


# torch's own functions mean the same and get the exact formulas
_BUILTIN: tuple[tuple[Any, ScalarFunction], ...] = (
    (torch.exp, exp),
    (torch.log, log),
    (torch.sqrt, sqrt),
    (torch.rsqrt, rsqrt),
    (torch.reciprocal, inverse),
)

__all__ = [
    "Custom",
    "ScalarFunction",
    "as_function",
    "derivative",
    "exp",
    "inverse",
    "log",
    "phi",
    "power",
    "rsqrt",
    "sqrt",
]
