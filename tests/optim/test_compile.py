"""torch.compile around the step, with the backend that compiles nothing: what is traced must do what eager does."""

from __future__ import annotations

import pytest
import torch
from tests.optim.problems import OPTIMIZERS, Net, batch, identical, loss_of, train


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_step(name):
    torch.compiler.reset()
    model, other = Net(), Net()
    optimizer, plain = (OPTIMIZERS[name](m, 0.02, update_interval=2) for m in (model, other))
    step = torch.compile(optimizer.step, backend="eager")
    for t in range(4):
        X, Y = batch(t)
        optimizer.zero_grad()
        loss_of(model(X), Y).backward()
        step()
    train(other, plain, 4)
    assert identical(model, other)
    assert not identical(model, Net())


def test_compiled_loop():
    """The step inside a larger function that is compiled."""
    torch.compiler.reset()
    model, other = Net(), Net()
    optimizer, plain = (OPTIMIZERS["singd dense"](m, 0.02, update_interval=2) for m in (model, other))

    def body() -> float:
        before = model.head.weight.detach().clone()
        optimizer.step()
        return float((model.head.weight.detach() - before).norm())

    compiled = torch.compile(body, backend="eager")
    for t in range(4):
        X, Y = batch(t)
        optimizer.zero_grad()
        loss_of(model(X), Y).backward()
        assert compiled() > 0
    train(other, plain, 4)
    assert identical(model, other)
