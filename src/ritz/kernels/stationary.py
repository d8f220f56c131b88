"""Stationary kernels: functions of the distance of two points, with length-scales to learn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..operators import LinearOperator
from .backends import TileBackend
from .base import ActiveKernel
from .distances import origin_of, squared_distances
from .forms import Form, PeriodicForm, RationalQuadraticForm, ScaledForm
from .matern import GeneralMaternProfile
from .parameters import assign, positive
from .profiles import Gaussian, MaternProfile, Profile
from .tiled import StationaryOperator


class Stationary(ActiveKernel):
    """k(‖u(x) − u(z)‖²) with learned length-scales: base of RBF, Matérn, rational quadratic and periodic kernels.

    A subclass gives ``form`` (coordinates u and the profile k) and, where that has further parameters,
    ``form_parameters``.

    Args:
        ard_num_dims: number of length-scales, one per column of the points; None for one that all share.
        lengthscale: start value, a number or one per column.
        active_dims: the columns of the points that the kernel sees; None for all.

    ``lengthscale`` (1, 1) or (1, d) is softplus(``raw_lengthscale``) + 1e-8 and may be assigned.

    Raises:
        OperandError: length-scales, ard_num_dims and active_dims that do not fit together.
    """

    def __init__(
        self,
        ard_num_dims: int | None = None,
        *,
        lengthscale: Any = 1.0,
        active_dims: Sequence[int] | None = None,
    ) -> None:
        super().__init__(ard_num_dims, active_dims)
        self.raw_lengthscale = nn.Parameter(torch.zeros(1, ard_num_dims or 1))
        self.lengthscale = lengthscale

    @property
    def lengthscale(self) -> Tensor:
        """Length-scales, (1, 1) or (1, ard_num_dims)."""
        return positive(self.raw_lengthscale)

    @lengthscale.setter
    def lengthscale(self, value: Any) -> None:
        assign(self.raw_lengthscale, value, "lengthscale")

    def evaluate(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        X, Z = self._check(X, Z)
        origin, parameters = origin_of(X), self.form_parameters()
        U = self.form.coordinates(X, origin, *parameters)
        V = U if Z is None else self.form.coordinates(Z, origin, *parameters)
        return self.form.entries(squared_distances(U, V, Z is None), *parameters)

    @property
    @abstractmethod
    def form(self) -> Form:
        """Coordinates and profile, as functions of :meth:`form_parameters`."""

    @property
    def profile(self) -> Profile:
        """The profile at the present values of the parameters."""
        return self.form.profile(*(p.detach() for p in self.form_parameters()))

    def form_parameters(self) -> tuple[Tensor, ...]:
        """The raw parameters that the form reads."""
        return (self.raw_lengthscale,)

    def operator(
        self, X: Tensor, Z: Tensor | None, raw_scales: Sequence[Tensor], backend: TileBackend
    ) -> LinearOperator:
        self._check(X, Z)
        return StationaryOperator(self.form, X, Z, self.form_parameters(), raw_scales, backend=backend)

    def extra_repr(self) -> str:
        return f"{self.profile}, {super().extra_repr()}"


class RBF(Stationary):
    """exp(−½ ‖(x − z)/ℓ‖²), the squared-exponential kernel. Arguments as in :class:`Stationary`.

    Example:
        >>> import torch
        >>> K = RBF()(torch.tensor([[0.0], [1.0]]))
        >>> K @ torch.tensor([1.0, 0.0])
        tensor([1.0000, 0.6065], grad_fn=<SqueezeBackward1>)
    """

    @property
    def form(self) -> Form:
        return ScaledForm(self._columns, Gaussian())


class Matern(Stationary):
    """The Matérn kernel of smoothness ν, with a = √(2ν)·‖(x − z)/ℓ‖: 2^{1−ν}/Γ(ν) aᵛ K_ν(a).

    0.5: e⁻ᵃ, 1.5: (1 + a) e⁻ᵃ, 2.5: (1 + a + a²/3) e⁻ᵃ; elsewhere K_ν, the modified Bessel function, by a table, which
    costs several times as much per entry. Draws from the process are differentiable ⌈ν⌉ − 1 times.

    Args:
        nu: smoothness, 0 < ν ≤ 50, fixed.

    Further arguments as in :class:`Stationary`. At coincident points the derivatives of k in the points are taken as 0
    where they do not exist: the first for ν ≤ 1/2, the second for ν ≤ 1.
    """

    def __init__(
        self, nu: float = 2.5, ard_num_dims: int | None = None, *, lengthscale: Any = 1.0, active_dims: Any = None
    ) -> None:
        super().__init__(ard_num_dims, lengthscale=lengthscale, active_dims=active_dims)
        self.nu = float(nu)
        closed = self.nu in (0.5, 1.5, 2.5)
        # Kept, since the general profile keeps its table.
        self._form = ScaledForm(self._columns, MaternProfile(self.nu) if closed else GeneralMaternProfile(self.nu))

    @property
    def form(self) -> Form:
        return self._form


class RationalQuadratic(Stationary):
    """(1 + ‖(x − z)/ℓ‖²/(2α))^{−α}: a mixture of RBF kernels over length-scales, which it approaches as α → ∞.

    Args:
        alpha: start value of α, which is learned.

    Further arguments as in :class:`Stationary`. ``alpha`` (1,) is softplus(``raw_alpha``) + 1e-8 and may be assigned.
    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, MIT Press 2006, eq. 4.19.
    """

    def __init__(
        self, ard_num_dims: int | None = None, alpha: Any = 1.0, *, lengthscale: Any = 1.0, active_dims: Any = None
    ) -> None:
        super().__init__(ard_num_dims, lengthscale=lengthscale, active_dims=active_dims)
        self.raw_alpha = nn.Parameter(torch.zeros(1))
        self.alpha = alpha

    @property
    def alpha(self) -> Tensor:
        """The exponent α, (1,)."""
        return positive(self.raw_alpha)

    @alpha.setter
    def alpha(self, value: Any) -> None:
        assign(self.raw_alpha, value, "alpha")

    @property
    def form(self) -> Form:
        return RationalQuadraticForm(self._columns)

    def form_parameters(self) -> tuple[Tensor, ...]:
        return (self.raw_lengthscale, self.raw_alpha)


class Periodic(Stationary):
    """exp(−2 Σ_a sin²(π (x_a − z_a)/p_a)/λ_a), of period p; GPyTorch's definition, in which λ is not squared.

    It is the RBF kernel of the points (cos 2πx_a/p_a, sin 2πx_a/p_a)/√λ_a on circles (MacKay 1998), and computed so.

    Args:
        ard_num_dims: number of periods and of length-scales, one per column of the points; None for one of each.
        period_length: start value of p, a number or one per column.

    Further arguments as in :class:`Stationary`. ``period_length`` (1, 1) or (1, d) is softplus(``raw_period_length``) +
    1e-8 and may be assigned.
    """

    def __init__(
        self,
        ard_num_dims: int | None = None,
        period_length: Any = 1.0,
        *,
        lengthscale: Any = 1.0,
        active_dims: Any = None,
    ) -> None:
        super().__init__(ard_num_dims, lengthscale=lengthscale, active_dims=active_dims)
        self.raw_period_length = nn.Parameter(torch.zeros(1, ard_num_dims or 1))
        self.period_length = period_length

    @property
    def period_length(self) -> Tensor:
        """Periods, (1, 1) or (1, ard_num_dims)."""
        return positive(self.raw_period_length)

    @period_length.setter
    def period_length(self, value: Any) -> None:
        assign(self.raw_period_length, value, "period_length")

    @property
    def form(self) -> Form:
        return PeriodicForm(self._columns)

    def form_parameters(self) -> tuple[Tensor, ...]:
        return (self.raw_lengthscale, self.raw_period_length)
