"""ritz: gradients of functions of large matrices, and learning with the curvature they give."""

from . import errors, functions, krylov, operators
from .errors import ConvergenceWarning
from .functions import bilinear_form, expm_multiply, funm_multiply, quadratic_form
from .methods import Adjoint, Arnoldi, Auto, Frechet, Lanczos, Unrolled
from .operators import Counting, LinearOperator, aslinearoperator
from .result import Info, Status

__version__ = "0.1.0.dev0"

__all__ = [
    "Adjoint",
    "Arnoldi",
    "Auto",
    "ConvergenceWarning",
    "Counting",
    "Frechet",
    "Info",
    "Lanczos",
    "LinearOperator",
    "Status",
    "Unrolled",
    "aslinearoperator",
    "bilinear_form",
    "errors",
    "expm_multiply",
    "functions",
    "funm_multiply",
    "krylov",
    "operators",
    "quadratic_form",
]
