"""How a stationary kernel reads points: the coordinates whose distance it sees, and the profile of that distance.

k(x, z) = profile(‖u(x) − u(z)‖²), with u(x) = (x − c)/ℓ for most kernels. The raw parameters stay tensors of their own,
so that an operator made once follows them through an optimisation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .parameters import positive
from .profiles import Profile


@dataclass(frozen=True)
class Form(ABC):
    """Base: coordinates u(x) and a profile, as functions of raw parameters (tensors of the kernel's module).

    Attributes:
        active: columns of the points that the kernel sees; None for all.
    """

    active: tuple[int, ...] | None

    @abstractmethod
    def coordinates(self, P: Tensor, origin: Tensor, *parameters: Tensor) -> Tensor:
        """u (n, q) of points (n, d); ``origin`` (d,) may be subtracted from all of them. Differentiable."""

    @abstractmethod
    def pullback(
        self, P: Tensor, origin: Tensor, parameters: tuple[Tensor, ...], G: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Gradients in the points (n, d) and in each raw parameter, for the cotangent G (n, q) of u.

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
class ScaledForm(Form):
    """u = (x − c)/ℓ with one parameter, raw_lengthscale (1, 1) or (1, q)."""

    fixed: Profile

    def coordinates(self, P: Tensor, origin: Tensor, *parameters: Tensor) -> Tensor:
        return self.pick(P - origin) / positive(parameters[0]).to(P.dtype)

    def pullback(
        self, P: Tensor, origin: Tensor, parameters: tuple[Tensor, ...], G: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        raw = parameters[0]
        ell = positive(raw).to(G.dtype)
        grad_ell = -(G * (self.pick(P - origin) / ell)).sum(0, keepdim=True) / ell
        grad_ell = grad_ell if raw.shape[1] > 1 else grad_ell.sum(1, keepdim=True)
        grad_raw = grad_ell.to(raw.dtype) * torch.sigmoid(raw)
        return self.spread(G / ell, P.shape[1]), (grad_raw.reshape(raw.shape),)

    def profile(self, *parameters: Tensor) -> Profile:
        return self.fixed
