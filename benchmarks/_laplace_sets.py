"""The six sets of the Laplace study: data, network, and the training that every contestant shares."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from _gp_data import find
from _optim_tasks import cora, mnist
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]
UCI = ("yacht", "energy", "concrete", "airfoil")
NAMES = (*UCI, "cora", "mnist10k")
DIGITS, DIGITS_TEST = 1000, 2000
NEIGHBOURS = 32  # of a node of cora, the strongest ones; one node in a hundred has more


@dataclass(frozen=True)
class Study:
    """A set at one seed. `train` is all that may be learned from; `validation` is a part of it, except for cora.

    `strange` (digits only): test inputs turned by 90 degrees, which a network should be less sure about.
    """

    name: str
    likelihood: str
    make: Callable[[], nn.Module]
    train: Pair
    without: Pair  # training data without the validation rows
    validation: Pair
    test: Pair
    strange: Tensor | None
    epochs: int
    batch: int
    lr: float

    @property
    def regression(self) -> bool:
        return self.likelihood == "regression"


def table(name: str, data: str | None, seed: int) -> tuple[Pair, Pair]:
    """90/10 split of the seed, inputs and targets standardised by the training rows."""
    with gzip.open(find(name, data), "rt") as stream:
        rows = np.loadtxt(stream, delimiter=",")
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    cut = int(0.9 * len(rows))
    mean, std = rows[:cut].mean(0), rows[:cut].std(0)
    rows = torch.from_numpy((rows - mean) / np.where(std > 0, std, 1.0)).float()
    return (rows[:cut, :-1], rows[:cut, -1:]), (rows[cut:, :-1], rows[cut:, -1:])


def held_out(train: Pair, seed: int) -> tuple[Pair, Pair]:
    """A fifth of the training rows for choices that need data of their own."""
    order = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))
    cut = len(order) // 5
    return (train[0][order[cut:]], train[1][order[cut:]]), (train[0][order[:cut]], train[1][order[:cut]])


class Nodes(nn.Module):
    """Two graph convolutions; the input are numbers of nodes, the outputs their logits.

    The features were already averaged over neighbours once, and a node comes with a table of its neighbours, so that
    nodes are examples like any others: nothing else is computed for them.
    """

    def __init__(self, features: Tensor, neighbours: Tensor, weights: Tensor, classes: int) -> None:
        super().__init__()
        self.features, self.neighbours, self.weights = features, neighbours, weights
        self.first, self.last = nn.Linear(features.shape[1], 16), nn.Linear(16, classes)

    def forward(self, nodes: Tensor) -> Tensor:
        h = F.relu(self.first(self.features[self.neighbours[nodes]]))  # (n, neighbours, 16)
        return self.last((self.weights[nodes].unsqueeze(-1) * h).sum(-2))


def graph(data: str | None) -> tuple[Callable[[], nn.Module], Pair, Pair, Pair]:
    stored = cora(data)
    n, features = stored["shape"].tolist()
    X = torch.zeros(n, features)
    X[stored["rows"], stored["cols"]] = stored["values"]
    spread = torch.zeros(n, n)
    spread[stored["to"], stored["from"]] = stored["weights"]
    X, y = spread @ X, stored["labels"]
    X = X / X.square().mean().sqrt()  # so that weights of size 1/√features are what a prior can expect
    weights, neighbours = spread.topk(NEIGHBOURS, 1)  # padded with weights of zero
    classes = int(y.max()) + 1
    parts = [(stored[k], y[stored[k]]) for k in ("train", "val", "test")]  # 140, 500 and 1000 nodes
    return (lambda: Nodes(X, neighbours, weights, classes)), *parts


def small_cnn() -> nn.Module:
    first, second = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(784, 10))


def study(name: str, data: str | None, seed: int, quick: bool = False) -> Study:
    if name == "cora":
        make, train, validation, test = graph(data)
        found = Study(
            name, "classification", make, train, train, validation, test, None, epochs=200, batch=140, lr=1e-2
        )
    elif name == "mnist10k":
        images, labels = mnist(data)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        own, other = order[:DIGITS], order[DIGITS : DIGITS + (200 if quick else DIGITS_TEST)]
        x = ((images - images[own].mean()) / images[own].std()).unsqueeze(1)
        train, test = (x[own], labels[own]), (x[other], labels[other])
        without, validation = held_out(train, seed)
        strange = torch.rot90(x[other], 1, (2, 3)).contiguous()
        found = Study(
            name, "classification", small_cnn, train, without, validation, test, strange, epochs=60, batch=100, lr=3e-3
        )
    else:
        train, test = table(name, data, seed)
        without, validation = held_out(train, seed)
        d = train[0].shape[1]

        def mlp() -> nn.Module:
            return nn.Sequential(nn.Linear(d, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))

        found = Study(name, "regression", mlp, train, without, validation, test, None, epochs=1000, batch=1500, lr=1e-2)
    return replace(found, epochs=10) if quick else found


def loss_of(found: Study, f: Tensor, y: Tensor) -> Tensor:
    """Mean over examples: cross-entropy, or half the squared error."""
    return 0.5 * (f - y).square().sum(-1).mean() if found.regression else F.cross_entropy(f, y)


def epoch(pair: Pair, batch: int, generator: torch.Generator) -> list[Pair]:
    if len(pair[0]) <= batch:
        return [pair]
    return [(pair[0][i], pair[1][i]) for i in torch.randperm(len(pair[0]), generator=generator).split(batch)]


def trained(found: Study, pair: Pair, decay: float, seed: int) -> nn.Module:
    """Adam under a cosine schedule on the mean loss + decay ‖θ‖² / 2n."""
    torch.manual_seed(seed)
    model, generator = found.make(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), found.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, found.epochs)
    n = len(pair[0])
    for _ in range(found.epochs):
        for x, y in epoch(pair, found.batch, generator):
            optimizer.zero_grad(set_to_none=True)
            size = sum(p.square().sum() for p in model.parameters())
            (loss_of(found, model(x), y) + decay * size / (2 * n)).backward()
            optimizer.step()
        schedule.step()
    return model.eval()
