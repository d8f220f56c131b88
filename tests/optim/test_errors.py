"""What the optimizers refuse, and the sentence that says so."""

from __future__ import annotations

import pytest
import torch
from tests.optim.problems import Net, perceptron
from torch import nn

from ritz.curvature import GaussNewton, SquaredError
from ritz.errors import OperandError
from ritz.operators.structured import Dense, Diagonal
from ritz.optim import KFAC, SINGD, DenseBelow, EarlyDense, Every

both = pytest.mark.parametrize("make", [SINGD, KFAC], ids=["singd", "kfac"])


def linear() -> nn.Linear:
    return nn.Linear(3, 2).double()


def sparse() -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 3, sparse=True), nn.Linear(3, 2))


ARGUMENTS = {
    "parameters without the model": (lambda make: make(linear().parameters()), "parameters without the model"),
    "parameters of another model": (lambda make: make(linear().parameters(), model=linear()), "without the model"),
    "a group without the model": (lambda make: make([{"params": linear().parameters()}]), "model=model"),
    "not a parameter": (lambda make: make([torch.ones(2)], model=linear()), "a parameter group has a Tensor"),
    "three structures": (lambda make: make(linear(), structures=(Dense(),) * 3), "3 entries; expected one structure"),
    "a structure's name": (lambda make: make(linear(), structures="dense"), "names 'dense'; expected values such as"),
    "a structure's class": (lambda make: make(linear(), structures=Diagonal), "expected values such as Dense"),
    "a rule that gives none": (lambda make: make(linear(), structures=lambda d: d), "names 1; expected values"),
    "reduction": (lambda make: make(linear(), reduction="none"), "reduction='none'; expected 'mean' or 'sum'"),
    "reduction of a group": (
        lambda make: make([{"params": (m := linear()).parameters(), "reduction": "avg"}], model=m),
        "reduction='avg'",
    ),
    "update_interval": (lambda make: make(linear(), update_interval="often"), "='often'; expected an int, EarlyDense"),
    "update_interval 0": (lambda make: make(linear(), update_interval=0), "at least 1"),
    "num_loss_terms": (lambda make: make(linear(), num_loss_terms=-3), "num_loss_terms=-3; expected a positive int"),
    "grad_scale": (lambda make: make(linear(), grad_scale=-1.0), "grad_scale=-1.0; expected a positive number"),
    "a sparse embedding": (lambda make: make(sparse()), "sparse gradients.*use sparse=False"),
    "a lazy module": (lambda make: make(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))), "run one forward pass"),
    "strict": (lambda make: make(Net(), strict=True), r"strict=True.*mix \(Net\.mix has no rule\)"),
    "whole-optimizer settings in a group": (
        lambda make: make([{"params": (m := linear()).parameters(), "statistics": GaussNewton()}], model=m),
        "statistics.*whole optimizer",
    ),
}


@both
@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case, make):
    attempt, phrase = ARGUMENTS[case]
    with pytest.raises(OperandError, match=phrase):
        attempt(make)


@both
def test_a_group_of_parameters_that_the_model_does_not_have(make):
    model = linear()
    optimizer = make(model)
    with pytest.raises(OperandError, match="parameters without the model"):
        optimizer.add_param_group({"params": linear().parameters()})
    assert len(optimizer.param_groups) == 1


@both
def test_strict_names_all(make):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()
            self.bilinear = nn.Bilinear(2, 2, 2)
            self.free = nn.Parameter(torch.ones(2, 2))

    with pytest.raises(OperandError, match=r"free \(.*bilinear\.weight \(Bilinear\.weight has no rule\)"):
        make(Model(), strict=True)
    make(linear(), strict=True)


@both
def test_the_number_of_loss_terms_is_asked_for_when_the_step_comes(make):
    model = perceptron(3, 2)
    optimizer = make(model, num_loss_terms=lambda: 0)
    model(torch.ones(4, 3, dtype=torch.float64)).sum().backward()
    with pytest.raises(OperandError, match="num_loss_terms gave 0; expected a positive number"):
        optimizer.step()


@both
def test_curvature_is_accumulated_only_where_statistics_ask_for_it(make):
    model = perceptron(3, 2)
    optimizer = make(model)
    with pytest.raises(OperandError, match="collected by backward itself"):
        optimizer.accumulate_curvature(model(torch.ones(4, 3, dtype=torch.float64)), SquaredError())


@pytest.mark.parametrize("make", [Every, EarlyDense])
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_schedules(make, value):
    with pytest.raises(OperandError, match=f"{make.__name__}.*at least 1"):
        make(value)


def test_empty():
    with pytest.raises(ValueError, match="empty parameter list"):
        SINGD([], model=linear())


def test_rules_by_size_are_asked_with_the_sizes():
    asked = []
    SINGD(perceptron(3, 2), structures=lambda d: asked.append(d) or DenseBelow()(d))
    assert set(asked) >= {4, 2}
