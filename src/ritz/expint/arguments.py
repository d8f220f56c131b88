"""What odeint is called with, checked where it enters: what came, what was expected, what to do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OperandError
from ..methods import Adjoint, Arnoldi, Auto, Frechet, Lanczos, Unrolled
from ..numerics import check_finite, refuse_transforms
from ..operators import LinearOperator
from .segments import Checkpoints
from .steppers import ETDRK4, ExponentialEuler, Fixed


def as_grid(t: Any) -> tuple[Tensor, list[float]]:
    """t as a tensor (T,) and as numbers, strictly monotone."""
    times = t if isinstance(t, Tensor) else torch.from_numpy(np.asarray(t, dtype=np.float64))
    if times.ndim != 1 or times.numel() == 0:
        raise OperandError(f"t has shape {tuple(times.shape)}; expected a 1-D tensor of times, the first that of y0")
    if times.is_complex():
        raise OperandError(f"t is {times.dtype}; expected real times")
    refuse_transforms(times, "t")
    check_finite(times.detach(), "t")
    numbers = [float(x) for x in times.detach().double().tolist()]
    gaps = [b - a for a, b in pairwise(numbers)]
    if not (all(g > 0 for g in gaps) or all(g < 0 for g in gaps)):
        raise OperandError("t is neither strictly increasing nor strictly decreasing; expected one of the two")
    return times, numbers


def check_state(y: Tensor) -> None:
    """Raise unless the flattened y0 is finite and of a floating point dtype."""
    if not (y.is_floating_point() or y.is_complex()):
        raise OperandError(f"y0 is {y.dtype}; expected a floating point dtype")
    if not y.numel():
        raise OperandError("y0 has no entries; expected at least one")
    refuse_transforms(y, "y0")
    check_finite(y, "y0")


def check_arguments(
    method: Any,
    func: Any,
    A: LinearOperator | None,
    jacobian: Any,
    y: Tensor,
    num_steps: int | None,
    rtol: float | None,
    atol: float | None,
) -> None:
    """Raise where method, system and tolerances do not go together."""
    if not isinstance(method, Fixed):
        raise OperandError(f"method={method!r}; expected EXPRB43(), EXPRB53(), ETDRK4() or ExponentialEuler()")
    if func is None and A is None:
        raise OperandError("odeint came with neither func nor linear; expected at least one of them")
    if isinstance(method, ETDRK4) and A is None:
        raise OperandError("ETDRK4 came without linear; it integrates y' = A y + f: give A, or use EXPRB43()")
    keeps_A = isinstance(method, ETDRK4) or (isinstance(method, ExponentialEuler) and A is not None) or func is None
    if jacobian is not None and keeps_A:
        raise OperandError(f"jacobian= came with {method!r}, which does not linearise func here; leave it out")
    if y.is_complex() and not keeps_A:
        raise OperandError(
            "y0 is complex and func would be linearised, but need not be complex differentiable; give real and "
            "imaginary parts as a real state, or linear= with ETDRK4()"
        )
    if num_steps is None and not method.adaptive and func is not None:
        raise OperandError(f"{method!r} has no error estimate; give num_steps=, the steps between two times of t")
    if num_steps is not None:
        if not isinstance(num_steps, int) or num_steps < 1:
            raise OperandError(f"num_steps={num_steps!r}; expected a whole number, at least 1")
        if rtol is not None or atol is not None:
            raise OperandError("num_steps= fixes the steps, and rtol=, atol= would choose them; give one or the other")
    if rtol is not None and not 0 < rtol < 1:
        raise OperandError(f"rtol={rtol!r}; expected a number between 0 and 1")
    if atol is not None and not atol >= 0:
        raise OperandError(f"atol={atol!r}; expected a number, not negative")


def check_modes(dense: bool, checkpoints: Any, krylov: Any, gradient: Any, number: int, on_failure: str) -> None:
    """Raise where the ways to keep and to return a solution do not go together; krylov None is not looked at."""
    if on_failure not in ("warn", "raise", "ignore"):
        raise OperandError(f"on_failure={on_failure!r} is not known; give 'warn', 'raise' or 'ignore'")
    if krylov is not None and not isinstance(krylov, (Lanczos, Arnoldi, Auto)):
        raise OperandError(f"krylov={krylov!r}; expected Lanczos(...), Arnoldi(...) or Auto()")
    if not isinstance(gradient, (Frechet, Adjoint, Unrolled)):
        raise OperandError(f"gradient={gradient!r}; expected Frechet(), Adjoint() or Unrolled()")
    if checkpoints is not None:
        if not isinstance(checkpoints, Checkpoints):
            Checkpoints(checkpoints)
        if dense:
            raise OperandError("dense=True keeps every step, and checkpoints= is there not to; give one of them")
        if isinstance(gradient, Unrolled):
            raise OperandError("checkpoints= came with Unrolled(); its derivatives are first order: use Frechet()")
    if dense and number < 2:
        raise OperandError("dense=True came with one time; expected at least two, between which to solve")
