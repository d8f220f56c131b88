"""What a Laplace posterior chooses for its user: which parameters a subset means, and where a curve is highest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import LayerRule, rule_for
from ..errors import OperandError


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Modules that multiply by a weight, in the order of their registration."""
    found = [m for m in model.modules() if isinstance(rule_for(m), LayerRule)]
    if not found:
        raise OperandError("the model has no layer that multiplies by a weight; give subset= as names")
    return found


def check_last_layer(model: nn.Module, run: Callable[[], Any]) -> None:
    """Raise where the last layer that runs is not the one that was registered last."""
    order: list[nn.Module] = []
    layers = layers_of(model)
    handles = [m.register_forward_hook(lambda m, *_: order.append(m)) for m in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if order and order[-1] is not layers[-1]:
        name = next(n for n, m in model.named_modules() if m is order[-1])
        raise OperandError(
            f"subset='last_layer' means the layer that was registered last, but {name} ran last; give subset={name!r}"
        )


def chosen_parameters(model: nn.Module, subset: Any) -> Any:
    """What ``params=`` of a curvature operator is for a subset: all, the last layer's, or names as they are."""
    if subset is None or (isinstance(subset, str) and subset == "all"):
        return None
    if isinstance(subset, str) and subset == "last_layer":
        return list(layers_of(model)[-1].parameters(recurse=False))
    return subset


def maximum(values: Callable[[Tensor], Tensor], low: float, high: float, points: int = 41) -> float:
    """The maximiser of a function of positive numbers near [low, high], by finer and finer grids of logarithms.

    While it lies on a border the grid goes on beyond, by three decades at a time, twelve at most.
    """
    first, last, best = low, high, low
    for _ in range(4):
        while True:
            grid = torch.logspace(math.log10(low), math.log10(high), points, dtype=torch.float64)
            i = int(values(grid).argmax())
            if i == 0 and low <= first and low > 1e-12 * first:
                low, high = 1e-3 * low, float(grid[1])
            elif i == points - 1 and high >= last and high < 1e12 * last:
                low, high = float(grid[-2]), 1e3 * high
            else:
                break
        best = float(grid[i])
        low, high = float(grid[max(i - 1, 0)]), float(grid[min(i + 1, points - 1)])
    return best
