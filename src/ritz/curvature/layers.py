"""What a layer's weight multiplies: inputs, output gradients and the weight itself as matrices, module type by type.

Every rule turns its module into the one form y = W a (+ bias) with W (d_out, d_in): inputs a (n, R, d_in), output
gradients g (n, R, d_out) for n examples and R positions, and the weight's own layout to and from (d_out, d_in).
The bias, where there is one, is the last column, met by a constant input of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class OneHot:
    """Inputs that are unit vectors: positions (n, R) of the ones, among ``size``; never formed."""

    index: Tensor
    size: int


class LayerRule:
    """The form y = W a of one module type."""

    name = "linear"

    def inputs(self, module: Any, x: Tensor, y: Sequence[int]) -> Tensor | OneHot:
        """Inputs (n, R, d_in) of the linear map, of a call with input x and an output of shape y.

        Here: any leading dimensions, the first of which counts examples.
        """
        return _three_axes(x)

    def outputs(self, module: Any, g: Tensor, x: Tensor) -> Tensor:
        """Output gradients (n, R, d_out)."""
        return _three_axes(g)

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        """The weight, or its gradient, as (d_out, d_in)."""
        return weight

    def from_matrix(self, module: Any, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Back to the weight's own shape; a view where the layout allows."""
        return matrix


class LinearRule(LayerRule):
    """``nn.Linear``: weight (d_out, d_in)."""


class TransposedLinearRule(LayerRule):
    """A linear layer that stores its weight as (d_in, d_out), such as the ``Conv1D`` of GPT-2 implementations."""

    name = "linear, stored transposed"

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        return weight.mT

    def from_matrix(self, module: Any, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix.mT


class ConvRule(LayerRule):
    """``nn.Conv1d/2d/3d``: patches are the inputs, output pixels the positions; channel groups share one input factor.

    Inputs are averaged over the channel groups first, so that d_in = C_in/groups · kernel; d_out covers all groups.
    """

    name = "convolution"

    def inputs(self, module: Any, x: Tensor, y: Sequence[int]) -> Tensor:
        x, borders = _mean_over_groups(self._batched(module, x), module.groups), _both_sides(module)
        if any(borders):
            x = F.pad(x, borders, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        return patches(x, module.kernel_size, module.stride, module.dilation)

    def outputs(self, module: Any, g: Tensor, x: Tensor) -> Tensor:
        return self._batched(module, g).flatten(2).mT

    @staticmethod
    def _batched(module: Any, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.ndim == len(module.kernel_size) + 1 else x

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def from_matrix(self, module: Any, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix.reshape(tuple(shape))


class ConvTransposeRule(ConvRule):
    """``nn.ConvTranspose1d/2d/3d``: a convolution of the input with zeros between its pixels, by the flipped kernel."""

    name = "transposed convolution"

    def inputs(self, module: Any, x: Tensor, y: Sequence[int]) -> Tensor:
        x = _mean_over_groups(self._batched(module, x), module.groups)
        spread = x.new_zeros(*x.shape[:2], *((s - 1) * step + 1 for s, step in zip(x.shape[2:], module.stride)))
        pixels: tuple = (..., *(slice(None, None, step) for step in module.stride))
        spread[pixels] = x
        dims = len(module.kernel_size)
        borders = []
        for axis in reversed(range(dims)):
            reach = module.dilation[axis] * (module.kernel_size[axis] - 1)
            left = reach - module.padding[axis]
            # From the output's size, because a call may choose it (`output_size=`); negative borders crop.
            borders += [left, y[axis - dims] + reach - left - spread.shape[axis - dims]]
        ones = (1,) * dims
        rows = patches(F.pad(spread, borders), module.kernel_size, ones, module.dilation)
        flipped = rows.reshape(*rows.shape[:2], x.shape[1], *module.kernel_size)
        return flipped.flip(tuple(range(3, flipped.ndim))).flatten(2)

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        inner, outer, *kernel = weight.shape  # C_in, C_out/groups
        grouped = weight.reshape(module.groups, inner // module.groups, outer, -1)
        return grouped.transpose(1, 2).reshape(module.groups * outer, -1)

    def from_matrix(self, module: Any, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        inner, outer = shape[:2]
        grouped = matrix.reshape(module.groups, outer, inner // module.groups, -1)
        return grouped.transpose(1, 2).reshape(tuple(shape))


class EmbeddingRule(LayerRule):
    """``nn.Embedding``: a linear map of one-hot inputs, whose factor A is diagonal: the tokens' frequencies."""

    name = "embedding"

    def inputs(self, module: Any, x: Tensor, y: Sequence[int]) -> OneHot:
        return OneHot(self._index(x), module.num_embeddings)

    def outputs(self, module: Any, g: Tensor, x: Tensor) -> Tensor:
        index = self._index(x)
        g = g.reshape(*index.shape, g.shape[-1])
        if module.padding_idx is not None:  # its row never gets a gradient
            g = g.masked_fill((index == module.padding_idx).unsqueeze(-1), 0.0)
        return g

    @staticmethod
    def _index(x: Tensor) -> Tensor:
        return x.reshape(1, 1) if x.ndim == 0 else x.reshape(x.shape[0], math.prod(x.shape[1:]))

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        return weight.mT

    def from_matrix(self, module: Any, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        return matrix.mT


def patches(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """The patches (n, positions, channels·kernel) that a convolution over (n, channels, *sizes) multiplies; padded."""
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation)):
        x = x.unfold(2 + axis, (k - 1) * d + 1, s)[..., ::d]
    dims = len(kernel)  # (n, channels, *positions, *kernel)
    x = x.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
    return x.reshape(x.shape[0], math.prod(x.shape[1 : 1 + dims]), math.prod(x.shape[1 + dims :]))


def _three_axes(x: Tensor) -> Tensor:
    """(n, R, d) of a tensor (d,) or (n, ..., d), with sizes that are zero too."""
    return x.reshape(1, 1, -1) if x.ndim == 1 else x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _mean_over_groups(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.unflatten(1, (groups, -1)).mean(1)


def _both_sides(module: Any) -> list[int]:
    """Padding in the order of ``F.pad`` (last axis first); "same" puts an odd remainder on the right, as torch does."""
    borders: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            borders += [total // 2, total - total // 2]
        else:
            side = 0 if module.padding == "valid" else module.padding[axis]
            borders += [side, side]
    return borders


_RULES: tuple[tuple[type[nn.Module], LayerRule], ...] = (
    (nn.Linear, LinearRule()),
    (nn.Conv1d, ConvRule()),
    (nn.Conv2d, ConvRule()),
    (nn.Conv3d, ConvRule()),
    (nn.ConvTranspose1d, ConvTransposeRule()),
    (nn.ConvTranspose2d, ConvTransposeRule()),
    (nn.ConvTranspose3d, ConvTransposeRule()),
    (nn.Embedding, EmbeddingRule()),
)


def rule_for(module: nn.Module) -> LayerRule | str | None:
    """The rule of a module with a weight of its own, a reason why it has none, or None for any other module.

    A subclass that computes in another way than torch's class (a forward pass of its own) has no rule.
    """
    if isinstance(module, nn.Embedding):
        if module.sparse:
            return "an embedding with sparse gradients"
        if module.scale_grad_by_freq or module.max_norm is not None:
            return "an embedding that rescales its gradients or rows"
    for base, rule in _RULES:
        if isinstance(module, base):
            own = type(module)
            same = all(getattr(own, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))
            return rule if same else f"a {own.__name__} with a forward pass of its own"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's linear layer
        return TransposedLinearRule()
    return None
