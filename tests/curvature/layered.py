"""Small networks of layers with rules, with inputs and labels: for tests that look at what layers see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

DOUBLE = {"dtype": torch.float64}


class Twice(nn.Module):
    """One layer that is used twice, with a layer between, and a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.out = nn.Linear(4, 4, **DOUBLE), nn.Linear(4, 3, **DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.shared(torch.tanh(self.shared(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=0, **DOUBLE)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **DOUBLE)
        self.out = nn.Linear(4, 3, **DOUBLE)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.out(self.attention(h, h, h, need_weights=False)[0])


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double()


CASES: dict[str, tuple[Any, Any, Any]] = {
    "linear": (lambda: sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), (6, 4), (6,)),
    "sequence": (lambda: sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 2, 4), (6, 2)),
    "convolutions": (
        lambda: sequential(
            nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(2, 9, 2, bias=False), nn.Flatten(),
            nn.Linear(36, 3),
        ),
        (5, 1, 6, 6), (5,),
    ),
    "transposed convolution": (
        lambda: sequential(nn.ConvTranspose1d(2, 3, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(21, 3)),
        (5, 2, 3), (5,),
    ),
    "norm between": (lambda: sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), (6, 4), (6,)),
    "used twice": (Twice, (6, 4), (6,)),
    "attention": (Attention, "tokens", (4, 3)),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model, shape, labels = CASES[name]
    x = torch.randint(0, 6, (4, 3)) if shape == "tokens" else torch.randn(shape, **DOUBLE)
    return model(), x, torch.randint(0, 3, labels)
