"""ritz: gradients of functions of large matrices, and learning with the curvature they give."""

from . import errors, functions, krylov, operators, stochastic
from .errors import (
    BreakdownError,
    ConvergenceError,
    ConvergenceWarning,
    DomainError,
    NonFiniteError,
    OperandError,
    RitzError,
)
from .functions import bilinear_form, expm_multiply, funm_multiply, quadratic_form
from .methods import Adjoint, Arnoldi, Auto, Frechet, Lanczos, Unrolled
from .operators import Counting, LinearOperator, aslinearoperator
from .ravel import ravel
from .result import Info, Status
from .stochastic import Hutchinson, diagonal, logdet, trace

__version__ = "0.1.0.dev0"

__all__ = [
    "Adjoint",
    "Arnoldi",
    "Auto",
    "BreakdownError",
    "ConvergenceError",
    "ConvergenceWarning",
    "Counting",
    "DomainError",
    "Frechet",
    "Hutchinson",
    "Info",
    "Lanczos",
    "LinearOperator",
    "NonFiniteError",
    "OperandError",
    "RitzError",
    "Status",
    "Unrolled",
    "aslinearoperator",
    "bilinear_form",
    "diagonal",
    "errors",
    "expm_multiply",
    "functions",
    "funm_multiply",
    "krylov",
    "logdet",
    "operators",
    "quadratic_form",
    "ravel",
    "stochastic",
    "trace",
]
