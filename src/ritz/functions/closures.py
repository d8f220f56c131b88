"""Gradients in what a callable f closes over, such as the exponent of a fractional power.

A value is linear in what f returns at the Ritz values, whose derivative autograd knows: a second copy of the value is
formed from it on a graph, with the space held fixed, and hands its gradient on beside that of the value itself. It is
the derivative of the computed value, which converges as fast as the value does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError, SecondDerivativeError
from ..numerics import full_precision
from .composed import Part, Shifted
from .scalar import Custom, ScalarFunction


def closes_over(f: ScalarFunction) -> bool:
    """Whether a callable reads tensors that require grad, as far as its value at 1 tells."""
    if not isinstance(f, (Custom, Part, Shifted)) or not torch.is_grad_enabled():
        return False
    return f(torch.ones(1, dtype=torch.float64)).requires_grad


def refuse_closures(functions: Iterable[ScalarFunction], method: str) -> None:
    """Raise where a method would leave out the gradients in what f closes over."""
    if any(closes_over(f) for f in functions):
        raise OperandError(
            f"f reads tensors that require grad, to which gradients by {method} do not go; expected Lanczos with a "
            "basis, Arnoldi or Auto(), or an f that reads detached tensors"
        )


def with_closure(value: Tensor, f: ScalarFunction, copy: Callable[[], Tensor]) -> Tensor:
    """``value``, whose gradient goes also through ``copy()``, the same value as a function of what f closes over."""
    if not closes_over(f):
        return value
    with full_precision():
        through = copy()
    return value + _Slope.apply(through).to(value.dtype)


class _Slope(torch.autograd.Function):
    """Zero with the gradient of its operand, once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise SecondDerivativeError(
                "the gradient in what f closes over was asked for with create_graph=True; it is of first order only: "
                "where second derivatives are needed give gradient=ritz.Unrolled()"
            )
        return g
