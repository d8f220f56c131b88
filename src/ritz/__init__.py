"""ritz: gradients of functions of large matrices, and learning with the curvature they give."""

from . import (
    curvature,
    eig,
    errors,
    expint,
    functions,
    gp,
    kernels,
    krylov,
    laplace,
    operators,
    optim,
    plot,
    stochastic,
    testing,
)
from .eig import eigsh
from .errors import (
    BreakdownError,
    ConvergenceError,
    ConvergenceWarning,
    DomainError,
    NonFiniteError,
    OperandError,
    RitzError,
)
from .functions import Chebyshev, ShiftInvert, bilinear_form, expm_multiply, funm_multiply, quadratic_form
from .methods import Adjoint, Arnoldi, Auto, Frechet, Lanczos, Unrolled
from .operators import Counting, LinearOperator, aslinearoperator
from .ravel import ravel
from .result import Info, Status
from .solve import CG, MINRES, Direct, Jacobi, Landmarks, Nystrom, PivotedCholesky, RandomlyPivotedCholesky, solve
from .stochastic import Deflated, Hutchinson, XDiag, diagonal, logdet, spectral_density, trace

__version__ = "0.1.0.dev0"

__all__ = [
    "Adjoint",
    "Arnoldi",
    "Auto",
    "BreakdownError",
    "CG",
    "Chebyshev",
    "ConvergenceError",
    "ConvergenceWarning",
    "Counting",
    "Deflated",
    "Direct",
    "DomainError",
    "Frechet",
    "Hutchinson",
    "Info",
    "Jacobi",
    "Landmarks",
    "Lanczos",
    "LinearOperator",
    "MINRES",
    "NonFiniteError",
    "Nystrom",
    "OperandError",
    "PivotedCholesky",
    "RandomlyPivotedCholesky",
    "RitzError",
    "ShiftInvert",
    "Status",
    "Unrolled",
    "XDiag",
    "aslinearoperator",
    "bilinear_form",
    "curvature",
    "diagonal",
    "eig",
    "eigsh",
    "errors",
    "expint",
    "expm_multiply",
    "functions",
    "funm_multiply",
    "gp",
    "kernels",
    "krylov",
    "laplace",
    "logdet",
    "operators",
    "optim",
    "plot",
    "quadratic_form",
    "ravel",
    "solve",
    "spectral_density",
    "stochastic",
    "testing",
    "trace",
]
