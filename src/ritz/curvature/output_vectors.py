"""Vectors that go back from a network's outputs: unit vectors, roots of the loss's Hessian, gradients at labels.

All have the outputs' shape f (n, …) and mean all examples at once: vector j of example n is row n of tensor j.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .batches import Batch
from .losses import CustomLoss, Loss
from .statistics import EmpiricalFisher, MonteCarloFisher

MOST_VECTORS = 256  # output vectors an example; beyond, a backward pass for each costs more than products save


def unit_vectors(f: Tensor) -> Iterator[Tensor]:
    """For each output of an example its unit vector."""
    flat = f.shape[1:].numel()
    for j in range(flat):
        unit = torch.zeros(f.shape[0], flat, dtype=f.dtype, device=f.device)
        unit[:, j] = 1.0
        yield unit.reshape(f.shape)


def root_vectors(loss: Loss, f: Tensor, batch: Batch) -> list[Tensor]:
    """u with Σ_j u_j u_jᵀ = H for every example; empty where there is no root, or more than ``MOST_VECTORS``."""
    if isinstance(loss, CustomLoss) or f[0].numel() > MOST_VECTORS:
        return []
    hessian = loss.hessian(f, batch.y)
    return [hessian.root(unit) for unit in unit_vectors(f)]


def label_gradients(
    kind: MonteCarloFisher | EmpiricalFisher, loss: Loss, f: Tensor, batch: Batch, number: int
) -> list[Tensor]:
    """Gradients at the labels of the data or at drawn ones; the sum of their outer products, by loss term, is meant.

    ``number`` of the batch seeds the draws where the user gave no generator.
    """
    if isinstance(kind, EmpiricalFisher):
        return [loss.gradient(f, batch.y)]
    generator = kind.generator or torch.Generator(f.device).manual_seed(number)
    drawn = [loss.sampled_gradient(f.detach(), generator, batch.y) for _ in range(kind.samples)]
    return [g / kind.samples**0.5 for g in drawn]


def by_term(loss: Loss, f: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    """The same gradients, each cut to one loss term of an example; empty beyond ``MOST_VECTORS``.

    A term is a row of outputs, and a single output where f is one-dimensional.
    """
    if f.ndim == 1:
        return gradients
    axis = loss._axis(f)
    terms = f.select(axis, 0)
    if terms[0].numel() * len(gradients) > MOST_VECTORS:
        return []
    masks = [m.unsqueeze(axis) for m in unit_vectors(terms)]
    return [g * mask for g in gradients for mask in masks]
