"""One step of an exponential integrator: methods as values, each a few φ-functions of one operator.

Every method ends in the same form: over its step the solution is approximated by that of a linear system,
u' = F + J (u − y) + Σ_j τ^{j−1}/(j−1)! b_j, whose value at y(t + θh) is

    y + Σ_{j≥1} θ^j φ_j(θhJ) w_j,   w_j = h^j b_j,

so that a step is the list of the w_j, and the same list read at θ < 1 is the method's continuous extension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OperandError
from .system import Point, System

Vectors = list["Tensor | None"]


@dataclass(frozen=True)
class Fixed(ABC):
    """A method without an error estimate: the number of steps is given."""

    adaptive: ClassVar[bool] = False

    @abstractmethod
    def point(self, system: System, t: Tensor, y: Tensor) -> Point:
        """The system at the start of a step, as this method uses it."""

    @abstractmethod
    def vectors(self, system: System, at: Point, h: float) -> tuple[Vectors, Vectors]:
        """[w_1, …] of one step, and those of the error estimate (empty where there is none)."""


@dataclass(frozen=True)
class Adaptive(Fixed):
    """A method with an embedded error estimate.

    Args:
        max_steps: limit of the steps, accepted and rejected together.
        first_step: size of the first step; None finds one.
        max_step: no step is larger; None sets no limit.
    """

    max_steps: int = 10_000
    first_step: float | None = None
    max_step: float | None = None
    adaptive: ClassVar[bool] = True
    error_order: ClassVar[int] = 4  # the estimate is O(h^4): the embedded method has order three

    def __post_init__(self) -> None:
        for name in ("max_steps", "first_step", "max_step"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OperandError(f"{name}={value!r}; expected a positive number")
        if not isinstance(self.max_steps, int):
            raise OperandError(f"max_steps={self.max_steps!r}; expected a whole number")

    def point(self, system: System, t: Tensor, y: Tensor) -> Point:
        return system.linearize(t, y)


@dataclass(frozen=True)
class ExponentialEuler(Fixed):
    """y + h φ₁(hJ)(A y + f), with J = A, order 1; without ``linear`` the Rosenbrock–Euler method, order 2.

    Rosenbrock–Euler takes J = ∂f/∂y at the start of every step, and h² φ₂(hJ) ∂f/∂t where f depends on t. Both are
    exact where f is constant (affine in y and t for Rosenbrock–Euler).

    Cost: one product with φ-functions a step. Source: Hochbruck, Ostermann, "Exponential integrators" (2010), (2.2);
        Pope 1963.
    """

    def point(self, system: System, t: Tensor, y: Tensor) -> Point:
        return system.semilinear(t, y) if system.linear is not None else system.linearize(t, y)

    def vectors(self, system: System, at: Point, h: float) -> tuple[Vectors, Vectors]:
        return _leading(at, h), []


@dataclass(frozen=True)
class ETDRK4(Fixed):
    """Krogstad's exponential Runge–Kutta method of order 4, for y' = A y + f(t, y); it needs ``linear``.

    His variant of the scheme by Cox and Matthews: the same work, smaller error constants, and order 3 instead of 2 in
    the worst case of a stiff A. Everything is written in φ-functions of A, which lose no digits for a small hA.

    Cost: four products with φ-functions and four evaluations of f a step; f is not differentiated.
    Source: Cox, Matthews 2002; Krogstad 2005; Hochbruck, Ostermann 2005, example 5.
    """

    def point(self, system: System, t: Tensor, y: Tensor) -> Point:
        return system.semilinear(t, y)

    def vectors(self, system: System, at: Point, h: float) -> tuple[Vectors, Vectors]:
        A, y, N1, F = at.J, at.y, at.f, at.rate
        N2 = system.f(at.t + h / 2, y + system.phi(A, h / 2, [h / 2 * F]))
        N3 = system.f(at.t + h / 2, y + system.phi(A, h / 2, [h / 2 * F, h * (N2 - N1)]))
        N4 = system.f(at.t + h, y + system.phi(A, h, [h * F, 2 * h * (N3 - N1)]))
        return [h * F, h * (2 * (N2 + N3) - 3 * N1 - N4), 4 * h * (N1 - N2 - N3 + N4)], []


@dataclass(frozen=True)
class EXPRB43(Adaptive):
    """Exponential Rosenbrock method of order 4 with three stages, the error estimated by an embedded one of order 3.

    Linearises f at the start of every step; a linear system is solved exactly whatever the step. Its continuous
    extension has order 4 as well. Arguments: ``max_steps``, ``first_step``, ``max_step``.

    Cost: three products with φ-functions a step, and a coarse one for the error; three evaluations of f.
    Source: Hochbruck, Ostermann, Schweitzer, "Exponential Rosenbrock-type methods" (2009), section 5 (exprb43); terms
        in ∂f/∂t as in Hochbruck, Ostermann 2010, (2.45).
    """

    def vectors(self, system: System, at: Point, h: float) -> tuple[Vectors, Vectors]:
        y, (first, slope) = at.y, _leading(at, h)
        assert first is not None
        D2 = _remainder(system, at, h, 0.5, y + system.phi(at.J, h / 2, _leading(at, h / 2)))
        D3 = _remainder(system, at, h, 1.0, y + system.phi(at.J, h, [first + h * D2, slope]))
        fourth = h * (12 * D3 - 48 * D2)
        return [first, slope, h * (16 * D2 - 2 * D3), fourth], [None, None, None, fourth]


@dataclass(frozen=True)
class EXPRB53(Adaptive):
    """Exponential Rosenbrock method of order 5 with three stages, the error estimated by an embedded one of order 3.

    As :class:`EXPRB43` with one more φ-product a step, for tight tolerances. The estimate belongs to the method of
    order 3 and overstates the error of this one.

    Source: Luan, Ostermann, "Exponential Rosenbrock methods of order five – construction, analysis and numerical
        comparisons" (2014), exprb53s3.
    """

    def vectors(self, system: System, at: Point, h: float) -> tuple[Vectors, Vectors]:
        y, c = at.y, 0.9
        D2 = _remainder(system, at, h, 0.5, y + system.phi(at.J, h / 2, _leading(at, h / 2)))
        U = y + system.phi(at.J, c * h, [*_leading(at, c * h), h * (729 / 125) * D2])
        U = U + system.phi(at.J, h / 2, [None, None, h * (27 / 25) * D2])
        D3 = _remainder(system, at, h, c, U)
        third, fourth = h * (18 * D2 - (250 / 81) * D3), h * ((500 / 27) * D3 - 60 * D2)
        # The embedded method has 8 φ₃ D₂ where this one has the two terms.
        return [*_leading(at, h), third, fourth], [None, None, third - 8 * h * D2, fourth]


def _leading(at: Point, h: float) -> Vectors:
    """[h F, h² ∂f/∂t]: the linearised system from the start of the step."""
    return [h * at.rate, None if at.slope is None else h * h * at.slope]


def _remainder(system: System, at: Point, h: float, c: float, U: Tensor) -> Tensor:
    """f(t + ch, U) less its linearisation at (t, y): A and what is linear in f take no part."""
    D = system.f(at.t + c * h, U) - at.f
    if at.N is not None:
        D = D - system.product(at.N, U - at.y)
    return D if at.slope is None else D - c * h * at.slope


def error_vector(system: System, at: Point, h: float, vectors: Vectors) -> Tensor:
    """The embedded error estimate; two digits of it are enough, and nothing differentiates it."""
    with torch.no_grad():
        return system.phi(at.J, h, [None if w is None else w.detach() for w in vectors], rtol=1e-2)
