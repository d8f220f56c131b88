"""The gradient primitive. Every way in which it could be silently wrong is a test here."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

import ritz
from ritz.errors import AdjointUnavailableError, SecondDerivativeError, TransformError
from ritz.numerics import full_precision
from ritz.operators import Dense, FunctionOperator, Sparse
from ritz.pairing import PAIR_CHUNK, Cotangents, Pair, Run
from ritz.testing import check_gradient

# torch.jit.script is what PyTorch itself imports on the first use of forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

N = 5
REAL, COMPLEX = torch.float64, torch.complex128
DTYPES = pytest.mark.parametrize("dtype", [REAL, COMPLEX], ids=["real", "complex"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = REAL) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def squared_norm(A: ritz.LinearOperator, v: Tensor) -> Tensor:
    """‖A v‖² for a vector or a block, by the pairing."""
    V = v.detach().reshape(v.shape[0], -1)
    with Run(A, v) as run:
        Y = run.matmat(V)
        value = torch.vdot(Y.reshape(-1), Y.reshape(-1)).real

    def rule(g: Tensor) -> Cotangents:
        Lam = 2 * g * Y
        return Cotangents([Pair(Lam)], [run.adjoint(V.shape[1])(Lam).reshape(v.shape)])

    (out,) = run.attach([value], rule, [V], name="squared norm")
    return out


def only_pairing(A: ritz.LinearOperator, v: Tensor) -> Tensor:
    """The same without a gradient for v, so without adjoint products."""
    V = v.detach().reshape(v.shape[0], -1)
    with Run(A) as run:
        Y = run.matmat(V)
    rule = lambda g: Cotangents([Pair(2 * g * Y)], [])
    return run.attach([torch.vdot(Y.reshape(-1), Y.reshape(-1)).real], rule, [V], name="squared norm")[0]


def operator(fn, n: int = N, dtype: torch.dtype = REAL, **options) -> ritz.LinearOperator:
    return ritz.aslinearoperator(fn, shape=n, dtype=dtype, **options)


class Calls:
    """Counts calls of a callable and the widths that it saw."""

    def __init__(self, fn) -> None:
        self.fn, self.widths = fn, []

    def __call__(self, x: Tensor) -> Tensor:
        self.widths.append(1 if x.ndim == 1 else x.shape[1])
        return self.fn(x)


# -- what a callable closes over --------------------------------------------------------------------------------------


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


def rows(w: Tensor, x: Tensor) -> Tensor:
    return w.reshape(-1, *[1] * (x.ndim - 1)) * x


W = randn(N, N, seed=1)


def close_leaf(theta):
    return lambda x: rows(theta, W @ x)


def close_nonleaf(theta):
    h = theta.square() + theta
    return lambda x: rows(h, W @ x)


def close_nested(theta):
    h = theta.exp()
    return lambda x: rows(theta, W @ x) + rows(h, x)


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


def close_cached(theta):
    """Computes a factor on its first call and keeps it, graph and all."""
    cache = {}

    def fn(x):
        if "h" not in cache:
            cache["h"] = theta.square().sin()
        return rows(cache["h"], W @ x)

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


# -- blocks -----------------------------------------------------------------------------------------------------------

d4 = torch.linspace(1, 2, 4, dtype=REAL)
M4 = randn(4, 4, seed=5)
MISHANDLED = {
    "d * x": (lambda x: d4 * x, torch.diag(d4)),
    "x @ M": (lambda x: x @ M4, M4.T),
    "vectors only": (lambda x: torch.dot(d4, x) * d4, torch.outer(d4, d4)),
    "sum over everything": (
        lambda x: d4 * x.sum() if x.ndim == 1 else d4[:, None] * x.sum(),
        torch.outer(d4, torch.ones(4, dtype=REAL)),
    ),
    "assertion": (lambda x: _only_vectors(x), torch.diag(d4)),
    "blocks only": (lambda X: _only_blocks(X), M4),
    "flip": (lambda x: x.flip(-1), torch.eye(4, dtype=REAL).flip(0)),
}


def _only_vectors(x):
    assert x.ndim == 1
    return d4 * x


def _only_blocks(X):
    n, k = X.shape
    return M4 @ X


@pytest.mark.parametrize("name", MISHANDLED)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_blocks_come_out_right_whatever_the_callable_does_with_them(name, width):
    fn, dense = MISHANDLED[name]
    X = randn(4, width)
    torch.testing.assert_close(operator(fn, 4) @ X, dense @ X)
    with Run(operator(fn, 4)) as run:
        torch.testing.assert_close(run.matmat(X), dense @ X)
        torch.testing.assert_close(run.matmat(X), dense @ X)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_square_block_trap(n):
    d = torch.linspace(1, 2, n, dtype=REAL).requires_grad_()
    A = operator(lambda x: d * x, n)
    X = randn(n, n)  # d * X has the right shape and scales columns instead of rows
    torch.testing.assert_close(A @ X, torch.diag(d) @ X)
    (got,) = torch.autograd.grad(squared_norm(A, X), d)
    torch.testing.assert_close(got, torch.autograd.grad((torch.diag(d) @ X).square().sum(), d)[0])


def test_block_is_taken_at_its_word():
    calls = Calls(lambda x: W @ x)
    operator(calls, block=True) @ randn(N, 3)
    assert calls.widths == [3]
    calls = Calls(lambda x: W @ x)
    operator(calls, block=False) @ randn(N, 3)
    assert calls.widths == [1, 1, 1]


def test_columns_are_probed_once_over_many_runs():
    theta = randn(N).requires_grad_()
    calls = Calls(lambda x: rows(theta, W @ x))
    A = operator(calls)
    for _ in range(3):
        squared_norm(A, randn(N, 3)).backward()
    probes = calls.widths[:3]
    assert probes == [1, 1, 2]
    assert 1 not in calls.widths[3:]


# -- in-place changes between forward and backward --------------------------------------------------------------------


IN_PLACE = {
    "a captured leaf": lambda s: s["theta"],
    "a constant": lambda s: s["constant"],
    "a constant through a view": lambda s: s["constant"][1:3],
    "the operand": lambda s: s["v"],
    "a tensor that is only used detached": lambda s: s["detached"],
    "a captured non-leaf": lambda s: s["h"],
}


@pytest.mark.parametrize("hooks", [False, True], ids=["plain", "saved tensors on the CPU"])
@pytest.mark.parametrize("what", IN_PLACE)
def test_a_change_in_place_before_backward_raises(what, hooks):
    s = {name: randn(N, seed=i).requires_grad_() for i, name in enumerate(["theta", "v", "detached"])}
    s["constant"] = randn(N, seed=9)
    s["h"] = s["theta"].square()

    def fn(x):
        return rows(s["theta"] + s["constant"] * s["detached"].detach(), W @ x) + rows(s["h"], x) * 1.0

    def nonleaf(x):
        return rows(s["h"] * s["constant"] * s["detached"].detach(), W @ x)

    A = operator(nonleaf if what == "a captured non-leaf" else fn)
    if hooks:
        with torch.autograd.graph.save_on_cpu():
            value = squared_norm(A, s["v"])
    else:
        value = squared_norm(A, s["v"])
    with torch.no_grad():
        IN_PLACE[what](s).mul_(2)
    with pytest.raises(RuntimeError, match="in.?place|inplace"):
        value.backward()


def test_a_change_in_place_of_a_leaf_alone_raises():
    """No nested tensors here, so the pairing is deferred and would read the new numbers."""
    for name in ("theta", "constant", "detached"):
        s = {"theta": randn(N).requires_grad_(), "constant": randn(N), "detached": randn(N).requires_grad_()}
        A = operator(lambda x, s=s: rows(s["theta"] * s["constant"] * s["detached"].detach(), W @ x))
        value = squared_norm(A, randn(N))
        with torch.no_grad():
            s[name].mul_(2)
        with pytest.raises(RuntimeError, match="in.?place|inplace"):
            value.backward()


def test_a_workspace_that_the_callable_itself_changes_is_no_reason_to_raise():
    theta, counter = randn(N).requires_grad_(), torch.zeros(1)

    def fn(x):
        counter.add_(1)
        return rows(theta, W @ x)

    v = randn(N)
    (got,) = torch.autograd.grad(squared_norm(operator(fn), v), theta)
    torch.testing.assert_close(got, torch.autograd.grad((theta * (W @ v)).square().sum(), theta)[0])


def test_writing_into_the_basis_that_the_first_product_came_from_is_no_reason_to_raise():
    """A Krylov basis is filled row by row; the operand of the first product is a view of it."""
    theta = randn(N).requires_grad_()
    Q = torch.zeros(3, N, dtype=REAL)
    Q[0] = randn(N)
    with Run(operator(lambda x: rows(theta, x))) as run:
        y = run.matmat(Q[0].unsqueeze(1))
        Q[1] = y[:, 0]
    rule = lambda g: Cotangents([Pair(2 * g * y)], [])
    (value,) = run.attach([y.square().sum()], rule, [Q[:1].mT], name="form")
    (got,) = torch.autograd.grad(value, theta)
    torch.testing.assert_close(got, 2 * theta.detach() * Q[0].square())


def test_changing_a_value_in_place_does_not_reach_the_rule():
    theta, v = randn(N).requires_grad_(), randn(N)
    with Run(operator(lambda x: rows(theta, x))) as run:
        y = run.matmat(v[:, None])
    rule = lambda g: Cotangents([Pair(2 * y * g)], [])  # reads its own value: d (y²) = 2 y dy
    (value,) = run.attach([y.square()], rule, [v[:, None]], name="square")
    (out,) = run.attach([y], lambda g: Cotangents([Pair(g)], []), [v[:, None]], name="product")
    out.data.mul_(5)
    (got,) = torch.autograd.grad(value.sum(), theta)
    torch.testing.assert_close(got, 2 * theta.detach() * v * v)


def test_changing_a_value_that_is_also_a_block_raises():
    theta, v = randn(N).requires_grad_(), randn(N, 1)
    with Run(operator(lambda x: rows(theta, x))) as run:
        Y = run.matmat(v)
    (value,) = run.attach([Y], lambda g: Cotangents([Pair(g)], []), [Y], name="a solution")
    with torch.no_grad():
        value.mul_(2)
    with pytest.raises(RuntimeError, match="a solution: a tensor of shape .* in place"):
        value.sum().backward()


def test_a_factor_computed_inside_the_first_product_serves_every_chunk_and_every_backward():
    """With block=True nothing is probed before, so the cached factor's graph belongs to the captured product."""
    theta, X = randn(N).requires_grad_(), randn(N, 2 * PAIR_CHUNK + 1)
    A = operator(close_cached(theta), block=True)
    value = only_pairing(A, X) + only_pairing(A, 2 * X)
    (got,) = torch.autograd.grad(value, theta)
    plain = 5 * rows(theta.square().sin(), W @ X).square().sum()
    torch.testing.assert_close(got, torch.autograd.grad(plain, theta)[0])


def test_backward_twice_gives_the_same():
    theta = randn(N).requires_grad_()
    value = squared_norm(operator(close_cached(theta)), randn(N, 40))
    first = torch.autograd.grad(value, theta, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(value, theta)[0], first, rtol=0, atol=0)


def test_checkpoint_gives_the_same():
    from torch.utils.checkpoint import checkpoint

    theta, v = randn(N).requires_grad_(), randn(N, 3, seed=1).requires_grad_()
    f = lambda v: squared_norm(operator(close_leaf(theta)), v)
    plain = torch.autograd.grad(f(v), (theta, v))
    again = torch.autograd.grad(checkpoint(f, v, use_reentrant=False), (theta, v))
    for a, b in zip(plain, again):
        torch.testing.assert_close(a, b)


# -- second derivatives -----------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(
        torch.autograd.grad(g, named[second])[0], torch.autograd.grad(plain, named[second])[0]
    )


def test_gradient_penalty_is_refused_and_not_dropped():
    theta, v = randn(N).requires_grad_(), randn(N, seed=1).requires_grad_()
    value = squared_norm(operator(close_leaf(theta)), v)
    (g,) = torch.autograd.grad(value, v, create_graph=True)
    with pytest.raises(SecondDerivativeError):
        (value + g.square().sum()).backward()


# -- torch.func -------------------------------------------------------------------------------------------------------


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


# -- cost -------------------------------------------------------------------------------------------------------------


def test_nothing_extra_is_computed_where_nothing_requires_grad():
    calls = Calls(lambda x: W @ x)
    squared_norm(operator(calls), randn(N))
    assert calls.widths == [1]
    calls = Calls(lambda x: W @ x)
    value = squared_norm(operator(calls, block=True), randn(N, 3))
    assert calls.widths == [3]
    assert value.grad_fn is None


def test_nothing_extra_is_computed_under_no_grad():
    theta = randn(N).requires_grad_()
    modes = []
    calls = Calls(lambda x: (modes.append(torch.is_grad_enabled()), rows(theta, W @ x))[1])
    with torch.no_grad():
        value = squared_norm(operator(calls), randn(N).requires_grad_())
    assert calls.widths == [1] and modes == [False] and value.grad_fn is None


def test_the_forward_pass_spends_no_product_on_gradients_and_backward_is_chunked():
    theta = randn(N).requires_grad_()
    calls = Calls(lambda x: rows(theta, W @ x))
    A = ritz.Counting(operator(calls, block=True))
    k = 2 * PAIR_CHUNK + 5
    X = randn(N, k)
    with Run(A) as run:
        Y = torch.cat([run.matmat(x.unsqueeze(1)) for x in X.unbind(1)], 1)
    (value,) = run.attach([Y.square().sum()], lambda g: Cotangents([Pair(2 * g * Y)], []), [X], name="sum")
    assert calls.widths == [1] * k == [1] * A.num_forward and run.num_matvecs == k
    value.backward()
    assert calls.widths[k:] == [PAIR_CHUNK, PAIR_CHUNK, 5]
    assert A.num_paired == k and A.num_adjoint == 0
    torch.testing.assert_close(theta.grad, 2 * theta.detach() * (W @ X).square().sum(1))


class Weight:
    """Something that lives as long as the graph that holds it."""


class HeavyScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, x, alive):
        ctx.save_for_backward(w, x)
        ctx.weight = Weight()
        alive.append(weakref.ref(ctx.weight))
        return w.unsqueeze(1) * x

    @staticmethod
    def backward(ctx, g):
        w, x = ctx.saved_tensors
        return (g * x).sum(1), g * w.unsqueeze(1), None


def test_the_graph_of_one_chunk_is_alive_at_a_time():
    theta = randn(50).requires_grad_()
    alive: list[weakref.ref] = []
    peaks: list[int] = []

    def fn(x):
        y = HeavyScale.apply(theta, x, alive)
        peaks.append(sum(r() is not None for r in alive))
        return y

    value = only_pairing(operator(fn, 50, block=True), randn(50, 5 * PAIR_CHUNK))
    alive.clear()
    peaks.clear()
    value.backward()
    assert len(peaks) == 5
    assert max(peaks) <= 2  # the one being made, and the last one until its name is bound anew


def test_deferred_pairs_keep_no_graph_until_backward():
    theta = randn(N).requires_grad_()
    alive: list[weakref.ref] = []
    value = only_pairing(operator(lambda x: HeavyScale.apply(theta, x, alive), block=True), randn(N, 100))
    assert value.requires_grad and len(alive) == 1 and alive[0]() is None


def test_a_finished_value_does_not_keep_itself_alive():
    """A block that is also an output would hold its own graph in a cycle, until the garbage collector comes."""
    theta = randn(N).requires_grad_()
    gc.collect()
    gc.disable()
    try:
        with Run(operator(lambda x: rows(theta, x), block=True)) as run:
            Y = run.matmat(randn(N, 2))
        (value,) = run.attach([Y], lambda g: Cotangents([Pair(g)], []), [Y], name="a solution")
        dead = weakref.ref(value.grad_fn.plan if hasattr(value.grad_fn, "plan") else value.grad_fn)
        del value, Y, run
        assert dead() is None
    finally:
        gc.enable()


# -- sparse -----------------------------------------------------------------------------------------------------------

BIG = 200_000  # a dense gradient would take 320 GB


def _bidiagonal_pattern(n: int) -> tuple[Tensor, Tensor, Tensor]:
    i = torch.arange(n)
    row = torch.cat([i, i[1:]])
    col = torch.cat([i, i[:-1]])
    order = torch.argsort(row * n + col)
    row, col = row[order], col[order]
    crow = torch.zeros(n + 1, dtype=torch.long)
    crow[1:] = torch.bincount(row, minlength=n).cumsum(0)
    return crow, row, col


@pytest.mark.parametrize("leaf", ["values", "computed values", "tensor"])
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_gradients_stay_on_the_pattern(layout, leaf):
    crow, row, col = _bidiagonal_pattern(BIG)
    values = randn(col.numel())
    theta = values.clone().requires_grad_(leaf != "tensor")
    entries = theta if leaf != "computed values" else theta * 2
    if layout == "coo":
        index = torch.stack([row, col])
        A = torch.sparse_coo_tensor(index, entries, (BIG, BIG), is_coalesced=True, check_invariants=False)
    else:
        A = torch.sparse_csr_tensor(crow, col, entries, (BIG, BIG), check_invariants=False)
    if leaf == "tensor":
        theta = A.detach().requires_grad_()
        A = theta
    v = randn(BIG, seed=1).requires_grad_()
    squared_norm(ritz.aslinearoperator(A, hermitian=False), v).backward()
    entries = values if leaf == "tensor" else entries.detach()
    y = torch.zeros(BIG, dtype=REAL).index_add(0, row, entries * v.detach()[col])
    want = 2 * y[row] * v.detach()[col] * (2 if leaf == "computed values" else 1)
    grad = theta.grad
    if leaf == "tensor":
        assert grad.layout == theta.layout
        grad = grad.coalesce().values() if layout == "coo" else grad.values()
    torch.testing.assert_close(grad, want)
    assert v.grad is not None and v.grad.shape == (BIG,)


def test_sparse_product_under_autograd_stays_on_the_pattern():
    crow, row, col = _bidiagonal_pattern(BIG)
    theta = randn(col.numel()).requires_grad_()
    A = Sparse(crow, col, theta, (BIG, BIG), hermitian=False)
    v = randn(BIG, seed=1)
    (A @ v).square().sum().backward()
    (A.mH @ v).square().sum().backward()
    assert theta.grad.shape == theta.shape


@DTYPES
def test_second_derivative_of_a_sparse_product(dtype):
    crow, row, col = _bidiagonal_pattern(N)
    values, v, w = (randn(k, seed=s, dtype=dtype).requires_grad_() for k, s in ((col.numel(), 0), (N, 1), (N, 2)))

    def run(adjoint, dense):
        A = Sparse(crow, col, values, (N, N), hermitian=False)
        y = (A.to_dense().mH if adjoint else A.to_dense()) @ v if dense else (A.mH if adjoint else A) @ v
        energy = ((y * y * w).sum() * w.conj().sum()).abs()
        first = torch.autograd.grad(energy, (values, v), create_graph=True)
        return torch.autograd.grad(sum((g.conj() * g).real.sum() for g in first), (values, v, w))

    for adjoint in (False, True):
        for got, want in zip(run(adjoint, False), run(adjoint, True)):
            torch.testing.assert_close(got, want)


def test_second_derivative_of_a_sparse_product_with_an_operand_made_from_its_values():
    """The engine does not stop at the operand: without care its part of the gradient counts twice."""
    values = randn(N).requires_grad_()

    def first(A, dense):
        x = values.square()
        y = dense @ x if dense is not None else A @ x
        return torch.autograd.grad(y.square().sum(), values, create_graph=True)[0]

    A = Sparse(torch.arange(N + 1), torch.arange(N).flip(0), values, (N, N), hermitian=False)
    torch.testing.assert_close(first(A, None), first(None, A.to_dense()))
    got = torch.autograd.grad(first(A, None).square().sum(), values)
    torch.testing.assert_close(got, torch.autograd.grad(first(None, A.to_dense()).square().sum(), values))


# -- adjoint products of a callable -----------------------------------------------------------------------------------


@DTYPES
def test_adjoint_product_records_the_forward_product_once(dtype):
    M = randn(4, N, dtype=dtype)
    calls = Calls(lambda x: M @ x)
    A = FunctionOperator(calls, (4, N), dtype, "cpu", block=True)
    adjoint = A.adjoint_product(2)
    for seed in range(4):
        Y = randn(4, 2, seed=seed, dtype=dtype)
        torch.testing.assert_close(adjoint(Y), M.mH @ Y)
    assert calls.widths == [2]


@DTYPES
def test_a_run_over_the_gram_operator_records_once(dtype):
    M = randn(4, N, dtype=dtype).requires_grad_()
    calls = Calls(lambda x: M @ x)
    A = FunctionOperator(calls, (4, N), dtype, "cpu", block=True)
    X = randn(N, 2, dtype=dtype)
    for G in (A.mH @ A, A.mT @ A):
        calls.widths.clear()
        with Run(G) as run:
            for _ in range(5):
                Y = run.matmat(X)
        assert len(calls.widths) <= 5 + 3  # one each step, one to capture the adjoint's side, one or two recordings
        (value,) = run.attach([Y.abs().square().sum()], lambda g, Y=Y: Cotangents([Pair(2 * g * Y)], []), [X], name="G")
        (got,) = torch.autograd.grad(value, M)
        left = M.mH if G.hermitian else M.mT
        torch.testing.assert_close(Y, (left @ (M @ X)).detach())
        torch.testing.assert_close(got, torch.autograd.grad((left @ (M @ X)).abs().square().sum(), M)[0])


def test_given_adjoint_is_used():
    M = randn(4, N)
    forward, backward = Calls(lambda x: M @ x), Calls(lambda y: M.T @ y)
    A = FunctionOperator(forward, (4, N), REAL, "cpu", adjoint=backward)
    torch.testing.assert_close(A.mH @ randn(4), M.T @ randn(4))
    assert (forward.widths, backward.widths) == ([], [1])


HIDDEN = {
    "NumPy": lambda x: torch.from_numpy(W.numpy() @ x.numpy()),
    "NumPy after detach": lambda x: torch.from_numpy(W.numpy() @ x.detach().numpy()),
    "partly NumPy": lambda x: W @ x + torch.from_numpy(W.numpy() @ x.detach().numpy()),
    "an offset": lambda x: W @ x + 1.0,
}


@pytest.mark.parametrize("name", HIDDEN)
def test_an_adjoint_that_autograd_cannot_give_is_refused_by_name(name):
    A = operator(HIDDEN[name])
    with pytest.raises(AdjointUnavailableError, match="pass adjoint=..., or hermitian=True"):
        A.mH @ randn(N)
    with pytest.raises(AdjointUnavailableError):
        squared_norm(A, randn(N).requires_grad_()).backward()


def test_products_alone_do_not_need_an_adjoint():
    A = operator(HIDDEN["NumPy"])
    torch.testing.assert_close(squared_norm(A, randn(N)), (W @ randn(N)).square().sum())
    factor = randn(N).requires_grad_()
    B = ritz.operators.Diagonal(factor) @ A @ Dense(W)
    only_pairing(B, randn(N)).backward()  # only the left factor wants a gradient: no adjoint of A is needed
    torch.testing.assert_close(factor.grad, 2 * factor.detach() * (W @ W @ randn(N)).square())


# -- complex ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["callable", "real parameter", "dense", "sparse", "conjugate", "transpose", "adjoint"])
@pytest.mark.parametrize("width", [1, 3])
def test_complex_gradients(kind, width):
    Wc = randn(N, N, seed=4, dtype=COMPLEX)

    def value(theta, v):
        if kind == "callable":
            A = operator(lambda x: rows(theta, Wc @ x), dtype=COMPLEX)
        elif kind == "real parameter":
            A = operator(lambda x: rows(theta.real, Wc @ x), dtype=COMPLEX) + theta.real.sum() * Dense(Wc)
        elif kind == "sparse":
            A = Sparse(torch.arange(N + 1), torch.arange(N).flip(0), theta, (N, N))
        else:
            A = Dense(rows(theta, Wc))
            A = {"dense": A, "conjugate": A.mT.mH, "transpose": A.mT, "adjoint": A.mH}[kind]
        return squared_norm(A, v)

    v = randn(N, seed=2, dtype=COMPLEX) if width == 1 else randn(N, width, seed=2, dtype=COMPLEX)
    assert check_gradient(value, randn(N, seed=1, dtype=COMPLEX), v) < 1e-7


# -- autocast and precision -------------------------------------------------------------------------------------------


def test_the_callable_runs_under_the_users_autocast_and_own_numerics_do_not():
    weight = torch.randn(N, N, requires_grad=True)
    states = []

    def fn(x):
        states.append(torch.is_autocast_enabled("cpu"))
        return weight @ x

    A = ritz.aslinearoperator(fn, shape=N)
    inside = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with Run(A) as run:
            Y = run.matmat(torch.ones(N, 2))
            inside.append(torch.is_autocast_enabled("cpu"))
            inside.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        rule = lambda g: (inside.append(torch.is_autocast_enabled("cpu")), Cotangents([Pair(g * Y)], []))[1]
        (value,) = run.attach([Y.square().sum() / 2], rule, [torch.ones(N, 2)], name="half a square")
        assert torch.is_autocast_enabled("cpu")
    value.backward()
    assert run.bound.deferrable  # autocast's cached cast of the weight, left by the probe, must not hide the weight
    assert inside == [False, torch.float32, False]
    assert len(states) > 3 and all(states)  # the probe, the product, the pairing in backward
    expected = weight.detach().bfloat16().float() @ torch.ones(N, 2)
    torch.testing.assert_close(Y, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(weight.grad, (Y @ torch.ones(2, N)), rtol=2e-2, atol=2e-2)


def test_own_numerics_in_a_backward_pass_that_runs_inside_autocast():
    theta = torch.randn(N, requires_grad=True)
    inside = []
    with Run(ritz.aslinearoperator(lambda x: rows(theta, x), shape=N)) as run:
        Y = run.matmat(torch.ones(N, 2))
    rule = lambda g: (inside.append(torch.is_autocast_enabled("cpu")), Cotangents([Pair(g * Y)], []))[1]
    (value,) = run.attach([Y.sum()], rule, [torch.ones(N, 2)], name="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value.backward()
    assert inside == [False]


def test_a_product_taken_under_no_grad_inside_autocast_does_not_cost_the_gradient():
    """Autocast caches casts of parameters; one made without a graph must not be found again."""
    weight = torch.randn(N, N, requires_grad=True)
    A = ritz.aslinearoperator(lambda x: weight @ x, shape=N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            A @ torch.ones(N)
        only_pairing(A, torch.ones(N, 3)).backward()
    assert weight.grad is not None and bool(weight.grad.any())


def test_a_closure_may_open_its_own_autocast_region_and_use_ritz_in_there():
    states = []
    inner = ritz.aslinearoperator(lambda x: (states.append(torch.is_autocast_enabled("cpu")), 2 * x)[1], shape=N)

    def fn(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with Run(inner) as run:
                return run.matmat(x.reshape(N, -1)).reshape(x.shape)

    with Run(ritz.aslinearoperator(fn, shape=N)) as run:
        run.matmat(torch.ones(N, 1))
    assert states == [True]


def test_own_products_do_not_follow_autocast():
    M = torch.randn(N, N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = Dense(M, hermitian=False) @ torch.ones(N)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, M.sum(1))


def _precision() -> tuple:
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    return (torch.get_float32_matmul_precision(),)


@pytest.fixture
def low_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield _precision()
    torch.set_float32_matmul_precision(before)


def test_state_is_restored_after_an_exception(low_precision):
    def fn(x):
        raise ValueError("from the callable")

    with pytest.raises(ValueError, match="from the callable"):
        with torch.autocast("cpu", dtype=torch.bfloat16), Run(operator(fn, block=True)) as run:
            assert _precision() != low_precision
            run.matmat(randn(N, 2))
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert _precision() == low_precision
    assert ritz.numerics._outer_autocast.get() is None
    assert torch.overrides._len_torch_function_stack() == 0


def test_state_is_restored_when_entering_is_refused(low_precision):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(randn(N), randn(N))
        with pytest.raises(TransformError), Run(Dense(W), dual):
            pass
    assert torch.is_grad_enabled() and _precision() == low_precision


def test_threads_do_not_take_each_others_precision_for_the_users(low_precision):
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first():
        with full_precision():
            first_in.set()
            second_in.wait(5)
        first_out.set()

    def second():
        first_in.wait(5)
        with full_precision():
            second_in.set()
            first_out.wait(5)
            seen.append(_precision())

    threads = [threading.Thread(target=t) for t in (first, second)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert seen[0] != low_precision  # the second still computes in full precision
    assert _precision() == low_precision


# -- small things -----------------------------------------------------------------------------------------------------


def test_a_product_does_not_hand_out_its_operand():
    X = randn(N, 2)
    for A in (ritz.operators.identity(N, dtype=REAL), operator(lambda x: x), operator(lambda x: x.view(x.shape))):
        for Y in (A @ X, A @ X[:, 0]):
            assert Y.untyped_storage().data_ptr() != X.untyped_storage().data_ptr()
        with Run(A) as run:
            for _ in range(2):
                assert run.matmat(X).untyped_storage().data_ptr() != X.untyped_storage().data_ptr()


def test_attach_without_blocks():
    v = randn(N).requires_grad_()
    theta = randn(N).requires_grad_()
    with Run(operator(lambda x: rows(theta, x)), v) as run:
        pass
    (value,) = run.attach([v.detach().sum()], lambda g: Cotangents([], [g.expand(N)]), [], name="sum")
    value.backward()
    torch.testing.assert_close(v.grad, torch.ones_like(v))
    assert theta.grad is None
