"""Kernels made of kernels: scaled, added, multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..operators import LinearOperator, Sum
from .backends import TileBackend
from .base import Kernel
from .forms import JoinedForm
from .parameters import assign, positive
from .products import FactoredOperator
from .stationary import Stationary
from .tiled import StationaryOperator
from .torch_tiles import Tiles


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

    def operator(
        self, X: Tensor, Z: Tensor | None, raw_scales: Sequence[Tensor], backend: TileBackend
    ) -> LinearOperator:
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

    def operator(
        self, X: Tensor, Z: Tensor | None, raw_scales: Sequence[Tensor], backend: TileBackend
    ) -> LinearOperator:
        return Sum([k.operator(X, Z, raw_scales, backend) for k in self.parts()])


class ProductKernel(_Several):
    """k₁·k₂·…, elementwise.

    Factors that are Gaussian functions of some distance (RBF, periodic, with their scales) make one such function
    together, with the tiles of a single kernel. Other stationary factors have their tiles multiplied, and gradients by
    the product rule. Anything else goes by tiles of ``evaluate``, with autograd through one tile at a time.
    """

    def evaluate(self, X: Tensor, Z: Tensor | None = None) -> Tensor:
        return math.prod((k.evaluate(X, Z) for k in self.parts()), start=torch.ones((), dtype=X.dtype, device=X.device))

    def operator(
        self, X: Tensor, Z: Tensor | None, raw_scales: Sequence[Tensor], backend: TileBackend
    ) -> LinearOperator:
        factors, scales = _factors(self)
        stationary = [k for k in factors if isinstance(k, Stationary)]
        if len(stationary) < len(factors):
            return super().operator(X, Z, raw_scales, backend)
        for k in stationary:
            k._check(X, Z)
        gaussian = [k for k in stationary if k.form.gaussian]
        parts = [(k.form, k.form_parameters()) for k in stationary if not k.form.gaussian]
        if gaussian:
            form = JoinedForm(None, tuple((k.form, len(k.form_parameters())) for k in gaussian))
            parts.append((form, tuple(p for k in gaussian for p in k.form_parameters())))
        scales = [*raw_scales, *scales]
        if len(parts) == 1:
            return StationaryOperator(parts[0][0], X, Z, parts[0][1], scales, backend=backend)
        # By torch whatever the back end, which only says how large tiles are.
        tiles = Tiles(getattr(backend, "edge", None))
        return FactoredOperator([StationaryOperator(f, X, Z, p) for f, p in parts], scales, tiles)


def _factors(kernel: Kernel) -> tuple[list[Kernel], list[Tensor]]:
    """The kernels that ``kernel`` is the product of, and the raw output scales among them."""
    if isinstance(kernel, Scale):
        inner, scales = _factors(kernel.base_kernel)
        return inner, [kernel.raw_outputscale, *scales]
    if isinstance(kernel, ProductKernel):
        found = [_factors(k) for k in kernel.parts()]
        return [k for inner, _ in found for k in inner], [s for _, scales in found for s in scales]
    return [kernel], []
