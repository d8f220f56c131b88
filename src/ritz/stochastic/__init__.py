"""Stochastic estimates with fixed probes and standard errors: traces, log-determinants, diagonals."""

from .deflated import Deflated
from .probes import Hutchinson
from .trace import diagonal, logdet, trace

__all__ = ["Deflated", "Hutchinson", "diagonal", "logdet", "trace"]
