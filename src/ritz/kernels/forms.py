"""How a stationary kernel reads points: the coordinates whose distance it sees, and the profile of that distance.

k(x, z) = profile(‖u(x) − u(z)‖²), with u(x) = (x − c)/ℓ for most kernels. The raw parameters stay tensors of their own,
so that an operator made once follows them through an optimisation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .parameters import positive
from .profiles import Gaussian, Profile, RationalQuadraticProfile, rational_quadratic


@dataclass(frozen=True)
class Form(ABC):
    """Base: coordinates u(x) and a profile, as functions of raw parameters (tensors of the kernel's module).

    Attributes:
        active: columns of the points that the kernel sees; None for all.
    """

    active: tuple[int, ...] | None

    @property
    def gaussian(self) -> bool:
        """Whether the profile is exp(−r²/2): the product of such kernels is one of them again."""
        return False

    @abstractmethod
    def coordinates(self, P: Tensor, origin: Tensor, *parameters: Tensor) -> Tensor:
        """u (n, q) of points (n, d); ``origin`` (d,) may be subtracted from all of them. Differentiable."""

    @abstractmethod
    def pullback(
        self, P: Tensor, origin: Tensor, parameters: tuple[Tensor, ...], G: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Gradients in the points (n, d) and in each raw parameter (None: u does not depend on it), for ū = G (n, q).

        By hand and not by autograd, since it has to run inside of torch.func's transforms too.
        """

    @abstractmethod
    def profile(self, *parameters: Tensor) -> Profile:
        """The profile, its shape parameters read off as numbers."""

    def entries(self, r2: Tensor, *parameters: Tensor) -> Tensor:
        """k for squared distances, differentiable in them and in the shape parameters."""
        return self.profile(*parameters)(r2)

    def shape_gradients(self, slopes: Tensor, *parameters: Tensor) -> tuple[Tensor | None, ...]:
        """One gradient a parameter from the cotangents of the profile's shape parameters (none: all None)."""
        return (None,) * len(parameters)

    def pick(self, P: Tensor) -> Tensor:
        """The active columns."""
        return P if self.active is None else P[:, list(self.active)]

    def spread(self, G: Tensor, d: int) -> Tensor:
        """A gradient in the active columns as one in all d columns."""
        if self.active is None:
            return G
        index = torch.tensor(self.active, dtype=torch.long, device=G.device)
        return torch.zeros(G.shape[0], d, dtype=G.dtype, device=G.device).index_add_(1, index, G)


@dataclass(frozen=True)
class LengthscaleForm(Form):
    """Base: u = (x − c)/ℓ, with raw_lengthscale (1, 1) or (1, q) as the first parameter."""

    def coordinates(self, P: Tensor, origin: Tensor, *parameters: Tensor) -> Tensor:
        return self.pick(P - origin) / positive(parameters[0]).to(P.dtype)

    def pullback(
        self, P: Tensor, origin: Tensor, parameters: tuple[Tensor, ...], G: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        raw, *others = parameters
        ell = positive(raw).to(G.dtype)
        grad_ell = -(G * (self.pick(P - origin) / ell)).sum(0, keepdim=True) / ell
        grad_ell = grad_ell if raw.shape[1] > 1 else grad_ell.sum(1, keepdim=True)
        grad_raw = grad_ell.to(raw.dtype) * torch.sigmoid(raw)
        return self.spread(G / ell, P.shape[1]), (grad_raw.reshape(raw.shape), *(None for _ in others))


@dataclass(frozen=True)
class ScaledForm(LengthscaleForm):
    """u = (x − c)/ℓ and a profile without parameters of its own."""

    fixed: Profile

    @property
    def gaussian(self) -> bool:
        return isinstance(self.fixed, Gaussian)

    def profile(self, *parameters: Tensor) -> Profile:
        return self.fixed


@dataclass(frozen=True)
class RationalQuadraticForm(LengthscaleForm):
    """u = (x − c)/ℓ and (1 + r²/(2α))^{−α}, with raw_alpha (1,) as the second parameter."""

    def profile(self, *parameters: Tensor) -> Profile:
        return RationalQuadraticProfile(float(positive(parameters[1].detach())))

    def entries(self, r2: Tensor, *parameters: Tensor) -> Tensor:
        return rational_quadratic(r2, positive(parameters[1]).to(r2.dtype))

    def shape_gradients(self, slopes: Tensor, *parameters: Tensor) -> tuple[Tensor | None, ...]:
        raw = parameters[1]
        return (None, (slopes.to(raw.dtype) * torch.sigmoid(raw)).reshape(raw.shape))


@dataclass(frozen=True)
class PeriodicForm(Form):
    """u = (cos θ, sin θ)/√λ with θ = 2π (x − c)/p, so that ½ ‖u − u'‖² = 2 Σ sin²(π (x − x')/p)/λ.

    Parameters: raw_lengthscale (of λ) and raw_period_length, (1, 1) or (1, q).
    """

    @property
    def gaussian(self) -> bool:
        return True

    def coordinates(self, P: Tensor, origin: Tensor, *parameters: Tensor) -> Tensor:
        theta, lam, _ = self._angles(P, origin, *parameters)
        return (torch.cat([theta.cos(), theta.sin()], 1) * lam.rsqrt().repeat(1, 2)).to(P.dtype)

    def _angles(self, P: Tensor, origin: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """θ (n, q), λ and p (1, q), in float64: many periods from the origin, float32 has no angle left."""
        x = self.pick(P - origin).double()
        lam, p = (positive(raw.double()).expand(1, x.shape[1]) for raw in parameters)
        return 2 * math.pi * x / p, lam, p

    def pullback(
        self, P: Tensor, origin: Tensor, parameters: tuple[Tensor, ...], G: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        theta, lam, p = self._angles(P, origin, *parameters)
        cos, sin = theta.cos(), theta.sin()
        to_cos, to_sin = (G.double() * lam.rsqrt().repeat(1, 2)).chunk(2, 1)
        to_theta = to_sin * cos - to_cos * sin
        to_lam = -0.5 * (to_cos * cos + to_sin * sin).sum(0, keepdim=True) / lam
        to_p = -(to_theta * theta).sum(0, keepdim=True) / p
        grads = []
        for raw, g in zip(parameters, (to_lam, to_p), strict=True):
            g = g if raw.shape[1] > 1 else g.sum(1, keepdim=True)
            grads.append((g.to(raw.dtype) * torch.sigmoid(raw)).reshape(raw.shape))
        return self.spread((to_theta * (2 * math.pi / p)).to(G.dtype), P.shape[1]), tuple(grads)

    def profile(self, *parameters: Tensor) -> Profile:
        return Gaussian()


@dataclass(frozen=True)
class JoinedForm(Form):
    """The product of kernels with Gaussian profiles, which is one of their joined coordinates.

    Attributes:
        parts: (form, number of its parameters) of each.
    """

    parts: tuple[tuple[Form, int], ...]

    @property
    def gaussian(self) -> bool:
        return True

    def _split(self, parameters: Sequence[Tensor]) -> Iterator[tuple[Form, tuple[Tensor, ...]]]:
        start = 0
        for form, count in self.parts:
            yield form, tuple(parameters[start : start + count])
            start += count

    def coordinates(self, P: Tensor, origin: Tensor, *parameters: Tensor) -> Tensor:
        return torch.cat([form.coordinates(P, origin, *own) for form, own in self._split(parameters)], 1)

    def pullback(
        self, P: Tensor, origin: Tensor, parameters: tuple[Tensor, ...], G: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        grads: list[Tensor | None] = []
        points, start = torch.zeros_like(P), 0
        for form, own in self._split(parameters):
            width = form.coordinates(P[:1], origin, *own).shape[1]
            g, rest = form.pullback(P, origin, own, G[:, start : start + width])
            points, start = points + g, start + width
            grads += rest
        return points, tuple(grads)

    def profile(self, *parameters: Tensor) -> Profile:
        return Gaussian()
