"""Back ends: how the products with a kernel matrix are computed. All of them mean the same matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import OperandError
from ..methods import Auto
from .numba_tiles import NumbaTiles
from .torch_tiles import Tiles
from .triton_tiles import TritonTiles

# Entries below which Auto() does not load a compiler: at 2048 × 2048 it saves some 3 ms a product, and numba takes
# about half a second to import (Triton as long to compile).
SMALL = 2**22
# Bytes of a whole matrix up to which repeated products are made with a stored one
COMFORTABLE = 2**30

TileBackend = Tiles | TritonTiles  # NumbaTiles is a kind of Tiles


@dataclass(frozen=True)
class Stored:
    """The matrix, made once by tiles and kept: the fastest products where it fits.

    n·m numbers; on a CPU half of them for K(X, X) with a stationary kernel, see :class:`~ritz.kernels.StoredOperator`.
    Gradients are made by tiles, as without it. The matrix is made anew when a parameter has changed.

    Args:
        tiles: the back end that fills it and contracts gradients.
    """

    tiles: Auto | TileBackend = Auto()

    def __post_init__(self) -> None:
        if not isinstance(self.tiles, Auto | TileBackend):
            raise OperandError(f"Stored(tiles={self.tiles!r}); expected Auto() or a back end of tiles")


Backend = Auto | TileBackend | Stored


def choose(backend: Auto | TileBackend, size: int = 0, device: torch.device = torch.device("cpu")) -> TileBackend:
    """The back end of tiles that Auto() stands for; any other one as it is.

    ==========  =======================================  =================
    device      further condition                        back end
    ==========  =======================================  =================
    any         fewer than 2²² entries                   ``Tiles()``
    CPU         numba is installed                       ``NumbaTiles()``
    CUDA        triton is installed                      ``TritonTiles()``
    otherwise                                            ``Tiles()``
    ==========  =======================================  =================

    A pure function of its arguments and of what is installed. Profiles and dtypes that compiled code does not know are
    treated as by ``Tiles()`` inside of the chosen one.

    Args:
        backend: Auto() or a choice already made.
        size: entries n·m of the matrix.
        device: where its points are.
    """
    if not isinstance(backend, Auto):
        return backend
    if size >= SMALL:
        if NumbaTiles.available(device):
            return NumbaTiles()
        if TritonTiles.available(device):
            return TritonTiles()
    return Tiles()


def for_iteration(n: int, m: int, dtype: torch.dtype) -> Stored | Auto:
    """What to multiply by some tens of times: the stored matrix, where it fits comfortably.

    ====================================  ============
    bytes of the whole matrix, n·m·size   back end
    ====================================  ============
    at most 2³⁰ (1 GiB)                   ``Stored()``
    more                                  ``Auto()``
    ====================================  ============

    A pure function of its arguments, on any device, and not of the memory that happens to be free: n = 16 384 in
    float32 and 11 585 in float64 are the largest squares that are stored. A CPU keeps half of them where it can, see
    :class:`~ritz.kernels.StoredOperator`. A stored product takes 0.6 of the time of one by compiled tiles, and filling
    the matrix that of two: it pays from five products on.

    Args:
        n, m: rows and columns.
        dtype: of the entries.
    """
    return Auto() if n * m * dtype.itemsize > COMFORTABLE else Stored()
