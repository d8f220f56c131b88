"""Kernels on points, and their matrices as operators that never exist as a whole."""

from .backends import Stored
from .base import RBF, AdditiveKernel, Kernel, Matern, ProductKernel, Scale, Stationary
from .evaluated import EvaluatedOperator
from .profiles import Gaussian, MaternProfile, Profile
from .stored import StoredOperator
from .tiled import StationaryOperator
from .torch_tiles import Tiles

__all__ = [
    "RBF",
    "AdditiveKernel",
    "EvaluatedOperator",
    "Gaussian",
    "Kernel",
    "Matern",
    "MaternProfile",
    "ProductKernel",
    "Profile",
    "Scale",
    "Stationary",
    "StationaryOperator",
    "Stored",
    "StoredOperator",
    "Tiles",
]
