"""Tiles of a stationary kernel matrix by torch operations: the back end that is always there.

A tile is one matrix product, one in-place pass of the profile over it, and one product with the block of vectors. The
pairing makes tiles anew: with T = Λ Qᵀ, S = T ∘ k'(t)
    ∂/∂u_i = 2·scale·(Σ_j S_ij u_i − Σ_j S_ij v_j),      likewise for v_j.   docs/derivations/kernels.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import OperandError
from .distances import Coordinates
from .panels import Panel, pool, rounds, together
from .profiles import Profile

WORKSPACE = 64 * 2**20  # bytes of tile buffers at most, on any device
CPU_EDGE = 512  # a float32 tile of 1 MiB stays in the second-level cache (measured against 256 and 1024)


class Contraction(NamedTuple):
    """Derivatives of ⟨Λ, k(U, V) Q⟩."""

    grad_U: Tensor | None  # (n, q); None where not wanted
    grad_V: Tensor | None  # (m, q); None where V is U, or not wanted
    value: Tensor  # ⟨Λ, k(U, V) Q⟩ itself, a float64 scalar: the derivative in log(scale)
    shapes: Tensor  # (profile.num_shapes,) float64: derivatives in the profile's shape parameters


class TorchPass:
    """The pass of a profile over tiles, by torch operations, in buffers that all tiles share.

    Args:
        points: their dtype is that of the distances that it is given.
        dtype: of the kernel matrix.
        area: entries of the largest tile.
    """

    def __init__(self, profile: Profile, points: Coordinates, dtype: torch.dtype, area: int) -> None:
        self.profile = profile
        self.wide = points.left.dtype != dtype
        device = points.left.device
        self._buffers = [torch.empty(area, dtype=dtype, device=device) for _ in range(2 if self.wide else 1)]

    def values(self, r2: Tensor) -> Tensor:
        """k of distances times the profile's scale, of which only exact zeros need to be exact; overwrites them."""
        t, work = self._clamped(r2)
        return self.profile.values_(t, work)

    def pairing(self, r2: Tensor, T: Tensor, sums: Tensor | None) -> Tensor:
        """S = T ∘ dk/dt in the dtype of the distances; adds ⟨T, k⟩ and ⟨T, ∂k/∂shape⟩ to ``sums``. Overwrites both."""
        t, work = self._clamped(r2)
        bends = self.profile.shape_slopes(t) if sums is not None and self.profile.num_shapes else ()
        slope, value = self.profile.slopes_(t, work)
        if sums is not None:
            for p, x in enumerate((value, *bends)):
                sums[p] += torch.dot(T.view(-1), x.view(-1))
        S = T.mul_(slope)
        return r2.copy_(S) if self.wide else S

    def _clamped(self, r2: Tensor) -> tuple[Tensor, Tensor]:
        work, *narrow = (f[: r2.numel()].view(r2.shape) for f in self._buffers)
        t = narrow[0].copy_(r2) if narrow else r2
        return self.profile.clamp_(t), work


@dataclass(frozen=True)
class Tiles:
    """Square tiles of the matrix, made and used one after the other by torch operations; never the whole matrix.

    On a CPU, ``torch.get_num_threads()`` threads have tiles of their own (see panels.py) where each gets several. The
    same call gives the same bits with the same number of threads.

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
        k, X = X.shape[1], _as_rows(X)
        Y = torch.zeros(X.shape[0], points.U.shape[0], dtype=X.dtype, device=X.device)
        edge = self.size(X.dtype, X.device)
        x, y = X.split(edge, 1), Y.split(edge, 1)

        def visit(worker: _Worker, i: int, j: int) -> None:
            K = worker.tile.values(worker.distances(i, j))
            y[i].addmm_(x[j], K.mT)
            if points.same and i != j:
                y[j].addmm_(x[i], K)

        self._visit(profile, points, X.dtype, visit)
        return Y[:k].mT

    def fill(self, profile: Profile, points: Coordinates, out: Tensor) -> None:
        """Write k(U, V) into ``out`` (n, m)."""
        edge = self.size(out.dtype, out.device)
        parts = [rows.split(edge, 1) for rows in out.split(edge)]

        def put(i: int, j: int, K: Tensor) -> None:
            parts[i][j].copy_(K)
            if points.same and i != j:
                parts[j][i].copy_(K.mT)

        self.each(profile, points, out.dtype, put)

    def each(
        self, profile: Profile, points: Coordinates, dtype: torch.dtype, put: Callable[[int, int, Tensor], None]
    ) -> None:
        """Call put(i, j, K) with every tile K of k(U, V), in any order and from any thread; K is overwritten after it.

        Only the tiles on and above the diagonal (j ≥ i) where the points are the same.
        """

        def visit(worker: _Worker, i: int, j: int) -> None:
            put(i, j, worker.tile.values(worker.distances(i, j)))

        self._visit(profile, points, dtype, visit)

    def contract(
        self, profile: Profile, points: Coordinates, Lam: Tensor, Q: Tensor, *, moves: bool, sums: bool
    ) -> Contraction:
        """Derivatives of ⟨Λ, k(U, V) Q⟩ for Λ (n, k), Q (m, k).

        Args:
            moves: whether gradients in the coordinates are wanted.
            sums: whether value and shapes are.
        """
        same, U, V = points.same, points.U, points.V
        q = U.shape[1]
        one_U = _as_rows(torch.cat([U, torch.ones_like(U[:, :1])], 1))
        one_V = one_U if same else _as_rows(torch.cat([V, torch.ones_like(V[:, :1])], 1))
        G_U = torch.zeros_like(one_U)
        G_V = G_U if same else torch.zeros_like(one_V)
        # ⟨Λ, dK Q⟩ with dK symmetric: a tile above the diagonal stands for its mirror image as well
        left, right = (torch.cat([Lam, Q], 1), torch.cat([Q, Lam], 1)) if same else (Lam, Q)
        k, edge = Lam.shape[1], self.size(Q.dtype, Q.device)
        rows, columns = left.split(edge), right.mT.contiguous().split(edge, 1)
        u, v, g_u, g_v = (P.split(edge, 1) for P in (one_U, one_V, G_U, G_V))

        def visit(worker: _Worker, i: int, j: int) -> None:
            r2 = worker.distances(i, j)
            T = worker.second[: r2.numel()].view(r2.shape)
            if same and i != j:
                torch.mm(rows[i], columns[j], out=T)
            else:
                torch.mm(rows[i][:, :k], columns[j][:k], out=T)
            S = worker.tile.pairing(r2, T, worker.sums if sums else None)
            if moves:
                if same and i == j:
                    S.fill_diagonal_(0.0)  # u_i − u_i: large, and would have to cancel
                g_u[i].addmm_(v[j], S.mT)
                g_v[j].addmm_(u[i], S)

        workers = self._visit(profile, points, Q.dtype, visit, pairing=True)
        totals = torch.stack([w.sums for w in workers]).sum(0)
        if not moves:
            return Contraction(None, None, totals[0], totals[1:])
        grads = [2 * profile.scale * (G[q] * P.mT - G[:q]).mT for G, P in ((G_U, U), (G_V, V))]
        return Contraction(grads[0], None if same else grads[1], totals[0], totals[1:])

    def _pass(self, profile: Profile, points: Coordinates, dtype: torch.dtype, area: int) -> TorchPass:
        return TorchPass(profile, points, dtype, area)

    def _visit(
        self,
        profile: Profile,
        points: Coordinates,
        dtype: torch.dtype,
        visit: Callable[[_Worker, int, int], None],
        pairing: bool = False,
    ) -> list[_Worker]:
        """Call visit(worker, i, j) for every tile, the upper ones only where the points are the same."""
        device, edge = points.left.device, self.size(dtype, points.left.device)
        n, m = points.left.shape[0], points.right.shape[1]
        rows, columns = -(-n // edge), -(-m // edge)
        area = min(edge, n) * min(edge, m)
        threads = 1
        if device.type == "cpu" and pool() is not None:
            room = WORKSPACE // max(area * (2 * points.left.dtype.itemsize + 2 * dtype.itemsize), 1)
            most = columns // 2 if points.same else min(rows, columns) if pairing else rows
            threads = max(1, min(torch.get_num_threads(), most, room))
        workers = [
            _Worker(self._pass(profile, points, dtype, area), points, edge, area, dtype, pairing)
            for _ in range(threads)
        ]

        def task(worker: _Worker, panel: Panel) -> Callable[[], None]:
            def run() -> None:
                for i, j in panel:
                    visit(worker, i, j)

            return run

        for panels in rounds(rows, columns, threads, same=points.same, apart=pairing):
            together([task(w, p) for w, p in zip(workers, panels, strict=True)])
        return workers


class _Worker:
    """What one thread needs for its tiles. Workers are bound to panels: sums do not depend on who is faster."""

    def __init__(
        self, tile: TorchPass, points: Coordinates, edge: int, area: int, dtype: torch.dtype, pairing: bool
    ) -> None:
        device, exact = points.left.device, points.left.dtype
        self.tile, self._same = tile, points.same
        self._left, self._right = points.left.split(edge), points.right.split(edge, 1)
        self._buffer = torch.empty(area, dtype=exact, device=device)
        self.second = torch.empty(area if pairing else 0, dtype=dtype, device=device)
        self.sums = torch.zeros(1 + tile.profile.num_shapes, dtype=torch.float64, device=device)

    def distances(self, i: int, j: int) -> Tensor:
        """Squared distances times the profile's scale, exactly 0 on the diagonal."""
        rows, columns = self._left[i], self._right[j]
        shape = (rows.shape[0], columns.shape[1])
        r2 = self._buffer[: shape[0] * shape[1]].view(shape)
        torch.mm(rows, columns, out=r2)
        if self._same and i == j:
            r2.fill_diagonal_(0.0)
        return r2


def multiply(K: Tensor, X: Tensor, *, same: bool) -> Tensor:
    """K X for a dense matrix in memory (n, m) and a block (m, k); with ``same`` K is symmetric and half of it is read.

    On a CPU by tiles: BLAS takes two to three times as long for a large matrix times a few columns.
    """
    if K.device.type != "cpu":
        return K @ X
    parts = enumerate(rows.split(CPU_EDGE, 1) for rows in K.split(CPU_EDGE))
    tiles = {(i, j): tile for i, row in parts for j, tile in enumerate(row)}
    return multiply_tiles(tiles, K.shape[0], CPU_EDGE, X, same=same)


def multiply_tiles(tiles: Mapping[tuple[int, int], Tensor], n: int, edge: int, X: Tensor, *, same: bool) -> Tensor:
    """The product of a matrix of n rows, given by its tiles (i, j) of ``edge`` rows and columns, and a block X (m, k).

    With ``same`` the matrix is symmetric, and only its tiles j ≥ i are read. For tensors on a CPU.
    """
    k, X = X.shape[1], _as_rows(X)
    Y = torch.zeros(X.shape[0], n, dtype=X.dtype, device=X.device)
    x, y = X.split(edge, 1), Y.split(edge, 1)

    def task(panel: Panel) -> Callable[[], None]:
        def run() -> None:
            for i, j in panel:
                tile = tiles[i, j]
                y[i].addmm_(x[j], tile.mT)
                if same and i != j:
                    y[j].addmm_(x[i], tile)

        return run

    most = len(x) // 2 if same else len(y)
    threads = max(1, min(torch.get_num_threads() if pool() is not None else 1, most))
    for panels in rounds(len(y), len(x), threads, same=same, apart=False):
        together([task(panel) for panel in panels])
    return Y[:k].mT


def _as_rows(X: Tensor) -> Tensor:
    """The columns of X (m, k) as rows, with a few rows of zeros after them where BLAS is faster for it.

    MKL takes longer for 11 rows times a tile than for 12 (17 % in float32, 30 % in float64), for 19 than for 20.
    """
    m, k = X.shape
    missing = -k % 4
    if X.device.type != "cpu" or k < 6 or missing > 2:
        return X.mT.contiguous()
    rows = X.new_zeros(k + missing, m)
    rows[:k] = X.mT
    return rows
