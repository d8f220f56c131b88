"""Settings that the iterative solvers share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from .system import check_settings, default_rtol, default_steps

if TYPE_CHECKING:
    from ..operators import LinearOperator

T = TypeVar("T", bound="Iterative")


@dataclass(frozen=True)
class Iterative:
    """Tolerances and a limit of steps.

    Args:
        rtol: relative tolerance; None is 1e-6 in float64 and 1e-4 in float32.
        atol: absolute tolerance.
        max_steps: iterations per column; None is 10 n, at least 100 and at most 10 000.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_settings(type(self).__name__, self.rtol, self.atol, self.max_steps)

    def resolve(self: T, A: LinearOperator) -> T:
        """The same method with the defaults filled in for an operator."""
        return replace(
            self, rtol=default_rtol(A.dtype) if self.rtol is None else self.rtol, max_steps=self.limit(A.shape[0])
        )

    def limit(self, n: int) -> int:
        """Iterations per column, at size n."""
        return self.max_steps or default_steps(n)
