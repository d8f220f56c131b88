"""Back ends: how the products with a kernel matrix are computed. All of them mean the same matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import OperandError
from ..methods import Auto

WORKSPACE = 64 * 2**20  # bytes of tile buffers at most, on any device
CPU_EDGE = 512  # a float32 tile of 1 MiB stays in the second-level cache (measured against 256 and 1024)


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
            raise OperandError(f"Tiles(edge={self.edge}); expected at least 1")

    def size(self, dtype: torch.dtype, device: torch.device) -> int:
        """Rows and columns of a tile."""
        if self.edge is not None:
            return self.edge
        if device.type == "cpu":
            return CPU_EDGE
        entry = 32 if dtype == torch.float64 else 20  # three buffers and a distance in float64
        return int(math.sqrt(WORKSPACE / entry)) // 128 * 128


@dataclass(frozen=True)
class Stored:
    """The dense matrix, made once by ``kernel.evaluate``; n² numbers, twice differentiable."""


Backend = Auto | Tiles | Stored


def choose(backend: Backend) -> Tiles | Stored:
    """Resolve Auto(), which is ``Tiles()``."""
    if isinstance(backend, Auto):
        return Tiles()
    if not isinstance(backend, (Tiles, Stored)):
        raise OperandError(f"backend={backend!r}; expected Auto(), Tiles() or Stored()")
    return backend
