"""The tiles of a symmetric matrix on and above its diagonal: half the memory of the matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .torch_tiles import multiply_tiles


class UpperTiles:
    """Tiles (i, j), j ≥ i, of a symmetric matrix (n, n) on a CPU, each contiguous; not yet filled.

    All are in one allocation: an allocator gives one of this size back to the system, and keeps many small ones.

    Args:
        n: rows of the matrix.
        edge: rows and columns of a tile (fewer in the last ones).
        dtype: of the entries.
        device: a CPU.

    Memory: n (n + edge)/2 numbers.
    """

    def __init__(self, n: int, edge: int, dtype: torch.dtype, device: torch.device) -> None:
        self.n, self.edge = n, edge
        sizes = [min(edge, n - a) for a in range(0, n, edge)]
        shapes = {(i, j): (sizes[i], sizes[j]) for i in range(len(sizes)) for j in range(i, len(sizes))}
        counts = [a * b for a, b in shapes.values()]
        memory = torch.empty(sum(counts), dtype=dtype, device=device)
        self.tiles: dict[tuple[int, int], Tensor] = {
            at: part.view(shapes[at]) for at, part in zip(shapes, memory.split(counts), strict=True)
        }
        self._memory = memory

    def product(self, X: Tensor) -> Tensor:
        """The matrix times a block X (n, k)."""
        return multiply_tiles(self.tiles, self.n, self.edge, X, same=True)

    def to_dense(self) -> Tensor:
        """The matrix (n, n)."""
        out = torch.empty(self.n, self.n, dtype=self._memory.dtype, device=self._memory.device)
        parts = [rows.split(self.edge, 1) for rows in out.split(self.edge)]
        for (i, j), tile in self.tiles.items():
            parts[i][j].copy_(tile)
            if i != j:
                parts[j][i].copy_(tile.mT)
        return out
