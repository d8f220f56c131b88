"""Losses by what curvature needs of them: gradients at sampled labels, and the columns of a root of their Hessian.

Both act on network outputs f (..., C), one loss term per leading index, and are per term, without any reduction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CrossEntropy:
    """−log softmax(f)_y: the Hessian diag(p) − p pᵀ has the root diag(√p) − p √pᵀ, with one column per class."""

    def sampled_gradient(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """p − e_ŷ with ŷ drawn from the softmax p; its second moment is the Hessian."""
        p = torch.softmax(f.float() if f.dtype in (torch.float16, torch.bfloat16) else f, -1)
        drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).reshape(*p.shape[:-1], 1)
        return p.scatter_add(-1, drawn, p.new_full(drawn.shape, -1.0)).to(f.dtype)

    def root_columns(self, f: Tensor) -> Iterator[Tensor]:
        """The C columns of the Hessian's root, each (..., C)."""
        p = torch.softmax(f.float() if f.dtype in (torch.float16, torch.bfloat16) else f, -1)
        root = p.sqrt()
        for c in range(p.shape[-1]):
            column = -p * root[..., c : c + 1]
            column[..., c] += root[..., c]
            yield column.to(f.dtype)


@dataclass(frozen=True)
class SquaredError:
    """Half the sum of squares ½‖f − y‖²: the Hessian is the identity. ``scale`` multiplies it.

    torch's ``mse_loss`` averages over the C outputs too and has no ½: that is scale = 2/C per term.
    """

    scale: float = 1.0

    def sampled_gradient(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """√scale times a standard normal vector."""
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        return self.scale**0.5 * noise

    def root_columns(self, f: Tensor) -> Iterator[Tensor]:
        """√scale times each unit vector, for all terms at once."""
        for c in range(f.shape[-1]):
            column = torch.zeros_like(f)
            column[..., c] = self.scale**0.5
            yield column


Loss = CrossEntropy | SquaredError
