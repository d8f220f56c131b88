"""The row form: a natural gradient from the rows of a layer's inputs and output gradients, without its gradient.

With G = gᵀ a over m rows, P_C G P_K = (P_C gᵀ)(P_K aᵀ)ᵀ. That costs m(d_K² + d_C²) + m d_K d_C multiplications for
dense factors instead of d_C² d_K + d_C d_K²: less wherever the batch has fewer rows than the layer has columns.

It is right only for the gradient that those rows make. ``.grad`` may have been clipped, unscaled, averaged over
processes, or hold more than this layer's uses (a penalty on the weight). So one product with a fixed vector z compares
``.grad`` z with gᵀ(a z): equal up to a factor means that the rows, times that factor, are the gradient; anything else
goes the ordinary way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..operators.structured.products import aligned_product, fixed_vector
from .layer import MatrixLayer

if TYPE_CHECKING:
    from .base import CurvatureOptimizer

TOLERANCE = 64  # in units of the gradient's rounding error
MOVED = 32  # multiplications that a processor makes while a structured product reads and writes one entry of its block


def keeps_rows(optimizer: CurvatureOptimizer, layer: MatrixLayer, m: int) -> bool:
    """Whether m further rows of a layer are kept for the step: a pure function of sizes, dtype and settings."""
    asked = layer.settings.row_form
    if asked is False or layer.one_hot or optimizer._reduction.world > 1 or not optimizer.two_sided(layer):
        return False
    if layer.weight.dtype not in (torch.float32, torch.float64):
        return False  # the check below could not tell a clipped gradient from a rounded one
    return asked is True or _cheaper(optimizer, layer, m)


def _cheaper(optimizer: CurvatureOptimizer, layer: MatrixLayer, m: int) -> bool:
    """Whether the row form is faster: multiplications, and entries that go through memory, of both forms."""
    d_in, d_out = layer.sizes
    m += sum(a.shape[0] for a, _ in layer.kept)
    rows, whole = (m + MOVED) * d_in * d_out, 0.0
    for side, d in enumerate(layer.sizes):
        rows += optimizer.apply_cost(layer, side, m) + MOVED * d * m
        whole += optimizer.apply_cost(layer, side, d_in * d_out // d) + MOVED * d_in * d_out
    return rows < whole


def from_rows(optimizer: CurvatureOptimizer, layer: MatrixLayer, G: Tensor) -> Tensor | None:
    """The natural gradient from the kept rows, or None where there are none or they do not make G."""
    if not layer.kept or not layer.whole:
        return None
    a = torch.cat([a for a, _ in layer.kept]) if len(layer.kept) > 1 else layer.kept[0][0]
    g = torch.cat([g for _, g in layer.kept]) if len(layer.kept) > 1 else layer.kept[0][1]
    a = layer.with_bias(a)
    factor = _factor(layer, a, g, G)
    if factor is None:
        return None
    left = optimizer.apply_factor([layer], 1, g.mT)  # P_C gᵀ
    right = optimizer.apply_factor([layer], 0, a.mT)  # P_K aᵀ
    N = aligned_product(left, right.mT)
    return N if factor == 1.0 else N.mul_(factor)


def _factor(layer: MatrixLayer, a: Tensor, g: Tensor, G: Tensor) -> float | None:
    """The number s with G = s gᵀ a, as far as a fixed direction can tell; None where there is none."""
    z = layer.cache.get("z")
    if z is None or z.dtype != G.dtype or z.device != G.device:
        z = layer.cache["z"] = fixed_vector(G.shape[1], G)
    seen, made = G @ z, g.mT @ (a @ z)
    size = float(made.norm())
    s = float(seen @ made) / size**2 if size > 0 else float("nan")
    off = float((seen - s * made).norm())
    if not off <= TOLERANCE * torch.finfo(G.dtype).eps * abs(s) * size:  # NaN fails too
        return None
    return 1.0 if abs(s - 1.0) <= TOLERANCE * torch.finfo(G.dtype).eps else s
