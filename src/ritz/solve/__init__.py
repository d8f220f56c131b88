"""Solves x = A⁻¹ b by CG, MINRES, GMRES or a dense factorisation; least squares by LSMR; preconditioners."""

from .auto import choose
from .cg import CG
from .direct import Direct
from .gmres import GMRES
from .lowrank import LowRankPreconditioner
from .lsmr import LSMR
from .lstsq import lstsq
from .minres import MINRES
from .nystrom import Landmarks, Nystrom, PivotedCholesky, RandomlyPivotedCholesky, default_rank
from .preconditioners import DiagonalPreconditioner, Jacobi, Preconditioner, as_preconditioner
from .root import InverseRoot, Preconditioned
from .solve import solve
from .splitting import split_noise, split_shift

__all__ = [
    "CG",
    "GMRES",
    "LSMR",
    "MINRES",
    "DiagonalPreconditioner",
    "Direct",
    "InverseRoot",
    "Jacobi",
    "Landmarks",
    "LowRankPreconditioner",
    "Nystrom",
    "PivotedCholesky",
    "Preconditioned",
    "Preconditioner",
    "RandomlyPivotedCholesky",
    "as_preconditioner",
    "choose",
    "default_rank",
    "lstsq",
    "solve",
    "split_noise",
    "split_shift",
]
