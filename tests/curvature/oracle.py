"""Kronecker factors from the formulas, by loops over examples and positions, and the small models they are made for."""

import torch
from torch import nn
from torch.nn import functional as F

from ritz.operators.structured import Dense
from ritz.optim import KFAC


def kronecker(a, g, *, bias=True, reduce=False, scale=1.0):
    """A and B of inputs a (n, R, d_in) and output gradients g (n, R, d_out); ``scale`` multiplies the sum of g gᵀ."""
    n, R, d = a.shape
    A = torch.zeros(d + bias, d + bias, dtype=a.dtype)
    B = torch.zeros(g.shape[2], g.shape[2], dtype=g.dtype)
    one = torch.ones(int(bias), dtype=a.dtype)
    for i in range(n):
        rows = [a[i].mean(0)] if reduce else list(a[i])
        for row in rows:
            row = torch.cat([row, one])
            A += torch.outer(row, row) / (n * len(rows))
        for row in [g[i].sum(0)] if reduce else list(g[i]):
            B += scale * torch.outer(row, row)
    return A, B


class Net(nn.Module):
    """Convolution, a linear layer on its pixels as tokens, their mean, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.token = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2, bias=False)
        self.double()

    def forward(self, x):
        return self.head(self.token(self.conv(x).tanh().flatten(2).mT).tanh().mean(1))

    def trace(self, x):
        """Output, and (a, y) of every layer: rows and the tensor whose gradient has the other rows."""
        a1 = F.unfold(x, 3, padding=1, stride=2).mT
        y1 = a1 @ self.conv.weight.flatten(1).T + self.conv.bias
        a2 = y1.tanh()
        y2 = a2 @ self.token.weight.T + self.token.bias
        a3 = y2.tanh().mean(1)
        f = a3 @ self.head.weight.T
        return f, {"conv": (a1, y1), "token": (a2, y2), "head": (a3.unsqueeze(1), f)}


def batch(n=6, seed=0):
    """Images and targets for :class:`Net`; 16 positions."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 8, 7, generator=g).double(), torch.randn(n, 2, generator=g).double()


def loss_of(f, t, reduction="mean"):
    """Half squares, one term per example."""
    terms = 0.5 * (f - t).square().flatten(1).sum(1)
    return terms.mean() if reduction == "mean" else terms.sum()


def kfac(model, **settings):
    """An optimizer that moves nothing, whose factors are those of the last step alone."""
    settings = {"structures": Dense(), "update_interval": 1, **settings}
    return KFAC(model, lr=0.0, momentum=0.0, stat_decay=0.0, **settings)


def factors(optimizer):
    """Step, and {layer: (A, B)} as dense matrices of the layers that got statistics."""
    optimizer.step()
    found = {}
    for layer in optimizer._layers:
        state = optimizer.state[layer.weight]
        if "S_A" in state:
            pairs = zip(layer.structures, (state["S_A"], state["S_B"]), layer.sizes)
            found[layer.name.removesuffix(".weight")] = tuple(S.to_dense(flat, d).clone() for S, flat, d in pairs)
    return found
