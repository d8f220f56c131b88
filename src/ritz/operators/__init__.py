"""Operators: anything with a product, and their algebra."""

from .algebra import Adjoint, Conjugate, Declared, Product, Scaled, Sum
from .base import LinearOperator
from .basic import Dense, Diagonal, Identity, identity
from .convert import aslinearoperator
from .counting import Counting
from .function import FunctionOperator
from .sparse import Sparse

__all__ = [
    "Adjoint",
    "Conjugate",
    "Counting",
    "Declared",
    "Dense",
    "Diagonal",
    "FunctionOperator",
    "Identity",
    "LinearOperator",
    "Product",
    "Scaled",
    "Sparse",
    "Sum",
    "aslinearoperator",
    "identity",
]
