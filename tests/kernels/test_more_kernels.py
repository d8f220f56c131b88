"""Rational quadratic, periodic, general Matérn, linear and polynomial kernels, and products: against plain formulas."""

import copy
import math
import pickle

import pytest
import torch
from tests.kernels.formulas import check_under_torch_func, direct, points

from ritz.errors import OperandError
from ritz.kernels import (
    RBF,
    EvaluatedOperator,
    FactoredOperator,
    Linear,
    Matern,
    Periodic,
    Polynomial,
    RationalQuadratic,
    Scale,
    StationaryOperator,
    Stored,
    Tiles,
)
from ritz.testing import check_gradient, check_operator

KERNELS = {
    "rq": lambda: RationalQuadratic(alpha=0.7),
    "rq ard": lambda: 2.0 * RationalQuadratic(3, 1.7, lengthscale=torch.tensor([0.5, 1.0, 2.0])),
    "periodic": lambda: Periodic(period_length=1.3, lengthscale=0.8),
    "periodic ard": lambda: Scale(Periodic(2, [0.7, 2.0], lengthscale=[0.5, 1.5], active_dims=[2, 0]), 0.5),
    "matern 0.7": lambda: Matern(0.7, 3),
    "matern 1.2": lambda: 2.0 * Matern(1.2, active_dims=[1, 2]),
    "matern 3.2": lambda: Matern(3.2, 3, lengthscale=[0.5, 1.0, 2.0]),
    "linear": lambda: Linear(variance=0.4),
    "linear ard": lambda: 3.0 * Scale(Linear(2, [0.5, 2.0], active_dims=[2, 0]), 0.5),
    "polynomial": lambda: 0.5 * Polynomial(3, 0.8, active_dims=[0, 1]),
    "locally periodic": lambda: 2.0 * (RBF(3) * (0.7 * Periodic(lengthscale=1.5, active_dims=[1]))),
    "rq matern": lambda: 0.5 * (RationalQuadratic(3) * Scale(Matern(1.2, active_dims=[0, 2]), 3.0)),
    "four factors": lambda: RBF(3) * Matern(0.5) * Periodic(active_dims=[1]) * RationalQuadratic(alpha=2.0),
    "with linear": lambda: RationalQuadratic() * Matern(2.5) * Linear(),
    "sum": lambda: 0.3 * (RationalQuadratic() + Linear(3) + Scale(Periodic(3), 0.5)),
}
SMOOTH = [
    name for name in KERNELS if name not in ("matern 0.7", "four factors")
]  # differentiable in the points where they coincide


class Dense(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, X, Z):
        return self.kernel.evaluate(X, Z)


@pytest.mark.parametrize("name, edge", [*((name, 5) for name in KERNELS), ("rq", None), ("rq matern", None)])
def test_operator_contract(name, edge):
    kernel = KERNELS[name]().double()
    X, Z = points(13).requires_grad_(True), points(7, seed=1).requires_grad_(True)
    with torch.no_grad():
        Z[2] = X[1]
    check_operator(kernel(X, backend=Tiles(edge)))
    check_operator(kernel(X, Z, backend=Tiles(edge)))


@pytest.mark.parametrize("name", KERNELS)
def test_operator_contract_in_float32_and_stored(name):
    kernel = KERNELS[name]()
    check_operator(kernel(points(12, dtype=torch.float32), backend=Tiles(5)), rtol=1e-3)
    check_operator(kernel(points(12), backend=Stored()), rtol=1e-6)  # parameters' gradients are float32


@pytest.mark.parametrize("name", KERNELS)
def test_entries_are_those_of_the_formula(name):
    kernel = KERNELS[name]().double()
    X, Z = points(11), points(9, seed=1)
    Z[2] = X[1]
    want = direct(kernel, X, Z).detach()
    torch.testing.assert_close(kernel.evaluate(X, Z).detach(), want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(kernel(X, Z).to_dense(), want, rtol=1e-12, atol=1e-12)
        same = kernel(X, backend=Tiles(4)) @ torch.eye(11).double()
    torch.testing.assert_close(same, direct(kernel, X, X).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_derivatives_of_the_dense_matrix(name):
    kernel = KERNELS[name]().double()
    parameters = dict(kernel.named_parameters())

    def fn(X, Z, *values):
        named = {f"kernel.{k}": v for k, v in zip(parameters, values)}
        return torch.func.functional_call(Dense(kernel), named, (X, Z))

    X, Z = points(4, repeat=False), points(3, seed=1, repeat=False)
    check_gradient(fn, X, Z, *parameters.values(), rtol=1e-6)
    if name in SMOOTH:
        Z[0] = X[0]
        check_gradient(lambda X, Z: fn(X, Z, *parameters.values()), X, Z, rtol=1e-3)
    Z = points(3, seed=1, repeat=False)
    inputs = [t.detach().clone().requires_grad_(True) for t in (X, *parameters.values())]
    assert torch.autograd.gradgradcheck(lambda x, *p: fn(x, Z, *p), inputs, atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_two_derivatives_are_finite_at_coincident_points(name, dtype):
    kernel = KERNELS[name]().to(dtype)
    X = torch.full((4, 3), 0.7, dtype=dtype).requires_grad_(True)
    leaves = [X, *kernel.parameters()]
    for K in (kernel.evaluate(X), kernel.evaluate(X, X.detach().clone().requires_grad_(True))):
        weights = torch.linspace(1, 2, 16, dtype=dtype).reshape(4, 4)
        first = torch.autograd.grad((weights * K).sum(), leaves, create_graph=True, allow_unused=True)
        total = sum((g * g.detach().clone().fill_(0.3)).sum() for g in first if g is not None)
        second = torch.autograd.grad(total, leaves, allow_unused=True)
        for g in (K, *first, *second):
            assert g is None or bool(torch.isfinite(g).all())
    for backend in (Tiles(), Tiles(2), Stored()):
        (kernel(X, backend=backend) @ torch.linspace(1, 2, 4, dtype=dtype)).square().sum().backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in leaves)


@pytest.mark.parametrize(
    "name", ["rq", "periodic", "matern 0.7", "matern 1.2", "matern 3.2", "locally periodic", "rq matern"]
)
@pytest.mark.parametrize("lengthscale", [0.05, 0.5, 5.0])
def test_float32_products_and_gradients(name, lengthscale):
    X, Q, Lam = (points(500, c, seed=s).float() for s, c in enumerate((3, 4, 4)))
    found = []
    for dtype in (torch.float32, torch.float64):
        kernel = KERNELS[name]().to(dtype)
        for module in kernel.modules():
            if hasattr(module, "raw_lengthscale"):
                module.lengthscale = lengthscale**2 if isinstance(module, Periodic) else lengthscale
        K = kernel(X.to(dtype).requires_grad_(True))
        q, lam = Q.to(dtype), Lam.to(dtype)
        found.append([(K @ q).detach(), *K.pair(q, q), *K.pair(lam, q)])
    (single, double), *gradients = zip(*found)
    assert float((single - double).norm()) < 1e-5 * float(double.norm())
    for single, double in gradients:
        # one number out of 2e5 terms of random sign may all but cancel
        assert float((single - double).norm()) < 1e-4 * max(float(double.norm()), 10.0)


def test_float32_gradients_of_products_in_many_dimensions():
    # k is largest on the diagonal there, whose terms u_i − u_i would have to cancel
    X, Lam, Q = (points(300, c, seed=s).float() for s, c in enumerate((18, 4, 4)))
    found = []
    for dtype in (torch.float32, torch.float64):
        kernel = (RationalQuadratic(18, lengthscale=1.5) * Matern(2.5, 18, lengthscale=1.5)).to(dtype)
        x = X.to(dtype).requires_grad_(True)
        found.append(kernel(x).pair(Lam.to(dtype), Q.to(dtype))[0])
    assert float((found[0] - found[1]).norm()) < 4e-6 * float(found[1].norm())  # 1.1e-5 if they had to


def test_mixed_second_derivative_at_coincident_points():
    # d²k/dx dz at x = z is −2k'(0)/ℓ²: the variance of the derivative of a draw, ν/(ν − 1) for Matérn
    cases = [
        (RationalQuadratic(alpha=0.3), 1.0),
        (Matern(1.2), 6.0),
        (Matern(3.5), 1.4),
        (Periodic(period_length=2.0, lengthscale=0.5), (math.pi / 2.0) ** 2 * 4 / 0.5),
    ]
    for kernel, want in cases:
        kernel = kernel.double()
        x, z = (torch.full((1, 1), 0.3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        (g,) = torch.autograd.grad(kernel.evaluate(x, z).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), z)
        assert h.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    "name", ["rq", "periodic", "matern 1.2", "linear ard", "polynomial", "locally periodic", "rq matern"]
)
def test_under_torch_func_and_over_several_backward_passes(name):
    kernel = KERNELS[name]().double()
    X, v = points(15), torch.linspace(0, 1, 15, dtype=torch.float64)
    check_under_torch_func(kernel, X)
    X = X.clone().requires_grad_(True)
    K = kernel(X)
    passes = [torch.autograd.grad(v @ (K @ v), [*kernel.parameters(), X]) for _ in range(2)]
    for x, y in zip(*passes):
        assert torch.equal(x, y)
    with torch.no_grad():
        for p in kernel.parameters():
            p += 0.3
    torch.testing.assert_close(K @ v, kernel(X) @ v)


@pytest.mark.parametrize("name", ["rq", "linear ard", "rq matern", "sum"])
@pytest.mark.parametrize("backend", [Tiles(4), Stored()])
def test_products_are_twice_differentiable(name, backend):
    kernel, X = KERNELS[name]().double(), points(6, repeat=False).requires_grad_(True)
    v = torch.linspace(-1, 1, 6, dtype=torch.float64).requires_grad_(True)
    assert torch.autograd.gradgradcheck(lambda X, v: kernel(X, backend=backend) @ v, (X, v))


def test_period_and_far_points():
    kernel = Periodic(lengthscale=0.3).double()
    kernel.period_length = 0.25
    X = points(20, 2)
    near = kernel(X).to_dense()
    torch.testing.assert_close(kernel(X, X + 0.25 * torch.tensor([3.0, -7.0])).to_dense(), near, rtol=0, atol=1e-12)
    # 2²⁰ periods away the points themselves round to 1e-10
    torch.testing.assert_close(kernel(X + 2.0**18).to_dense(), near, rtol=0, atol=1e-7)
    far = X.float() + 1000.0
    torch.testing.assert_close(
        kernel.float()(far).to_dense().double(), kernel.double()(far.double()).to_dense(), rtol=0, atol=1e-6
    )


def test_linear_is_of_low_rank_and_needs_no_tiles():
    n = 200_000
    kernel, X = Linear(3, [0.5, 1.0, 2.0]), torch.linspace(-1, 1, 3 * n).reshape(n, 3).requires_grad_(True)
    K = kernel(X)  # its matrix would take 160 GB
    (K @ torch.ones(n, 2)).sum().backward()
    assert bool(torch.isfinite(X.grad).all()) and K.psd and K.hermitian
    assert int(torch.linalg.matrix_rank(kernel(X[:50]).to_dense())) <= 3
    torch.testing.assert_close(K.diagonal()[:2], (X[:2].square() * kernel.variance).sum(1))


def test_gaussian_factors_share_their_tiles():
    X = points(9)
    assert isinstance((RBF() * Periodic() * (2.0 * RBF(3))).double()(X), StationaryOperator)
    nested = Scale(RBF() * (RBF(active_dims=[1]) * Scale(Periodic())))
    assert isinstance(nested.double()(X), StationaryOperator)
    factored = (RBF() * Matern(1.5) * Periodic() * Scale(RationalQuadratic())).double()(X)
    assert isinstance(factored, FactoredOperator) and len(factored.factors) == 3
    assert isinstance((RBF() * Linear()).double()(X), EvaluatedOperator)
    squared = RBF(lengthscale=2.0) * RBF(lengthscale=2.0)
    want = RBF(lengthscale=math.sqrt(2.0)).double()(X).to_dense()
    torch.testing.assert_close(squared.double()(X).to_dense(), want)
    shared = RBF().double()  # one module twice: the gradient counts twice
    grads = []
    for kernel in (shared * shared, shared):
        shared.zero_grad()
        kernel(X).to_dense().log().sum().backward()
        (kernel(X) @ X).sum().backward()
        grads.append(shared.raw_lengthscale.grad.clone())
    dense = torch.autograd.grad(
        (shared.evaluate(X).square().log().sum() + (shared.evaluate(X).square() @ X).sum()), shared.raw_lengthscale
    )[0]
    torch.testing.assert_close(grads[0], dense)


def test_names_as_in_gpytorch():
    named = lambda kernel: {k: tuple(p.shape) for k, p in kernel.named_parameters()}
    assert named(RationalQuadratic(2)) == {"raw_lengthscale": (1, 2), "raw_alpha": (1,)}
    assert named(Periodic(2)) == {"raw_lengthscale": (1, 2), "raw_period_length": (1, 2)}
    assert named(Linear()) == {"raw_variance": (1, 1)} and named(Polynomial(3)) == {"raw_offset": (1,)}
    kernel = Scale(Periodic())
    kernel.base_kernel.period_length = 365.25
    torch.testing.assert_close(kernel.base_kernel.period_length, torch.full((1, 1), 365.25))
    linear, polynomial, rq = Linear(2), Polynomial(2), RationalQuadratic()
    linear.variance, polynomial.offset, rq.alpha = [0.5, 3.0], 0.2, 4.0
    torch.testing.assert_close(linear.variance, torch.tensor([[0.5, 3.0]]))
    torch.testing.assert_close(torch.cat([polynomial.offset, rq.alpha]), torch.tensor([0.2, 4.0]))
    assert "alpha=4" in repr(rq) and "nu=1.2" in repr(Matern(1.2)) and "power=2" in repr(polynomial)


def test_copies_and_pickles_after_use():
    X = points(5)
    for name in ("matern 1.2", "rq ard", "four factors"):
        kernel = KERNELS[name]().double()
        want = kernel(X).to_dense()
        for other in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))):
            assert torch.equal(other(X).to_dense(), want)


def test_arguments():
    X = torch.zeros(3, 2)
    cases = [
        (lambda: RationalQuadratic(alpha=0.0), "alpha"),
        (lambda: Periodic(period_length=-1.0), "period_length"),
        (lambda: Matern(0.0), "0 < nu"),
        (lambda: Matern(60.0), "RBF"),
        (lambda: Linear(3)(X), "ard_num_dims=3"),
        (lambda: Linear(variance=0.0), "variance"),
        (lambda: Linear(active_dims=[2])(X), "column 2"),
        (lambda: Polynomial(0), "power=0"),
        (lambda: Polynomial(1.5), "power=1.5"),
        (lambda: Polynomial(2, -1.0), "offset"),
        (lambda: (RBF(3) * Periodic())(X), "ard_num_dims=3"),
    ]
    for call, words in cases:
        with pytest.raises(OperandError, match=words):
            call()
