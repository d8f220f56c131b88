"""Gaussian-process regression with exact covariances, from tens to millions of points."""

from . import scores
from .adam import Adam
from .checkpoint import Checkpoint
from .exact import ExactGP
from .fit import Fit, fit
from .from_gpytorch import from_gpytorch
from .lbfgs import LBFGS
from .means import ConstantMean, LinearMean, ZeroMean
from .multioutput import MultiOutputGP, MultiOutputPosterior
from .noise import FixedNoise, HeteroscedasticNoise
from .objective import LeaveOneOut, MarginalLikelihood
from .pathwise import Exact, Features, Paths, SquareRoot
from .posterior import Posterior
from .priors import vanilla_priors
from .projection import Projection
from .regressor import GPRegressor
from .training import HeldOut

__all__ = [
    "Adam",
    "Checkpoint",
    "ConstantMean",
    "Exact",
    "ExactGP",
    "Features",
    "Fit",
    "FixedNoise",
    "GPRegressor",
    "HeldOut",
    "HeteroscedasticNoise",
    "LBFGS",
    "LeaveOneOut",
    "LinearMean",
    "MarginalLikelihood",
    "MultiOutputGP",
    "MultiOutputPosterior",
    "Paths",
    "Posterior",
    "Projection",
    "SquareRoot",
    "ZeroMean",
    "fit",
    "from_gpytorch",
    "scores",
    "vanilla_priors",
]
