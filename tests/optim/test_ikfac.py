"""IKFAC's factor against KFAC's running factor: K Kᵀ = (S_A + λI)⁻¹ + O(β₁²).

The gap after t updates is of second order where t β₁ is small. Beyond, S_A forgets, and the gap saturates: over twenty
updates the order shows at β₁ of 0.01 and less, in one update at 0.1 as well.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from tests.optim.oracle import Setting, matrices, passes
from tests.optim.problems import loss_of, normal, perceptron
from torch import Tensor

from ritz.operators.structured import Dense
from ritz.optim import IKFAC

RATES = {1: (0.1, 0.03, 0.01, 0.003), 20: (0.01, 0.003, 0.001, 0.0003)}  # by the number of updates
DAMPING = 0.1


def data(step: int) -> tuple[Tensor, Tensor]:
    return normal(16, 4, seed=step), normal(16, 3, seed=100 + step)


@functools.cache
def errors(rate: float, updates: int) -> list[float]:
    """‖(K Kᵀ)⁻¹ − (S_A + λI)‖ and the same of the output factor, over all layers, after the updates."""
    model = perceptron(4, 5, 3, seed=3)
    # With lr=0 both methods see the same inputs and output gradients.
    optimizer = IKFAC(model, lr=0.0, lr_cov=rate, damping=DAMPING, normalize=False, update_interval=1)
    weights = matrices(model)
    # K₀ = C₀ = I says S(0) + λI = I.
    running = [[(1 - DAMPING) * torch.eye(d, dtype=torch.float64) for d in (w.shape[1], w.shape[0])] for w in weights]
    for step in range(updates):
        X, Y = data(step)
        optimizer.zero_grad()
        loss_of(model(X), Y).backward()
        optimizer.step()
        for S, seen in zip(running, passes(weights, (X.unsqueeze(1), Y.unsqueeze(1)), Setting())):
            a, g = seen.a.flatten(0, 1), seen.g.flatten(0, 1)
            for side, moment in ((0, a.mT @ a / len(a)), (1, len(g) * g.mT @ g)):
                S[side] = (1 - rate) * S[side] + rate * moment
    found = [0.0, 0.0]
    for layer, S in zip(optimizer._layers, running):
        for side, name in enumerate("KC"):
            d = layer.sizes[side]
            K = Dense().to_dense(optimizer.state[layer.weight][name], d)
            found[side] += float((torch.linalg.inv(K @ K.mT) - S[side] - DAMPING * torch.eye(d)).square().sum())
    return [math.sqrt(f) for f in found]


@pytest.mark.parametrize("updates", RATES)
@pytest.mark.parametrize("side", [0, 1], ids=["inputs", "outputs"])
def test_the_gap_to_kfac_is_of_second_order(side, updates):
    gaps = [errors(rate, updates)[side] for rate in RATES[updates]]
    x, y = torch.tensor(RATES[updates], dtype=torch.float64).log(), torch.tensor(gaps, dtype=torch.float64).log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert 1.9 <= slope <= 2.1, (slope, gaps)


def test_the_gap_at_larger_rates():
    """Twenty updates at 0.1 are beyond the second order, and still close."""
    gaps = [sum(errors(rate, 20)) for rate in (0.1, 0.03, 0.01)]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2] and gaps[0] < 0.2
