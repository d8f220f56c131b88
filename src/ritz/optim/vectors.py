"""The diagonal rule: one inverse-free factor per entry, for norm scales, biases without a matrix and free vectors.

A vector has no other axis and no rows to collect: the outer product of its gradient stands for the curvature, as in
inverse-free Shampoo. With N loss terms behind a mean gradient g, N g² estimates the mean of squared term gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .base import CurvatureOptimizer


def factor_step(
    optimizer: CurvatureOptimizer,
    vectors: list[nn.Parameter],
    gradients: list[Tensor],
    group: dict,
    dtype: torch.dtype | None,
    terms: float,
    due: bool,
) -> list[Tensor]:
    """K² g with K ← K (1 − β₁ m), m ← α₁ m + c (K² N g² + λ K² − 1), the diagonal form of SINGD."""
    natural = []
    for p, g in zip(vectors, gradients):
        state = optimizer.state[p]
        if "K" not in state:
            state["K"] = torch.full_like(p, 1.0 if group["start"] is None else group["start"], dtype=dtype or p.dtype)
            if group["riemannian_momentum"]:
                state["m_K"] = torch.zeros_like(state["K"])
        if due:
            _update(state, g, group, terms)
        natural.append((state["K"].square() * g).to(p.dtype))
    return natural


def _update(state: dict, g: Tensor, group: dict, terms: float) -> None:
    wide = torch.promote_types(state["K"].dtype, torch.float32)
    K, g = state["K"].to(wide), g.to(wide)
    if group["start"] is None and not state.get("started") and g.any():
        K = K * (terms * g.square().mean() + group["damping"]).rsqrt()  # as first_scale does for matrices
        state["started"] = 1
    squared = K.square()
    alpha = group["riemannian_momentum"]
    D = squared * (terms * g.square() + group["damping"]) - 1.0
    m = D * ((1.0 - alpha) / 2 if group["normalize"] else 0.5)
    if alpha:
        m = alpha * state["m_K"].to(wide) + m
        state["m_K"].copy_(m)
    rate = group["lr_cov"] / m.abs().max().clamp(min=1.0) if group["normalize"] and m.numel() else group["lr_cov"]
    change = rate * m
    state["K"].copy_(K * (1.0 - change + (change.square() / 2 if group["second_order"] else 0.0)))
