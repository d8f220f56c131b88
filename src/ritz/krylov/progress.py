"""Which of m simultaneous iterations are still alive: breakdown, depth and norms, for every method of this folder.

An iteration ends when its new residual is rounding, ‖r‖ ≤ BREAKDOWN·eps·‖A‖, with ‖A‖ estimated from below by the
largest entries of the small matrix seen so far. From then on its basis rows are zero: dividing by infinity does that
without a branch, and A 0 = 0 keeps it so.

On the CPU the bookkeeping is done in Python numbers (a scalar read costs 0.5 µs, a tensor operation 2–5 µs); elsewhere
in tensors, because a scalar read would drain the device's queue at every step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import NonFiniteError

# At exact breakdown (1 to 4 well separated eigenvalues, n = 10 … 1000, every dtype) what is left after two Gram–Schmidt
# passes was 3 to 43 eps·‖A‖: the rounding of the product itself. Missing a breakdown costs the adjoint everything, it
# divides by the residual; seeing one too early costs a perturbation of this size.
BREAKDOWN = 50.0

# Steps between two looks from the host at whether anything is left to do, on devices other than the CPU.
LOOK_EVERY = 8


class Progress:
    """Bookkeeping of m runs, kept in tensors on the runs' device.

    ``length`` (m,) is the norm of each run's last residual, zero once the run has ended.
    """

    def __init__(self, length: Tensor, largest: Tensor | None = None) -> None:
        self.length = length
        self.tol = BREAKDOWN * torch.finfo(length.dtype).eps
        self._live = length > 0
        self._largest = torch.zeros_like(length) if largest is None else largest
        self._steps = 0
        self.sizes: list[Tensor] = []
        self.lengths: list[Tensor] = []
        self._depth = torch.zeros_like(length, dtype=torch.int64)

    @property
    def depth(self) -> Tensor:
        """Steps that every run has begun (m,) int64."""
        return self._depth

    @property
    def live(self) -> Tensor:
        """Which runs can go on (m,) bool."""
        return self._live

    def any(self) -> bool:
        """Whether some run can go on; looked up only now and then, so it may say yes a few steps too long."""
        return bool(self._live.any()) if self._steps % LOOK_EVERY == 0 else True

    def all(self) -> bool:
        """Whether every run can go on."""
        return bool(self._live.all())

    def divisor(self) -> Tensor | float:
        """What to divide the residuals (m, n) by: their norms, infinity for runs that have ended."""
        return self.length.masked_fill(~self._live, math.inf).unsqueeze(1)

    def record(self, size: Tensor, length: Tensor) -> None:
        """Take in one step: ``size`` (m,) bounds ‖A‖ from below together with ``length`` (m,), the residual norms."""
        self._depth += self._live
        self._largest = torch.maximum(self._largest, size.abs() + length)
        self._live = self._live & (length > self.tol * self._largest)  # False for NaN: told apart by check_finite
        self.length = length * self._live
        self._steps += 1
        self.sizes.append(size)
        self.lengths.append(self.length)

    def history(self, norm: Tensor, first: int, padding: int) -> tuple[Tensor, Tensor]:
        """Return the recorded sizes and lengths, (m, steps + padding) each, zero in the padding.

        Raises NonFiniteError naming the first step whose numbers are NaN or Inf; ``first`` steps were done before.
        """
        if not bool(torch.isfinite(norm).all()):
            raise bad_start()
        zero = torch.zeros_like(norm)
        sizes = torch.stack(self.sizes + [zero] * padding, 1)
        lengths = torch.stack(self.lengths + [zero] * padding, 1)
        # A length was multiplied by the mask, and NaN·0 and Inf·0 are both NaN: nothing is hidden here.
        finite = torch.isfinite(sizes + lengths)
        if not bool(finite.all()):
            raise not_finite(first + 1 + int((~finite).any(0).nonzero()[0]))
        return sizes, lengths


class HostProgress(Progress):
    """The same bookkeeping in Python numbers, for runs on the CPU."""

    def __init__(self, length: Tensor, largest: Tensor | None = None) -> None:
        super().__init__(length, largest)
        self._alive: list[bool] = self._live.tolist()
        self._top: list[float] = self._largest.tolist()
        self._count = [0] * len(self._alive)
        self._all = all(self._alive)

    @property
    def depth(self) -> Tensor:
        return torch.tensor(self._count, dtype=torch.int64)

    @property
    def live(self) -> Tensor:
        return torch.tensor(self._alive)

    def any(self) -> bool:
        return self._all or any(self._alive)

    def all(self) -> bool:
        return self._all

    def divisor(self) -> Tensor | float:
        if not self._all:
            return self.length.masked_fill(~self.live, math.inf).unsqueeze(1)
        return self.length.item() if len(self._alive) == 1 else self.length.unsqueeze(1)

    def record(self, size: Tensor, length: Tensor) -> None:
        for i, (a, b) in enumerate(zip(size.tolist(), length.tolist(), strict=True)):
            if self._alive[i]:
                self._count[i] += 1
                self._top[i] = max(self._top[i], abs(a) + b)
                if not b > self.tol * self._top[i]:
                    self._alive[i] = self._all = False
        self.length = length if self._all else length * self.live
        self.sizes.append(size)
        self.lengths.append(self.length)


def bad_start() -> NonFiniteError:
    """The error of a starting vector."""
    return NonFiniteError("a starting vector has NaN or Inf, or its norm overflows; expected finite numbers")


def not_finite(step: int) -> NonFiniteError:
    """The error of a product with NaN or Inf."""
    return NonFiniteError(
        f"the product with A returned NaN or Inf in step {step} of the Krylov iteration; expected finite numbers: "
        "check the operator's data, and its product with a random vector"
    )


def progress(length: Tensor, largest: Tensor | None = None) -> Progress:
    """Bookkeeping for runs whose first residuals have norms ``length`` (m,), ‖A‖ at least ``largest`` (m,) so far."""
    return (HostProgress if length.device.type == "cpu" else Progress)(length, largest)
