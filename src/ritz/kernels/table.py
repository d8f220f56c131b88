"""Smooth functions of log t from a table: piecewise polynomials on equal intervals, for use in tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

PER_UNIT = 16  # intervals to a unit of log t; a power of 2, so that the place within an interval has no rounding
FIRST, LAST = -1327, 222  # intervals: t from 1e-36 to 1e6
DEGREE = 5
FLOAT32_DEGREE = 3

SMALLEST = math.exp(FIRST / PER_UNIT)
LARGEST = math.exp(LAST / PER_UNIT)


class LogTable:
    """Interpolants of functions of t, by polynomials of degree 5 in log t at Chebyshev points.

    Args:
        functions: maps of float64 tensors t, analytic in log t for |Im log t| < π, such as those with their
            singularities on the negative real axis.

    The error is about 2·(64π)⁻⁶ = 3e-14 of the size of the function in that strip. In float32 the terms above the third
    power are left out, 1e-9. Outside of [SMALLEST, LARGEST] the end value is taken. Cost: 9300 values of each function.
    """

    def __init__(self, functions: Sequence[Callable[[Tensor], Tensor]]) -> None:
        nodes = np.cos(np.pi * (np.arange(DEGREE + 1) + 0.5) / (DEGREE + 1))  # in [−1, 1]
        to_powers = torch.from_numpy(np.linalg.inv(np.vander(nodes, increasing=True)))
        starts = torch.arange(FIRST, LAST, dtype=torch.float64, device="cpu")
        t = torch.exp((starts[:, None] + (torch.from_numpy(nodes) + 1) / 2) / PER_UNIT)
        self.coefficients = [(f(t) @ to_powers.mT).mT.contiguous() for f in functions]  # (DEGREE + 1, intervals)
        self._copies: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(interval, place in it from −1 to 1) of positive t."""
        y = t.clamp(SMALLEST, LARGEST).log_().mul_(PER_UNIT)
        start = y.floor().clamp_(FIRST, LAST - 1)
        return start.to(torch.int64).sub_(FIRST), y.sub_(start).mul_(2).sub_(1)

    def __call__(self, which: int, interval: Tensor, place: Tensor) -> Tensor:
        """Function number ``which``, in the dtype of ``place``."""
        degree = FLOAT32_DEGREE if place.dtype == torch.float32 else DEGREE
        key = (which, place.dtype, place.device)
        c = self._copies.get(key)
        if c is None:
            c = self._copies[key] = self.coefficients[which].to(place)
        out = torch.take(c[degree], interval)
        for power in range(degree - 1, -1, -1):
            out.mul_(place).add_(torch.take(c[power], interval))
        return out
