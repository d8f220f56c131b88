"""Runs of a few hundred steps: they converge, and stay finite where the design says so."""

from __future__ import annotations

import pytest
import torch
from tests.operators.structured.table import STRUCTURES
from tests.optim.problems import OPTIMIZERS, generator, loss_of, normal, perceptron
from torch import Tensor, nn
from torch.nn import functional as F

from ritz.operators.structured import Dense
from ritz.optim import IKFAC, SINGD

STEPS = 150


def regression() -> tuple[Tensor, Tensor]:
    """Inputs of very different sizes that matter alike, and noise: gradient descent crawls along the small ones."""
    X = normal(64, 5, seed=1)
    scales = torch.tensor([3.0, 1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    return X * scales, X @ normal(5, 3, seed=2) + 0.3 * normal(64, 3, seed=3)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    X, Y = regression()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model(X), Y).backward()
        optimizer.step()
    return float(loss_of(model(X), Y).detach())


@pytest.fixture(scope="module")
def optimum() -> float:
    """The loss of the least-squares solution."""
    X, Y = regression()
    A = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    return float(loss_of(A @ torch.linalg.lstsq(A, Y).solution, Y))


@pytest.mark.parametrize("lr", [0.5, 0.3, 0.1, 0.03, 0.01])
def test_gradient_descent_stays_away_from_the_optimum(lr, optimum):
    """At every learning rate; the larger ones diverge."""
    model = perceptron(5, 3, seed=2)
    assert not fit(model, torch.optim.SGD(model.parameters(), lr, momentum=0.9)) < 5 * optimum


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimum_is_reached(name, optimum):
    model = perceptron(5, 3, seed=2)
    assert fit(model, OPTIMIZERS[name](model, 0.1, damping=1e-4, update_interval=1)) < 1.01 * optimum


# -- stability of the multiplicative update ---------------------------------------------------------------------------


def steps_until_not_finite(make: type, **settings: object) -> int | None:
    """When a three-layer classifier on four batches has its first NaN or infinity; None: not within 300 steps."""
    model = perceptron(3, 6, 5, 3, seed=1)
    optimizer = make(model, 0.05, damping=1e-3, update_interval=1, structures=Dense(), **settings)
    for step in range(300):
        X = normal(8, 3, seed=step % 4)
        optimizer.zero_grad()
        F.cross_entropy(model(X), torch.randint(0, 3, (8,), generator=generator(step % 4))).backward()
        optimizer.step()
        state = [t for entries in optimizer.state.values() for t in entries.values()]
        if not all(bool(torch.isfinite(t).all()) for t in [*state, *model.parameters()]):
            return step
    return None


@pytest.mark.slow
@pytest.mark.parametrize("make", [SINGD, IKFAC], ids=["singd", "ikfac"])
def test_normalised_steps_of_the_factors_stay_finite(make):
    assert steps_until_not_finite(make, lr_cov=0.5, normalize=True) is None


@pytest.mark.slow
@pytest.mark.parametrize("make", [SINGD, IKFAC], ids=["singd", "ikfac"])
def test_plain_steps_of_the_factors_diverge(make):
    assert steps_until_not_finite(make, lr_cov=0.01, normalize=False) is None
    tenth, half = (steps_until_not_finite(make, lr_cov=rate, normalize=False) for rate in (0.1, 0.5))
    assert tenth is not None and half is not None and half < tenth


@pytest.mark.slow
@pytest.mark.parametrize("name", STRUCTURES)
def test_bfloat16(name):
    """200 steps all in bfloat16, with every structure: finite, and the loss falls."""
    model = perceptron(5, 6, 6, 3, seed=1, dtype=torch.bfloat16)
    optimizer = SINGD(model, 0.01, structures=STRUCTURES[name], damping=0.1, update_interval=2)
    X, Y = (t.bfloat16() for t in regression())
    first = float(loss_of(model(X), Y).detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss_of(model(X), Y).backward()
        optimizer.step()
    state = [t for entries in optimizer.state.values() for t in entries.values()]
    assert all(t.dtype == torch.bfloat16 and bool(torch.isfinite(t).all()) for t in [*state, *model.parameters()])
    assert float(loss_of(model(X), Y).detach()) < 0.5 * first
