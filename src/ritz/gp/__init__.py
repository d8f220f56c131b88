"""Gaussian-process regression with exact covariances, from tens to millions of points."""

from .exact import ExactGP
from .means import ConstantMean, ZeroMean
from .posterior import Posterior

__all__ = ["ConstantMean", "ExactGP", "Posterior", "ZeroMean"]
