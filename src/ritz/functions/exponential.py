"""e^{tA}B at one or many times: one Krylov space where it reaches, substeps with an error estimate where it does not.

A space is grown until the error estimate at the last time is below the tolerance. Where the depth (or the memory) ends
first, the same space serves for as long a step τ as its own estimate allows, and the next one starts from there: no
product is wasted, and the depth adapts to A. Every substep is differentiated by the rule that was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from ..krylov.lanczos import run_lanczos
from ..methods import Arnoldi, Auto, Frechet, GradientRule, KrylovMethod, Lanczos, Unrolled
from ..numerics import as_block, unwrap
from ..operators.assemble import assemble
from ..operators.base import LinearOperator
from ..operators.convert import aslinearoperator
from ..result import Info, Joined, OnFailure, Status, report
from .chebyshev import Chebyshev, chebyshev_multiply
from .inputs import as_times
from .multiply import multiply
from .scalar import Exp, ScalarFunction
from .shift_invert import SHARE, OfInverse, ShiftInvert, resolvent
from .space import GeneralSpace, Space, check_rule, choose, decompose, error_estimate

ExponentialMethod = KrylovMethod | Chebyshev | ShiftInvert

STIFF = 1e4  # ‖tA‖ above which Auto() looks for a factorisation: polynomial spaces need several hundred products there
LARGE = 1000  # from this size on Auto() takes the plain Lanczos recurrence and short Arnoldi spaces
SHORT = 40  # vectors of such an Arnoldi space: its orthogonalisation grows with the square
HALVINGS = 4  # candidates for a step: the remaining time times 2^(−i/HALVINGS)
SMALLEST = 30  # a step is never shorter than the remaining time times 2^−SMALLEST
ROUNDING = 1e-14  # of the small matrix' exponential: no substep is asked for less
BACKWARD = 1.5  # a cotangent's space may be that much deeper than the one that chose the step
RESERVE = 4  # vectors beside the basis that a run needs


def expm_multiply(
    A: LinearOperator,
    B: Tensor,
    t: float | complex | Tensor = 1.0,
    *,
    method: ExponentialMethod = Auto(),
    gradient: GradientRule = Frechet(),
    memory_budget: int | None = None,
    return_info: bool = False,
    on_failure: OnFailure = "warn",
) -> Any:
    """e^{tA} B for one time or a grid of times, with gradients in A's tensors, B and t.

    Args:
        A: square operator (n, n).
        B: vector (n,) or block (n, m).
        t: number or tensor of no dimension; or a 1-D tensor of times in any order, whose length becomes the leading
            axis of the result. Real (of either sign) or complex; B is the state at time zero.
        method: with a fixed depth, ``Lanczos(k)`` or ``Arnoldi(k)``, one space serves all times, whatever its error.
            With an adaptive one, ``max_matvecs`` bounds the depth, and the time is split into substeps where that does
            not suffice. ``Chebyshev(bounds=(a, b))`` where the spectrum is known, ``ShiftInvert()`` for stiff systems.
            ``Auto()``: Lanczos where A is Hermitian, Arnoldi otherwise; from n = 1000 on the plain three-term
            recurrence, Arnoldi spaces of at most 40 vectors, and ShiftInvert() where A is Hermitian and sparse, SciPy
            is there, and eight Lanczos steps estimate that tA decays with a rate above 10⁴.
        gradient: as in :func:`funm_multiply`.
        memory_budget: bytes for bases of ``Lanczos`` and ``Arnoldi``; substeps then keep their starting vectors only,
            and make their spaces anew in backward. ``Lanczos(reorthogonalize=False, two_pass=True)`` has no bases: it
            takes twice the products and no substeps.
        return_info, on_failure: as in :func:`funm_multiply`.

    Returns:
        (n,), (n, m), or with a leading axis of times; complex where t or A is. ``info.residual`` is the estimated
        relative error per column, the sum over substeps; ``info.details["substeps"]`` their number.

    Raises:
        OperandError: shapes, dtypes, or a budget of less than seven blocks of B's size.
        DomainError: the exponential overflows.

    Cost: k products a substep; see :func:`funm_multiply`. Memory: the bases of all substeps until backward.
    Source: substeps chosen from one space as in phipm (Niesen, Wright 2012) and KIOPS (Gaudreault, Rainwater, Tokman
        2018), at a depth that is grown first.
    """
    A = aslinearoperator(A)
    times = as_times(t, A)
    V = as_block(B, A.shape[0], "B", dtype=A.dtype, device=A.device)
    grid = times.reshape(-1)
    numbers = grid.detach().tolist()
    chosen = _choose(A, method, V, numbers, factor=memory_budget is None)
    if memory_budget is not None and (not isinstance(chosen, (Lanczos, Arnoldi)) or getattr(chosen, "two_pass", False)):
        raise OperandError(f"memory_budget={memory_budget} came with {chosen!r}, which has no bases to bound; drop it")
    if isinstance(chosen, Chebyshev):
        exps = [Exp(s) for s in numbers]
        outs, info = chebyshev_multiply(exps, A, V, grid, chosen, gradient, on_failure)
    elif isinstance(chosen, ShiftInvert):
        outs, info = _by_resolvent(A, V, grid, numbers, chosen, gradient, on_failure)
    else:
        check_rule(gradient, chosen)
        if memory_budget is not None:
            chosen = _within(chosen, memory_budget, V)
        outs, info = _evaluate(A, V, grid, numbers, chosen, gradient, on_failure, keep=memory_budget is None)
    Y = torch.stack(outs)
    Y = Y.squeeze(2) if B.ndim == 1 else Y
    Y = Y[0] if times.ndim == 0 else Y
    return (Y, info) if return_info else Y


def _choose(
    A: LinearOperator, method: ExponentialMethod, V: Tensor, numbers: Sequence[complex | float], factor: bool
) -> Lanczos | Arnoldi | Chebyshev | ShiftInvert:
    """``factor``: whether a factorisation of A may be made, whose memory nobody bounds."""
    if isinstance(method, (Chebyshev, ShiftInvert)):
        return method
    if not isinstance(method, Auto) or A.shape[0] < LARGE:
        return choose(A, method)
    if not A.hermitian:
        return Arnoldi(max_matvecs=SHORT)
    real = [s for s in numbers if not isinstance(s, complex)]
    if factor and len(real) == len(numbers) and real and (min(real) >= 0 or max(real) <= 0) and _is_stiff(A, V, real):
        return ShiftInvert()
    return Lanczos(reorthogonalize=False)


def _is_stiff(A: LinearOperator, V: Tensor, numbers: Sequence[float]) -> bool:
    """Whether ‖tA‖, as eight Lanczos steps see it, is above STIFF, all of it decay, and A can be factored."""
    if find_spec("scipy") is None or not V.shape[1] or not bool(torch.isfinite(V.detach().sum().abs())):
        return False
    t = max(numbers, key=abs)
    with torch.no_grad():
        state = run_lanczos(A._matmat, unwrap(V).detach()[:, :1], min(8, A.shape[0]))
        ritz = decompose(state).ritz * t
        return float(-ritz.min()) > STIFF and float(ritz.max()) <= 1.0 and assemble(A) is not None


def _by_resolvent(
    A: LinearOperator,
    V: Tensor,
    grid: Tensor,
    numbers: Sequence[complex | float],
    method: ShiftInvert,
    gradient: GradientRule,
    on_failure: OnFailure,
) -> tuple[list[Tensor], Info]:
    real = [s for s in numbers if not isinstance(s, complex)]
    if len(real) < len(numbers) or not (min(real, default=0.0) >= 0 or max(real, default=0.0) <= 0):
        raise OperandError(f"ShiftInvert() came with t={numbers}; expected real times of one sign (one call for each)")
    if isinstance(gradient, Unrolled):
        raise OperandError("ShiftInvert() cannot be unrolled through its factorisation; use Frechet() or Adjoint()")
    krylov = method.krylov or (Lanczos() if A.hermitian else Arnoldi())
    if not any(real):
        return _evaluate(A, V, grid, numbers, krylov, gradient, on_failure, keep=True)
    gamma = method.gamma if method.gamma is not None else SHARE * max(real, key=abs)
    B = resolvent(A, gamma, method.solver)
    some = [i for i, s in enumerate(real) if s != 0]
    functions = [OfInverse(Exp(real[i]), gamma) for i in some]
    times = grid[some]

    def refine(space: Space, error: Tensor, status: Status) -> Any:
        if isinstance(space, GeneralSpace):
            # Where A is far from normal, ‖B‖ is huge instead of about one, and its products err by that much rounding.
            size = float(torch.linalg.matrix_norm(space.H, 2).amax()) if len(error) else 0.0
            rounding = torch.finfo(V.dtype).eps * size
            error = error.clamp(min=rounding)
            status = Status.STAGNATED if rounding > krylov.tolerance(V.dtype) else status
        return functions, times, error, status

    outs, info = multiply(functions, B, V, None, krylov, gradient, on_failure, refine=refine)
    info.details["gamma"], info.method = gamma, method
    return _with_zeros(A, V, grid, real, dict(zip(some, outs, strict=True))), info


def _within(method: Lanczos | Arnoldi, budget: int, V: Tensor) -> Lanczos | Arnoldi:
    """The method with as many vectors as the budget holds."""
    vector = max(1, V.numel()) * V.element_size()
    fits = int((budget // vector - RESERVE) / (1 + BACKWARD))
    if fits < 1:
        raise OperandError(
            f"memory_budget={budget} bytes holds {budget // vector} blocks of B's size ({vector} bytes each); expected "
            f"room for at least {RESERVE + 3}"
        )
    if method.num_matvecs is not None and method.num_matvecs > fits:
        raise OperandError(
            f"memory_budget={budget} bytes holds a space of depth {fits}, and {method!r} was asked for; expected a "
            "smaller depth, or an adaptive one, which goes by substeps"
        )
    return replace(method, max_matvecs=min(method.max_matvecs, fits))


def _evaluate(
    A: LinearOperator,
    V: Tensor,
    grid: Tensor,
    numbers: Sequence[complex | float],
    method: Lanczos | Arnoldi,
    gradient: GradientRule,
    on_failure: OnFailure,
    *,
    keep: bool,
) -> tuple[list[Tensor], Info]:
    """One space for all times where they need no substeps or may have none; otherwise ray by ray."""
    functions: list[ScalarFunction] = [Exp(s) for s in numbers]
    rays = _rays(numbers)
    two_pass = isinstance(method, Lanczos) and method.two_pass
    if method.num_matvecs is not None or isinstance(gradient, Unrolled) or two_pass or not rays:
        return multiply(functions, A, V, grid, method, gradient, on_failure, keep=keep)
    if len(rays) == 1 and len(rays[0].index) == len(numbers):
        outs, info = _walk(A, V, grid, rays[0], method, gradient, on_failure, keep)
        return [outs[i] for i in range(len(numbers))], info
    found: dict[int, Tensor] = {}
    infos = []
    for ray in rays:
        outs, info = _walk(A, V, grid, ray, method, gradient, on_failure, keep)
        found |= outs
        infos.append(info)
    return _with_zeros(A, V, grid, numbers, found), Joined([i for info in infos for i in info.parts])


def _with_zeros(
    A: LinearOperator, V: Tensor, grid: Tensor, numbers: Sequence[complex | float], found: dict[int, Tensor]
) -> list[Tensor]:
    """All values in order, V itself at times of zero, where its slope A V is one product that no space was read for."""
    wide = torch.promote_types(V.dtype, grid.dtype) if grid.is_complex() else V.dtype
    values = []
    for i, s in enumerate(numbers):
        y = found[i] if s != 0 else V
        if s == 0 and grid.requires_grad and torch.is_grad_enabled():
            time = grid[i] if grid.is_complex() else grid[i].to(V.real.dtype)
            y = y + time * (A @ V.detach()).detach()
        values.append(y.to(wide))
    return values


@dataclass(frozen=True)
class _Ray:
    """Times on one half-line from zero: direction d with |d| = 1, and the indices and moduli in ascending order."""

    direction: complex | float
    index: list[int]
    moduli: list[float]


def _rays(numbers: Sequence[complex | float]) -> list[_Ray]:
    found: dict[Any, list[tuple[float, int]]] = {}
    for i, s in enumerate(numbers):
        if s == 0:
            continue
        d = s / abs(s)
        key = (round(d.real, 12), round(d.imag, 12)) if isinstance(s, complex) else d
        found.setdefault(key, []).append((abs(s), i))
    rays = []
    for pairs in found.values():
        pairs.sort()
        s = numbers[pairs[-1][1]]
        rays.append(_Ray(s / abs(s), [i for _, i in pairs], [r for r, _ in pairs]))
    return rays


@dataclass
class _Leg:
    """One substep that starts at the modulus ``here``; how far it goes is known once its space is there."""

    grid: Tensor
    ray: _Ray
    done: int  # times that are behind
    here: float
    rtol: float
    recording: bool
    reached: int = 0  # times that are behind after the leg
    end: float = 0.0

    @cached_property
    def last(self) -> Exp:
        """The exponential at the last time, which the space is grown for and knows."""
        return Exp(self.numbers()[-1])

    def numbers(self) -> list[complex | float]:
        """The times that are left, from here."""
        return [self.ray.direction * (r - self.here) for r in self.ray.moduli[self.done :]]

    def refine(self, space: Space, error: Tensor, status: Status) -> Any:
        d, total = self.ray.direction, self.ray.moduli[-1]
        rest = total - self.here
        step, error, status = _step(space, error, status, d, rest, self.rtol, total)
        last = len(self.ray.index)
        self.reached = last if step == rest else sum(r <= self.here + step for r in self.ray.moduli)
        self.end = total if step == rest else self.here + step
        inside = range(self.done, self.reached)
        functions = [self.last if s == self.last.scale else Exp(s) for s in self.numbers()[: len(inside)]]
        with torch.set_grad_enabled(self.recording):  # the numerics around this run without a graph
            times = [self.grid[self.ray.index[p]] - d * self.here for p in inside]
            if step != rest:
                functions.append(Exp(d * step))
                times.append(torch.tensor(d * step, dtype=self.grid.dtype, device=self.grid.device))
            return functions, torch.stack(times), error, status


def _walk(
    A: LinearOperator,
    V: Tensor,
    grid: Tensor,
    ray: _Ray,
    method: Lanczos | Arnoldi,
    gradient: GradientRule,
    on_failure: OnFailure,
    keep: bool,
) -> tuple[dict[int, Tensor], Joined]:
    """The states at the times of one ray, substep by substep from zero outwards."""
    rtol, total = method.tolerance(V.dtype), ray.moduli[-1]
    if isinstance(gradient, Frechet) and gradient.method is None:
        deeper = replace(method, max_matvecs=int(BACKWARD * method.max_matvecs) + 8)
        gradient = replace(gradient, method=deeper)
    found: dict[int, Tensor] = {}
    infos: list[Info] = []
    here, state, done, likely = 0.0, V, 0, 0.0
    while done < len(ray.index):
        # A real operator takes a complex state as two real ones.
        two = state.is_complex() and not A.dtype.is_complex
        split = two and bool(state.imag.any())
        block = torch.cat([state.real, state.imag], 1) if split else state.real if two else state
        leg = _Leg(grid, ray, done, here, rtol, torch.is_grad_enabled())
        share = replace(method, rtol=max(rtol * (total - here) / total, 1e-15))
        outs, info = multiply(
            [leg.last],
            A,
            block,
            None,
            share,
            gradient,
            on_failure,
            refine=leg.refine,
            keep=keep,
            quiet=True,
            likely=likely,
        )
        step, rest = leg.end - here, total - leg.end
        likely = info.depth * min(1.0, rest / step) if step > 0 else 0.0
        infos.append(info)
        if split:
            m = state.shape[1]
            outs = [y[:, :m] + 1j * y[:, m:] for y in outs]
        found |= {ray.index[p]: outs[p - done] for p in range(done, leg.reached)}
        done, here, state = leg.reached, leg.end, outs[-1]
        if not info.status.success:
            break
    joined = Joined(infos)
    report(joined, what="e^{tA}v", target=rtol, on_failure=on_failure)
    return found, joined


def _step(
    space: Space, error: Tensor, status: Status, d: complex | float, rest: float, rtol: float, total: float
) -> tuple[float, Tensor, Status]:
    """The longest step that the space allows at its share of the tolerance, its error, and the status."""
    if status is not Status.MAX_STEPS:
        return rest, error, status

    def fits(i: int) -> tuple[bool, Tensor]:
        tau = rest * 2 ** (-i / HALVINGS)
        e = error_estimate(space, [Exp(d * tau)])
        return bool((e <= max(rtol * tau / total, ROUNDING)).all()), e

    low, high = 0, HALVINGS * SMALLEST
    good, best = fits(high)
    if not good:
        return rest, error, status
    while high - low > 1:
        middle = (low + high) // 2
        good, e = fits(middle)
        low, high, best = (low, middle, e) if good else (middle, high, best)
    return rest * 2 ** (-high / HALVINGS), best, Status.CONVERGED
