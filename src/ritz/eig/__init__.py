"""Extremal eigenpairs of Hermitian operators and singular triplets of any, with derivatives."""

from .eigsh import EigenPairs, eigsh
from .svds import SingularTriplets, svds

__all__ = ["EigenPairs", "SingularTriplets", "eigsh", "svds"]
