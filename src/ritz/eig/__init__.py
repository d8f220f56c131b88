"""Extremal eigenpairs of Hermitian operators, with derivatives."""

from .eigsh import EigenPairs, eigsh

__all__ = ["EigenPairs", "eigsh"]
