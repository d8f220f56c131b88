"""Activation checkpointing: the same statistics, and no input is kept from the forward to the backward pass."""

import pytest
import torch
from tests.curvature.oracle import factors, kfac, loss_of
from tests.curvature.recorder import close
from tests.curvature.test_lifetime import inputs_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from ritz.curvature import GaussNewton, SquaredError


class Blocks(nn.Module):
    """Blocks of two layers, each in a checkpoint of its own; ``shared``: all blocks are one."""

    def __init__(self, reentrant=None, shared=False, count=3):
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh()) for _ in range(count)]
        self.blocks = nn.ModuleList([blocks[0]] * count if shared else blocks)
        self.head = nn.Linear(4, 2)
        self.reentrant = reentrant
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Encoder(nn.Module):
    """Attention in a checkpoint."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 2)
        self.reentrant = reentrant
        self.double()

    def forward(self, x):
        x = self.layer(x) if self.reentrant is None else checkpoint(self.layer, x, use_reentrant=self.reentrant)
        return self.head(x)


MODELS = {
    "blocks": (Blocks, (5, 4)),
    "one block, three times": (lambda reentrant=None: Blocks(reentrant, shared=True), (5, 4)),
    "encoder": (Encoder, (3, 5, 4)),
}


def statistics(model, x, **settings):
    optimizer = kfac(model, **settings)
    loss_of(model(x), 0.0).backward()
    counts = {layer.name: (layer.sums.rows, layer.sums.examples) for layer in optimizer._layers}
    return counts, factors(optimizer)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_same_statistics_as_without(name, reentrant):
    build, shape = MODELS[name]
    x = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape).requires_grad_()
    expected_counts, expected = statistics(build(), x)
    counts, found = statistics(build(reentrant=reentrant), x)
    assert counts == expected_counts
    assert {n for _, n in counts.values()} == {shape[0]}
    for layer, pair in expected.items():
        assert all(close(a, b) for a, b in zip(found[layer], pair))


@pytest.mark.parametrize("name", MODELS)
def test_gauss_newton_through_checkpoints(name):
    build, shape = MODELS[name]
    x = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    found = []
    for model in (build(), build(reentrant=False)):
        optimizer = kfac(model, statistics=GaussNewton())
        f = model(x)
        uses = optimizer.accumulate_curvature(f, SquaredError())
        loss_of(f, 0.0).backward()
        assert optimizer._capture.pending == []  # what was computed anew is not taken for another forward pass
        found.append((uses, factors(optimizer)))
    (uses, expected), (uses_again, again) = found
    assert uses == uses_again > 0
    assert all(close(a, b) for layer in expected for a, b in zip(again[layer], expected[layer]))


def test_inputs_are_not_kept_between_the_passes():
    x = torch.randn(5, 4).double()
    for reentrant, kept in ((None, True), (False, False)):
        model = Blocks(reentrant)
        optimizer = kfac(model)
        loss, inputs = inputs_of(model, x)
        inner = [inputs[i] for i in (1, 3, 5)]  # the second layer's of every block
        assert all(ref.expired() != kept for ref in inner)
        loss.backward()
        assert all(layer.sums.rows == 5 for layer in optimizer._layers)
