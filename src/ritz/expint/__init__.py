"""Exponential integrators: e^{tA}v and its relatives, operators of PDEs, and what steps through time with them."""

from ..functions import expm_multiply
from .diffusion import Diffusion, Laplacian
from .first_order import FirstOrder
from .fourier import Fourier, laplacian_symbol
from .grid import Grid
from .interpolate import DenseOutput
from .odeint import OdeInfo, odeint
from .phi import phi_multiply
from .segments import Checkpoints
from .stencils import Advection, Hamiltonian, WaveOperator
from .steppers import ETDRK4, EXPRB43, EXPRB53, ExponentialEuler
from .wave import wave_multiply

__all__ = [
    "Advection",
    "Checkpoints",
    "DenseOutput",
    "Diffusion",
    "ETDRK4",
    "EXPRB43",
    "EXPRB53",
    "ExponentialEuler",
    "FirstOrder",
    "Fourier",
    "Grid",
    "Hamiltonian",
    "Laplacian",
    "OdeInfo",
    "WaveOperator",
    "expm_multiply",
    "laplacian_symbol",
    "odeint",
    "phi_multiply",
    "wave_multiply",
]
