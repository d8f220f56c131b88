"""Torch optimizers that precondition with structured Kronecker factors of the curvature."""

from .inverse_free import LargestEntry, SpectralNorm
from .inverses import Eigen, Inverse
from .kfac import KFAC
from .settings import AdamW, DenseBelow, EarlyDense, Every, KLClip, NormClip
from .singd import IKFAC, INGD, SINGD

__all__ = [
    "AdamW",
    "DenseBelow",
    "EarlyDense",
    "Eigen",
    "Every",
    "IKFAC",
    "INGD",
    "Inverse",
    "KFAC",
    "KLClip",
    "LargestEntry",
    "NormClip",
    "SINGD",
    "SpectralNorm",
]
