"""SINGD against a plain loop of its formulas, for every structure and every setting that changes the arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.operators.structured.table import STRUCTURES
from tests.optim.oracle import Batch, Setting, loss_of, matrices, singd
from tests.optim.problems import normal, perceptron

from ritz.curvature import Expand, PerExample, PerPosition, Reduce
from ritz.operators.structured import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Hierarchical,
    LowerToeplitz,
    LowerTriangular,
    RankTriangular,
    Structure,
    UpperToeplitz,
    UpperTriangular,
)
from ritz.optim import SINGD, EarlyDense

SIZES = (6, 6, 6)  # two layers of equal shape, which foreach=True batches
STEPS = 20
TOLERANCE = 1e-10

PAIRS: list[tuple[Structure, Structure]] = [
    (Dense(), Diagonal()),
    (Diagonal(), Dense()),
    (Hierarchical(2, 1), LowerToeplitz()),
    (UpperToeplitz(), BlockDiagonal(2)),
    (LowerTriangular(), RankTriangular(2, rows=False)),
    (BlockDiagonal(4), UpperTriangular()),
]

MIXED = Setting(structures=(Hierarchical(2, 1), Dense()))
SETTINGS: dict[str, Setting] = {
    "normalize": replace(MIXED, normalize=True, lr_cov=lambda step: 0.5, damping=10.0),
    "normalize, small damping": replace(MIXED, normalize=True, lr_cov=lambda step: 0.5),
    "second order": replace(MIXED, second_order=True),
    "second order, normalize": replace(MIXED, second_order=True, normalize=True, lr_cov=lambda step: 0.3),
    "not adaptive": replace(MIXED, adaptive=False),
    "no riemannian momentum": replace(MIXED, alpha=0.0),
    "no riemannian momentum, normalize": replace(MIXED, alpha=0.0, normalize=True, lr_cov=lambda step: 0.4),
    "ikfac": replace(MIXED, alpha=0.0, adaptive=False),
    "no momentum": replace(MIXED, momentum=0.0),
    "no damping": replace(MIXED, damping=0.0, lr_cov=lambda step: 0.02),
    "coupled decay": replace(MIXED, decay=0.1),
    "decoupled decay": replace(MIXED, decay=0.1, decoupled=True),
    "decoupled decay, no momentum": replace(MIXED, decay=0.1, decoupled=True, momentum=0.0),
    "every third step": replace(MIXED, due=lambda step: step % 3 == 0),
    "not at the first step": replace(MIXED, due=lambda step: step % 4 == 2),
    "early dense": replace(MIXED, due=EarlyDense(10)),
    "lr_cov by step": replace(MIXED, lr_cov=lambda step: 0.004 * (step + 1), due=lambda step: step % 2 == 0),
    "sum": replace(MIXED, mean=False, lr=0.005, lr_cov=lambda step: 0.01),
}

SHARED: dict[str, Setting] = {
    "expand, per example": MIXED,
    "expand, per position": replace(MIXED, per_position=True),
    "expand, sum": replace(MIXED, mean=False, lr=0.002, lr_cov=lambda step: 0.005),
    "reduce, per example": replace(MIXED, reduce=True),
    "reduce, per position": replace(MIXED, reduce=True, per_position=True),
    "reduce, sum": replace(MIXED, reduce=True, mean=False, lr=0.002, lr_cov=lambda step: 0.005),
}


def batches(positions: int) -> list[Batch]:
    shape = (8, positions)
    return [(normal(*shape, SIZES[0], seed=10 + t), normal(*shape, SIZES[-1], seed=60 + t)) for t in range(STEPS)]


def check(setting: Setting, positions: int = 1, **extra: object) -> None:
    """Parameters after every step and the final factors, from both."""
    model = perceptron(*SIZES, seed=1)
    data = batches(positions)
    run = singd(matrices(model), data, setting)
    optimizer = SINGD(
        model, setting.lr, momentum=setting.momentum, damping=setting.damping, riemannian_momentum=setting.alpha,
        lr_cov=setting.lr_cov, normalize=setting.normalize, second_order=setting.second_order,
        adaptive=setting.adaptive, update_interval=setting.due, structures=setting.structures,
        weight_decay=setting.decay, decoupled_weight_decay=setting.decoupled,
        weight_sharing=Reduce() if setting.reduce else Expand(),
        reduction="mean" if setting.mean else "sum",
        num_loss_terms=PerPosition() if setting.per_position else PerExample(), **extra,
    )  # fmt: skip
    for (X, Y), wanted in zip(data, run.trajectory):
        X, Y = (X.squeeze(1), Y.squeeze(1)) if positions == 1 else (X, Y)
        optimizer.zero_grad()
        loss_of(model(X).reshape(8, positions, -1), Y.reshape(8, positions, -1), setting).backward()
        optimizer.step()
        for got, want in zip(matrices(model), wanted):
            assert bool((got - want).abs().max() <= TOLERANCE)
    for layer, K, C in zip(optimizer._layers, run.K, run.C):
        state = optimizer.state[layer.weight]
        for name, side, want in (("K", 0, K), ("C", 1, C)):
            got = layer.structures[side].to_dense(state[name], layer.sizes[side])
            assert bool((got - want).abs().max() <= TOLERANCE)
            assert bool((want - torch.eye(len(want))).abs().max() > 1e-3)  # the factors did move


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure_on_both_sides(name):
    check(Setting(structures=(STRUCTURES[name], STRUCTURES[name])))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " and ".join(type(s).__name__ for s in pair))
def test_different_structures_on_the_two_sides(pair):
    check(Setting(structures=pair))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    check(SETTINGS[name])


@pytest.mark.parametrize("name", SHARED)
def test_weight_sharing_and_loss_terms(name):
    check(SHARED[name], positions=4)


@pytest.mark.parametrize("extra", [{"foreach": True}, {"row_form": True}, {"row_form": False}], ids=str)
def test_forms_of_the_computation(extra):
    check(MIXED, **extra)
