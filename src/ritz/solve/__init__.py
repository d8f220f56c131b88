"""Solves: x = A⁻¹ b by conjugate gradients, MINRES or a dense factorisation, and preconditioners."""

from .auto import choose
from .cg import CG
from .direct import Direct
from .minres import MINRES
from .preconditioners import (
    DiagonalPreconditioner,
    Jacobi,
    LowRankPreconditioner,
    PivotedCholesky,
    Preconditioner,
    RandomlyPivotedCholesky,
    split_shift,
)
from .solve import solve

__all__ = [
    "CG",
    "MINRES",
    "DiagonalPreconditioner",
    "Direct",
    "Jacobi",
    "LowRankPreconditioner",
    "PivotedCholesky",
    "Preconditioner",
    "RandomlyPivotedCholesky",
    "choose",
    "solve",
    "split_shift",
]
