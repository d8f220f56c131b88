"""Gauss–Newton and Monte-Carlo statistics against dense Hessians and Jacobians."""

import pytest
import torch
from tests.curvature.oracle import Net, batch, factors, kfac, kronecker, loss_of
from tests.curvature.recorder import close
from torch import nn
from torch.nn import functional as F

from ritz.curvature import CrossEntropy, EmpiricalFisher, GaussNewton, MonteCarloFisher, PerPosition, SquaredError
from ritz.errors import OperandError

LOSSES = {
    "cross entropy": (CrossEntropy(), lambda f: F.cross_entropy(f.unsqueeze(0), torch.tensor([1]))),
    "half squares": (SquaredError(), lambda f: 0.5 * (f - 1.0).square().sum()),
    "mse_loss": (SquaredError(2 / 3), lambda f: F.mse_loss(f, torch.ones_like(f))),
}


def hessian(term, f):
    """Of one loss term at outputs f (C,), by autograd."""
    return torch.autograd.functional.hessian(term, f.detach())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_linear_layer_gets_the_hessian_of_its_outputs(name, reduction):
    torch.manual_seed(0)
    loss, term = LOSSES[name]
    model, x = nn.Linear(4, 3).double(), torch.randn(6, 4).double()
    optimizer = kfac(model, statistics=GaussNewton(), reduction=reduction)
    f = model(x)
    assert optimizer.accumulate_curvature(f, loss) == 1
    ((A, B),) = factors(optimizer).values()
    expected = sum(hessian(term, row) for row in f) / (6 if reduction == "mean" else 1)
    assert close(B, expected)
    assert close(A, kronecker(x.unsqueeze(1), x.unsqueeze(1))[0])


class Three(nn.Module):
    """A network with one loss term per example, and its pre-activations as a chain of functions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 3)]).double()

    def forward(self, x, start=0):
        for layer in self.layers[start:]:
            x = layer(x).tanh() if layer is not self.layers[-1] else layer(x)
        return x

    def blocks(self, x, term):
        """Σ over examples of Jᵀ H J with respect to each layer's output."""
        found = []
        for i, layer in enumerate(self.layers):
            total = 0.0
            for row in x:
                y = layer(self.until(row, i)).detach()
                rest = lambda y, i=i: self.forward(y.tanh(), i + 1) if i < 2 else y
                J = torch.autograd.functional.jacobian(rest, y)
                total = total + J.mT @ hessian(term, rest(y)) @ J
            found.append(total)
        return found

    def until(self, x, stop):
        for layer in self.layers[:stop]:
            x = layer(x).tanh()
        return x


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [(6,), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gauss_newton_of_inner_layers(name, sizes, reduction):
    loss, term = LOSSES[name]
    model, x = Three(), torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()
    optimizer = kfac(model, statistics=GaussNewton(), reduction=reduction)
    for part in x.split(sizes):
        f = model(part)
        assert optimizer.accumulate_curvature(f, loss) == 3
        assert all(p.grad is None for p in model.parameters())
        f.sum().backward()  # the training pass has no part in it
        model.zero_grad()
    found = factors(optimizer)
    with optimizer.paused():
        expected = model.blocks(x, term)
    for (A, B), full, i in zip(found.values(), expected, range(3)):
        assert close(B, full / 6 if reduction == "mean" else full)
        with optimizer.paused():
            a = model.until(x, i).detach().unsqueeze(1)
        assert close(A, kronecker(a, a)[0])


def test_token_losses_count_positions():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(2, 5, 4).double()
    optimizer = kfac(model, statistics=GaussNewton(), num_loss_terms=PerPosition())
    f = model(x)
    optimizer.accumulate_curvature(f, CrossEntropy())
    ((_, B),) = factors(optimizer).values()
    assert close(B, sum(hessian(LOSSES["cross entropy"][1], row) for row in f.flatten(0, 1)) / 10)


@pytest.mark.parametrize("statistics", [GaussNewton(), MonteCarloFisher()], ids=repr)
def test_gradients_are_left_alone(statistics):
    torch.manual_seed(0)
    model, (x, t) = Net(), batch()
    optimizer = kfac(model, statistics=statistics)
    loss_of(model(x), t).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.zero_grad(set_to_none=False)
    for p, g in zip(model.parameters(), before):
        p.grad.copy_(g)
    f = model(x)
    assert optimizer.accumulate_curvature(f, SquaredError()) == 3
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before))
    loss_of(f, t).backward()
    assert all(close(p.grad, 2 * g) for p, g in zip(model.parameters(), before))


def test_a_module_called_twice_counts_its_examples_once():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3).double()
    model, x = nn.Sequential(layer, nn.Tanh(), layer), torch.randn(5, 3).double()
    optimizer = kfac(model, statistics=GaussNewton())
    f = model(x)
    assert optimizer.accumulate_curvature(f, SquaredError()) == 2
    ((A, B),) = factors(optimizer).values()
    y = x @ layer.weight.mT + layer.bias
    a = torch.stack([x, y.tanh()], 1).detach()
    J = torch.stack([layer.weight * (1 - row.tanh().square()) for row in y])  # of f with respect to y
    assert close(A, kronecker(a, a)[0])
    assert close(B, torch.eye(3).double() + (J.mT @ J).mean(0).detach())


def test_columns_are_a_root_of_the_hessian():
    f = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    for loss, term in LOSSES.values():
        R = torch.stack(list(loss.root_columns(f)), -1)
        if isinstance(loss, SquaredError):
            H = loss.scale * torch.eye(4).double().expand(2, 4, 4)
        else:
            H = torch.stack([hessian(term, row) for row in f])
        assert R.shape == (2, 4, 4) and close(R @ R.mT, H)


@pytest.mark.parametrize("name", ["cross entropy", "half squares", "mse_loss"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_monte_carlo_approaches_gauss_newton(name, reduction):
    """As one over the root of the number of samples; drawn for many copies of the examples at once."""
    loss, _ = LOSSES[name]
    model, x = Three(), torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).double()
    exact = kfac(model, statistics=GaussNewton(), reduction=reduction)
    exact.accumulate_curvature(model(x), loss)
    expected = factors(exact)
    errors = []
    for copies in (25, 2500):
        generator = torch.Generator().manual_seed(2)
        optimizer = kfac(model, statistics=MonteCarloFisher(4, generator), reduction=reduction)
        assert optimizer.accumulate_curvature(model(x.repeat(copies, 1)), loss) == 3
        found = factors(optimizer)
        share = copies if reduction == "sum" else 1
        pairs = [(found[name], expected[name]) for name in expected]
        assert all(close(own[0], other[0]) for own, other in pairs)
        errors.append([float((own[1] / share - other[1]).norm() / other[1].norm()) for own, other in pairs])
    assert all(few < 0.4 and many < 0.04 for few, many in zip(*errors))
    assert all(many > 1e-4 for many in errors[1])


def test_a_generator_makes_it_reproducible():
    model, x = Three(), torch.randn(5, 3).double()
    found = []
    for seed in (3, 3, 4):
        torch.rand(1)  # the global state has no part in it
        optimizer = kfac(model, statistics=MonteCarloFisher(2, torch.Generator().manual_seed(seed)))
        optimizer.accumulate_curvature(model(x), CrossEntropy())
        found.append(factors(optimizer))
    for name in found[0]:
        assert torch.equal(found[0][name][1], found[1][name][1])
        assert not close(found[0][name][1], found[2][name][1], 1e-3)


def test_when_it_is_asked_for():
    model, (x, t) = Net(), batch()
    plain = kfac(model, statistics=EmpiricalFisher())
    with pytest.raises(OperandError, match="collected by backward itself"):
        plain.accumulate_curvature(model(x), SquaredError())
    plain.remove_hooks()
    optimizer = kfac(model, statistics=GaussNewton(), update_interval=2)
    reached = []
    for _ in range(4):
        optimizer.zero_grad()
        f = model(x)
        reached.append(optimizer.accumulate_curvature(f, SquaredError()))
        loss_of(f, t).backward()
        optimizer.step()
    assert reached == [3, 0, 3, 0]
    loss_of(model(x), t).backward()
    with pytest.raises(OperandError, match="call optimizer.accumulate_curvature"):
        optimizer.step()
