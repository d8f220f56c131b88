"""A network, its data and the table of optimizers that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ritz.operators.structured import Dense, Diagonal, Hierarchical
from ritz.optim import IKFAC, INGD, KFAC, SINGD, Eigen, Inverse

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "singd dense": partial(SINGD, structures=Dense()),
    "singd diagonal": partial(SINGD, structures=Diagonal()),
    "singd hierarchical": partial(SINGD, structures=Hierarchical(2, 1)),
    "ingd": INGD,
    "ikfac": IKFAC,
    "kfac inverse": partial(KFAC, inverse=Inverse()),
    "kfac eigen": partial(KFAC, inverse=Eigen()),
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


class Net(nn.Module):
    """Weights with and without bias, two of them of equal shape; norm vectors; a matrix that no rule covers."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.mix = nn.Parameter(torch.empty(6, 6))
        self.norm = nn.LayerNorm(6)
        self.inner = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.head = nn.Linear(6, 3, bias=False)
        self.double()
        g = generator(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / p.shape[-1] ** 0.5)
            self.norm.weight += 1.0
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x) @ self.mix))
        for layer in self.inner:
            h = torch.tanh(layer(h))
        return self.head(h)


def perceptron(*sizes: int, seed: int = 0, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    """Linear layers with tanh between them; children "0", "2", … are the layers."""
    modules: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(zip(sizes, sizes[1:])):
        layer = nn.Linear(d_in, d_out, bias=bias).double()
        with torch.no_grad():
            layer.weight.copy_(normal(d_out, d_in, seed=100 * seed + i) / d_in**0.5)
            if bias:
                layer.bias.copy_(0.1 * normal(d_out, seed=100 * seed + 50 + i))
        modules += [layer, nn.Tanh()]
    return nn.Sequential(*modules[:-1]).to(dtype)


def batch(step: int, n: int = 8, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step; the targets are one fixed function of the inputs."""
    X = normal(n, 5, seed=1000 + step)
    return X.to(dtype), torch.sin(X @ normal(5, 3, seed=7)).to(dtype)


def loss_of(f: Tensor, Y: Tensor) -> Tensor:
    """The mean over examples of half the squared error."""
    return 0.5 * (f - Y).square().sum(-1).mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    """The plain loop, on the batches of steps ``start``, ``start`` + 1, …; returns the losses before each step."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(start, start + steps):
        X, Y = batch(step, dtype=dtype)
        optimizer.zero_grad()
        loss = loss_of(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def clones(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def distance(model: nn.Module, other: nn.Module | list[Tensor]) -> float:
    """The largest difference of a parameter; NaN counts as infinite."""
    others = list(other.parameters()) if isinstance(other, nn.Module) else other
    gaps = [(p.detach() - q.detach()).abs().max() for p, q in zip(model.parameters(), others)]
    return float(torch.stack(gaps).max().nan_to_num(nan=float("inf")))


def identical(model: nn.Module, other: nn.Module | list[Tensor]) -> bool:
    """The same bits in every parameter."""
    others = list(other.parameters()) if isinstance(other, nn.Module) else other
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), others))
