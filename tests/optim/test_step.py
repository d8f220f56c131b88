"""One step: closures, missing and clipped gradients, what is dropped, layers of equal shape in one batch."""

from __future__ import annotations

import pytest
import torch
from tests.optim.problems import OPTIMIZERS, Net, batch, clones, distance, identical, loss_of, perceptron, train
from torch import Tensor

from ritz.optim import SINGD

every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


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
def test_a_scaled_step_without_gradients(name):
    """What GradScaler.step tells an optimizer, where no parameter has a gradient."""
    model = Net()
    optimizer = OPTIMIZERS[name](model, 0.02)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    optimizer.step()
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
