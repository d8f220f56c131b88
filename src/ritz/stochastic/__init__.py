"""Stochastic estimates with fixed probes and standard errors: traces, log-determinants, diagonals."""

from .deflated import Deflated
from .hutchpp import HutchPP
from .measure import SpectralMeasure, spectral_density, spectral_measure
from .norms import frobenius_norm
from .probes import Hutchinson
from .trace import diagonal, logdet, trace
from .xdiag import XDiag
from .xtrace import XTrace

__all__ = [
    "Deflated",
    "HutchPP",
    "Hutchinson",
    "SpectralMeasure",
    "XDiag",
    "XTrace",
    "diagonal",
    "frobenius_norm",
    "logdet",
    "spectral_density",
    "spectral_measure",
    "trace",
]
