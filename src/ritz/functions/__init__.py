"""Functions of operators: f(A)v, forms, and the functions f themselves with exact divided differences."""

from .chebyshev import Chebyshev
from .divided import divided_difference
from .exponential import expm_multiply
from .forms import bilinear_form, quadratic_form, shared_forms
from .multiply import funm_multiply
from .scalar import ScalarFunction, exp, inverse, log, phi, power, rsqrt, sqrt
from .shift_invert import ShiftInvert
from .terms import Term

__all__ = [
    "Chebyshev",
    "ScalarFunction",
    "ShiftInvert",
    "Term",
    "bilinear_form",
    "divided_difference",
    "exp",
    "expm_multiply",
    "funm_multiply",
    "inverse",
    "log",
    "phi",
    "power",
    "quadratic_form",
    "rsqrt",
    "shared_forms",
    "sqrt",
]
