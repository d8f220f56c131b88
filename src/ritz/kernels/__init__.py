"""Kernels on points, and their matrices as operators that never exist as a whole."""

from .backends import Stored, Tiles
from .base import RBF, AdditiveKernel, Kernel, Matern, ProductKernel, Scale, Stationary
from .evaluated import EvaluatedOperator
from .profiles import Gaussian, MaternProfile, Profile
from .tiled import StationaryOperator

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
    "Tiles",
]
