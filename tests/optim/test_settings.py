"""Settings that are values: update schedules, step sizes by step, clipping of the natural gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.optim.problems import Net, batch, identical, loss_of, perceptron, train
from torch import Tensor, nn

from ritz.operators.structured import BlockDiagonal, Dense, Diagonal, Hierarchical
from ritz.optim import KFAC, SINGD, DenseBelow, EarlyDense, Every, KLClip, NormClip


def update_steps(steps: int, update_interval: object) -> list[int]:
    """At which steps the factors of a small layer change."""
    model = perceptron(5, 3, seed=1)
    optimizer = SINGD(model, 1e-3, structures=Diagonal(), update_interval=update_interval)
    found = []
    before = torch.ones(6, dtype=torch.float64)
    for step in range(steps):
        train(model, optimizer, 1, start=step)
        after = optimizer.state[model[0].weight]["K"].clone()
        if not torch.equal(before, after):
            found.append(step)
        before = after
    return found


@pytest.mark.parametrize(
    "given, steps",
    [
        (1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, [0, 3, 6]),
        (Every(4), [0, 4]),
        (EarlyDense(10), [0, 1, 2, 3, 4, 5, 6, 7]),
        (lambda step: step in (1, 6), [1, 6]),
    ],
    ids=["1", "3", "Every(4)", "EarlyDense(10)", "callable"],
)
def test_when_factors_change(given, steps):
    assert update_steps(8, given) == steps


@pytest.mark.parametrize("maximum", [1, 2, 3, 10])
def test_early_dense_is_its_recursion(maximum):
    """next = t + min(max(⌊log₄(t + 1)⌋, 1), maximum), from t = 0."""
    rule = EarlyDense(maximum)
    due, t = set(), 0
    while t < 20_000:
        due.add(t)
        gap = min(max(max(k for k in range(9) if 4**k <= t + 1), 1), maximum)
        assert rule.gap(t) == gap
        t += gap
    assert [step for step in range(20_000) if rule(step)] == sorted(due)


def test_early_dense_far_out():
    """Whole numbers all the way: the logarithm of 4¹⁶ − 1 rounds to 16."""
    rule = EarlyDense(100)
    assert [rule.gap(4**16 - 2), rule.gap(4**16 - 1)] == [15, 16]


def test_lr_cov_by_step():
    """A callable equals setting the number before each step; it is asked on update steps."""
    asked = []

    def rate(step: int) -> float:
        asked.append(step)
        return 0.02 * (step + 1)

    models = [Net(), Net()]
    scheduled = SINGD(models[0], 0.01, lr_cov=rate, update_interval=2)
    by_hand = SINGD(models[1], 0.01, lr_cov=0.1, update_interval=2)
    for step in range(5):
        for group in by_hand.param_groups:
            group["lr_cov"] = 0.02 * (step + 1)
        train(models[0], scheduled, 1, start=step)
        train(models[1], by_hand, 1, start=step)
    assert identical(*models)
    assert set(asked) == {0, 2, 4}


def test_lr_cov_by_step_reaches_a_group_of_vectors():
    """A group without any matrix has no layer that would ask for the step size."""
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    vectors, matrices = list(model[1].parameters()), [*model[0].parameters(), *model[2].parameters()]
    optimizer = SINGD(
        [{"params": matrices}, {"params": vectors}], 0.01, model=model, lr_cov=lambda step: 0.1, update_interval=1
    )
    train(model, optimizer, 2)
    assert bool((optimizer.state[model[1].weight]["K"] - 1).abs().max() > 1e-2)


# -- clipping ---------------------------------------------------------------------------------------------------------


def natural(make: Callable[..., torch.optim.Optimizer], clip: object) -> tuple[list[Tensor], list[Tensor]]:
    """(natural gradients, gradients) of one step with lr = 0.5, of all parameters in one group."""
    model = perceptron(5, 6, 3, seed=1)
    optimizer = make(model, 0.5, momentum=0.0, clip=clip)
    before = [p.detach().clone() for p in model.parameters()]
    X, Y = batch(0)
    loss_of(model(X), Y).backward()
    optimizer.step()
    N = [(old - p.detach()) / 0.5 for p, old in zip(model.parameters(), before)]
    return N, [p.grad for p in model.parameters()]


def inner(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b)))


@pytest.mark.parametrize("make", [SINGD, KFAC], ids=["singd", "kfac"])
@pytest.mark.parametrize("maximum", [1e-3, 1e6])
def test_norm_clip(make, maximum):
    free, _ = natural(make, None)
    got, _ = natural(make, NormClip(maximum))
    factor = min(1.0, maximum / inner(free, free) ** 0.5)
    assert (factor < 1.0) == (maximum < 1.0)
    for N, F in zip(got, free):
        assert bool((N - factor * F).abs().max() <= 1e-13)


@pytest.mark.parametrize("make", [SINGD, KFAC], ids=["singd", "kfac"])
@pytest.mark.parametrize("maximum", [1e-3, 1e6])
def test_kl_clip(make, maximum):
    """Scaled by √(ν/(lr² ⟨N, G⟩)), which makes lr² ⟨N, F N⟩ ≈ ν."""
    free, G = natural(make, None)
    got, _ = natural(make, KLClip(maximum))
    factor = min(1.0, (maximum / (0.25 * inner(free, G))) ** 0.5)
    assert (factor < 1.0) == (maximum < 1.0)
    for N, F in zip(got, free):
        assert bool((N - factor * F).abs().max() <= 1e-13)


def test_clipping_looks_at_vectors_and_rows_too():
    """All parts of a group count: the clipped natural gradient of a net with norm vectors has the norm asked for."""
    model = Net()
    optimizer = SINGD(model, 0.5, momentum=0.0, clip=NormClip(1e-3), row_form=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, 1)
    moved = [(before[name] - p.detach()) / 0.5 for name, p in model.named_parameters() if name != "mix"]
    assert abs(inner(moved, moved) ** 0.5 - 1e-3) <= 1e-13


# -- structures by size -----------------------------------------------------------------------------------------------


def test_dense_below():
    rule = DenseBelow(6, otherwise=Hierarchical(2, 1))
    assert [rule(5), rule(6), rule(7)] == [Dense(), Dense(), Hierarchical(2, 1)]
    optimizer = SINGD(perceptron(5, 6, 9, seed=1), structures=(rule, BlockDiagonal(2)))
    assert [layer.structures for layer in optimizer._layers] == [
        (Dense(), BlockDiagonal(2)),
        (Hierarchical(2, 1), BlockDiagonal(2)),
    ]


def test_defaults():
    """Dense up to 512, hierarchical above; every ten steps."""
    optimizer = SINGD(perceptron(512, 511, 512, seed=1, dtype=torch.float32))
    assert [layer.structures for layer in optimizer._layers] == [
        (Hierarchical(15, 15), Dense()),
        (Dense(), Dense()),
    ]
    assert [step for step in range(25) if optimizer._settings[0].update_interval(step)] == [0, 10, 20]
