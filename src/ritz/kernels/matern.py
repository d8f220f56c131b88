"""The Matérn profile of any smoothness ν > 0, through the modified Bessel function.

In t = a² = 2ν r²:  k_ν = c aᵛ K_ν(a), c = 2^{1−ν}/Γ(ν), and since d(aᵛ K_ν)/dt = −½ a^{ν−1} K_{ν−1},

    dʲk/dtʲ = (−½)ʲ c a^{ν−j} K_{ν−j}(a),        at t = 0:  (−¼)ʲ Γ(ν−j)/Γ(ν) where j < ν, infinite elsewhere,

so that every derivative is again a Bessel function, without cancellation. DLMF 10.29.4; Rasmussen and Williams,
Gaussian Processes for Machine Learning, MIT Press 2006, eq. 4.14.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from .bessel import log_power_bessel_k
from .profiles import Profile, lowest_exponent
from .table import LARGEST, SMALLEST, LogTable

LARGEST_NU = 50.0


@dataclass(frozen=True)
class GeneralMaternProfile(Profile):
    """Matérn of smoothness 0 < ν ≤ 50 (ν = 1/2, 3/2, 5/2 have the cheaper :class:`MaternProfile`).

    Value and first derivative come from a table of log k + a that the profile makes once, in 0.1 s or less, and keeps;
    they are within 1e-12 of the truth in float64. Where a derivative at r² = 0 is infinite it is taken as 0: the first
    for ν ≤ 1 and the second for ν ≤ 2, as for Matérn 1/2 and 3/2. A tile takes three temporaries of its size besides.
    """

    nu: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.nu <= LARGEST_NU:
            raise OperandError(
                f"Matern(nu={self.nu}); expected 0 < nu <= {LARGEST_NU:g}; beyond, RBF differs by less than 1%"
            )

    @property
    def scale(self) -> float:
        return 2 * self.nu

    @property
    def rough(self) -> bool:  # type: ignore[override]
        return self.nu <= 1

    @cached_property
    def table(self) -> LogTable:
        """log |k| + a and log |dk/dt| + a."""
        return LogTable([partial(self._log_shifted, 0), partial(self._log_shifted, 1)])

    def __call__(self, r2: Tensor) -> Tensor:
        out: Tensor = _Derivative.apply(self.scale * r2, self, 0)
        return out

    def derivative(self, r2: Tensor) -> Tensor:
        return self.scale * self._values(self.scale * r2, 1)

    def second(self, r2: Tensor) -> Tensor:
        return self.scale**2 * self._values(self.scale * r2, 2)

    def clamp_(self, t: Tensor) -> Tensor:
        return t.clamp_(min=0.0, max=self._limits[t.dtype == torch.float64])

    @cached_property
    def _limits(self) -> tuple[float, float]:
        """The t from which on k would be subnormal, in float32 and in float64."""
        t = torch.logspace(0, math.log10(LARGEST), 500, dtype=torch.float64, device="cpu")
        log_k = self._log_derivative(t, 0)
        return tuple(float(t[log_k > lowest_exponent(d)][-1]) for d in (torch.float32, torch.float64))  # type: ignore

    def values_(self, t: Tensor, work: Tensor) -> Tensor:
        interval, place = self.table.locate(t)
        k = torch.sqrt(t, out=work).neg_().add_(self.table(0, interval, place)).exp_()
        return k.masked_fill_(t < SMALLEST, 1.0)

    def slopes_(self, t: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
        interval, place = self.table.locate(t)
        coincident = t < SMALLEST
        a = torch.sqrt(t, out=work)
        slope = torch.sub(self.table(1, interval, place), a, out=t).exp_().mul_(-0.5)
        k = a.neg_().add_(self.table(0, interval, place)).exp_()
        return slope.masked_fill_(coincident, self._limit(1)), k.masked_fill_(coincident, 1.0)

    # -- derivatives of any order ---------------------------------------------------------------------------------

    def _log_derivative(self, t: Tensor, order: int) -> Tensor:
        """log |c a^{ν−j} K_{ν−j}(a)| in float64, for t > 0."""
        return log_power_bessel_k(self.nu - order, t) + (1 - self.nu) * math.log(2) - math.lgamma(self.nu)

    def _log_shifted(self, order: int, t: Tensor) -> Tensor:
        return self._log_derivative(t, order) + t.sqrt()

    def _limit(self, order: int) -> float:
        """dʲk/dtʲ at t = 0, or 0 where that is infinite."""
        if order >= self.nu:
            return 0.0
        return (-0.25) ** order * math.exp(math.lgamma(self.nu - order) - math.lgamma(self.nu))

    def _values(self, t: Tensor, order: int) -> Tensor:
        """dʲk/dtʲ, without a graph."""
        t = t.detach()
        if order < 2:
            log = self.table(order, *self.table.locate(t)) - t.sqrt()
        else:
            log = self._log_derivative(t.clamp(min=SMALLEST), order).to(t.dtype)
        size = log.exp_().clamp_(max=torch.finfo(t.dtype).max)  # an infinity would meet a factor r⁴ = 0
        return torch.where(t < SMALLEST, self._limit(order), (-0.5) ** order * size)


class _Derivative(torch.autograd.Function):
    """dʲk/dtʲ, with the next one as its derivative."""

    @staticmethod
    def forward(t: Tensor, profile: GeneralMaternProfile, order: int) -> Tensor:
        return profile._values(t, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        t, ctx.profile, ctx.order = inputs
        ctx.save_for_backward(t)
        ctx.save_for_forward(t)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], t: Tensor, profile: GeneralMaternProfile, order: int
    ) -> tuple[Any, Any]:
        return _Derivative.apply(t, profile, order), in_dims[0]

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None]:
        (t,) = ctx.saved_tensors
        return G * _Derivative.apply(t, ctx.profile, ctx.order + 1), None, None

    @staticmethod
    def jvp(ctx: Any, dt: Tensor, *_: Any) -> Tensor:
        (t,) = ctx.saved_tensors
        out: Tensor = dt * _Derivative.apply(t, ctx.profile, ctx.order + 1)
        return out
