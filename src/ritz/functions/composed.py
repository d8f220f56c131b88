"""Functions made of others: −f, f(x + shift), real and imaginary parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scalar import ScalarFunction


@dataclass(frozen=True)
class Shifted(ScalarFunction):
    """f(x + shift)."""

    f: ScalarFunction
    shift: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.f(x + self.shift)

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        return self.f.divided_difference(a + self.shift, b + self.shift)

    def check_domain(self, ritz: Tensor) -> None:
        self.f.check_domain(ritz + self.shift)


@dataclass(frozen=True)
class Part(ScalarFunction):
    """The real or the imaginary part of a complex function at real arguments (or at real matrices)."""

    f: ScalarFunction
    imaginary: bool

    def _of(self, x: Tensor) -> Tensor:
        if not x.is_complex():
            return torch.zeros_like(x) if self.imaginary else x
        return x.imag if self.imaginary else x.real

    def __call__(self, x: Tensor) -> Tensor:
        return self._of(self.f(x))

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        return self._of(self.f.divided_difference(a, b))

    def matrix(self, H: Tensor) -> Tensor:
        return self._of(self.f.matrix(H.to(torch.complex128)))

    @property
    def block_exact(self) -> bool:
        return self.f.block_exact

    def between(self, A: Tensor, B: Tensor, E: Tensor) -> Tensor:
        # Not through f[a, b] at complex eigenvalues: its real part is not the divided difference of (f + f̄)/2.
        wide = torch.complex128
        return self._of(self.f.between(A.to(wide), B.to(wide), E.to(wide)))

    def check_domain(self, ritz: Tensor) -> None:
        self.f.check_domain(ritz)


@dataclass(frozen=True)
class Minus(ScalarFunction):
    """−f(x)."""

    f: ScalarFunction

    def __call__(self, x: Tensor) -> Tensor:
        return -self.f(x)
