"""Exponential integrators: e^{tA}v and its relatives, and what steps through time with them."""

from .phi import phi_multiply
from .wave import wave_multiply

__all__ = ["phi_multiply", "wave_multiply"]
