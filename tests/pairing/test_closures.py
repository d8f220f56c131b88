"""What a callable closes over: every way in which its gradient could be silently wrong."""

from __future__ import annotations

import threading

import pytest
import torch
from tests.pairing.common import REAL, N, W, close_cached, close_leaf, close_nested, operator, randn, rows, squared_norm
from torch import nn

import ritz

# torch.jit.script is what PyTorch itself imports on the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


class HiddenScale(torch.autograd.Function):
    """w * x, computed from NumPy memory: no torch function sees w."""

    memory = None

    @staticmethod
    def forward(ctx, w, x):
        ctx.save_for_backward(w, x)
        scale = torch.from_numpy(HiddenScale.memory)
        return scale.reshape(-1, *[1] * (x.ndim - 1)) * x

    @staticmethod
    def backward(ctx, g):
        w, x = ctx.saved_tensors
        wide = w.reshape(-1, *[1] * (x.ndim - 1))
        return (g * x).reshape(w.shape[0], -1).sum(1), g * wide


class SeenScale(torch.autograd.Function):
    """w * x through an autograd.Function that calls torch operations on w."""

    @staticmethod
    def forward(ctx, w, x):
        ctx.save_for_backward(w, x)
        return w.reshape(-1, *[1] * (x.ndim - 1)) * x

    backward = HiddenScale.backward


def close_nonleaf(theta):
    h = theta.square() + theta
    return lambda x: rows(h, W @ x)


def close_nested_nonleaf(theta):
    g = theta.sin()
    h = g.exp()
    return lambda x: rows(g, W @ x) + rows(h, x)


def close_view(theta):
    return lambda x: rows(theta[:N], W @ x) + theta[0] * x


def close_container(theta):
    parts = {"list": [theta, 2.0], "inner": {"w": theta * 2}}
    return lambda x: rows(torch.cat([parts["list"][0][:2], parts["inner"]["w"][2:]]), W @ x)


def close_hidden(theta):
    def fn(x):
        HiddenScale.memory = theta.detach().numpy()
        return HiddenScale.apply(theta, W @ x)

    return fn


def close_hidden_memory(theta):
    memory = theta.detach().numpy()

    def fn(x):
        HiddenScale.memory = memory
        return HiddenScale.apply(theta, W @ x)

    return fn


def close_hidden_nonleaf(theta):
    h = theta * 3
    memory = h.detach().numpy()

    def fn(x):
        HiddenScale.memory = memory
        return HiddenScale.apply(h, W @ x)

    return fn


def close_function(theta):
    return lambda x: SeenScale.apply(theta, W @ x)


def close_inner_leaf(theta):
    def fn(x):
        inner = torch.ones(N, dtype=REAL, requires_grad=True)  # a leaf that nobody outside can ask for
        return rows(theta, W @ (rows(inner, x)))

    return fn


def close_inner_gradient(theta):
    """A Hessian-vector product: autograd runs inside of the callable."""

    def fn(x):
        point = torch.linspace(0.1, 1, N, dtype=REAL).requires_grad_()
        energy = (theta * point.square() * (W @ point)).sum()
        (g,) = torch.autograd.grad(energy, point, create_graph=True)
        return torch.autograd.grad(g, point, x, create_graph=True)[0]

    return fn


def close_jvp(theta):
    """torch.func inside: a Jacobian product of x -> tanh(theta * W x) at a fixed point."""
    point = torch.linspace(0.1, 1, N, dtype=REAL)
    f = lambda p, q: torch.tanh(p * (W @ q))

    def fn(x):
        return torch.func.jvp(lambda q: f(theta, q), (point,), (x,))[1]

    return fn


def close_vjp(theta):
    """torch.func inside, and no torch function ever sees theta without a wrapper."""
    point = torch.linspace(0.1, 1, N, dtype=REAL)
    return lambda x: torch.func.vjp(lambda p: torch.tanh(p * point), theta)[1](x)[0]


def close_thread(theta):
    """A tensor made in another thread, whose sequence numbers have nothing to do with ours."""
    box = []

    def work():
        h = theta
        for _ in range(300):
            h = h + 0.001
        box.append(h)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return lambda x: rows(box[0], W @ x)


CLOSURES = [
    close_leaf,
    close_nonleaf,
    close_nested,
    close_nested_nonleaf,
    close_view,
    close_container,
    close_hidden,
    close_hidden_memory,
    close_hidden_nonleaf,
    close_function,
    close_inner_leaf,
    close_inner_gradient,
    close_cached,
    close_jvp,
    close_vjp,
    close_thread,
]


@pytest.mark.parametrize("close", CLOSURES, ids=[c.__name__ for c in CLOSURES])
@pytest.mark.parametrize("width", [1, 3, 40], ids=["vector", "block", "chunks"])
def test_gradient_reaches_what_a_callable_closes_over(close, width):
    X = randn(N, width, seed=2)
    theta = randn(N, seed=3).requires_grad_()
    v = (X[:, 0] if width == 1 else X).clone().requires_grad_()
    value = squared_norm(operator(close(theta)), v)
    grads = torch.autograd.grad(value, (theta, v))

    plain_theta, plain_v = theta.detach().clone().requires_grad_(), v.detach().clone().requires_grad_()
    fn = close(plain_theta)
    columns = [fn(x) for x in plain_v.reshape(N, -1).unbind(1)]
    plain = torch.stack(columns).square().sum()
    expected = torch.autograd.grad(plain, (plain_theta, plain_v))
    torch.testing.assert_close(value, plain)
    for got, want in zip(grads, expected):
        torch.testing.assert_close(got, want)


def test_gradient_reaches_the_parameters_of_a_module():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(N, 7, bias=False), nn.Linear(7, N, bias=False)).double()
    v = randn(N)
    fn = lambda x: net(x.mT).mT
    squared_norm(operator(fn), v).backward()
    got = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    net(v).square().sum().backward()
    for g, p in zip(got, net.parameters()):
        torch.testing.assert_close(g, p.grad)


def test_gradient_reaches_a_gauss_newton_product():
    """The main use: functional_call, jvp and vjp in one callable."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    params = dict(net.named_parameters())
    shapes = {k: p.shape for k, p in params.items()}
    data = randn(4, 2)
    sizes = [p.numel() for p in params.values()]
    outputs = lambda p: torch.func.functional_call(net, p, (data,))

    def ggn(x):
        tangent = {k: t.reshape(shapes[k]) for k, t in zip(params, x.split(sizes))}
        _, Jx = torch.func.jvp(outputs, (params,), (tangent,))
        (back,) = torch.func.vjp(outputs, params)[1](Jx)
        return torch.cat([b.reshape(-1) for b in back.values()])

    n = sum(sizes)
    A = operator(ggn, n, hermitian=True, psd=True)
    v = randn(n)
    leaves = list(params.values())
    got = torch.autograd.grad(squared_norm(A, v), leaves, allow_unused=True)
    expected = torch.autograd.grad(ggn(v).square().sum(), leaves, allow_unused=True)
    assert sum(e is None for e in expected) == 1  # the last bias
    for g, e in zip(got, expected):
        assert (g is None) == (e is None)
        if g is not None:
            torch.testing.assert_close(g, e)
    assert A.capture(v[:, None])[1].deferrable


@pytest.mark.parametrize("close", CLOSURES, ids=[c.__name__ for c in CLOSURES])
def test_which_callables_are_paired_later(close):
    """Nested or hidden tensors send the pairing to its recorded form; everything else costs nothing in the forward."""
    recorded = {close_nested, close_nested_nonleaf, close_container, close_hidden_memory, close_hidden_nonleaf}
    A = operator(close(randn(N).requires_grad_()))
    deferrable = A.capture(randn(N, 1))[1].deferrable
    if close is not close_thread:  # there either answer is right
        assert deferrable == (close not in recorded)


def test_a_captured_tensor_and_one_computed_from_it_in_two_operators():
    theta = randn(N).requires_grad_()
    h = theta.exp()
    A = operator(lambda x: rows(theta, x)) + operator(lambda x: rows(h, x))
    v = randn(N, seed=1)
    (got,) = torch.autograd.grad(squared_norm(A, v), theta)
    plain = ((theta + theta.exp()) * v).square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(plain, theta)[0])


def test_pairing_a_nested_callable_directly_is_refused():
    theta = randn(N).requires_grad_()
    with pytest.raises(ritz.operators.base.OperandError, match="computed from it"):
        operator(close_nested(theta)).pair(randn(N, 2), randn(N, 2))


def test_subclass_that_names_nested_tensors_is_refused():
    class Twice(ritz.LinearOperator):
        def __init__(self, theta):
            super().__init__((N, N), REAL, "cpu")
            self.theta, self.h = theta, theta.exp()

        def _matmat(self, X):
            return rows(self.theta * self.h, X)

        def tensors(self):
            return self.theta, self.h

    theta = randn(N).requires_grad_()
    with pytest.raises(ritz.operators.base.OperandError, match="both would count"):
        Twice(theta).pair(randn(N, 2), randn(N, 2))


def test_a_tensor_without_influence_gets_no_gradient():
    theta, other = randn(N).requires_grad_(), randn(N).requires_grad_()
    fn = lambda x: rows(theta, x) + 0 * other.detach().sum()
    value = squared_norm(operator(fn), randn(N))
    assert torch.autograd.grad(value, other, allow_unused=True) == (None,)
