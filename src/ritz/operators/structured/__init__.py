"""Structured matrices that are closed under products, and the map of symmetric matrices to them."""

from .base import Structure
from .block import BlockDiagonal
from .compose import BlockTriangular, DirectSum
from .dense import Dense
from .diagonal import Diagonal
from .hierarchical import Hierarchical
from .matrix import StructuredMatrix
from .rank import RankTriangular
from .toeplitz import LowerToeplitz, UpperToeplitz
from .triangular import LowerTriangular, UpperTriangular

__all__ = [
    "BlockDiagonal",
    "BlockTriangular",
    "Dense",
    "Diagonal",
    "DirectSum",
    "Hierarchical",
    "LowerToeplitz",
    "LowerTriangular",
    "RankTriangular",
    "Structure",
    "StructuredMatrix",
    "UpperToeplitz",
    "UpperTriangular",
]
