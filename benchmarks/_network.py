"""The Gauss-Newton product of a small classifier as a plain callable, written with torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap


def build_network(
    settings: dict[str, Any], device: str = "cpu"
) -> tuple[list[Tensor], Callable[[Tensor], Tensor], int]:
    """Parameters (leaves), the product X ↦ (G + δI) X for (n,) or (n, m), and n.

    G = (1/N) Σ Jᵀ (diag p − p pᵀ) J, the Gauss-Newton matrix of the mean cross-entropy. A block of vectors goes through
    `vmap`. The product depends on the parameters through the activations and the probabilities p.
    """
    sizes, batch, damping = settings["sizes"], settings["batch"], settings["damping"]
    generator = torch.Generator().manual_seed(3)
    options = {"generator": generator, "dtype": torch.float64}
    X = torch.randn(batch, sizes[0], **options).to(device)
    params = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        params.append((torch.randn(b, a, **options) * (1.5 / a) ** 0.5).to(device).requires_grad_())
        params.append((0.1 * torch.randn(b, **options)).to(device).requires_grad_())
    numels = [p.numel() for p in params]
    shapes = [p.shape for p in params]

    def logits(*weights: Tensor) -> Tensor:
        h = X
        for i in range(0, len(weights), 2):
            h = h @ weights[i].T + weights[i + 1]
            h = torch.tanh(h) if i + 2 < len(weights) else h
        return h

    def single(v: Tensor) -> Tensor:
        tangents = tuple(part.reshape(shape) for part, shape in zip(v.split(numels), shapes, strict=True))
        z, Jv = jvp(logits, tuple(params), tangents)
        p = torch.softmax(z, dim=-1)
        HJv = (p * Jv - p * (p * Jv).sum(-1, keepdim=True)) / batch
        _, pull = vjp(logits, *params)
        return torch.cat([g.reshape(-1) for g in pull(HJv)]) + damping * v

    def product(V: Tensor) -> Tensor:
        return single(V) if V.ndim == 1 else vmap(single, in_dims=1, out_dims=1)(V)

    return params, product, sum(numels)
