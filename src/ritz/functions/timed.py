"""Functions that carry a time t: φ-functions and the waves cos t√x, sin(t√x)/√x, with exact divided differences.

They know their derivative in t (``in_time``), so that what is built of them is differentiable in t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DomainError
from .composed import Minus
from .scalar import Exp, Phi, ScalarFunction, Times

WAVE_ROUNDING = 1e-5  # relative to the largest: negative eigenvalues of a positive semidefinite operator by rounding


@dataclass(frozen=True)
class PhiTerm(ScalarFunction):
    """t^j φ_j(t·x), the weight of b_j in the solution of y' = A y + Σ_j t^{j−1}/(j−1)! b_j."""

    j: int
    t: complex | float

    def __call__(self, x: Tensor) -> Tensor:
        return self.t**self.j * Phi(self.j, self.t)(x)

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        if self.j == 0:
            return Exp(self.t).divided_difference(a, b)
        j = self.j
        a, b = torch.broadcast_tensors(self.t * a, self.t * b)
        large, small = torch.where(a.abs() >= b.abs(), a, b), torch.where(a.abs() >= b.abs(), b, a)
        near = large.abs() < 1.0 + j
        # Near zero Σ_i (a^i − b^i)/(a − b)/(i + j)!, whose numerators follow S_{i+1} = a S_i + b^i.
        x, y = torch.where(near, large, torch.zeros_like(large)), torch.where(near, small, torch.zeros_like(small))
        S, power, series = torch.zeros_like(x), torch.ones_like(x), torch.zeros_like(x)
        for i in range(1, 24 + 4 * j):
            S, power = x * S + power, power * y
            series = series + S / float(math.factorial(i + j))
        # Elsewhere z φ_{i+1}(z) = φ_i(z) − 1/i! gives φ_{i+1}[a, b] = (φ_i[a, b] − φ_{i+1}(b))/a.
        divisor = torch.where(near, torch.ones_like(large), large)
        d = Exp().divided_difference(divisor, small)
        for i in range(j):
            d = (d - Phi(i + 1)(small)) / divisor
        return self.t ** (j + 1) * torch.where(near, series, d)

    def matrix(self, H: Tensor) -> Tensor:
        return self.t**self.j * Phi(self.j, self.t).matrix(H)

    def in_time(self) -> ScalarFunction:
        return PhiTerm(self.j - 1, self.t) if self.j else Times(Exp(self.t))


@dataclass(frozen=True)
class Wave(ScalarFunction):
    """What carries u'' = −A u over a time t, for A with eigenvalues x ≥ 0.

    ``kind`` 0: cos(t√x), displacement to displacement and velocity to velocity. 1: sin(t√x)/√x, velocity to
    displacement. 2: −√x sin(t√x), displacement to velocity. With p = t√a, q = t√b, s = (p + q)/2, d = (p − q)/2 and
    sinc z = sin z/z their divided differences are −(t²/2) sinc s sinc d, (t³/2)(cos s sinc d − sinc s cos d)/(pq) and
    −(t/2)(cos s sinc d + sinc s cos d).
    """

    kind: int
    t: float

    def __call__(self, x: Tensor) -> Tensor:
        p = self.t * x.clamp(min=0).sqrt()
        if self.kind == 0:
            return torch.cos(p)
        return self.t * _sinc(p) if self.kind == 1 else -x.clamp(min=0) * self.t * _sinc(p)

    def onset(self, low: float, high: float) -> float:
        return 0.5 * abs(self.t) * math.sqrt(max(high, 0.0))  # J_2k(t√high)

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        a, b, t = a.clamp(min=0), b.clamp(min=0), self.t
        p, q = abs(t) * a.sqrt(), abs(t) * b.sqrt()
        s, d = 0.5 * (p + q), 0.5 * (p - q)
        if self.kind == 0:
            return -0.5 * t * t * _sinc(s) * _sinc(d)
        if self.kind == 2:
            return -0.5 * t * (torch.cos(s) * _sinc(d) + _sinc(s) * torch.cos(d))
        return t**3 * self._between_sincs(p, q, s, d)

    def _between_sincs(self, p: Tensor, q: Tensor, s: Tensor, d: Tensor) -> Tensor:
        """(sinc p − sinc q)/(p² − q²): the formula divides by pq, which needs both away from zero."""
        p, q = torch.maximum(p, q), torch.minimum(p, q)
        product = torch.where(q > 1, p * q, torch.ones_like(p))
        formula = 0.5 * (torch.cos(s) * _sinc(d) - _sinc(s) * torch.cos(d)) / product
        near = p < 2
        gap = torch.where(near, torch.ones_like(p), p * p - q * q)
        quotient = (_sinc(p) - _sinc(q)) / gap
        x, y = torch.where(near, p * p, torch.zeros_like(p)), torch.where(near, q * q, torch.zeros_like(p))
        S, power, series = torch.zeros_like(x), torch.ones_like(x), torch.zeros_like(x)
        for i in range(1, 16):  # sinc p = Σ_i (−p²)^i/(2i + 1)!
            S, power = x * S + power, power * y
            series = series + (-1) ** i / float(math.factorial(2 * i + 1)) * S
        return torch.where(near, series, torch.where(q > 1, formula, quotient))

    def matrix(self, H: Tensor) -> Tensor:
        raise DomainError("waves cos(t√A), sin(t√A)/√A are for Hermitian operators; e^{tA} of the system serves others")

    def in_time(self) -> ScalarFunction:
        return (Wave(2, self.t), Wave(0, self.t), Minus(Times(Wave(0, self.t))))[self.kind]

    def check_domain(self, ritz: Tensor) -> None:
        smallest, largest = (float(ritz.min()), float(ritz.abs().max())) if ritz.numel() else (0.0, 0.0)
        if smallest < -WAVE_ROUNDING * largest:
            raise DomainError(
                f"u'' = −A u came with an operator of Ritz value {smallest:.6g}; expected a positive semidefinite one "
                "(the negative of a Laplacian): change its sign, or write a first-order system for ritz.expm_multiply"
            )


def _sinc(z: Tensor) -> Tensor:
    return torch.sinc(z / math.pi)
