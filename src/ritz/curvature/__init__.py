"""Curvature of networks: what a layer multiplies, captured in the passes that training makes anyway."""

from .capture import Capture, Sink
from .discover import Found, Site, discover
from .layers import LayerRule, OneHot, rule_for
from .losses import CrossEntropy, SquaredError
from .pending import Pending
from .sharing import Count, Expand, PerExample, PerPosition, Reduce
from .statistics import EmpiricalFisher, GaussNewton, MonteCarloFisher

__all__ = [
    "Capture",
    "Count",
    "CrossEntropy",
    "EmpiricalFisher",
    "Expand",
    "Found",
    "GaussNewton",
    "LayerRule",
    "MonteCarloFisher",
    "OneHot",
    "Pending",
    "PerExample",
    "PerPosition",
    "Reduce",
    "Sink",
    "Site",
    "SquaredError",
    "discover",
    "rule_for",
]
