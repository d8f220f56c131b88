"""ritz: gradients of functions of large matrices, and learning with the curvature they give."""

from . import errors, functions, krylov, operators, stochastic
from .errors import ConvergenceWarning
from .functions import bilinear_form, expm_multiply, funm_multiply, quadratic_form
from .methods import Adjoint, Arnoldi, Auto, Frechet, Lanczos, Unrolled
from .operators import Counting, LinearOperator, aslinearoperator
from .result import Info, Status
from .stochastic import Hutchinson, diagonal, logdet, trace

__version__ = "0.1.0.dev0"

__all__ = [
    "Adjoint",
    "Arnoldi",
    "Auto",
    "ConvergenceWarning",
    "Counting",
    "Frechet",
    "Hutchinson",
    "Info",
    "Lanczos",
    "LinearOperator",
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
    "stochastic",
    "trace",
]
