"""Layers of equal shape go through one batched product; and the clipping that looks at all layers together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .layer import MatrixLayer
from .settings import KLClip, NormClip

# Up to this many entries of G, starting a product costs more than the product: stack on that device.
STACK_BELOW = {"cpu": 64 * 64, "cuda": 1024 * 1024}


@dataclass
class Move:
    """A natural gradient on its way to a layer (as a matrix) or a parameter."""

    target: MatrixLayer | nn.Parameter
    natural: Tensor
    gradient: Tensor


def batches(layers: Iterable[MatrixLayer], foreach: bool | None) -> list[list[MatrixLayer]]:
    """Layers grouped by everything that a batched product must share; ``foreach=None`` groups small ones only."""
    groups: dict[Any, list[MatrixLayer]] = {}
    for layer in layers:
        weight = layer.weight
        small = layer.d_in * layer.d_out <= STACK_BELOW.get(weight.device.type, 0)
        alike: Any = (layer.group, layer.sizes, layer.structures, layer.one_hot, weight.dtype, weight.device)
        groups.setdefault(alike if (small if foreach is None else foreach) else id(layer), []).append(layer)
    return list(groups.values())


def clip(moves: list[Move], rule: NormClip | KLClip, lr: float) -> None:
    """Scale all natural gradients of a group by the factor that the rule gives for them together."""
    squared = sum(float(m.natural.square().sum()) for m in moves)
    inner = sum(float((m.natural * m.gradient).sum()) for m in moves)
    factor = rule(squared, inner, lr)
    if factor < 1.0:
        for m in moves:
            m.natural = m.natural * factor
