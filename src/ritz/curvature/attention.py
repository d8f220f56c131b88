"""The projections inside ``nn.MultiheadAttention``, which it computes without calling a module.

Its forward pass hands all weights to one function, ``multi_head_attention_forward``. While a mode of torch's function
protocol is active, that function asks the mode; the mode runs the same function with another ``linear`` in its
namespace, one that reports each projection's input and output. Nothing global is replaced, so other threads and other
modules see nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..uncompiled import uncompiled
from .layers import LinearRule

# (parameter, input, output, how to put examples first, first row of the parameter that was used)
Report = Callable[[nn.Parameter, Tensor, Tensor, Callable[[Tensor], Tensor], int], None]


class Projections(TorchFunctionMode):
    """Reports every projection of one attention module while it is active (pushed before its forward, popped after)."""

    def __init__(self, module: nn.MultiheadAttention, report: Report) -> None:
        super().__init__()
        found = [module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        self._weights = [w for w in (*found, module.out_proj.weight) if isinstance(w, nn.Parameter)]
        self._report = report
        self._examples = 1

    @uncompiled  # it would take the private copy for the function that it is a copy of
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.multi_head_attention_forward:
            return _reporting(self._linear)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        if x.ndim == 3:  # inside, sequences lead: (L, n, d), and (L·n, d) for the output projection after them
            self._examples = x.shape[1]
        n = self._examples
        for own in self._weights:
            if weight is own or weight._base is own:  # a chunk of the packed weight is a view of it

                def examples_first(t: Tensor) -> Tensor:
                    return t.reshape(-1, n, t.shape[-1]).transpose(0, 1)

                first_row = (weight.storage_offset() - own.storage_offset()) // own.stride(0)
                self._report(own, x, y, examples_first, first_row)
        return y


def _reporting(linear: Callable[..., Tensor]) -> Callable[..., Any]:
    """``multi_head_attention_forward`` with another ``linear``, as a private copy of its code."""
    names: dict[str, Any] = dict(vars(F))
    names["linear"] = linear
    names["has_torch_function"] = lambda tensors: False  # it has asked; the copy must not ask again
    for name in ("_in_projection_packed", "_in_projection"):
        names[name] = _copy(getattr(F, name), names)
    return _copy(F.multi_head_attention_forward, names)


def _copy(function: Any, names: dict[str, Any]) -> types.FunctionType:
    copied = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


class AttentionRule(LinearRule):
    """A projection of ``nn.MultiheadAttention``, packed or not."""

    name = "attention projection"
