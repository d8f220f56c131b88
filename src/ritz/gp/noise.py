"""Noise of observations: fixed, or varying over the inputs. A learned scalar lives in the process itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OperandError
from ..numerics import check_finite


class Noise(nn.Module, ABC):
    """Variance of the noise of observations; what ``ExactGP(noise=...)`` takes beside a number.

    ``noise(X)`` is that of the observations which a process is conditioned on, ``noise.new(X)`` that of observations
    yet to be made; both are a scalar or (n,) for points (n, d), positive.
    """

    @abstractmethod
    def forward(self, X: Tensor) -> Tensor:
        """Noise variances of the observations at X (n, d): a scalar or (n,)."""

    def new(self, X: Tensor) -> Tensor:
        """Noise variances of new observations at X (n, d): a scalar or (n,)."""
        return self(X)

    def rows(self, index: Tensor) -> Noise:
        """The noise of the observations ``index`` (m,) of those at hand."""
        return self


class FixedNoise(Noise):
    """Noise variances that are known and not learned.

    Args:
        value: the variance, a number, or one per observation, a tensor (n,).
        new: the variance of a new observation, a number. Needed for a tensor ``value`` only where predictions of new
            observations are asked for (those of the function need none); a number ``value`` holds everywhere.

    Raises:
        OperandError: a variance that is not positive and finite; later, a number of points that is not that of
            ``value``, or new observations of which nobody said how noisy they are.

    Example:
        >>> import ritz
        >>> gp = ritz.gp.ExactGP(ritz.kernels.RBF(), noise=FixedNoise(0.01))
        >>> [name for name, _ in gp.named_parameters()]
        ['kernel.raw_lengthscale', 'mean.constant']
    """

    value: Tensor
    new_value: Tensor | None

    def __init__(self, value: Any, new: Any = None) -> None:
        super().__init__()
        self.register_buffer("value", _positive(value, "FixedNoise(value)", (0, 1)))
        self.register_buffer("new_value", None if new is None else _positive(new, "FixedNoise(new=...)", (0,)))

    def forward(self, X: Tensor) -> Tensor:
        if self.value.ndim and self.value.shape[0] != X.shape[0]:
            raise OperandError(
                f"FixedNoise has {self.value.shape[0]} variances and X {X.shape[0]} points; it is one per observation "
                "(gp.rows(index) is the process of some of them)"
            )
        return self.value

    def new(self, X: Tensor) -> Tensor:
        if self.new_value is not None:
            return self.new_value
        if self.value.ndim == 0:
            return self.value
        raise OperandError(
            "FixedNoise has one variance per observation and knows none at new points: give FixedNoise(value, new=...) "
            "or ask for predictions without noise"
        )

    def rows(self, index: Tensor) -> FixedNoise:
        if self.value.ndim == 0:
            return self
        return FixedNoise(self.value[index.to(self.value.device)], self.new_value)

    def extra_repr(self) -> str:
        what = f"{float(self.value):.4g}" if self.value.ndim == 0 else f"{self.value.shape[0]} variances"
        return what if self.new_value is None else f"{what}, new={float(self.new_value):.4g}"


class HeteroscedasticNoise(Noise):
    """exp(g(x)) with g a module to be learned together with the rest, at observed and at new points alike.

    Args:
        module: g, (n, d) -> (n,) or (n, 1), the log of the variance; it gets the points in the dtype of its parameters.
        floor: the smallest variance, added.

    Without a prior a flexible g may explain every residual as noise; keep it small or give it one.

    Reference: Goldberg, Williams, Bishop, Regression with input-dependent noise, 1998 (there g is itself a Gaussian
    process; here its values are a point estimate).
    """

    def __init__(self, module: nn.Module, floor: float = 1e-6) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise OperandError(f"module is a {type(module).__name__}; expected an nn.Module (n, d) -> (n,)")
        if not 0 <= floor < float("inf"):
            raise OperandError(f"floor={floor}; expected a finite number, at least 0")
        self.module, self.floor = module, float(floor)

    def forward(self, X: Tensor) -> Tensor:
        own = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), X.dtype)
        g = self.module(X.to(own))
        n = X.shape[0]
        if not isinstance(g, Tensor) or g.shape not in ((n,), (n, 1)):
            what = f"shape {tuple(g.shape)}" if isinstance(g, Tensor) else f"a {type(g).__name__}"
            raise OperandError(f"the noise module returned {what} for points {tuple(X.shape)}; expected ({n},)")
        check_finite(g, "the log noise variance")
        return g.reshape(n).to(X.dtype).exp() + self.floor


def _positive(value: Any, name: str, dims: tuple[int, ...]) -> Tensor:
    v = value.detach().clone() if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
    v = v if v.is_floating_point() else v.double()
    if v.ndim not in dims or v.numel() == 0 or not bool(torch.isfinite(v).all()) or bool((v <= 0).any()):
        shapes = "a number" if dims == (0,) else "a number or a tensor (n,)"
        what = f"a tensor of shape {tuple(v.shape)}, smallest {float(v.min()):.3g}" if v.numel() > 1 else f"{value}"
        raise OperandError(f"{name} is {what}; expected {shapes} of positive finite variances")
    return v
