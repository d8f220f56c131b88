"""ritz: gradients of functions of large matrices, and learning with the curvature they give."""

from . import operators
from .operators import Counting, LinearOperator, aslinearoperator

__version__ = "0.1.0.dev0"

__all__ = ["Counting", "LinearOperator", "aslinearoperator", "operators"]
