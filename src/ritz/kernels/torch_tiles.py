"""Tiles of a stationary kernel matrix by torch operations: the back end that is always there.

A tile is one matrix product, one in-place pass of the profile over it, and one product with the block of vectors. The
pairing makes tiles anew: with T = Λ Qᵀ, S = T ∘ k'(t)
    ∂/∂u_i = 2·scale·(Σ_j S_ij u_i − Σ_j S_ij v_j),      likewise for v_j.   docs/derivations/kernels.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import OperandError
from .distances import Coordinates
from .profiles import Profile

WORKSPACE = 64 * 2**20  # bytes of tile buffers at most, on any device
CPU_EDGE = 512  # a float32 tile of 1 MiB stays in the second-level cache (measured against 256 and 1024)


class Contraction(NamedTuple):
    """Derivatives of ⟨Λ, k(U, V) Q⟩."""

    grad_U: Tensor | None  # (n, q); None where not wanted
    grad_V: Tensor | None  # (m, q); None where V is U, or not wanted
    value: Tensor  # ⟨Λ, k(U, V) Q⟩ itself, a float64 scalar: the derivative in log(scale)
    shapes: Tensor  # (profile.num_shapes,) float64: derivatives in the profile's shape parameters


@dataclass(frozen=True)
class Tiles:
    """Square tiles of the matrix, made and used one after the other by torch operations; never the whole matrix.

    Args:
        edge: rows and columns of a tile; None is 512 on a CPU, and elsewhere as many as fit into 64 MB of workspace
            (1792 in float32, 1408 in float64): a pure function of dtype and device type.
    """

    edge: int | None = None

    def __post_init__(self) -> None:
        if self.edge is not None and self.edge < 1:
            raise OperandError(f"{type(self).__name__}(edge={self.edge}); expected at least 1")

    def size(self, dtype: torch.dtype, device: torch.device) -> int:
        """Rows and columns of a tile."""
        if self.edge is not None:
            return self.edge
        if device.type == "cpu":
            return CPU_EDGE
        entry = 32 if dtype == torch.float64 else 20  # three buffers and a distance in float64
        return int(math.sqrt(WORKSPACE / entry)) // 128 * 128

    def product(self, profile: Profile, points: Coordinates, X: Tensor) -> Tensor:
        """k(U, V) X for a block X (m, k), in its dtype; no graph."""
        # Vectors as rows: a tile times a few columns takes BLAS four times as long as a few rows times a tile.
        X = X.mT.contiguous()
        Y = torch.zeros(X.shape[0], points.U.shape[0], dtype=X.dtype, device=X.device)
        for i, j, t, work in self._tiles(profile, points, X.dtype, buffers=2):
            k = profile.values_(t, work)
            Y[:, i].addmm_(X[:, j], k.mT)
            if points.same and i != j:
                Y[:, j].addmm_(X[:, i], k)
        return Y.mT

    def fill(self, profile: Profile, points: Coordinates, out: Tensor) -> None:
        """Write k(U, V) into ``out`` (n, m)."""
        for i, j, t, work in self._tiles(profile, points, out.dtype, buffers=2):
            k = profile.values_(t, work)
            out[i, j] = k
            if points.same and i != j:
                out[j, i] = k.mT

    def contract(
        self, profile: Profile, points: Coordinates, Lam: Tensor, Q: Tensor, *, moves: bool, sums: bool
    ) -> Contraction:
        """Derivatives of ⟨Λ, k(U, V) Q⟩ for Λ (n, k), Q (m, k).

        Args:
            moves: whether gradients in the coordinates are wanted.
            sums: whether value and shapes are.
        """
        same, U, V = points.same, points.U, points.V
        q, device = U.shape[1], U.device
        one_U = torch.cat([U, torch.ones_like(U[:, :1])], 1).mT.contiguous()  # vectors as rows, as in product
        one_V = one_U if same else torch.cat([V, torch.ones_like(V[:, :1])], 1).mT.contiguous()
        G_U = torch.zeros_like(one_U)
        G_V = G_U if same else torch.zeros_like(one_V)
        total = torch.zeros((), dtype=torch.float64, device=device)
        shapes = torch.zeros(profile.num_shapes, dtype=torch.float64, device=device)
        # ⟨Λ, dK Q⟩ with dK symmetric: a tile above the diagonal stands for its mirror image as well
        left, right = (torch.cat([Lam, Q], 1), torch.cat([Q, Lam], 1)) if same else (Lam, Q)
        k = Lam.shape[1]
        for i, j, t, work, T in self._tiles(profile, points, Q.dtype, buffers=3):
            bends = profile.shape_slopes(t) if sums and profile.num_shapes else ()
            slope, value = profile.slopes_(t, work)
            if same and i != j:
                torch.mm(left[i], right[j].mT, out=T)
            else:
                torch.mm(left[i, :k], right[j, :k].mT, out=T)
            if sums:
                total += torch.dot(T.view(-1), value.view(-1))
                for p, bend in enumerate(bends):
                    shapes[p] += torch.dot(T.view(-1), bend.view(-1))
            if moves:
                S = T.mul_(slope)
                if same and i == j:
                    S.fill_diagonal_(0.0)  # u_i − u_i: large, and would have to cancel
                S = S if S.dtype == U.dtype else S.to(U.dtype)
                G_U[:, i].addmm_(one_V[:, j], S.mT)
                G_V[:, j].addmm_(one_U[:, i], S)
        if not moves:
            return Contraction(None, None, total, shapes)
        grads = [2 * profile.scale * (G[q:] * P.mT - G[:q]).mT for G, P in ((G_U, U), (G_V, V))]
        return Contraction(grads[0], None if same else grads[1], total, shapes)

    def _tiles(
        self, profile: Profile, points: Coordinates, dtype: torch.dtype, buffers: int
    ) -> Iterator[tuple[Any, ...]]:
        """(rows, columns, t, work, …) for every tile, the upper ones only where the points are the same."""
        left, right, same = points.left, points.right, points.same
        n, m, device = left.shape[0], right.shape[1], left.device
        edge = self.size(dtype, device)
        area = min(edge, n) * min(edge, m)
        flat = [torch.empty(area, dtype=dtype, device=device) for _ in range(buffers)]
        wide = left.dtype != dtype
        exact = torch.empty(area, dtype=left.dtype, device=device) if wide else flat[0]
        for a in range(0, n, edge):
            rows = slice(a, min(a + edge, n))
            for b in range(a if same else 0, m, edge):
                columns = slice(b, min(b + edge, m))
                shape = (rows.stop - a, columns.stop - b)
                t, *others = (f[: shape[0] * shape[1]].view(shape) for f in flat)
                r2 = exact[: t.numel()].view(shape)
                torch.mm(left[rows], right[:, columns], out=r2)
                if wide:
                    t.copy_(r2)
                if same and a == b:
                    t.fill_diagonal_(0.0)
                yield (rows, columns, profile.clamp_(t), *others)
