"""Curvature of networks: Jacobian, Hessian, Gauss–Newton and Fisher operators, and what layers multiply."""

from .capture import Capture, Sink
from .discover import Found, Site, discover
from .dual import DualGGN
from .eigenblocks import EigenBlock, EigenBlocks
from .ggn import GGN, ExactFisher, Fisher
from .hessian import Hessian
from .influence import influence
from .jacobian import NTK, Jacobian
from .kronecker import EKFAC, KFAC, BlockDiagonalGGN, DiagonalGGN
from .layers import LayerRule, OneHot, rule_for
from .losses import BinaryCrossEntropy, CrossEntropy, CustomLoss, Poisson, SquaredError
from .pending import Pending
from .sharing import Count, Expand, PerExample, PerPosition, Reduce
from .statistics import EmpiricalFisher, GaussNewton, MonteCarloFisher

__all__ = [
    "BinaryCrossEntropy",
    "BlockDiagonalGGN",
    "Capture",
    "Count",
    "CrossEntropy",
    "CustomLoss",
    "DiagonalGGN",
    "DualGGN",
    "EKFAC",
    "EigenBlock",
    "EigenBlocks",
    "EmpiricalFisher",
    "ExactFisher",
    "Expand",
    "Fisher",
    "Found",
    "GGN",
    "GaussNewton",
    "Hessian",
    "Jacobian",
    "KFAC",
    "LayerRule",
    "MonteCarloFisher",
    "NTK",
    "OneHot",
    "Pending",
    "PerExample",
    "PerPosition",
    "Poisson",
    "Reduce",
    "Sink",
    "Site",
    "SquaredError",
    "discover",
    "influence",
    "rule_for",
]
