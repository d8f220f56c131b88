"""Stationary kernel matrices by tiles: products, and gradients of everything, without an n×n matrix.

For scaled points u_i = (x_i − c)/ℓ and v_j = (z_j − c)/ℓ a tile is made by one matrix product with two further columns,
    t_ij = scale·‖u_i − v_j‖² = scale·[u_i, ‖u_i‖², 1] · [−2 v_j, 1, ‖v_j‖²],
one in-place pass of the profile over it, and one product with the block of vectors. The common shift c (the mean)
keeps the products small, since ‖u‖² + ‖v‖² − 2u·v cancels. The pairing makes tiles anew: with T = Λ Qᵀ, S = T ∘ k'(t)
    ∂/∂u_i = 2·scale·(Σ_j S_ij u_i − Σ_j S_ij v_j),      likewise for v_j,
from which length-scales and inputs follow by the chain rule of u = (x − c)/ℓ. docs/derivations/kernels.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numerics import full_precision, unwrap
from ..operators.base import Gradients, LinearOperator
from .backends import Tiles
from .parameters import positive
from .profiles import Profile

# float32: distances are made in float64 where the mean of ‖u‖² exceeds this (or 2d, since fewer dimensions have more
# close pairs), because they lose about eps·‖u‖² to rounding: 1e-6 in a product, 1e-5 in the gradient at this limit
SPREAD = 30.0


class Scaled(NamedTuple):
    """Points over length-scales, and the factors of the augmented product."""

    U: Tensor  # (n, d)
    V: Tensor  # (m, d); the same object as U where the points are the same
    left: Tensor  # (n, d + 2)
    right: Tensor  # (d + 2, m)


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


def scale_points(X: Tensor, Z: Tensor | None, raw: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """u = (x − c)/ℓ and v = (z − c)/ℓ, differentiable; v is u where Z is None."""
    c = X.detach().mean(0) if X.shape[0] else X.new_zeros(X.shape[1])
    ell = positive(raw).to(X.dtype)

    def scaled(P: Tensor) -> Tensor:
        P = P - c
        return (P if active is None else P[:, active]) / ell

    U = scaled(X)
    return U, U if Z is None else scaled(Z)


class StationaryOperator(LinearOperator):
    """s·k(‖x_i − z_j‖²/ℓ²) as an operator (n, m) that is made tile by tile.

    Args:
        profile: k as a function of r².
        X: points (n, d).
        Z: points (m, d), or None for X itself; the operator is then Hermitian positive semidefinite.
        raw_lengthscale: (1, 1) or (1, d); ℓ = softplus(raw) + floor.
        raw_scales: raw factors s of one element each (none: s = 1); nested scalings multiply.
        active: columns of X and Z that the kernel sees, or None for all.
        backend: the tile size.

    Cost: per product n·m evaluations of k (half of them for Z = None); the pairing costs about three products.
    Memory: ≤ 64 MB of tiles, and n·(d + k) numbers.
    Gradient: of X, Z, length-scales and scales; the first by tiles, further ones through the dense matrix.
    """

    def __init__(
        self,
        profile: Profile,
        X: Tensor,
        Z: Tensor | None,
        raw_lengthscale: Tensor,
        raw_scales: Sequence[Tensor] = (),
        *,
        active: Tensor | None = None,
        backend: Tiles = Tiles(),
    ) -> None:
        same = Z is None
        rows, columns = X.shape[0], (X if Z is None else Z).shape[0]
        super().__init__((rows, columns), X.dtype, X.device, hermitian=same or None, psd=same or None)
        self.profile, self.X, self.Z = profile, X, Z
        self.raw_lengthscale, self.raw_scales = raw_lengthscale, tuple(raw_scales)
        self.active, self.backend = active, backend

    # -- products -------------------------------------------------------------------------------------------------

    def _matmat(self, X: Tensor) -> Tensor:
        from ..pairing import product

        return product(self, X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self._matmat(X) if self.hermitian else self._swapped()._matmat(X)

    def _swapped(self) -> StationaryOperator:
        assert self.Z is not None
        options: dict[str, Any] = {"active": self.active, "backend": self.backend}
        return StationaryOperator(self.profile, self.Z, self.X, self.raw_lengthscale, self.raw_scales, **options)

    @torch.no_grad()
    def _numeric(self, X: Tensor) -> Tensor:
        points, same = self._scaled(), self.Z is None
        # Vectors as rows: a tile times a few columns takes BLAS four times as long as a few rows times a tile.
        X = X.mT.contiguous()
        Y = torch.zeros(X.shape[0], self.shape[0], dtype=self.dtype, device=self.device)
        with full_precision():
            for i, j, t, work in self._tiles(points):
                k = self.profile.values_(t, work)
                Y[:, i].addmm_(X[:, j], k.mT)
                if same and i != j:
                    Y[:, j].addmm_(X[:, i], k)
        scale = self._factor(*self.raw_scales)
        return (Y if scale is None else Y.mul_(scale)).mT

    def _recorded(self, X: Tensor, *tensors: Tensor) -> Tensor:
        return self._dense(*tensors) @ X

    def _factor(self, *raw_scales: Tensor) -> Tensor | None:
        """The product of the scales, a scalar, or None for 1."""
        factor = None
        for raw in raw_scales:
            s = positive(raw).to(self.dtype).reshape(())
            factor = s if factor is None else factor * s
        return factor

    def _dense(self, *tensors: Tensor, columns: Tensor | None = None) -> Tensor:
        """The matrix, or some columns of it, in plain differentiable operations on :meth:`tensors`."""
        X, rest = tensors[0], tensors[1:]
        Z, rest = (None, rest) if self.Z is None else (rest[0], rest[1:])
        U, V = scale_points(X, Z, rest[0], self.active)
        part = V if columns is None else V[columns]
        K = self.profile(squared_distances(U, part, columns is None and Z is None))
        factor = self._factor(*rest[1:])
        return K if factor is None else factor * K

    # -- tiles ----------------------------------------------------------------------------------------------------

    def _scaled(self) -> Scaled:
        """Scaled points as numbers, in float64 where the distances need it."""
        X, Z, raw = _plain(self.X, self.Z, self.raw_lengthscale)
        U, V = scale_points(X, Z, raw, self.active)
        if self.Z is None:
            V = U
        norms = [P.square().sum(1, keepdim=True) for P in (U, V)]
        spread = max(float(p.mean()) if p.numel() else 0.0 for p in norms)
        if self.dtype != torch.float64 and (self.profile.rough or spread > min(SPREAD, 2 * U.shape[1])):
            U, V = U.double(), V.double()
            norms = [P.square().sum(1, keepdim=True) for P in (U, V)]
        u, v = norms
        if self.profile.rough:  # see squared_distances: here all r² are lowered by τ, and clamped at 0 afterwards
            v = v - 2 * (U.shape[1] + 2) * torch.finfo(U.dtype).eps * torch.maximum(_largest(u), _largest(v))
        left = torch.cat([U, u, torch.ones_like(u)], 1).mul_(self.profile.scale)
        right = torch.cat([-2 * V, torch.ones_like(v), v], 1).mT.contiguous()
        return Scaled(U, V, left, right)

    def _tiles(self, points: Scaled, buffers: int = 2) -> Iterator[tuple[Any, ...]]:
        """(rows, columns, t, work, …) for every tile, the upper ones only where the points are the same."""
        same, edge = self.Z is None, self.backend.size(self.dtype, self.device)
        n, m = self.shape
        area = min(edge, n) * min(edge, m)
        flat = [torch.empty(area, dtype=self.dtype, device=self.device) for _ in range(buffers)]
        wide = points.left.dtype != self.dtype
        exact = torch.empty(area, dtype=points.left.dtype, device=self.device) if wide else flat[0]
        for a in range(0, n, edge):
            rows = slice(a, min(a + edge, n))
            for b in range(a if same else 0, m, edge):
                columns = slice(b, min(b + edge, m))
                shape = (rows.stop - a, columns.stop - b)
                t, *others = (f[: shape[0] * shape[1]].view(shape) for f in flat)
                r2 = exact[: t.numel()].view(shape)
                torch.mm(points.left[rows], points.right[:, columns], out=r2)
                if wide:
                    t.copy_(r2)
                if same and a == b:
                    t.fill_diagonal_(0.0)
                yield (rows, columns, self.profile.clamp_(t), *others)

    # -- gradients ------------------------------------------------------------------------------------------------

    def tensors(self) -> tuple[Tensor, ...]:
        second = () if self.Z is None else (self.Z,)
        return (self.X, *second, self.raw_lengthscale, *self.raw_scales)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        tensors = self.tensors()
        needs = [t.requires_grad for t in tensors]
        scales = len(self.raw_scales)
        moves, scaled = any(needs[: len(needs) - scales]), any(needs[len(needs) - scales :])
        grads: list[Tensor | None] = [None] * len(tensors)
        if not moves and not scaled:
            return tuple(grads)
        with torch.no_grad(), full_precision():
            points = self._scaled()
            grad_U, grad_V, total = self._contract(unwrap(Lam).detach(), unwrap(Q).detach(), points, moves, scaled)
            *inputs, raw = _plain(*tensors[: len(tensors) - scales])
            raw_scales = _plain(*self.raw_scales)
            if grad_U is not None:
                factor = self._factor(*raw_scales)
                raw_grad = torch.zeros(points.U.shape[1], dtype=grad_U.dtype, device=self.device)
                ell = positive(raw).to(grad_U.dtype)
                for i, (G, P) in enumerate(((grad_U, points.U), (grad_V, points.V))):
                    if G is None:
                        continue
                    G = G if factor is None else G * factor
                    raw_grad -= (G * P).sum(0)
                    if needs[i]:
                        grads[i] = self._spread((G / ell).to(self.dtype))
                if needs[len(inputs)]:
                    raw_grad = (raw_grad if raw.shape[1] > 1 else raw_grad.sum(0, keepdim=True)) / ell
                    grads[len(inputs)] = (raw_grad.to(raw.dtype) * torch.sigmoid(raw)).reshape(raw.shape)
            for i, r in enumerate(raw_scales):
                others = self._factor(*(o for j, o in enumerate(raw_scales) if j != i))
                g = total if others is None else total * others
                grads[len(inputs) + 1 + i] = (torch.sigmoid(r) * g.to(r.dtype)).reshape(r.shape)
        return tuple(g if need else None for g, need in zip(grads, needs, strict=True))

    def _spread(self, G: Tensor) -> Tensor:
        """A gradient in the active columns as one in all columns of X."""
        if self.active is None:
            return G
        out = torch.zeros(G.shape[0], self.X.shape[1], dtype=G.dtype, device=G.device)
        return out.index_add_(1, self.active, G)

    def _contract(
        self, Lam: Tensor, Q: Tensor, points: Scaled, moves: bool, scaled: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Gradients of ⟨Λ, k(U, V) Q⟩ in U and in V (None where V is U, or not wanted), and its value."""
        same, U, V = self.Z is None, points.U, points.V
        d = U.shape[1]
        one_U = torch.cat([U, torch.ones_like(U[:, :1])], 1).mT.contiguous()  # vectors as rows, as in _numeric
        one_V = one_U if same else torch.cat([V, torch.ones_like(V[:, :1])], 1).mT.contiguous()
        G_U = torch.zeros_like(one_U)
        G_V = G_U if same else torch.zeros_like(one_V)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        # ⟨Λ, dK Q⟩ with dK symmetric: a tile above the diagonal stands for its mirror image as well
        left, right = (torch.cat([Lam, Q], 1), torch.cat([Q, Lam], 1)) if same else (Lam, Q)
        k = Lam.shape[1]
        for i, j, t, work, T in self._tiles(points, buffers=3):
            slope, value = self.profile.slopes_(t, work)
            if same and i != j:
                torch.mm(left[i], right[j].mT, out=T)
            else:
                torch.mm(left[i, :k], right[j, :k].mT, out=T)
            if scaled:
                total += torch.dot(T.view(-1), value.view(-1))
            if moves:
                S = T.mul_(slope)
                if same and i == j:
                    S.fill_diagonal_(0.0)  # u_i − u_i: large, and would have to cancel
                S = S if S.dtype == U.dtype else S.to(U.dtype)
                G_U[:, i].addmm_(one_V[:, j], S.mT)
                G_V[:, j].addmm_(one_U[:, i], S)
        if not moves:
            return None, None, total
        grads = [2 * self.profile.scale * (G[d:] * P.mT - G[:d]).mT for G, P in ((G_U, U), (G_V, V))]
        return grads[0], None if same else grads[1], total

    # -- entries --------------------------------------------------------------------------------------------------

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        """The columns K[:, idx] (n, len(idx)), from n·len(idx) evaluations of k; differentiable to any order."""
        index = torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1)
        return self._dense(*self.tensors(), columns=index)

    def diagonal(self) -> Tensor:
        """The diagonal: s for Z = None, without evaluations; differentiable."""
        if self.Z is None:
            factor = self._factor(*self.raw_scales)
            ones = torch.ones(self.shape[0], dtype=self.dtype, device=self.device)
            return ones if factor is None else factor * ones
        size = min(self.shape)
        U, V = scale_points(self.X, self.Z, self.raw_lengthscale, self.active)
        K = self.profile((U[:size] - V[:size]).square().sum(1))
        factor = self._factor(*self.raw_scales)
        return K if factor is None else factor * K

    def to_dense(self) -> Tensor:
        return self._dense(*self.tensors())


def _plain(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else unwrap(t).detach() for t in tensors)
