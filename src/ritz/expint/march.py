"""From step to step: along given steps, or along those that an error estimate asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import DomainError, NonFiniteError
from ..result import Status
from .interpolate import Piece, at_time
from .products import Missed
from .steppers import Adaptive, Fixed, Vectors, error_vector
from .system import Point, System

SAFETY, SHRINK, GROW, GROW_FIRST = 0.9, 0.2, 5.0, 100.0  # of the step size, as in Hairer, Nørsett, Wanner, II.4
PROPORTIONAL, INTEGRAL = 0.7, 0.4  # exponents of the PI controller, over the order of the estimate (Gustafsson 1991)
SMALLEST = 16  # a step is never shorter than that many roundings of the time


@dataclass
class Clock:
    """Times as tensors that move with the initial time: t_n = t₀ + (steps made), the steps being constants."""

    t0: Tensor
    number: float

    def at(self, time: float) -> Tensor:
        """The time as a tensor of no dimension, float64."""
        return self.t0.double() + (time - self.number)


@dataclass
class Log:
    """What the search for step sizes did."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    rejected: int = 0
    status: Status = Status.FIXED
    trouble: str = ""


def replay(
    system: System, method: Fixed, clock: Clock, y: Tensor, steps: Sequence[tuple[float, float]]
) -> Iterator[Piece]:
    """The pieces of given steps (start, end)."""
    system.begin()
    for start, end in steps:
        at = method.point(system, clock.at(start), y)
        vectors, _ = method.vectors(system, at, end - start)
        piece = _piece(system, at, vectors, start, end)
        yield piece
        at.release()
        y = piece.value


def search(
    system: System, method: Adaptive, clock: Clock, y: Tensor, end: float, rtol: float, atol: float, log: Log
) -> Iterator[Piece]:
    """The pieces of steps whose error estimates stay below atol + rtol |y| in the root mean square.

    Ends early, with ``log.status`` and ``log.trouble`` set, where the step size or the number of steps runs out.
    """
    log.status = Status.CONVERGED
    system.begin()
    start = clock.number
    at = method.point(system, clock.at(start), y)  # NaN or Inf in f raises from here
    sign = math.copysign(1.0, end - start)
    h = _first(at, end - start, rtol, atol) if method.first_step is None else method.first_step
    controller = _Controller(1.0 / method.error_order)
    cause: Exception | None = None
    while start != end:
        rest = abs(end - start)
        h = min(h, math.inf if method.max_step is None else method.max_step)
        to = end if 1.01 * h >= rest else start + sign * (rest / 2 if 2 * h > rest else h)
        if h < SMALLEST * math.ulp(max(abs(start), abs(end))):
            if isinstance(cause, NonFiniteError):
                raise NonFiniteError(f"odeint cannot pass t = {start:.6g}, however small the step: {cause}") from cause
            log.status = Status.STAGNATED
            log.trouble = f"the step size fell to {h:.3g} at t = {start:.6g}"
            return
        if len(log.steps) + log.rejected >= method.max_steps:
            log.status = Status.MAX_STEPS
            log.trouble = f"max_steps = {method.max_steps} were made by t = {start:.6g}, the last of size {h:.3g}"
            return
        size = abs(to - start)
        try:
            system.lenient = True
            piece, error = _attempt(system, method, at, start, to, rtol, atol)
            after = at if to == end or error > 1 else method.point(system, clock.at(to), piece.value)
        except (Missed, NonFiniteError, DomainError) as failure:
            log.rejected, cause, h = log.rejected + 1, failure, SHRINK * size
            controller.rejected = True
            continue
        finally:
            system.lenient = False
        if error > 1:
            log.rejected, cause = log.rejected + 1, None
            h = size * controller.after_rejection(error)
            continue
        h = size * controller.after_success(error)
        log.steps.append((start, to))
        yield piece
        at.release()
        start, at = to, after


def _attempt(
    system: System, method: Adaptive, at: Point, start: float, to: float, rtol: float, atol: float
) -> tuple[Piece, float]:
    """A step, and its error estimate in units of the tolerance."""
    vectors, wrong = method.vectors(system, at, to - start)
    piece = _piece(system, at, vectors, start, to)
    error = error_vector(system, at, to - start, wrong)
    with torch.no_grad():
        size = torch.maximum(at.y.detach().abs(), piece.value.detach().abs())
        scale = (atol + rtol * size).clamp(min=torch.finfo(size.dtype).tiny)
        units = float((error.abs() / scale).square().mean().sqrt())
    if not math.isfinite(units):
        raise NonFiniteError(f"the error estimate of the step from t = {start:.6g} to {to:.6g} is not finite")
    return piece, units


def _piece(system: System, at: Point, vectors: Vectors, start: float, end: float) -> Piece:
    value = at.y + system.phi(at.J, end - start, vectors)
    return Piece(start, end, at.t, at.y, at.J, [None, *vectors], value, at.release)


@dataclass
class _Controller:
    """PI control of the step size: e^(−0.7/k) times the previous error to the 0.4/k."""

    exponent: float
    before: float = 1.0
    rejected: bool = False
    starting: bool = True

    def after_success(self, error: float) -> float:
        """The factor for the next step."""
        if error == 0:
            factor = math.inf
        else:
            factor = SAFETY * error ** (-PROPORTIONAL * self.exponent) * self.before ** (INTEGRAL * self.exponent)
        most = 1.0 if self.rejected else (GROW_FIRST if self.starting else GROW)
        # The first step is a guess: until the estimate holds the size back once, it may grow a hundredfold.
        self.starting = self.starting and factor > GROW and not self.rejected
        self.before, self.rejected = max(error, 1e-4), False
        return min(max(factor, SHRINK), most)

    def after_rejection(self, error: float) -> float:
        """The factor for another attempt."""
        self.rejected = True
        return max(SHRINK, SAFETY * error**-self.exponent)


def _first(at: Point, span: float, rtol: float, atol: float) -> float:
    """A first step that changes y by a hundredth (Hairer, Nørsett, Wanner, II.4, without its second look)."""
    y, rate = at.y.detach(), at.rate.detach()
    scale = atol + rtol * y.abs()
    size, speed = (float((x.abs() / scale).square().mean().sqrt()) for x in (y, rate))
    h = 0.01 * max(size, 1.0) / speed if speed > 0 else 0.01 * abs(span)
    return min(h, abs(span))


class Outputs:
    """Picks the values at the output times out of the pieces.

    Args:
        t: (T,), with a graph where its gradient is wanted.
        numbers: the same as numbers.
    """

    def __init__(self, system: System, clock: Clock, t: Tensor, numbers: Sequence[float]) -> None:
        self.system, self.clock, self.t, self.numbers = system, clock, t, numbers
        self.found: dict[int, Tensor] = {}
        self.next = 1

    def skip(self, start: float, end: float) -> None:
        """Pass over what lies before a first piece (start, end) that is not the first of all."""
        sign = math.copysign(1.0, end - start)
        while self.next < len(self.numbers) and sign * self.numbers[self.next] <= sign * start:
            self.next += 1

    def take(self, piece: Piece) -> None:
        """Read what lies in (start, end] of a piece, pieces coming in their order without gaps."""
        sign, inside = math.copysign(1.0, piece.end - piece.start), []
        while self.next < len(self.numbers) and sign * self.numbers[self.next] < sign * piece.end:
            inside.append(self.next)
            self.next += 1
        if inside:
            rows = piece.at(self.system, self.t[inside].double())
            self.found |= dict(zip(inside, rows, strict=True))
        if self.next < len(self.numbers) and self.numbers[self.next] == piece.end:
            time, clock = self.t[self.next].double(), self.clock.at(piece.end)
            self.found[self.next] = at_time(self.system, piece.value, time, clock, piece.end)
            self.next += 1
