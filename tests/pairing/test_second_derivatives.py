"""Second derivatives are refused by name."""

from __future__ import annotations

import pytest
import torch
from tests.pairing.common import REAL, N, W, close_leaf, close_nested, operator, randn, squared_norm

from ritz.errors import SecondDerivativeError
from ritz.operators import Dense, Sparse

# torch.jit.script is what PyTorch itself imports on the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.mark.parametrize("kind", ["callable", "dense", "sparse", "recorded"])
@pytest.mark.parametrize("cotangent_requires_grad", [False, True])
@pytest.mark.parametrize("first", ["v", "theta"])
@pytest.mark.parametrize("second", ["v", "theta", "cotangent"])
def test_second_derivatives_are_refused_by_name(kind, cotangent_requires_grad, first, second):
    theta, v = randn(N).requires_grad_(), randn(N, seed=1).requires_grad_()
    if kind == "callable":
        A = operator(close_leaf(theta))
    elif kind == "recorded":
        A = operator(close_nested(theta))
    elif kind == "dense":
        A = Dense(torch.outer(theta, theta) + torch.diag(theta))
    else:
        A = Sparse(torch.arange(N + 1), torch.arange(N).flip(0), theta, (N, N))
    cotangent = torch.tensor(2.0, dtype=REAL, requires_grad=cotangent_requires_grad)
    named = {"v": v, "theta": theta, "cotangent": cotangent}
    value = squared_norm(A, v)
    (g,) = torch.autograd.grad(value, named[first], cotangent, create_graph=True)
    if not named[second].requires_grad:
        assert second == "cotangent"
        cotangent = None
        with pytest.raises(RuntimeError):  # torch itself: the tensor does not require grad
            torch.autograd.grad(g.sum(), named[second])
        return
    with pytest.raises(SecondDerivativeError, match="squared norm was differentiated twice.*Unrolled"):
        torch.autograd.grad(g.sum(), named[second])


@pytest.mark.parametrize("second", ["v", "theta"])
def test_the_gradient_with_respect_to_a_factor_of_the_value_is_a_first_derivative(second):
    theta, v = randn(N).requires_grad_(), randn(N, seed=1).requires_grad_()
    factor = torch.tensor(2.0, dtype=REAL, requires_grad=True)
    value = squared_norm(operator(close_leaf(theta)), v)
    (g,) = torch.autograd.grad(factor * value, factor, create_graph=True)
    named = {"v": v, "theta": theta}
    plain = (theta * (W @ v)).square().sum()
    torch.testing.assert_close(torch.autograd.grad(g, named[second])[0], torch.autograd.grad(plain, named[second])[0])


def test_gradient_penalty_is_refused_and_not_dropped():
    theta, v = randn(N).requires_grad_(), randn(N, seed=1).requires_grad_()
    value = squared_norm(operator(close_leaf(theta)), v)
    (g,) = torch.autograd.grad(value, v, create_graph=True)
    with pytest.raises(SecondDerivativeError):
        (value + g.square().sum()).backward()
