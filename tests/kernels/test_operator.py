"""Kernel operators against dense formulas: products, gradients, coincident points, offsets, float32, memory."""

import pytest
import torch
from tests.kernels.formulas import check_under_torch_func, direct, points

from ritz.errors import NonFiniteError, OperandError
from ritz.kernels import RBF, Kernel, Matern, Scale, Stored, Tiles
from ritz.solve import PivotedCholesky
from ritz.testing import check_gradient, check_operator

KERNELS = {
    "rbf": lambda: RBF(),
    "rbf ard": lambda: RBF(3, lengthscale=torch.tensor([0.5, 1.0, 2.0])),
    "matern12": lambda: Matern(0.5, 3),
    "matern32 scaled": lambda: 2.0 * Matern(1.5),
    "matern52": lambda: Scale(Scale(Matern(2.5, 3), 0.5), 4.0),
    "active": lambda: Matern(1.5, 2, active_dims=[0, 2]),
    "sum": lambda: 0.3 * (RBF(3) + 0.5 * Matern(0.5)),
    "product": lambda: 1.5 * (RBF() * Matern(2.5, 3)),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("edge", [None, 5])
def test_operator_contract(name, edge):
    kernel = KERNELS[name]().double()
    X, Z = points(17, 3).requires_grad_(True), points(9, 3, seed=1).requires_grad_(True)
    with torch.no_grad():
        Z[2] = X[1]
    check_operator(kernel(X, backend=Tiles(edge)))
    check_operator(kernel(X, Z, backend=Tiles(edge)))


@pytest.mark.parametrize("name", KERNELS)
def test_operator_contract_without_gradients_of_points_and_in_float32(name):
    kernel = KERNELS[name]()
    check_operator(kernel(points(12, 3, torch.float32), backend=Tiles(5)), rtol=1e-3)
    check_operator(kernel(points(12, 3, torch.float32), points(4, 3, torch.float32, 1)), rtol=1e-3)
    check_operator(kernel(points(12, 3), backend=Stored()), rtol=1e-6)  # parameters' gradients are float32


@pytest.mark.parametrize("name", KERNELS)
def test_entries_are_those_of_the_formula(name):
    kernel = KERNELS[name]().double()
    X, Z = points(17, 3), points(9, 3, seed=1)
    Z[2] = X[1]
    torch.testing.assert_close(kernel.evaluate(X, Z), direct(kernel, X, Z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel.evaluate(X), direct(kernel, X, X), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel(X).to_dense(), direct(kernel, X, X), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kernel(X) @ torch.eye(17).double(), direct(kernel, X, X), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_derivatives_of_the_dense_matrix(name):
    kernel = KERNELS[name]().double()
    parameters = dict(kernel.named_parameters())

    def fn(X, Z, *values):
        named = {f"kernel.{k}": v for k, v in zip(parameters, values)}
        return torch.func.functional_call(_Dense(kernel), named, (X, Z))

    X, Z = points(4, 3, repeat=False), points(3, 3, seed=1, repeat=False)
    check_gradient(fn, X, Z, *parameters.values(), rtol=1e-6)
    if name != "matern12" and name != "sum":  # at coincident points Matérn 1/2 has no derivative in them
        Z = Z.clone()
        Z[0] = X[0]
        check_gradient(lambda X, Z: fn(X, Z, *parameters.values()), X, Z, rtol=1e-3)
    x = X.clone().requires_grad_(True)
    assert torch.autograd.gradgradcheck(lambda x: fn(x, Z, *parameters.values()), (x,), atol=1e-5)


class _Dense(torch.nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, X, Z):
        return self.kernel.evaluate(X, Z)


@pytest.mark.parametrize("nu", [1.5, 2.5, None])
def test_mixed_second_derivative_at_coincident_points(nu):
    # d²k/dx dz at x = z is −2k'(0)/ℓ²·I (derivative in r²): the prior covariance of the gradient of f
    kernel = (RBF() if nu is None else Matern(nu)).double()
    x, z = (torch.full((1, 2), 0.3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (g,) = torch.autograd.grad(kernel.evaluate(x, z).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g[0, 0], z)
    want = {None: 1.0, 1.5: 3.0, 2.5: 5 / 3}[nu]
    torch.testing.assert_close(h, torch.tensor([[want, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_at_repeated_points_are_finite_and_zero_where_they_must(name):
    kernel = KERNELS[name]().double()
    X = torch.full((6, 3), 0.7, dtype=torch.float64, requires_grad=True)
    for backend in (Tiles(), Tiles(2), Stored()):
        X.grad = None
        kernel.zero_grad()
        K = kernel(X, backend=backend)
        (torch.arange(6.0).double() @ (K @ torch.ones(6, dtype=torch.float64))).backward()
        assert float(X.grad.abs().max()) < 1e-13
        for key, p in kernel.named_parameters():
            if "lengthscale" in key:
                assert float(p.grad.abs().max()) < 1e-13
            else:
                assert bool(torch.isfinite(p.grad).all()) and float(p.grad) > 0


@pytest.mark.parametrize("n, d", [(1, 1), (1, 4), (2, 1), (50, 1)])
def test_small_shapes(n, d):
    X = points(n, d, repeat=False).requires_grad_(True)
    check_operator((2.0 * Matern(1.5)).double()(X, backend=Tiles(7)), rtol=1e-9)
    flat = X.detach()[:, 0]
    torch.testing.assert_close(RBF().double()(flat).to_dense(), RBF().double()(flat.unsqueeze(1)).to_dense())


def test_empty_test_set():
    K = RBF()(torch.zeros(0, 2), torch.zeros(3, 2))
    assert (K @ torch.ones(3)).shape == (0,)


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5, None])
def test_huge_offsets_do_not_cancel(nu):
    kernel = (RBF() if nu is None else Matern(nu)).double()
    X, v = points(40, 2), torch.linspace(-1, 1, 40, dtype=torch.float64)
    near = kernel(X) @ v
    # the offset itself rounds the points to 1e-9; without centring nothing would be left of k
    torch.testing.assert_close(kernel(X + 2.0**23) @ v, near, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kernel(X + 2.0**23, X + 2.0**23).to_dense(), kernel(X).to_dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5, None])
@pytest.mark.parametrize("lengthscale", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("d", [1, 18])
def test_float32_products_and_gradients(nu, lengthscale, d):
    n = 600
    X, Q, Lam = (points(n, c, seed=s).float() for s, c in enumerate((d, 4, 4)))
    found = []
    for dtype in (torch.float32, torch.float64):
        base = RBF(d) if nu is None else Matern(nu, d)
        base.lengthscale = lengthscale * (d**0.5)
        kernel = base.to(dtype)
        K = kernel(X.to(dtype).requires_grad_(True))
        q, lam = Q.to(dtype), Lam.to(dtype)
        found.append([(K @ q).detach(), *K.pair(q, q), *K.pair(lam, q)])
    product, *gradients = zip(*found)
    size = float(product[1].norm())
    assert float((product[0] - product[1]).norm()) < 1e-5 * size
    for single, double in gradients:
        scale = max(float(double.norm()), 10.0)  # one number from 1e6 terms of random sign may all but cancel
        assert float((single - double).norm()) < 1e-4 * scale


@pytest.mark.parametrize("name", ["rbf", "matern12", "matern52", "active"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_diagonal_is_exact(name, dtype):
    kernel = KERNELS[name]().to(dtype)
    K = kernel(points(50, 3, dtype), backend=Tiles(16))
    want = K.diagonal()
    assert torch.equal((K @ torch.eye(50, dtype=dtype)).diagonal(), want)
    assert torch.equal(K.to_dense().diagonal(), want)


def test_repeated_rows_in_float32_with_matern12():
    # rounding δ in r² would cost √δ = 1e-3 here
    X = points(30, 5, torch.float32)
    X = torch.cat([X, X])
    K = Matern(0.5)(X) @ torch.eye(60)
    assert bool((K[:30, 30:].diagonal() == 1).all())
    torch.testing.assert_close(K.double(), direct(Matern(0.5).double(), X.double(), X.double()), rtol=1e-5, atol=1e-6)


def test_one_operator_serves_several_backward_passes():
    kernel, X, v = (2.0 * Matern(1.5)).double(), points(20, 2), torch.ones(20).double()
    K = kernel(X)
    grads = []
    for _ in range(2):
        kernel.zero_grad()
        (v @ (K @ v)).backward()
        grads.append([p.grad.clone() for p in kernel.parameters()])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["matern52", "sum", "product"])
def test_under_torch_func(name):
    kernel = KERNELS[name]().double()
    check_under_torch_func(kernel, points(20, 3))


def test_functional_parameters_reach_products_after_the_call():
    kernel, X, v = (RBF() * Matern(2.5)).double(), points(15, 3), torch.ones(15).double()
    swapped = {k: (p.detach() + 0.5).requires_grad_(True) for k, p in kernel.named_parameters()}
    K = torch.func.functional_call(kernel, swapped, (X,))
    other = KERNELS["product"]().double().base_kernel
    with torch.no_grad():
        for p, q in zip(other.parameters(), swapped.values()):
            p.copy_(q[:, :1].expand_as(p))
    grads = torch.autograd.grad((K @ v).sum(), list(swapped.values()))
    assert all(float(g.abs().sum()) > 0 for g in grads)
    torch.testing.assert_close((K @ v).detach(), (other(X) @ v).detach())


def test_preconditioner_finds_columns_and_diagonal():
    kernel, X = (3.0 * RBF(lengthscale=0.8)).double(), points(60, 2)
    K = kernel(X)
    P = PivotedCholesky(40).build(K.shift(0.1))
    torch.testing.assert_close(P @ torch.eye(60).double(), K.shift(0.1).to_dense(), rtol=0, atol=1e-2)


class Brownian(Kernel):
    """A kernel of the user's own, with no operator of its own."""

    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(1.5))

    def evaluate(self, X, Z=None):
        return self.rate * torch.minimum(X, (X if Z is None else Z).mT)


def test_a_kernel_of_ones_own():
    X = torch.rand(23, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kernel = (Brownian() + 0.5 * Matern(1.5)).double()
    check_operator(kernel(X, backend=Tiles(6)))
    check_operator(kernel(X, X[:5], backend=Tiles(6)))


def test_arguments():
    X = torch.zeros(3, 2)
    cases = [
        (lambda: RBF(3)(X), "ard_num_dims=3"),
        (lambda: RBF(ard_num_dims=2, active_dims=[0]), "active_dims"),
        (lambda: RBF(active_dims=[2])(X), "column 2"),
        (lambda: RBF()(X.long()), "floating-point"),
        (lambda: RBF()(X, torch.zeros(3, 1)), "must agree"),
        (lambda: RBF()(X, torch.zeros(3, 2, dtype=torch.float64)), "must agree"),
        (lambda: RBF(lengthscale=0.0), "lengthscale"),
        (lambda: RBF(2, lengthscale=[1.0, 2.0, 3.0]), "shape"),
        (lambda: Scale(RBF(), -1.0), "outputscale"),
        (lambda: Tiles(0), "edge"),
        (lambda: RBF()(X, backend="torch"), "backend"),
    ]
    for call, words in cases:
        with pytest.raises(OperandError, match=words):
            call()
    with pytest.raises(NonFiniteError, match="X has 1 NaN"):
        RBF()(torch.tensor([[0.0], [float("nan")]]))
    with pytest.raises(TypeError):
        RBF() + 1.0


def test_names_as_in_gpytorch():
    kernel = Scale(Matern(2.5, ard_num_dims=4))
    assert {k for k, _ in kernel.named_parameters()} == {"raw_outputscale", "base_kernel.raw_lengthscale"}
    kernel.outputscale, kernel.base_kernel.lengthscale = 2.5, 0.3
    torch.testing.assert_close(kernel.outputscale, torch.tensor(2.5))
    torch.testing.assert_close(kernel.base_kernel.lengthscale, torch.full((1, 4), 0.3))
    assert isinstance(2.0 * RBF(), Scale) and kernel.base_kernel.ard_num_dims == 4
    for value in (1e-6, 1.0, 25.0, 1e4):
        kernel.double().outputscale = value
        assert float(kernel.outputscale.detach()) == pytest.approx(value, rel=1e-9)


def test_memory_stays_in_tiles():
    # the 20 000 × 20 000 matrix would take 1.6 GB; everything that is allocated here is below 64 MB together
    n = 20_000
    kernel = Scale(RBF(3))
    X, v = torch.rand(n, 3).requires_grad_(True), torch.rand(n, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        y = kernel(X) @ v
        y.sum().backward()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < 64 * 2**20
    assert bool(torch.isfinite(X.grad).all())


@pytest.mark.parametrize("name", ["matern32 scaled", "sum"])
def test_stored_matrix_follows_its_parameters_and_is_twice_differentiable(name):
    kernel, X = KERNELS[name]().double(), points(12, 3, repeat=False).requires_grad_(True)
    v = torch.linspace(-1, 1, 12, dtype=torch.float64)
    K = kernel(X, backend=Stored())
    assert (K @ v).equal(K @ v)
    with torch.no_grad():
        for p in kernel.parameters():
            p += 0.3
        X[0] += 0.1
    torch.testing.assert_close(K @ v, direct(kernel, X, X) @ v)
    x = torch.full_like(v, 0.5).requires_grad_(True)
    if name != "sum":  # Matérn 1/2 has no second derivative on the diagonal
        assert torch.autograd.gradgradcheck(lambda x: K @ x, (x,)) and torch.autograd.gradgradcheck(
            lambda X: kernel(X, backend=Stored()) @ v, (X,)
        )
    check_operator(kernel(X, X[:5].detach(), backend=Stored()))
