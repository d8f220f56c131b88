"""Systems y' = A y + f(t, y) by exponential integrators, called as torchdiffeq's odeint is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceError, ConvergenceWarning
from ..methods import Auto, Frechet, GradientRule, KrylovMethod
from ..ravel import ravel
from ..result import Info, OnFailure, Status, caller_level
from .arguments import as_grid, check_arguments, check_modes, check_state
from .interpolate import DenseOutput, Piece, stacked
from .march import Clock, Log, Outputs, replay, search
from .products import Settings
from .segments import Checkpoints, run
from .steppers import EXPRB43, Adaptive, Fixed
from .system import System, as_square

KRYLOV_SHARE = 0.01  # of rtol: the tolerance of every product with φ-functions, relative to the increment it makes


@dataclass
class OdeInfo(Info):
    """Report of :func:`odeint`; ``num_matvecs`` counts products with A + ∂f/∂y, forward pass only.

    Attributes:
        accepted, rejected: steps.
        num_evaluations: of func, those for derivatives included.
        last_step: size of the last accepted step, negative where time runs backwards; 0 where there is none.
        times: the ends of the accepted steps.
    """

    accepted: int = 0
    rejected: int = 0
    num_evaluations: int = 0
    last_step: float = 0.0
    times: list[float] = field(default_factory=list)


def odeint(
    func: Callable[[Tensor, Any], Any] | None,
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    linear: Any = None,
    method: Fixed | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    num_steps: int | None = None,
    jacobian: Callable[[Tensor, Any], Any] | None = None,
    krylov: KrylovMethod = Auto(),
    gradient: GradientRule = Frechet(),
    checkpoints: int | Checkpoints | None = None,
    dense: bool = False,
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """Solve y' = A y + func(t, y) from y(t[0]) = y0, with steps that the stiff linear part does not limit.

    Exponential Rosenbrock methods (the default) linearise func by its derivative at every step, so that ``linear`` is
    not needed; where a stiff A is known, giving it keeps its fast products. ETDRK4 and exponential Euler keep A alone.

    Args:
        func: (t, y) -> y' with t of no dimension and y like y0; a callable or nn.Module, or None for y' = A y,
            which ``ritz.expm_multiply`` solves at all times at once, whatever the method.
        y0: tensor of any shape, or a tuple (dict, list) of tensors, then func returns such a one.
        t: (T,), strictly increasing or strictly decreasing.
        linear: A, an operator or what ``ritz.aslinearoperator`` takes, (n, n) on the flattened y.
        method: ``EXPRB43()`` (None), ``EXPRB53()`` (adaptive), ``ETDRK4()``, ``ExponentialEuler()`` (these need
            ``num_steps``, and ETDRK4 ``linear``).
        rtol, atol: an adaptive step's error estimate stays below atol + rtol·|y|, in the root mean square; 1e-7 and
            1e-9 in float64, 1e-4 and 1e-6 in float32.
        num_steps: equal steps between two times of t, for every method; no error is estimated.
        jacobian: (t, y) -> ∂func/∂y as an operator (n, n) on the flattened y, where there is a cheaper one than
            autograd's (``Diagonal`` for a reaction term). It must be exact, and is compared once with a difference.
        krylov: how products with φ-functions are made: ``Lanczos(...)``, ``Arnoldi(...)``, or ``Auto()``: the matrix
            A + ∂f/∂y itself up to 48 unknowns, once a step, and by the operator's flags beyond. Without an rtol of its
            own, a Krylov space's tolerance is a hundredth of rtol, relative to the increment of the step, so that all
            steps together err by a hundredth of rtol of the way that y takes; with ``num_steps`` it is ritz's default,
            1e-10 (1e-5 in float32). Linear systems take any method that ``ritz.expm_multiply`` does.
        gradient: the rule of these products; ``Unrolled()`` gives any order, at the memory of everything.
        checkpoints: None keeps the Krylov spaces of all steps until backward; a number or ``Checkpoints(number)`` keeps
            that many states and repeats the steps between them, ``Checkpoints()`` about the square root of the number
            of steps, ``Checkpoints(memory_budget=bytes)`` what fits.
        dense: return a :class:`~ritz.expint.interpolate.DenseOutput` instead: the solution as a function of time.
        return_info: also return an :class:`OdeInfo`.
        on_failure: "warn", "raise" or "ignore": where the step size or ``max_steps`` runs out (the values at times
            that were not reached are NaN), or a Krylov space misses its tolerance.

    Returns:
        The states at t, stacked on a leading axis (in tuples where y0 is one); ``solution[0]`` equals y0. Adaptive
        steps do not stop at the times of t: the values come from the continuous extension of the method.

    Raises:
        OperandError: shapes, dtypes, times that are not monotone, arguments that do not go together.
        NonFiniteError: NaN or Inf in y0 or t; in func, where no smaller step avoids it.
        ConvergenceError: failures, with ``on_failure="raise"``.

    Cost: three to five products with φ-functions a step, each a Krylov space of A + ∂f/∂y; one more for a step that
        output times lie in. Products of the derivative cost about one backward pass through func each.
    Gradient: first order in y0, t (initial and output times), all tensors that func, linear and jacobian depend on,
        declared nowhere. Step sizes are constants: t_n = t[0] + (steps made) moves with t[0] only, and an output time
        moves along y'. A second differentiation raises by name.
    Source: see the methods.

    Example:
        >>> import torch
        >>> y = odeint(lambda t, y: -y**2, torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 1.0]))
        >>> round(y[-1].item(), 6)
        0.5
    """
    method = EXPRB43() if method is None else method
    times, numbers = as_grid(t)
    y, unravel = ravel(y0)
    check_state(y)
    times = times.to(y.device)
    A = None if linear is None else as_square(linear, y, "linear")
    check_arguments(method, func, A, jacobian, y, num_steps, rtol, atol)
    exact = func is None and num_steps is None
    check_modes(dense, checkpoints, None if exact else krylov, gradient, len(numbers), on_failure)
    wide = y.dtype in (torch.float64, torch.complex128)
    share = None if rtol is None else KRYLOV_SHARE * rtol
    rtol, atol = (1e-7 if wide else 1e-4) if rtol is None else rtol, (1e-9 if wide else 1e-6) if atol is None else atol
    if not exact and num_steps is None:
        share = KRYLOV_SHARE * rtol
    share = None if share is None else max(share, 4 * torch.finfo(y.dtype).eps)
    system = System(func, A, jacobian, y0, Settings(krylov, gradient, share, on_failure), numbers[-1] - numbers[0])
    clock, log = Clock(times[0], numbers[0]), Log()
    made: list[Piece] = []
    found: dict[int, Tensor] = {}
    pieces: Iterator[Piece] = iter(())
    if len(numbers) == 1:
        pass
    elif exact:
        formed = system.stiff()
        assert formed is not None
        whole = Piece(numbers[0], numbers[-1], clock.at(numbers[0]), None, formed, [y], y)
        made = [whole]
        found = {} if dense else dict(enumerate(whole.at(system, times[1:].double()), 1))
    elif num_steps is not None:
        pieces = replay(system, method, clock, y, _equal_steps(numbers, num_steps))
    else:
        assert isinstance(method, Adaptive)
        pieces = search(system, method, clock, y, numbers[-1], rtol, atol, log)
    ends = [(piece.start, piece.end) for piece in made]
    if checkpoints is None or exact:
        outputs = Outputs(system, clock, times, numbers)
        for piece in pieces:
            if dense:
                made.append(piece)
            else:
                outputs.take(piece)
            ends.append((piece.start, piece.end))
        found |= outputs.found
    else:
        kept = checkpoints if isinstance(checkpoints, Checkpoints) else Checkpoints(checkpoints)
        found, ends = run(system, method, pieces, times, numbers, kept)
    info = _info(method, system, log, ends)
    if log.trouble:
        _report(log, method, numbers, on_failure)
    if dense:
        if not made:
            raise ConvergenceError(f"odeint: {log.trouble} before the first step was accepted; there is no solution")
        result: Any = DenseOutput(system, made, unravel)
    else:
        missing = torch.full_like(y.detach(), torch.nan)
        result = stacked([unravel(y)] + [unravel(found.get(i, missing)) for i in range(1, len(numbers))])
    return (result, info) if return_info else result


def _equal_steps(numbers: Sequence[float], num_steps: int) -> list[tuple[float, float]]:
    """num_steps equal steps between neighbouring times, which are hit exactly."""
    edges = [a + (b - a) * j / num_steps for a, b in pairwise(numbers) for j in range(num_steps)]
    return list(pairwise([*edges, numbers[-1]]))


def _info(method: Fixed, system: System, log: Log, steps: Sequence[tuple[float, float]]) -> OdeInfo:
    status = Status.MAX_STEPS if system.counts.missed and log.status.success else log.status
    return OdeInfo(
        method, system.counts.matvecs, len(steps), status=status, accepted=len(steps), rejected=log.rejected,
        num_evaluations=system.counts.evaluations, last_step=steps[-1][1] - steps[-1][0] if steps else 0.0,
        times=[end for _, end in steps],
    )  # fmt: skip


def _report(log: Log, method: Fixed, numbers: Sequence[float], on_failure: OnFailure) -> None:
    text = (
        f"odeint: {log.trouble} ({len(log.steps)} steps accepted, {log.rejected} rejected by {method!r}) on the way to "
        f"t = {numbers[-1]:.6g}, and the values from there on are NaN; loosen rtol and atol, or look at func there: it "
        "may not be smooth, or its solution may end"
    )
    if on_failure == "raise":
        raise ConvergenceError(text)
    if on_failure == "warn":
        warnings.warn(text, ConvergenceWarning, stacklevel=caller_level())
