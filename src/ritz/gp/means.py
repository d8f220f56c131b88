"""Mean functions: callables on points (n, d) -> (n,)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ZeroMean(nn.Module):
    """m(x) = 0."""

    def forward(self, X: Tensor) -> Tensor:
        return torch.zeros(X.shape[0], dtype=X.dtype, device=X.device)


class ConstantMean(nn.Module):
    """m(x) = ``constant``, a parameter."""

    def __init__(self, constant: float = 0.0) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(float(constant)))

    def forward(self, X: Tensor) -> Tensor:
        return self.constant.to(X.dtype).expand(X.shape[0])
