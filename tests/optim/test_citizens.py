"""The optimizers as torch optimizers: ways to give parameters, groups with settings of their own, schedulers."""

from __future__ import annotations

import pytest
import torch
from tests.optim.problems import OPTIMIZERS, Net, distance, identical, train
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, OneCycleLR, SequentialLR

from ritz.operators.structured import Dense, Diagonal
from ritz.optim import KFAC, SINGD

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def split(model: Net) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of the first layers and of the last ones."""
    late = [*model.inner.parameters(), *model.head.parameters()]
    return [p for p in model.parameters() if not any(p is q for q in late)], late


def part(model: Net, which: int) -> list[Tensor]:
    return [p.detach() for p in split(model)[which]]


@every_optimizer
@pytest.mark.parametrize("key, values", [("lr", (0.05, 0.01)), ("damping", (0.5, 0.05)), ("momentum", (0.0, 0.9))])
def test_groups_have_settings_of_their_own(name, key, values):
    """After two steps with fixed factors, each group is where an optimizer with its setting for all would have it.

    (A step moves a layer by its own statistics alone; the second one starts from the same parameters in all runs.)
    """
    make, start = OPTIMIZERS[name], Net()
    mixed = Net()
    groups = [{"params": own, key: value} for own, value in zip(split(mixed), values)]
    train(mixed, make(groups, 0.02, model=mixed), 1)
    assert distance(mixed, start) > 0
    for which, value in enumerate(values):
        whole = Net()
        train(whole, make(whole, **{"lr": 0.02, key: value}), 1)
        assert all(torch.equal(p, q) for p, q in zip(part(mixed, which), part(whole, which)))
    assert not identical(whole, mixed) or key == "momentum"  # the first step has no momentum yet


@pytest.mark.parametrize("make", [SINGD, KFAC], ids=["singd", "kfac"])
def test_groups_have_structures_of_their_own(make):
    model = Net()
    early, late = split(model)
    optimizer = make([{"params": early, "structures": Diagonal()}, {"params": late}], model=model, structures=Dense())
    train(model, optimizer, 2)
    found = {row.name: row.structures for row in optimizer.report().rows}
    assert found["first.weight + bias"] == "diagonal; diagonal"
    assert found["inner.0.weight + bias"] == found["head.weight"] == "dense; dense"
    name = "K" if make is SINGD else "S_A"
    assert optimizer.state[model.first.weight][name].numel() == 6
    assert optimizer.state[model.head.weight][name].numel() == 36
    plain = {"step", "terms", "lr", "momentum", "params"}
    assert all(plain <= set(group) and "structures" not in group for group in optimizer.param_groups)


@every_optimizer
def test_add_param_group(name):
    """A group that joins later starts as a fresh optimizer would, at the step count of the others."""
    make, model = OPTIMIZERS[name], Net()
    early, late = split(model)
    optimizer = make(early, 0.02, model=model, update_interval=2, foreach=False)
    train(model, optimizer, 4)
    assert all(torch.equal(p, q) for p, q in zip(part(model, 1), part(Net(), 1)))
    optimizer.add_param_group({"params": late, "lr": 0.05})
    assert {group["step"] for group in optimizer.param_groups} == {4}
    fresh = Net()
    fresh.load_state_dict(model.state_dict())
    train(fresh, make(split(fresh)[1], 0.05, model=fresh, foreach=False), 1, start=4)
    train(model, optimizer, 1, start=4)
    assert all(torch.equal(p, q) for p, q in zip(part(model, 1), part(fresh, 1)))
    assert not any(torch.equal(p, q) for p, q in zip(part(model, 0), part(fresh, 0)))
    assert len(optimizer.report().rows) == len(make(fresh, 0.02).report().rows)


GIVEN = {
    "parameters": lambda model: model.parameters(),
    "named parameters": lambda model: model.named_parameters(),
    "one group": lambda model: [{"params": model.parameters()}],
    "a group of names": lambda model: [{"params": model.named_parameters()}],
    "two groups": lambda model: [{"params": own} for own in split(model)],
}


@pytest.mark.parametrize("given", GIVEN)
def test_ways_to_give_the_parameters(given):
    model, other = Net(), Net()
    train(model, SINGD(GIVEN[given](model), 0.02, model=model, update_interval=2), 4)
    train(other, SINGD(other, 0.02, update_interval=2), 4)
    assert identical(model, other)


# -- schedulers -------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: LambdaLR(o, lambda t: 0.8**t),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=0.05, total_steps=8),
    "SequentialLR": lambda o: SequentialLR(o, [ConstantLR(o, 0.3, 3), LambdaLR(o, lambda t: 0.9**t)], [3]),
}


@every_optimizer
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(name, scheduler):
    """A run under a scheduler is the run in which its numbers are written into the groups by hand."""
    model, other = Net(), Net()
    optimizer, by_hand = (OPTIMIZERS[name](m, 0.02, update_interval=3) for m in (model, other))
    schedule = SCHEDULERS[scheduler](optimizer)
    seen = set()
    for step in range(7):
        for group, own in zip(by_hand.param_groups, optimizer.param_groups):
            group.update(lr=own["lr"], momentum=own["momentum"])
            seen.add(own["lr"])
        train(model, optimizer, 1, start=step)
        train(other, by_hand, 1, start=step)
        schedule.step()
    assert identical(model, other)
    assert len(seen) > 3  # it did schedule


def test_a_learning_rate_that_is_a_tensor():
    model, other = Net(), Net()
    train(model, SINGD(model, torch.tensor(0.02, dtype=torch.float64)), 3)
    train(other, SINGD(other, 0.02), 3)
    assert identical(model, other)
