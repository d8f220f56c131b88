"""torch.func: what is right, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
from tests.pairing.common import REAL, N, W, operator, randn, rows, squared_norm
from torch import nn

from ritz.errors import SecondDerivativeError, TransformError
from ritz.operators import Dense, Sparse

# torch.jit.script is what PyTorch itself imports on the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def by_callable(theta, v):
    return squared_norm(operator(lambda x: rows(theta, W @ x)), v)


def by_nested(theta, v):
    h = theta.exp()
    return squared_norm(operator(lambda x: rows(theta + h, W @ x)), v)


def by_dense(theta, v):
    return squared_norm(Dense(rows(theta, W)), v)


def by_sparse(theta, v):
    return squared_norm(Sparse(torch.arange(N + 1), torch.arange(N).flip(0), theta, (N, N)), v)


def by_structured(theta, v):
    from ritz.operators import Diagonal, LowRank, Toeplitz

    A = Toeplitz(theta) + Diagonal(theta) @ LowRank(theta.unsqueeze(1), core=theta[:1])
    return squared_norm(theta.sum() * A, v)


def _dense_structured(theta):
    index = torch.arange(N)
    T = theta[(index[:, None] - index).abs()]
    return theta.sum() * (T + torch.diag(theta) @ torch.outer(theta, theta) * theta[0])


PLAIN = {
    by_callable: lambda theta, v: rows(theta, W @ v).square().sum(),
    by_nested: lambda theta, v: rows(theta + theta.exp(), W @ v).square().sum(),
    by_dense: lambda theta, v: rows(theta, W @ v).square().sum(),
    by_sparse: lambda theta, v: rows(theta, v.flip(0)).square().sum(),
    by_structured: lambda theta, v: (_dense_structured(theta) @ v).square().sum(),
}


KINDS = pytest.mark.parametrize("f", list(PLAIN), ids=lambda f: f.__name__)


@KINDS
@pytest.mark.parametrize("width", [None, 1, 3])
def test_func_grad_is_right(f, width):
    theta, v = randn(N), randn(N, seed=1) if width is None else randn(N, width, seed=1)
    for argnums in (0, 1, (0, 1)):
        got = torch.func.grad(f, argnums)(theta, v)
        want = torch.func.grad(PLAIN[f], argnums)(theta, v)
        torch.testing.assert_close(got, want)
    value, pullback = torch.func.vjp(f, theta, v)
    torch.testing.assert_close(pullback(torch.ones_like(value)), torch.func.grad(PLAIN[f], (0, 1))(theta, v))


def test_func_grad_through_functional_call():
    torch.manual_seed(0)
    net = nn.Linear(N, N, bias=False).double()
    params = {k: p.detach() for k, p in net.named_parameters()}
    v = randn(N)

    def f(params):
        fn = lambda x: torch.func.functional_call(net, params, (x.mT,)).mT
        return squared_norm(operator(fn), v)

    got = torch.func.grad(f)(params)
    want = torch.func.grad(lambda p: (p["weight"] @ v).square().sum())(params)
    torch.testing.assert_close(got["weight"], want["weight"])


@KINDS
@pytest.mark.parametrize("inner, outer", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_func_grad_of_func_grad_is_refused_by_name(f, inner, outer):
    def slope(theta, v):
        return torch.func.grad(f, inner)(theta, v).sum()

    with pytest.raises(SecondDerivativeError, match="squared norm"):
        torch.func.grad(slope, outer)(randn(N), randn(N, seed=1))


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x])),
    "grad of vmap": lambda f, x: torch.func.grad(lambda x: torch.func.vmap(f)(torch.stack([x, x])).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacrev": lambda f, x: torch.func.jacrev(lambda x: torch.stack([f(x), 2 * f(x)]))(x),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (x,)),
    "dual numbers": lambda f, x: _dual(f, x),
    "batched gradients": lambda f, x: _batched_gradients(f, x),
    "vectorized jacobian": lambda f, x: torch.autograd.functional.jacobian(
        lambda x: torch.stack([f(x), 2 * f(x)]), x, vectorize=True
    ),
    "forward-mode jacobian": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
}


def _dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


def _batched_gradients(f, x):
    x = x.clone().requires_grad_()
    y = torch.stack([f(x), 2 * f(x)])
    return torch.autograd.grad(y, x, torch.eye(2, dtype=REAL), is_grads_batched=True)


@KINDS
@pytest.mark.parametrize("through", ["theta", "v", "block"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_other_transforms_are_refused_by_name(f, through, transform):
    theta, v = randn(N), randn(N, seed=1)
    if through == "theta":
        g, x = (lambda x: f(x, v)), theta
    elif through == "v":
        g, x = (lambda x: f(theta, x)), v
    else:
        g, x = (lambda x: f(x, torch.stack([v, 2 * v], 1))), theta
    with pytest.raises(TransformError, match="serve"):
        TRANSFORMS[transform](g, x)


def test_a_tangent_is_refused_where_nothing_requires_grad():
    """no_grad does not stop forward mode: the tangent would be dropped without a word."""
    theta, v = randn(N), randn(N, seed=1)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode(), pytest.raises(TransformError, match="forward-mode tangent"):
            _dual(lambda x: by_callable(x, v), theta)
        with mode(), pytest.raises(TransformError, match="forward-mode tangent"):
            _dual(lambda x: by_callable(theta, x), v)


def test_vmap_around_unbatched_use_is_fine():
    theta, v = randn(N), randn(N, seed=1)
    f = lambda scale: scale * by_callable(theta, v)
    scales = torch.tensor([1.0, 2.0], dtype=REAL)
    torch.testing.assert_close(torch.func.vmap(f)(scales), by_callable(theta, v) * scales)
