"""Stationary kernels as scalar profiles k(r²) of the squared scaled distance.

Profiles take r², never r: the distance itself has no derivative at coincident points, and √ of a rounded zero is a
classic source of NaN gradients. In r² all profiles here have finite derivatives at 0 except Matérn 1/2, whose
exp(−r) is not differentiable at coincident points in any variable: there its derivative is taken as 0, the
subgradient that symmetry selects. docs/derivations/kernels.md has the formulas.

Each profile also works in place on a tile that holds t = scale · r² (the factor is folded into the matrix product
that makes the distances).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OperandError


@dataclass(frozen=True)
class Profile(ABC):
    """Base: k(r²) with k(0) = 1, decreasing.

    Attributes:
        scale: tiles hold t = scale · r²; negative where the profile is exp(t).
        rough: whether k is not differentiable at r² = 0. Rounding δ in r² then costs √δ in k, so distances are
            computed in float64 whatever the dtype.
        num_shapes: number of shape parameters that are learned (besides length-scales); see :meth:`shape_slopes`.
    """

    @property
    @abstractmethod
    def scale(self) -> float:
        """Factor of r² in tiles."""

    rough = False
    num_shapes = 0

    @abstractmethod
    def __call__(self, r2: Tensor) -> Tensor:
        """k(r²), differentiable to any order with the right values at r² = 0 (see the module's text)."""

    @abstractmethod
    def derivative(self, r2: Tensor) -> Tensor:
        """dk/d(r²)."""

    @abstractmethod
    def second(self, r2: Tensor) -> Tensor:
        """d²k/d(r²)²; 0 at r² = 0 where it is infinite (it meets factors r⁴ there)."""

    @abstractmethod
    def clamp_(self, t: Tensor) -> Tensor:
        """Rounded t back into [0, scale·∞) in place, and away from where exp makes subnormal numbers."""

    @abstractmethod
    def values_(self, t: Tensor, work: Tensor) -> Tensor:
        """k in place of a clamped t; ``work`` has the same shape and is overwritten."""

    @abstractmethod
    def slopes_(self, t: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
        """(dk/dt, k) of a clamped t, in the memory of t and work (both are overwritten; they may come out as one)."""

    def shape_slopes(self, t: Tensor) -> tuple[Tensor, ...]:
        """∂k/∂(shape parameter) at fixed r² of a clamped t, one new tensor each; t is kept."""
        return ()


def lowest_exponent(dtype: torch.dtype) -> float:
    """Exponents below give exp(t) < 1e-34 (1e-299): beneath notice next to k(0) = 1, but subnormals are slow."""
    return -690.0 if dtype == torch.float64 else -80.0


@dataclass(frozen=True)
class Gaussian(Profile):
    """exp(−r²/2), the RBF kernel."""

    @property
    def scale(self) -> float:
        return -0.5

    def __call__(self, r2: Tensor) -> Tensor:
        return torch.exp(-0.5 * r2)

    def derivative(self, r2: Tensor) -> Tensor:
        return -0.5 * torch.exp(-0.5 * r2)

    def second(self, r2: Tensor) -> Tensor:
        return 0.25 * torch.exp(-0.5 * r2)

    def clamp_(self, t: Tensor) -> Tensor:
        return t.clamp_(min=lowest_exponent(t.dtype), max=0.0)

    def values_(self, t: Tensor, work: Tensor) -> Tensor:
        return t.exp_()

    def slopes_(self, t: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
        k = t.exp_()
        return k, k


@dataclass(frozen=True)
class MaternProfile(Profile):
    """Matérn of smoothness ν ∈ {1/2, 3/2, 5/2}: with a = √(2ν) r, a polynomial in a times exp(−a).

    1/2: e⁻ᵃ        3/2: (1 + a) e⁻ᵃ        5/2: (1 + a + a²/3) e⁻ᵃ
    In t = a²: k₁/₂' = −e⁻ᵃ/(2a), k₃/₂' = −½ k₁/₂, k₅/₂' = −⅙ k₃/₂.
    """

    nu: float = 2.5

    def __post_init__(self) -> None:
        if self.nu not in (0.5, 1.5, 2.5):
            raise OperandError(f"Matern(nu={self.nu}); expected 0.5, 1.5 or 2.5")

    @property
    def scale(self) -> float:
        return 2 * self.nu

    @property
    def rough(self) -> bool:  # type: ignore[override]
        return self.nu == 0.5

    def __call__(self, r2: Tensor) -> Tensor:
        t = self.scale * r2
        apart = t > 0
        a = torch.where(apart, t, torch.ones_like(t)).sqrt()  # both branches finite, or where() makes NaN gradients
        # At 0 the leading terms of the series stand in for k: they have the derivatives that autograd then finds.
        if self.nu == 0.5:
            return torch.where(apart, torch.exp(-a), torch.ones_like(t))
        if self.nu == 1.5:
            return torch.where(apart, (1 + a) * torch.exp(-a), 1 - t / 2)
        return torch.where(apart, (1 + a + a * a / 3) * torch.exp(-a), 1 - t / 6 + t * t / 24)

    def derivative(self, r2: Tensor) -> Tensor:
        t = self.scale * r2
        a = t.sqrt()
        if self.nu == 0.5:
            slope = torch.where(t > 0, -torch.exp(-a) / (2 * a), torch.zeros_like(t))
        elif self.nu == 1.5:
            slope = -torch.exp(-a) / 2
        else:
            slope = -(1 + a) * torch.exp(-a) / 6
        return self.scale * slope

    def second(self, r2: Tensor) -> Tensor:
        t = self.scale * r2
        a, zero = t.sqrt(), torch.zeros_like(t)
        if self.nu == 0.5:
            bend = torch.where(t > 0, (1 + a) * torch.exp(-a) / (4 * a * t), zero)
        elif self.nu == 1.5:
            bend = torch.where(t > 0, torch.exp(-a) / (4 * a), zero)
        else:
            bend = torch.exp(-a) / 12
        return self.scale**2 * bend

    def clamp_(self, t: Tensor) -> Tensor:
        return t.clamp_(min=0.0, max=lowest_exponent(t.dtype) ** 2)

    def values_(self, t: Tensor, work: Tensor) -> Tensor:
        if self.nu == 0.5:
            return t.sqrt_().neg_().exp_()
        if self.nu == 1.5:
            a = t.sqrt_()
            decay = torch.neg(a, out=work).exp_()
            return a.add_(1.0).mul_(decay)
        a = torch.sqrt(t, out=work)
        t.mul_(1 / 3).add_(a).add_(1.0)
        return t.mul_(a.neg_().exp_())

    def slopes_(self, t: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.sqrt(t, out=work)
        if self.nu == 0.5:
            t.rsqrt_()
            t.masked_fill_(t == math.inf, 0.0)
            k = a.neg_().exp_()
            return t.mul_(k).mul_(-0.5), k
        if self.nu == 1.5:
            decay = torch.neg(a, out=t).exp_()
            k = a.add_(1.0).mul_(decay)
            return decay.mul_(-0.5), k
        # k = (1 + a + t/3) e⁻ᵃ and dk/dt = −(1 + a) e⁻ᵃ/6
        t.mul_(1 / 3)
        decay = torch.exp(-a)
        a.add_(1.0).mul_(decay)
        k = t.mul_(decay).add_(a)
        return a.mul_(-1 / 6), k


def rational_quadratic(r2: Tensor, alpha: Tensor | float) -> Tensor:
    """(1 + r²/(2α))^{−α}, differentiable in r² and in a tensor α."""
    return torch.exp(-alpha * torch.log1p(r2 / (2 * alpha)))


@dataclass(frozen=True)
class RationalQuadraticProfile(Profile):
    """(1 + r²/(2α))^{−α}, with α as its one shape parameter.

    In t = r²/(2α): k = (1 + t)^{−α}, dk/dt = −α k/(1 + t), and ∂k/∂α = k·(t/(1 + t) − log(1 + t)) at fixed r².
    """

    alpha: float = 1.0

    num_shapes = 1

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise OperandError(f"RationalQuadraticProfile(alpha={self.alpha}); expected a finite number above 0")

    @property
    def scale(self) -> float:
        return 1 / (2 * self.alpha)

    def __call__(self, r2: Tensor) -> Tensor:
        return rational_quadratic(r2, self.alpha)

    def derivative(self, r2: Tensor) -> Tensor:
        return -0.5 * self(r2) / (1 + self.scale * r2)

    def second(self, r2: Tensor) -> Tensor:
        return 0.25 * (1 + 1 / self.alpha) * self(r2) / (1 + self.scale * r2).square()

    def clamp_(self, t: Tensor) -> Tensor:
        # A small α never brings k near the subnormal numbers, and a t near the largest number does no harm.
        exponent = min(-lowest_exponent(t.dtype) / self.alpha, 80.0)
        return t.clamp_(min=0.0, max=math.expm1(exponent))

    def values_(self, t: Tensor, work: Tensor) -> Tensor:
        return t.log1p_().mul_(-self.alpha).exp_()

    def slopes_(self, t: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.log1p(t, out=work).mul_(-self.alpha).exp_()
        return t.add_(1.0).reciprocal_().mul_(k).mul_(-self.alpha), k

    def shape_slopes(self, t: Tensor) -> tuple[Tensor, ...]:
        log = torch.log1p(t)
        bend = t / (1 + t)
        bend.sub_(log)
        return (bend.mul_(log.mul_(-self.alpha).exp_()),)
