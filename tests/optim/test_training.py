"""Runs of a few hundred steps: they converge, and stay finite where the design says so."""

from __future__ import annotations

import pytest
import torch
from tests.operators.structured.table import STRUCTURES
from tests.optim.problems import OPTIMIZERS, loss_of, normal, perceptron
from torch import Tensor, nn

from ritz.optim import IKFAC, SINGD

# Coordinates of very different sizes: plain gradient descent crawls along the small ones.
SCALES = torch.tensor([3.0, 1.0, 0.3, 0.1, 0.03], dtype=torch.float64)


def regression() -> tuple[Tensor, Tensor]:
    """Ill-conditioned inputs and targets that a network of the same shape can fit."""
    X = normal(64, 5, seed=1) * SCALES
    with torch.no_grad():
        return X, perceptron(5, 6, 3, seed=5)(X / SCALES)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    X, Y = regression()
    loss = loss_of(model(X), Y)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(X), Y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


STEPS = 150


def by_gradient_descent() -> float:
    """The best of plain SGD over learning rates, the same number of steps and the same momentum."""
    found = []
    for lr in (0.3, 0.1, 0.03, 0.01, 0.003):
        model = perceptron(5, 6, 3, seed=2)
        loss = fit(model, torch.optim.SGD(model.parameters(), lr, momentum=0.9), STEPS)
        found.append(loss if loss == loss else float("inf"))
    return min(found)


@pytest.fixture(scope="module")
def descent():
    return by_gradient_descent()


RATES = {"singd diagonal": 0.03}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ahead_of_gradient_descent(name, descent):
    model = perceptron(5, 6, 3, seed=2)
    optimizer = OPTIMIZERS[name](model, RATES.get(name, 0.1), damping=1e-4, update_interval=1)
    assert fit(model, optimizer, STEPS) < 0.5 * descent


# -- stability of the multiplicative update -----------------------------------------------------------------------------


def steps_until_not_finite(make: type, steps: int, **settings: object) -> int | None:
    """When a three-layer network has its first NaN or infinity, or None where it has none."""
    model = perceptron(5, 10, 10, 3, seed=1)
    optimizer = make(model, 0.01, damping=1e-3, update_interval=1, **settings)
    for step in range(steps):
        X = normal(16, 5, seed=step)
        optimizer.zero_grad()
        loss_of(model(X), torch.sin(X[:, :3])).backward()
        optimizer.step()
        finite = all(bool(torch.isfinite(t).all()) for state in optimizer.state.values() for t in state.values())
        if not finite or not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            return step
    return None


@pytest.mark.slow
@pytest.mark.parametrize("make", [SINGD, IKFAC], ids=["singd", "ikfac"])
def test_normalised_steps_of_the_factors_stay_finite(make):
    assert steps_until_not_finite(make, 300, lr_cov=0.5, normalize=True) is None


@pytest.mark.slow
@pytest.mark.parametrize("make", [SINGD, IKFAC], ids=["singd", "ikfac"])
def test_plain_steps_of_the_factors_diverge(make):
    assert steps_until_not_finite(make, 300, lr_cov=0.1, normalize=False) is not None
    assert steps_until_not_finite(make, 300, lr_cov=0.01, normalize=False) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_bfloat16(name):
    """200 steps all in bfloat16, with every structure: finite, and not standing still."""
    model = perceptron(5, 6, 6, 3, seed=1, dtype=torch.bfloat16)
    optimizer = SINGD(model, 0.01, structures=STRUCTURES[name], update_interval=2)
    X, Y = (t.bfloat16() for t in regression())
    first = float(loss_of(model(X), Y).detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss = loss_of(model(X), Y)
        loss.backward()
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert all(t.dtype == torch.bfloat16 for state in optimizer.state.values() for t in state.values())
    assert float(loss.detach()) < 0.5 * first
