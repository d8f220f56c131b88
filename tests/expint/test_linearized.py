"""∂f/∂y and ∂f/∂t as operators."""

import pytest
import torch
from torch import Tensor, nn

from ritz.errors import SecondDerivativeError
from ritz.expint.linearized import JacobianOperator, Linearization, TimeDerivative, attached
from ritz.testing import check_operator

from .systems import D, relative

W = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=D)


def case(name: str) -> Linearization:
    t = torch.tensor(0.3, dtype=D, requires_grad=True)
    y = torch.linspace(-1, 1, 5, dtype=D).requires_grad_()
    w = W.clone().requires_grad_()
    if name == "smooth":
        return Linearization(lambda t, y: torch.tanh(w @ y) * torch.cos(t) + t**2 * y**3, t, y)
    if name == "state and parameter from one tensor":
        return Linearization(lambda t, y: torch.tanh(w @ y) * torch.cos(t), t, (w.sum(0) * y))
    if name == "a tensor with one computed from it":
        z = w * w
        return Linearization(lambda t, y: torch.tanh(w @ y) * torch.cos(t) + z @ y**2, t, y)
    if name == "not vectorised":  # is_grads_batched has no rule for this one
        return Linearization(lambda t, y: Cube.apply(w @ y) * torch.sin(t), t, y)
    if name == "module":
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()
        return Linearization(lambda t, y: net(y) * t, t, y)
    if name == "linear":
        return Linearization(lambda t, y: w @ y + t * w[0], t, y)
    if name == "no state":
        return Linearization(lambda t, y: torch.sin(t) * w[0], t, y)
    return Linearization(lambda t, y: y**2, t, y)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


NAMES = [
    "smooth", "state and parameter from one tensor", "a tensor with one computed from it", "not vectorised", "module",
    "linear", "no state", "no time",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [JacobianOperator, TimeDerivative])
def test_operators_keep_the_contract(name, kind):
    check_operator(kind(case(name)))


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_torch(name):
    at = case(name)
    J = torch.autograd.functional.jacobian(lambda y: at.f(at.t, y), at.y)
    v = torch.autograd.functional.jacobian(lambda t: at.f(t, at.y), at.t)
    with torch.no_grad():
        got, slope = JacobianOperator(at).to_dense(), TimeDerivative(at).to_dense()[:, 0]
    assert float((got - J).norm()) <= 1e-14 * float(J.norm()) and float((slope - v).norm()) <= 1e-14 * float(v.norm())
    assert JacobianOperator(at).zero == (name == "no state") and TimeDerivative(at).zero == (name == "no time")


def test_one_evaluation_serves_all_products():
    calls = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return torch.sin(y) * t

    at = Linearization(f, torch.tensor(2.0, dtype=D), torch.ones(3, dtype=D))
    J, T = JacobianOperator(at), TimeDerivative(at)
    for X in torch.randn(4, 3, 2, dtype=D):
        J @ X, J.mH @ X
    T @ torch.ones(1, dtype=D)
    assert len(calls) == 1
    at.release()
    J @ torch.ones(3, dtype=D)
    assert len(calls) == 2


def test_attached_product_keeps_its_operand_only():
    at = case("smooth")
    x = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=D).requires_grad_()
    w = at.captured[0]
    y = attached(JacobianOperator(at), x, "a product")
    g = torch.linspace(0, 1, 5, dtype=D)
    got = torch.autograd.grad(y, [x, at.y, at.t, w], g, create_graph=True)
    want = torch.autograd.grad(JacobianOperator(at) @ x, [x, at.y, at.t, w], g)
    assert all(relative(a, b) < 1e-13 for a, b in zip(got, want, strict=True))
    with pytest.raises(SecondDerivativeError, match="a product"):
        torch.autograd.grad(got[1].sum(), at.y)
