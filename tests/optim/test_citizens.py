"""The optimizers as torch optimizers: parameter groups, schedulers, closures, missing gradients, batched layers."""

from __future__ import annotations

import pytest
import torch
from tests.optim.problems import OPTIMIZERS, Net, batch, clones, distance, identical, loss_of, perceptron, train
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


# -- one step ---------------------------------------------------------------------------------------------------------


@every_optimizer
def test_closure(name):
    """It is evaluated once, with gradients on, and its loss is returned."""
    model, other = Net(), Net()
    optimizer, plain = (OPTIMIZERS[name](m, 0.02, update_interval=2) for m in (model, other))
    losses = []
    for _ in range(4):

        def closure() -> Tensor:
            X, Y = batch(len(losses))
            optimizer.zero_grad()
            loss = loss_of(model(X), Y)
            loss.backward()
            losses.append(loss)
            return loss

        assert optimizer.step(closure) is losses[-1]
    assert len(losses) == 4
    assert [float(loss.detach()) for loss in losses] == train(other, plain, 4)
    assert identical(model, other)


@every_optimizer
def test_step_without_a_closure_returns_none(name):
    model = Net()
    optimizer = OPTIMIZERS[name](model, 0.02)
    assert optimizer.step() is None  # and without any gradient, nothing happens
    assert identical(model, Net())


@every_optimizer
def test_parameters_without_a_gradient(name):
    """Layers that a loss does not reach stay as they are, weight decay or not, and join when they get one."""
    model = Net()
    optimizer = OPTIMIZERS[name](model, 0.02, weight_decay=0.1, update_interval=1)
    for step in range(3):
        optimizer.zero_grad()
        model.first(batch(step)[0]).square().sum(-1).mean().backward()
        optimizer.step()
    changed = {n for (n, p), q in zip(model.named_parameters(), Net().parameters()) if not torch.equal(p, q)}
    assert changed == {"first.weight", "first.bias"}
    train(model, optimizer, 2)
    changed = {n for (n, p), q in zip(model.named_parameters(), Net().parameters()) if not torch.equal(p, q)}
    assert changed == {n for n, _ in model.named_parameters()}


@every_optimizer
def test_frozen_parameters(name):
    """A frozen weight, a frozen bias and a frozen vector keep their values; what is left trains."""
    model = Net()
    frozen = ["inner.0.weight", "inner.1.bias", "norm.bias"]
    for n in frozen:
        model.get_parameter(n).requires_grad_(False)
    train(model, OPTIMIZERS[name](model, 0.02, weight_decay=0.1, update_interval=1), 3)
    changed = {n for (n, p), q in zip(model.named_parameters(), Net().parameters()) if not torch.equal(p, q)}
    assert changed == {n for n, _ in model.named_parameters()} - set(frozen)


@every_optimizer
def test_clipped_gradients(name):
    """Clipping scales .grad and leaves the statistics: the step is the free one times the factor."""
    model, free, start = Net(), Net(), clones(Net())
    settings = {"momentum": 0.0, "update_interval": 1}
    X, Y = batch(0)
    factor = 0.0
    for m in (model, free):
        # The fallback is AdamW, which is invariant under the scale: leave it out of the comparison.
        optimizer = OPTIMIZERS[name]([p for p in m.parameters() if p is not m.mix], 0.02, model=m, **settings)
        loss_of(m(X), Y).backward()
        if m is model:
            norm = torch.nn.utils.clip_grad_norm_([p for p in m.parameters() if p is not m.mix], 0.1)
            factor = 0.1 / (float(norm) + 1e-6)
        optimizer.step()
    vectors = {"norm.weight", "norm.bias"}  # their curvature is made of .grad, when the step comes
    for (n, p), q, s in zip(model.named_parameters(), free.parameters(), start):
        if n not in vectors:
            assert bool((p - (s + factor * (q - s))).abs().max() <= 1e-12)
    assert factor < 0.9


@every_optimizer
def test_both_ways_to_zero_gradients(name):
    models = [Net(), Net()]
    for model, to_none in zip(models, (True, False)):
        optimizer = OPTIMIZERS[name](model, 0.02, update_interval=2)
        for step in range(5):
            X, Y = batch(step)
            optimizer.zero_grad(set_to_none=to_none)
            loss_of(model(X), Y).backward()
            optimizer.step()
    assert identical(*models)


@every_optimizer
def test_zero_grad_drops_the_statistics_of_a_rejected_pass(name):
    """A pass whose gradient is thrown away leaves no trace."""
    model, other = Net(), Net()
    optimizer, plain = (OPTIMIZERS[name](m, 0.02, update_interval=1) for m in (model, other))
    for step in range(3):
        X, Y = batch(50 + step)
        loss_of(model(X), Y).backward()
        train(model, optimizer, 1, start=step)
        train(other, plain, 1, start=step)
    assert identical(model, other)


@every_optimizer
@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1}, {"row_form": False}], ids=["", "decay", "no rows"])
def test_layers_of_equal_shape_in_one_batch(name, settings):
    models = [perceptron(5, 5, 5, 5, 3, seed=1), perceptron(5, 5, 5, 5, 3, seed=1)]
    for model, foreach in zip(models, (True, False)):
        optimizer = OPTIMIZERS[name](model, 0.02, foreach=foreach, update_interval=2, **settings)
        train(model, optimizer, 8)
    assert distance(*models) <= 1e-12


def test_equal_shapes_are_batched():
    """foreach=True makes one update of three equal layers, False three."""
    counts = []
    for foreach in (True, False, None):
        model = perceptron(5, 5, 5, 5, 3, seed=1)
        optimizer = SINGD(model, 0.02, foreach=foreach, update_interval=1)
        sizes: list[int] = []
        original = optimizer.update
        optimizer.update = lambda layers, *rest: (sizes.append(len(layers)), original(layers, *rest))[1]  # noqa: B023
        train(model, optimizer, 1)
        counts.append(sorted(sizes))
    assert counts == [[1, 3], [1, 1, 1, 1], [1, 3]]
