"""Back ends: how the products with a kernel matrix are computed. All of them mean the same matrix."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OperandError
from ..methods import Auto
from .torch_tiles import Tiles


@dataclass(frozen=True)
class Stored:
    """The whole matrix, made once by tiles and kept: n·m numbers, and the fastest products where these fit.

    Gradients are made by tiles, as without it. The matrix is made anew when a parameter has changed.

    Args:
        tiles: the back end that fills it and contracts gradients.
    """

    tiles: Auto | Tiles = Auto()

    def __post_init__(self) -> None:
        if not isinstance(self.tiles, (Auto, Tiles)):
            raise OperandError(f"Stored(tiles={self.tiles!r}); expected Auto() or a back end of tiles")


Backend = Auto | Tiles | Stored


def choose(backend: Auto | Tiles) -> Tiles:
    """Resolve Auto(), which is ``Tiles()``."""
    return Tiles() if isinstance(backend, Auto) else backend
