"""Exponential integrators: e^{tA}v and its relatives, operators of PDEs, and what steps through time with them."""

from .diffusion import Diffusion, Laplacian
from .first_order import FirstOrder
from .fourier import Fourier, laplacian_symbol
from .grid import Grid
from .phi import phi_multiply
from .stencils import Advection, Hamiltonian, WaveOperator
from .wave import wave_multiply

__all__ = [
    "Advection",
    "Diffusion",
    "FirstOrder",
    "Fourier",
    "Grid",
    "Hamiltonian",
    "Laplacian",
    "WaveOperator",
    "laplacian_symbol",
    "phi_multiply",
    "wave_multiply",
]
