"""Convolutions recorded for J and Jᵀ alone.

torch differentiates the backward pass of a convolution in all that went into it, asked for or not: where only the
cotangent matters, as in J v, three convolutions of four are computed and thrown away. Here the backward pass is a
function of its cotangent g alone, with inputs x and weights W as numbers,

    x̄ = g ⋆ᵀ W,  W̄ = x ⋆ g,  b̄ = Σ g,    so that from their cotangents    ḡ = x̄' ∗ W + x ∗ W̄' + b̄'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class _Convolution:
    """A convolution in x (n, C, …) and W, and the pull-back of its cotangents."""

    stride: Any
    padding: Any
    dilation: Any
    transposed: bool
    output_padding: Any
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.convolution(x, weight, bias, *vars(self).values())

    def pull(self, mask: list[bool], g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        """x̄, W̄ and b̄, None where ``mask`` is False."""
        return torch.ops.aten.convolution_backward(g, x, weight, [g.shape[1]], *vars(self).values(), mask)


class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(of: _Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return of(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.of = inputs[0]
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return None, *_Pull.apply(ctx.of, list(ctx.needs_input_grad[1:]), g, x.detach(), weight.detach())


class _Pull(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(of: _Convolution, mask: list[bool], g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
        return of.pull(mask, g, x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor | None, ...]) -> None:
        ctx.of, _, g, x, weight = inputs
        ctx.shape = g.shape
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, tangents
        parts = []
        if of_x is not None:
            parts.append(ctx.of(of_x, weight))
        if of_weight is not None:
            parts.append(ctx.of(x, of_weight))
        if of_bias is not None:
            parts.append(of_bias.reshape(1, -1, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape))
        return None, None, sum(parts[1:], parts[0]) if parts else None, None, None


def _plain(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Any, Any, Any, bool, Any, int]:
    return input, weight, bias, stride, padding, dilation, False, 0, groups


def _transposed(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Any, Any, Any, bool, Any, int]:
    return input, weight, bias, stride, padding, dilation, True, output_padding, groups


_READ: dict[Callable[..., Tensor], Callable[..., tuple]] = {
    functional.conv1d: _plain, functional.conv2d: _plain, functional.conv3d: _plain,
    functional.conv_transpose1d: _transposed, functional.conv_transpose2d: _transposed,
    functional.conv_transpose3d: _transposed,
}  # fmt: skip


class LinearConvolutions(TorchFunctionMode):
    """Context in which convolutions are recorded so that J v pays for what it needs alone.

    What is recorded may be differentiated in the outputs' cotangents, and, backward once, in parameters; derivatives of
    products in the parameters are zero and must not be asked for. Autocast and unbatched inputs are left to torch.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _READ:
            return func(*args, **kwargs)
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = _READ[func](*args, **kwargs)
        ordinary = x.ndim == weight.ndim and x.is_floating_point() and not isinstance(padding, str)
        if not ordinary or torch.is_autocast_enabled(x.device.type):
            return func(*args, **kwargs)
        axes = x.ndim - 2
        stride, padding, dilation, output_padding = (
            list(v) if isinstance(v, (tuple, list)) else [v] * axes for v in (stride, padding, dilation, output_padding)
        )
        of = _Convolution(stride, padding, dilation, transposed, output_padding, groups)
        return _Forward.apply(of, x, weight, bias)
