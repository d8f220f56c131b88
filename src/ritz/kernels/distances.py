"""Squared distances: for dense matrices, and as the one matrix product that makes a tile.

A tile holds t_ij = scale·‖u_i − v_j‖² = scale·[u_i, ‖u_i‖², 1] · [−2 v_j, 1, ‖v_j‖²], where ‖u‖² + ‖v‖² − 2u·v cancels:
coordinates are made in float64, about a common origin, and stay in float64 where float32 would lose too much.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .profiles import Profile

# float32: distances are made in float64 where the mean of ‖u‖² exceeds this (or 2d, since fewer dimensions have more
# close pairs), because they lose about eps·‖u‖² to rounding: 1e-6 in a product, 1e-5 in the gradient at this limit.
# Also where the largest ‖u‖² exceeds 16 times this: among many points a few that are far out, and close to each other,
# hardly move the mean, and their own entries are only as good as eps·max‖u‖².
SPREAD = 30.0


class Coordinates(NamedTuple):
    """What tiles are made from. All in one dtype, which is float64 where the matrix' own would lose too much."""

    U: Tensor  # (n, q)
    V: Tensor  # (m, q); the same object as U where the points are the same
    left: Tensor  # (n, q + 2)
    right: Tensor  # (q + 2, m)

    @property
    def same(self) -> bool:
        """Whether rows and columns are the same points: the matrix is symmetric, with k(0) on its diagonal."""
        return self.V is self.U


def squared_distances(U: Tensor, V: Tensor, same: bool) -> Tensor:
    """‖u_i − v_j‖² (n, m), differentiable to any order, exactly 0 for equal points; made in float64.

    Rounding leaves up to τ = 2(d + 2)·eps·max‖u‖² where the truth is 0. Such values become 0 by subtracting a constant,
    so that the derivatives of r² stay (the second is not 0 there).
    """
    dtype = U.dtype
    U, V = U.double(), V.double()
    u, v = U.square().sum(1, keepdim=True), V.square().sum(1, keepdim=True)
    r2 = u + v.mT - 2 * (U @ V.mT)
    with torch.no_grad():
        top = torch.maximum(_largest(u), _largest(v))
        rounding = torch.where(r2 <= 2 * (U.shape[1] + 2) * torch.finfo(torch.float64).eps * top, r2, 0.0)
        if same:
            rounding.diagonal().copy_(r2.diagonal())
    return (r2 - rounding).to(dtype)


def _largest(x: Tensor) -> Tensor:
    return x.max() if x.numel() else x.new_zeros(())


def origin_of(X: Tensor) -> Tensor:
    """The mean of the points (d,), a constant: distances do not depend on it, their rounding does."""
    return X.detach().mean(0) if X.shape[0] else X.new_zeros(X.shape[1])


def prepare(U: Tensor, V: Tensor | None, profile: Profile, dtype: torch.dtype) -> Coordinates:
    """The factors of the tiles of k(u_i, v_j) in ``dtype``, from float64 coordinates; V = None for U itself."""
    norms = [P.square().sum(1, keepdim=True) for P in ((U,) if V is None else (U, V))]
    spread = max(float(p.mean()) if p.numel() else 0.0 for p in norms)
    narrow = dtype != torch.float64 and not profile.rough and spread <= min(SPREAD, 2 * U.shape[1])
    if narrow and max(float(_largest(p)) for p in norms) <= 16 * SPREAD:
        U, V = U.to(dtype), None if V is None else V.to(dtype)
        norms = [P.square().sum(1, keepdim=True) for P in ((U,) if V is None else (U, V))]
    if V is None:
        V = U
    u, v = norms[0], norms[-1]
    if profile.rough:  # see squared_distances: here all r² are lowered by τ, and clamped at 0 afterwards
        v = v - 2 * (U.shape[1] + 2) * torch.finfo(U.dtype).eps * torch.maximum(_largest(u), _largest(v))
    left = torch.cat([U, u, torch.ones_like(u)], 1).mul_(profile.scale)
    right = torch.cat([-2 * V, torch.ones_like(v), v], 1).mT.contiguous()
    return Coordinates(U, V, left, right)
