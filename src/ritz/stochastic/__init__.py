"""Stochastic estimates with fixed probes and standard errors: traces, log-determinants, diagonals."""

from .probes import Hutchinson
from .trace import diagonal, logdet, trace

__all__ = ["Hutchinson", "diagonal", "logdet", "trace"]
