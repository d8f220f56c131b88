"""Mean functions: callables on points (n, d) -> (n,), or (n, p) for p outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OperandError


class Mean(nn.Module, ABC):
    """Base of the means below; their parameters are cast to the dtype of the points."""

    @abstractmethod
    def forward(self, X: Tensor) -> Tensor:
        """m(X), shape (n,) or (n, p), for points (n, d)."""


class ZeroMean(Mean):
    """m(x) = 0, for any number of outputs."""

    def forward(self, X: Tensor) -> Tensor:
        return torch.zeros(X.shape[0], dtype=X.dtype, device=X.device)


class ConstantMean(Mean):
    """m(x) = ``constant``, a parameter.

    Args:
        constant: start value, a number or one per output.
        outputs: None for one constant, a scalar, that all outputs share; p for one each, (p,).
    """

    def __init__(self, constant: Any = 0.0, *, outputs: int | None = None) -> None:
        super().__init__()
        self.constant = nn.Parameter(_start(constant, () if outputs is None else (outputs,), "constant"))

    def forward(self, X: Tensor) -> Tensor:
        return self.constant.to(X.dtype).expand(X.shape[0], *self.constant.shape)


class LinearMean(Mean):
    """m(x) = weightsᵀ x + bias, both parameters.

    Args:
        d: number of inputs.
        outputs: None for ``weights`` (d,) and a scalar ``bias``; p for (d, p) and (p,).
    """

    def __init__(self, d: int, *, outputs: int | None = None) -> None:
        super().__init__()
        if d < 1:
            raise OperandError(f"LinearMean(d={d}); expected at least one input")
        shape = () if outputs is None else (outputs,)
        self.weights = nn.Parameter(_start(0.0, (d, *shape), "weights"))
        self.bias = nn.Parameter(_start(0.0, shape, "bias"))

    def forward(self, X: Tensor) -> Tensor:
        if X.shape[1] != self.weights.shape[0]:
            raise OperandError(f"LinearMean has {self.weights.shape[0]} weights and the points {X.shape[1]} columns")
        return X @ self.weights.to(X.dtype) + self.bias.to(X.dtype)


def _start(value: Any, shape: tuple[int, ...], name: str) -> Tensor:
    if any(s < 1 for s in shape):
        raise OperandError(f"outputs={shape[-1]}; expected at least 1, or None for a process of one output")
    v = torch.as_tensor(value, dtype=torch.get_default_dtype()).detach()
    if v.ndim > len(shape) or not bool(torch.isfinite(v).all()) or (v.ndim and v.shape != shape):
        raise OperandError(f"{name} was given as {value!r}; expected a finite number or a tensor of shape {shape}")
    return v.expand(shape).clone()


def evaluate(mean: Callable[[Tensor], Tensor], X: Tensor, outputs: int | None = None) -> Tensor:
    """m(X) in the dtype of X, of shape (n,), or (n, outputs) with a number of outputs.

    A module that is not one of ours gets the points in its own dtype: the dense path works in float64, the module's
    weights may not. A mean (n,) serves every output; a single column (n, 1) is taken for (n,).
    """
    if isinstance(mean, nn.Module) and not isinstance(mean, Mean):
        own = next((p.dtype for p in mean.parameters() if p.is_floating_point()), X.dtype)
        m = mean(X.to(own))
    else:
        m = mean(X)
    n = X.shape[0]
    if isinstance(m, Tensor) and outputs is None and m.shape == (n, 1):
        m = m.squeeze(1)
    if isinstance(m, Tensor) and outputs is not None and m.shape == (n,):
        m = m.unsqueeze(1).expand(n, outputs)
    expected = (n,) if outputs is None else (n, outputs)
    if not isinstance(m, Tensor) or m.shape != expected:
        what = f"shape {tuple(m.shape)}" if isinstance(m, Tensor) else f"a {type(m).__name__}"
        raise OperandError(f"the mean function returned {what} for points {tuple(X.shape)}; expected {expected}")
    return m.to(X.dtype)
