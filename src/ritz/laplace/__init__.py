"""Laplace posteriors of networks: the whole Gauss–Newton matrix without forming it, or blocks of it."""

from .laplace import Laplace
from .online import Training, marglik_training
from .posterior import Blocks, Full, LowRank

__all__ = ["Blocks", "Full", "Laplace", "LowRank", "Training", "marglik_training"]
