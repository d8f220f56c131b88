"""Gaussian-process regression with exact covariances, from tens to millions of points."""

from .exact import ExactGP
from .fit import Fit, fit
from .means import ConstantMean, ZeroMean
from .posterior import Posterior
from .regressor import GPRegressor

__all__ = ["ConstantMean", "ExactGP", "Fit", "GPRegressor", "Posterior", "ZeroMean", "fit"]
