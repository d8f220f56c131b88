"""Kernels as modules: length-scales and output scales to learn, sums, products, and operators on points."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import OperandError
from ..methods import Auto
from ..numerics import check_finite
from ..operators import LinearOperator, Sum
from .backends import Backend, Stored, choose
from .distances import origin_of, squared_distances
from .evaluated import EvaluatedOperator
from .forms import Form, ScaledForm
from .parameters import assign, positive
from .profiles import Gaussian, MaternProfile, Profile
from .stored import StoredOperator
from .tiled import StationaryOperator
from .torch_tiles import Tiles


class Kernel(nn.Module, ABC):
    """A positive semidefinite function of two points.

    ``kernel(X)`` is the Hermitian operator of the matrix k(x_i, x_j), ``kernel(X, Z)`` the rectangular one of
    k(x_i, z_j); neither forms the matrix. ``kernel.evaluate`` does, for small sizes. Kernels add and multiply:
    ``RBF() + 0.5 * Matern(1.5)``, where a number becomes a :class:`Scale` that is learned from there on.

    A kernel of your own gives ``evaluate(X, Z=None)`` in differentiable operations; products, gradients and memory
    are then taken care of by tiles. Hyper-parameters are cast to the dtype of the points.
    """

    @abstractmethod
    def evaluate(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        """The dense matrix k(x_i, z_j) (n, m) for X (n, d) and Z (m, d), or k(x_i, x_j); of any differentiability."""

    def forward(self, X: Tensor, Z: Tensor | None = None, *, backend: Backend = Auto()) -> LinearOperator:
        """The kernel matrix as an operator.

        Args:
            X: points (n, d), or (n,) for d = 1; floating point.
            Z: points (m, d), or None for X itself.
            backend: ``Tiles()``, ``Stored()`` (the dense matrix, kept), or ``Auto()``, which is Tiles.

        Returns:
            An operator (n, m) with gradients in the points and every hyper-parameter; Hermitian psd for Z = None.

        Raises:
            OperandError: points that do not fit together or to the kernel.
            NonFiniteError: NaN or Inf in the points.
        """
        X, Z = self._check(X, Z)
        if not isinstance(backend, (Auto, Tiles, Stored)):
            raise OperandError(f"backend={backend!r}; expected Auto(), Stored() or a back end of tiles")
        if isinstance(backend, Stored):
            return StoredOperator(self.operator(X, Z, (), choose(backend.tiles)))
        return self.operator(X, Z, (), choose(backend))

    def operator(self, X: Tensor, Z: Tensor | None, raw_scales: Sequence[Tensor], backend: Tiles) -> LinearOperator:
        """The operator of this kernel times the factors that belong to ``raw_scales``; for checked points."""
        return EvaluatedOperator(self, X, Z, raw_scales, backend=backend)

    def _check(self, X: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = []
        for name, P in (("X", X), ("Z", Z)):
            if P is None:
                continue
            if not isinstance(P, Tensor) or not P.is_floating_point() or P.ndim not in (1, 2):
                what = f"{tuple(P.shape)} {P.dtype}" if isinstance(P, Tensor) else type(P).__name__
                raise OperandError(f"{name} is {what}; expected a floating-point tensor of points (n, d)")
            P = P.unsqueeze(1) if P.ndim == 1 else P
            check_finite(P, name)
            out.append(P)
        if Z is not None and (out[0].shape[1], X.dtype, X.device) != (out[1].shape[1], Z.dtype, Z.device):
            raise OperandError(
                f"X has {out[0].shape[1]} columns in {X.dtype} on {X.device}, Z has {out[1].shape[1]} in {Z.dtype} on "
                f"{Z.device}; points of one kernel matrix must agree"
            )
        for p in self.parameters():
            if p.device != X.device:
                raise OperandError(f"the kernel is on {p.device} and X on {X.device}; move one of them with .to(...)")
        return out[0], out[1] if Z is not None else None

    def __add__(self, other: Any) -> Kernel:
        if isinstance(other, Kernel):
            return AdditiveKernel(self, other)
        return NotImplemented

    def __mul__(self, other: Any) -> Kernel:
        if isinstance(other, Kernel):
            return ProductKernel(self, other)
        if isinstance(other, numbers.Real) or (isinstance(other, Tensor) and other.numel() == 1):
            return Scale(self, outputscale=other)
        return NotImplemented

    def __rmul__(self, other: Any) -> Kernel:
        return self.__mul__(other)


class Stationary(Kernel):
    """k(‖x − z‖²) with coordinates divided by length-scales: base of RBF and Matérn.

    Args:
        profile: k as a function of the squared distance.
        ard_num_dims: number of length-scales, one per column of the points; None for one that all share.
        lengthscale: start value, a number or one per column.
        active_dims: the columns of the points that the kernel sees; None for all.

    ``lengthscale`` (1, 1) or (1, d) is softplus(``raw_lengthscale``) + 1e-8 and may be assigned.
    """

    active_dims: Tensor | None

    def __init__(
        self,
        profile: Profile,
        ard_num_dims: int | None = None,
        *,
        lengthscale: Any = 1.0,
        active_dims: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if ard_num_dims is not None and ard_num_dims < 1:
            raise OperandError(f"ard_num_dims={ard_num_dims}; expected at least 1, or None for one length-scale")
        if active_dims is not None and ard_num_dims not in (None, len(active_dims)):
            raise OperandError(f"ard_num_dims={ard_num_dims} came with {len(active_dims)} active_dims; they must agree")
        self.profile, self.ard_num_dims = profile, ard_num_dims
        self.raw_lengthscale = nn.Parameter(torch.zeros(1, ard_num_dims or 1))
        index = None if active_dims is None else torch.as_tensor(list(active_dims), dtype=torch.long)
        self.register_buffer("active_dims", index)
        self._columns = None if index is None else tuple(int(i) for i in index)
        self.lengthscale = lengthscale

    @property
    def lengthscale(self) -> Tensor:
        """Length-scales, (1, 1) or (1, ard_num_dims)."""
        return positive(self.raw_lengthscale)

    @lengthscale.setter
    def lengthscale(self, value: Any) -> None:
        assign(self.raw_lengthscale, value, "lengthscale")

    def _check(self, X: Tensor, Z: Tensor | None) -> tuple[Tensor, Tensor | None]:
        X, Z = super()._check(X, Z)
        active = self.active_dims
        if active is None and self.ard_num_dims not in (None, X.shape[1]):
            raise OperandError(f"the kernel has {self.ard_num_dims} length-scales and X {X.shape[1]} columns")
        if active is not None and int(active.max()) >= X.shape[1]:
            raise OperandError(f"active_dims has column {int(active.max())} and X only {X.shape[1]} columns")
        return X, Z

    def evaluate(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        X, Z = self._check(X, Z)
        origin, parameters = origin_of(X), self.form_parameters()
        U = self.form.coordinates(X, origin, *parameters)
        V = U if Z is None else self.form.coordinates(Z, origin, *parameters)
        return self.form.entries(squared_distances(U, V, Z is None), *parameters)

    @property
    def form(self) -> Form:
        """Coordinates and profile, as functions of :meth:`form_parameters`."""
        return ScaledForm(self._columns, self.profile)

    def form_parameters(self) -> tuple[Tensor, ...]:
        """The raw parameters that the form reads."""
        return (self.raw_lengthscale,)

    def operator(self, X: Tensor, Z: Tensor | None, raw_scales: Sequence[Tensor], backend: Tiles) -> LinearOperator:
        self._check(X, Z)
        return StationaryOperator(self.form, X, Z, self.form_parameters(), raw_scales, backend=backend)

    def extra_repr(self) -> str:
        active = None if self.active_dims is None else self.active_dims.tolist()
        return f"{self.profile}, ard_num_dims={self.ard_num_dims}, active_dims={active}"


class RBF(Stationary):
    """exp(−½ ‖(x − z)/ℓ‖²), the squared-exponential kernel. Arguments as in :class:`Stationary`.

    Example:
        >>> import torch
        >>> K = RBF()(torch.tensor([[0.0], [1.0]]))
        >>> K @ torch.tensor([1.0, 0.0])
        tensor([1.0000, 0.6065], grad_fn=<SqueezeBackward1>)
    """

    def __init__(self, ard_num_dims: int | None = None, *, lengthscale: Any = 1.0, active_dims: Any = None) -> None:
        super().__init__(Gaussian(), ard_num_dims, lengthscale=lengthscale, active_dims=active_dims)


class Matern(Stationary):
    """The Matérn kernel of smoothness ν ∈ {0.5, 1.5, 2.5}, with a = √(2ν)·‖(x − z)/ℓ‖.

    0.5: e⁻ᵃ, 1.5: (1 + a) e⁻ᵃ, 2.5: (1 + a + a²/3) e⁻ᵃ. Further arguments as in :class:`Stationary`.
    """

    def __init__(
        self, nu: float = 2.5, ard_num_dims: int | None = None, *, lengthscale: Any = 1.0, active_dims: Any = None
    ) -> None:
        super().__init__(MaternProfile(float(nu)), ard_num_dims, lengthscale=lengthscale, active_dims=active_dims)
        self.nu = float(nu)


class Scale(Kernel):
    """s·k(x, z) with s = ``outputscale`` = softplus(``raw_outputscale``) + 1e-8, which may be assigned.

    Args:
        base_kernel: k.
        outputscale: start value.
    """

    def __init__(self, base_kernel: Kernel, outputscale: Any = 1.0) -> None:
        super().__init__()
        self.base_kernel: Kernel = base_kernel
        self.raw_outputscale = nn.Parameter(torch.zeros(()))
        self.outputscale = outputscale.detach().reshape(()) if isinstance(outputscale, Tensor) else outputscale

    @property
    def outputscale(self) -> Tensor:
        """The factor s, a scalar."""
        return positive(self.raw_outputscale)

    @outputscale.setter
    def outputscale(self, value: Any) -> None:
        assign(self.raw_outputscale, value, "outputscale")

    def evaluate(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        K = self.base_kernel.evaluate(X, Z)
        return self.outputscale.to(K.dtype) * K

    def operator(self, X: Tensor, Z: Tensor | None, raw_scales: Sequence[Tensor], backend: Tiles) -> LinearOperator:
        return self.base_kernel.operator(X, Z, (*raw_scales, self.raw_outputscale), backend)


class _Several(Kernel):
    """Base of sums and products; nested ones are flattened."""

    def __init__(self, *kernels: Kernel) -> None:
        super().__init__()
        self.kernels = nn.ModuleList(p for k in kernels for p in (k.parts() if type(k) is type(self) else [k]))

    def parts(self) -> list[Kernel]:
        """The kernels that this one is made of."""
        return cast("list[Kernel]", list(self.kernels))


class AdditiveKernel(_Several):
    """k₁ + k₂ + …, one pass of tiles for each."""

    def evaluate(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        first, *rest = (k.evaluate(X, Z) for k in self.parts())
        return sum(rest, first)

    def operator(self, X: Tensor, Z: Tensor | None, raw_scales: Sequence[Tensor], backend: Tiles) -> LinearOperator:
        return Sum([k.operator(X, Z, raw_scales, backend) for k in self.parts()])


class ProductKernel(_Several):
    """k₁·k₂·…, elementwise; by tiles of ``evaluate``, with autograd through one tile at a time."""

    def evaluate(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        return math.prod((k.evaluate(X, Z) for k in self.parts()), start=torch.ones((), dtype=X.dtype, device=X.device))
