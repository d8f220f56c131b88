"""Operators: anything with a product, and their algebra."""

from .algebra import Adjoint, Conjugate, Declared, Product, Scaled, Sum
from .base import LinearOperator
from .basic import Dense, Diagonal, Identity, identity
from .block import BlockDiagonal
from .convert import aslinearoperator
from .counting import Counting
from .function import FunctionOperator
from .kronecker import Kronecker
from .lowrank import LowRank, low_rank_update
from .sparse import Sparse
from .toeplitz import Toeplitz

__all__ = [
    "Adjoint",
    "BlockDiagonal",
    "Conjugate",
    "Counting",
    "Declared",
    "Dense",
    "Diagonal",
    "FunctionOperator",
    "Identity",
    "Kronecker",
    "LinearOperator",
    "LowRank",
    "Product",
    "Scaled",
    "Sparse",
    "Sum",
    "Toeplitz",
    "aslinearoperator",
    "identity",
    "low_rank_update",
]
