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
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..numerics import in_transform


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
    @staticmethod
    def forward(ctx: Any, of: _Convolution, mode: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.of, ctx.mode = of, mode
        ctx.save_for_backward(x, weight)
        return of(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[2:])
        if ctx.mode.active:  # the network itself takes a gradient: what it gets depends on x and the weight
            return None, None, *ctx.of.pull(mask, g, x, weight)
        return None, None, *_Pull.apply(ctx.of, mask, g, x.detach(), weight.detach())


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
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Any, Any, Any, bool, Any, int]:
    return input, weight, bias, stride, padding, dilation, False, 0, groups


def _transposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Tensor, Tensor, Tensor | None, Any, Any, Any, bool, Any, int]:
    return input, weight, bias, stride, padding, dilation, True, output_padding, groups


_READ: dict[Callable[..., Tensor], Callable[..., tuple]] = {
    functional.conv1d: _plain, functional.conv2d: _plain, functional.conv3d: _plain,
    functional.conv_transpose1d: _transposed, functional.conv_transpose2d: _transposed,
    functional.conv_transpose3d: _transposed,
}  # fmt: skip


class LinearConvolutions(TorchFunctionMode):
    """Context in which convolutions are recorded so that J v pays for what it needs alone.

    Outputs that were recorded in it may be differentiated, after it, in their cotangents, and backward once in what
    they depend on; derivatives of that in the parameters are zero and must not be asked for. Left to torch: unbatched
    inputs, autocast, compiled code, and convolutions inside of other transforms.
    """

    active = False

    def __enter__(self) -> Any:
        self.active = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.active = False
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _READ or torch.compiler.is_compiling() or in_transform() or fwAD._current_level >= 0:
            return func(*args, **kwargs)
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = _READ[func](*args, **kwargs)
        ordinary = x.ndim == weight.ndim and x.is_floating_point() and not isinstance(padding, str)
        kind = x.device.type
        if not ordinary or (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return func(*args, **kwargs)
        axes = x.ndim - 2
        stride, padding, dilation, output_padding = (
            list(v) if isinstance(v, (tuple, list)) else [v] * axes for v in (stride, padding, dilation, output_padding)
        )
        of = _Convolution(stride, padding, dilation, transposed, output_padding, groups)
        return _Forward.apply(of, self, x, weight, bias)
