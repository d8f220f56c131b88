"""From captured uses to normalised statistics: what the hooks add up, and the division when the step comes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..curvature import OneHot, Site
from ..errors import OperandError
from ..numerics import full_precision
from .layer import MatrixLayer
from .rows import keeps_rows

if TYPE_CHECKING:
    from .base import CurvatureOptimizer


class Collector:
    """The sink of the hooks: adds every use to the sums of its layer.

    Factors are whitened here, with the K and C of the moment (they change only in ``step``), so that neither A nor B is
    ever formed for a structure that is not dense.
    """

    def __init__(self, optimizer: CurvatureOptimizer, layers: list[MatrixLayer]) -> None:
        self._optimizer = optimizer
        self._layer = {id(site): layer for layer in layers for site in layer.sites}
        self._scaled = True

    @contextlib.contextmanager
    def unscaled(self) -> Iterator[None]:
        """Inside, output gradients carry no loss scale (they were not made by a scaled loss)."""
        self._scaled = False
        try:
            yield
        finally:
            self._scaled = True

    def wanted(self, site: Site, entries: int | None) -> bool:
        layer = self._layer[id(site)]
        if not layer.weight.requires_grad:
            return False
        if self._optimizer.due(layer.group):
            return True
        return entries is not None and keeps_rows(self._optimizer, layer, entries // layer.d_out)

    def used(self, site: Site, x: Tensor, g: Tensor, y: Sequence[int], first_row: int, again: bool, batch: int) -> None:
        optimizer, layer = self._optimizer, self._layer[id(site)]
        due = optimizer.due(layer.group)
        keep = not optimizer._deferred and keeps_rows(optimizer, layer, g.numel() // layer.d_out)
        layer.whole &= keep
        if not (due or keep):
            return
        optimizer.settle(layer.weight, layer.group)
        with full_precision():
            a, g = layer.rows(site, x, g, y, first_row)
            if keep and isinstance(a, Tensor) and a.dtype == g.dtype == layer.weight.dtype:
                layer.kept.append((a.flatten(0, 1), g.flatten(0, 1)))
            else:
                layer.whole = False
            if due:
                self._add(layer, a, g, again, batch)

    def _add(self, layer: MatrixLayer, a: Tensor | OneHot, g: Tensor, again: bool, batch: int) -> None:
        optimizer, sharing = self._optimizer, layer.settings.weight_sharing
        if not again:
            layer.sums.count(g.shape[0], g.shape[0] * g.shape[1], batch)
            if isinstance(a, OneHot):
                layer.sums.add_inputs(optimizer.whiten(layer, 0, a), a.index.numel())
            else:
                rows = layer.with_bias(sharing.inputs(a))
                layer.sums.add_inputs(optimizer.whiten(layer, 0, rows), rows.shape[0])
        scale = optimizer._scale.known(optimizer.param_groups[layer.group]["step"]) if self._scaled else None
        if scale is not None:
            # Before the outer product: the square of a scale of 2¹⁶ would leave the range of half precision. And not in
            # half precision, where the gradients that the scale is there for would vanish.
            g = g.to(torch.promote_types(g.dtype, torch.float32)) / scale
        # One-hot inputs cannot be averaged over positions, so both sides of an embedding are expanded.
        rows = g.flatten(0, 1) if isinstance(a, OneHot) else sharing.outputs(g)
        layer.sums.add_outputs(optimizer.whiten(layer, 1, rows))


@dataclass
class Normalised:
    """(H_K, H_C) by the layers that were used, and the number of loss terms."""

    of: dict[int, tuple[Tensor, Tensor]]
    terms: float


def normalised(optimizer: CurvatureOptimizer, layers: list[MatrixLayer], scale: float | None) -> Normalised:
    """Divide the sums of this step by their counts, over all processes.

    H_K is the mean over rows. H_C is the sum over output gradients *of the loss terms* divided by their number: with
    gradients of a mean of N terms that is N Σ g gᵀ, of a sum Σ g gᵀ. Vectors of ``accumulate_curvature`` are per term:
    Σ g gᵀ / N and Σ g gᵀ. ``scale`` is a loss scale that was not known when the sums were made; None says that nobody
    knows it any more.
    """
    if scale is None and not optimizer._deferred:
        raise OperandError(
            "the loss was scaled and GradScaler.unscale_ was called before step, so the scale of the collected "
            "statistics is not known any more; give the scaler to the optimizer: grad_scale=scaler"
        )
    world = optimizer._reduction.reduce(layers)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    terms = 0.0
    for layer in layers:
        sums = layer.sums
        if sums.inputs is None or sums.outputs is None or sums.rows == 0:
            continue
        terms = max(terms, sums.terms)
        mean = optimizer.param_groups[layer.group]["mean_loss"]
        per_term = 1.0 / sums.terms if layer.settings.sum_per_term else 1.0
        if scale is None or optimizer._deferred:  # no loss, no scale and no wrapper had a part in these gradients
            factor = 1.0 / sums.terms if mean else per_term
        else:  # a wrapper that averages over processes makes each process's own gradients that many times too large
            factor = (sums.terms if mean else per_term) / (scale * world) ** 2
        found[id(layer)] = (sums.inputs / sums.rows, sums.outputs * factor)
    return Normalised(found, terms or optimizer.param_groups[0]["terms"])


def one_hot_counts(a: OneHot, dtype: torch.dtype) -> Tensor:
    """Σ of the one-hot inputs' outer products, a diagonal: how often each index came."""
    return torch.bincount(a.index.reshape(-1), minlength=a.size).to(dtype)
