"""Products of stationary kernels by tiles: the tiles of the factors are made together and multiplied.

K = s·k₁ ∘ k₂ ∘ …, so that ⟨Λ, dK Q⟩ = s Σ_f ⟨W_f, dk_f⟩ with W_f = (Λ Qᵀ) ∘ Π_{g≠f} k_g: the contraction of each factor
is that of a single kernel with W_f in place of Λ Qᵀ. docs/derivations/kernels.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..numerics import full_precision, is_transformed, unwrap
from ..operators.base import Gradients, LinearOperator
from .columns import columns_by_rows
from .distances import Coordinates, origin_of
from .parameters import positive
from .profiles import Profile
from .tiled import StationaryOperator
from .torch_tiles import Tiles

Prepared = list[tuple[Profile, Coordinates]]


class FactoredOperator(LinearOperator):
    """s·k₁(x_i, z_j)·k₂(x_i, z_j)·… as an operator (n, m) that is made tile by tile.

    Args:
        factors: operators of the factors, without scales, on the same points.
        raw_scales: raw factors s of one element each; nested scalings multiply.
        backend: the tile size; off the CPU the automatic one is half of the usual, since every factor has buffers.

    Cost: a product makes one tile per factor; the pairing contracts once per factor.
    Memory: two tiles per factor and a few more, n·(d + k) numbers.
    Gradient: of X, Z, parameters and scales; the first by tiles, further ones through the dense matrix.
    """

    def __init__(
        self, factors: Sequence[StationaryOperator], raw_scales: Sequence[Tensor] = (), backend: Tiles = Tiles()
    ) -> None:
        first = factors[0]
        super().__init__(
            first.shape, first.dtype, first.device, hermitian=first.hermitian or None, psd=first.psd or None
        )
        self.factors, self.raw_scales, self.backend = tuple(factors), tuple(raw_scales), backend
        self.X, self.Z = first.X, first.Z

    def _matmat(self, X: Tensor) -> Tensor:
        from ..product import product

        return product(self, X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        if self.hermitian:
            return self._matmat(X)
        return FactoredOperator([f._swapped() for f in self.factors], self.raw_scales, self.backend)._matmat(X)

    # -- tiles ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _numeric(self, X: Tensor) -> Tensor:
        with full_precision():
            X = X.mT.contiguous()
            Y = torch.zeros(X.shape[0], self.shape[0], dtype=self.dtype, device=self.device)
            for i, j, K in self._products():
                Y[:, i].addmm_(X[:, j], K.mT)
                if self.Z is None and i != j:
                    Y[:, j].addmm_(X[:, i], K)
            return Y.mul_(self._scale(*_plain(*self.raw_scales)).to(self.dtype)).mT

    def _products(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and entries of every tile, without the scales."""
        prepared = [f._prepared() for f in self.factors]
        for i, j, tiles in self._tiles(prepared):
            values = [profile.values_(t, work) for (profile, _), (t, work) in zip(prepared, tiles, strict=True)]
            for k in values[1:]:
                values[0].mul_(k)
            yield i, j, values[0]

    def _tiles(self, prepared: Prepared) -> Iterator[tuple[slice, slice, list[tuple[Tensor, Tensor]]]]:
        """Rows, columns and (clamped t, work) of every factor; the upper tiles only where the points are the same."""
        (n, m), same, dtype = self.shape, self.Z is None, self.dtype
        edge = self.backend.size(dtype, self.device)
        edge = edge if self.device.type == "cpu" or self.backend.edge else edge // 2
        area = min(edge, n) * min(edge, m)
        flat = [torch.empty(2, area, dtype=dtype, device=self.device) for _ in prepared]
        wide = any(points.left.dtype != dtype for _, points in prepared)
        exact = torch.empty(area if wide else 0, dtype=torch.float64, device=self.device)
        for a in range(0, n, edge):
            rows = slice(a, min(a + edge, n))
            for b in range(a if same else 0, m, edge):
                columns = slice(b, min(b + edge, m))
                shape = (rows.stop - a, columns.stop - b)
                out = []
                for (profile, points), buffers in zip(prepared, flat, strict=True):
                    t, work = (f[: math.prod(shape)].view(shape) for f in buffers)
                    r2 = t if points.left.dtype == dtype else exact[: t.numel()].view(shape)
                    torch.mm(points.left[rows], points.right[:, columns], out=r2)
                    if r2 is not t:
                        t.copy_(r2)
                    if same and a == b:
                        t.fill_diagonal_(0.0)
                    out.append((profile.clamp_(t), work))
                yield rows, columns, out

    # -- gradients ------------------------------------------------------------------------------------------------

    def tensors(self) -> tuple[Tensor, ...]:
        second = () if self.Z is None else (self.Z,)
        return (self.X, *second, *(p for f in self.factors for p in f.parameters), *self.raw_scales)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        tensors = self.tensors()
        if not any(t.requires_grad for t in tensors):
            return (None,) * len(tensors)
        with torch.no_grad(), full_precision():
            prepared = [f._prepared() for f in self.factors]
            sums = [_Sums(*p) for p in prepared]
            value = self._contract(prepared, sums, unwrap(Lam).detach(), unwrap(Q).detach())
            raw_scales = _plain(*self.raw_scales)
            scale = self._scale(*raw_scales)
            X, Z = _plain(self.X, self.Z)
            origin = origin_of(X).double()
            points = [torch.zeros_like(P, dtype=torch.float64) for P in (X, Z) if P is not None]
            grads: list[Tensor | None] = []
            for f, found in zip(self.factors, sums, strict=True):
                parameters = _plain(*f.parameters)
                own = list(f.form.shape_gradients(found.shapes * scale, *parameters))
                for total, P, G in zip(points, (X, Z), found.coordinates(self.Z is None), strict=False):
                    g, rest = f.form.pullback(P.double(), origin, parameters, G * scale)
                    total += g
                    own = [b if a is None else (a if b is None else a + b) for a, b in zip(own, rest, strict=True)]
                grads += own
            for r in raw_scales:
                g = torch.sigmoid(r).double() / positive(r).double() * (value * scale)
                grads.append(g.to(r.dtype).reshape(r.shape))
        everything = [*(p.to(self.dtype) for p in points), *grads]
        return tuple(g if t.requires_grad else None for g, t in zip(everything, tensors, strict=True))

    def _contract(self, prepared: Prepared, sums: list[_Sums], Lam: Tensor, Q: Tensor) -> Tensor:
        """⟨Λ, K Q⟩ without the scales, a float64 scalar, and the sums of every factor."""
        same, k = self.Z is None, Lam.shape[1]
        # ⟨Λ, dK Q⟩ with dK symmetric: a tile above the diagonal stands for its mirror image as well
        left, right = (torch.cat([Lam, Q], 1), torch.cat([Q, Lam], 1)) if same else (Lam, Q)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, j, tiles in self._tiles(prepared):
            width = slice(None) if same and i != j else slice(k)
            T = left[i, width] @ right[j, width].mT
            bends = [profile.shape_slopes(t) for (profile, _), (t, _) in zip(prepared, tiles, strict=True)]
            pairs = [profile.slopes_(t, work) for (profile, _), (t, work) in zip(prepared, tiles, strict=True)]
            for f, own in enumerate(sums):
                W = T.clone()
                for g, (_, value) in enumerate(pairs):
                    if g != f:
                        W.mul_(value)
                if f == 0:
                    total += torch.dot(W.view(-1), pairs[0][1].reshape(-1))
                for p, bend in enumerate(bends[f]):
                    own.shapes[p] += torch.dot(W.view(-1), bend.reshape(-1))
                W.mul_(pairs[f][0])
                if same and i == j:
                    W.fill_diagonal_(0.0)  # u_i − u_i: large, and would have to cancel
                own.add(i, j, W)
        return total

    # -- entries --------------------------------------------------------------------------------------------------

    def _scale(self, *raw_scales: Tensor) -> Tensor:
        """The product of the scales, a float64 scalar."""
        out = torch.ones((), dtype=torch.float64, device=self.device)
        for raw in raw_scales:
            out = out * positive(raw).double().reshape(())
        return out

    def _dense(self, *tensors: Tensor, rows: slice = slice(None), columns: Tensor | None = None) -> Tensor:
        """The matrix, or some of its rows and columns, in plain differentiable operations on :meth:`tensors`."""
        count = 1 if self.Z is None else 2
        points, rest = tensors[:count], tensors[count:]
        K = None
        for f in self.factors:
            own, rest = rest[: len(f.parameters)], rest[len(f.parameters) :]
            part = f._dense(*points, *own, rows=rows, columns=columns)
            K = part if K is None else K * part
        assert K is not None
        return K * self._scale(*rest).to(self.dtype)

    def _recorded(self, X: Tensor, *tensors: Tensor) -> Tensor:
        return self._dense(*tensors) @ X

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        """The columns K[:, idx] (n, len(idx)); differentiable to any order."""
        return columns_by_rows(self, torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1))

    def diagonal(self) -> Tensor:
        """The diagonal; differentiable."""
        out = math.prod((f.diagonal() for f in self.factors[1:]), start=self.factors[0].diagonal())
        return out * self._scale(*self.raw_scales).to(self.dtype)

    def to_dense(self) -> Tensor:
        """The matrix (n, m): by tiles where no graph is wanted, in differentiable operations otherwise."""
        tensors = self.tensors()
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if recorded or any(is_transformed(t) for t in tensors):
            return self._dense(*tensors)
        with torch.no_grad(), full_precision():
            out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            for i, j, K in self._products():
                out[i, j] = K
                if self.Z is None and i != j:
                    out[j, i] = K.mT
            return out.mul_(self._scale(*_plain(*self.raw_scales)).to(self.dtype))


class _Sums:
    """What the contraction adds up for one factor."""

    def __init__(self, profile: Profile, points: Coordinates) -> None:
        self.profile, self.points = profile, points
        self.shapes = torch.zeros(profile.num_shapes, dtype=torch.float64, device=points.U.device)
        self.ones = [torch.cat([P, torch.ones_like(P[:, :1])], 1).mT.contiguous() for P in (points.U, points.V)]
        self.rows, self.columns = (torch.zeros_like(P) for P in self.ones)

    def add(self, i: slice, j: slice, S: Tensor) -> None:
        """One tile of S = W ∘ dk/dt, t = scale·‖u_i − v_j‖²."""
        S = S.to(self.rows.dtype)
        self.rows[:, i].addmm_(self.ones[1][:, j], S.mT)
        self.columns[:, j].addmm_(self.ones[0][:, i], S)

    def coordinates(self, same: bool) -> list[Tensor]:
        """Gradients in u, and in v unless that is the same, in float64."""
        found = [
            2 * self.profile.scale * (G[-1:] * one[:-1] - G[:-1]).mT.double()
            for G, one in zip((self.rows, self.columns), self.ones, strict=True)
        ]
        return [found[0] + found[1]] if same else found


def _plain(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if t is None else unwrap(t).detach() for t in tensors)
