"""Kernels on points, and their matrices as operators that never exist as a whole."""

from .backends import Stored, for_iteration
from .base import Kernel
from .combine import AdditiveKernel, ProductKernel, Scale
from .dot import InnerProductOperator, Linear, Polynomial
from .evaluated import EvaluatedOperator
from .matern import GeneralMaternProfile
from .numba_tiles import NumbaTiles
from .products import FactoredOperator
from .profiles import Gaussian, MaternProfile, Profile, RationalQuadraticProfile
from .stationary import RBF, Matern, Periodic, RationalQuadratic, Stationary
from .stored import StoredOperator
from .tiled import StationaryOperator
from .torch_tiles import Tiles
from .triton_tiles import TritonTiles

__all__ = [
    "RBF",
    "AdditiveKernel",
    "EvaluatedOperator",
    "FactoredOperator",
    "Gaussian",
    "GeneralMaternProfile",
    "InnerProductOperator",
    "Kernel",
    "Linear",
    "Matern",
    "MaternProfile",
    "NumbaTiles",
    "Periodic",
    "Polynomial",
    "ProductKernel",
    "Profile",
    "RationalQuadratic",
    "RationalQuadraticProfile",
    "Scale",
    "Stationary",
    "StationaryOperator",
    "Stored",
    "StoredOperator",
    "Tiles",
    "TritonTiles",
    "for_iteration",
]
