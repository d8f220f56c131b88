"""Kernel operators in unusual states of PyTorch: default device, inference mode, transforms, threads, changed data."""

import threading

import pytest
import torch

import ritz
from ritz import functions
from ritz.errors import OperandError
from ritz.kernels import RBF, Linear, Matern, NumbaTiles, RationalQuadratic, Stored, Tiles
from ritz.kernels.evaluated import EvaluatedOperator
from ritz.kernels.products import FactoredOperator
from ritz.kernels.tiled import StationaryOperator
from ritz.solve import Nystrom, PivotedCholesky, RandomlyPivotedCholesky

KERNELS = {
    "one": lambda: 2.0 * Matern(1.5, 2),
    "sum": lambda: RBF() + 0.5 * Linear(),
    "product": lambda: RBF() * Matern(2.5),
    "evaluated": lambda: RBF() * Linear(),
}


def points(n, d=2, dtype=torch.float64):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_a_default_device_is_not_that_of_the_points():
    X, v, cpu = points(40), torch.ones(40, 1, dtype=torch.float64), torch.device("cpu")
    made = {"rbf": RBF().double(), "general": Matern(0.8).double(), "rational": RationalQuadratic().double()}
    single = RBF()
    far = 100 * points(40, dtype=torch.float32)  # distances in float64, entries in float32

    def products():
        for backend in (Tiles(16), NumbaTiles(16), Stored(Tiles(16))):
            for kernel in made.values():
                yield kernel(X, backend=backend) @ v
            yield single(far, backend=backend) @ v.float()
        for method in (PivotedCholesky(5), RandomlyPivotedCholesky(5), Nystrom(5)):
            yield method.build(made["rbf"](X), 0.1).solve(v)

    want = list(products())
    made["general"] = Matern(0.8).double()  # the table is made once per profile: anew
    with torch.device("meta"):
        on_meta = RBF(2, active_dims=[0, 1])
        got = list(products())
    assert on_meta.raw_lengthscale.device.type == "meta"
    for a, b in zip(got, want):
        assert a.device == cpu and torch.equal(a, b)


def test_stored_in_inference_mode():
    kernel, X, v = RBF().double(), points(20), torch.ones(20, dtype=torch.float64)
    want = kernel(X).to_dense().detach() @ v
    with torch.inference_mode():
        got = kernel(X.clone(), backend=Stored(Tiles(8))) @ v
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_stored_sees_data_that_was_replaced():
    kernel, X = RBF().double(), points(20)
    K = kernel(X, backend=Stored(Tiles(8)))
    v = torch.ones(20, dtype=torch.float64)
    first = (K @ v).detach()
    for step in range(3):  # also where the new memory could be that of the one before
        kernel.raw_lengthscale.data = torch.full((1, 1), 2.0 + step, dtype=torch.float64)
        torch.testing.assert_close((K @ v).detach(), kernel.evaluate(X).detach() @ v, rtol=1e-12, atol=1e-12)
    assert not torch.allclose((K @ v).detach(), first)


def test_adjoint_of_a_stored_rectangular_matrix_makes_no_tiles(monkeypatch):
    kernel, X, Z = RBF().double().requires_grad_(False), points(20), points(9)
    K, v = kernel(X, Z, backend=Stored(Tiles(8))), torch.ones(20, dtype=torch.float64)
    want = kernel.evaluate(X, Z).mT @ v
    assert (K @ torch.ones(9, dtype=torch.float64)).shape == (20,)
    monkeypatch.setattr(Tiles, "product", None)
    torch.testing.assert_close(K.mH @ v, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_to_dense_is_that_of_evaluate_with_and_without_a_graph(name):
    kernel, X = KERNELS[name]().double(), points(30)
    for Z in (None, points(19)):
        want = kernel.evaluate(X, Z).detach()
        for backend in (Tiles(8), Stored(Tiles(8))):
            K = kernel(X, Z, backend=backend)
            assert K.to_dense().requires_grad
            with torch.no_grad():
                torch.testing.assert_close(K.to_dense(), want, rtol=1e-12, atol=1e-12)
                if isinstance(backend, Stored):
                    torch.testing.assert_close(K.matrix(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["sum", "evaluated"])
def test_stored_is_filled_in_place(name, monkeypatch):
    """No tile of an evaluated matrix exceeds the edge, and no term of a sum goes by products with unit vectors."""
    sizes = []
    entries = EvaluatedOperator._entries

    def note(self, X, Z, rest):
        sizes.append((X if Z is None else Z).shape[0])
        return entries(self, X, Z, rest)

    monkeypatch.setattr(EvaluatedOperator, "_entries", note)
    monkeypatch.setattr(Tiles, "product", None)
    kernel, X = KERNELS[name]().double(), points(30)
    K = kernel(X, backend=Stored(Tiles(8))).matrix()
    torch.testing.assert_close(K, kernel.evaluate(X).detach(), rtol=1e-12, atol=1e-12)
    assert max(sizes, default=0) <= 8 and bool(sizes) == (name == "evaluated")


@pytest.mark.parametrize("backend", [Tiles(8), NumbaTiles(8), Stored(Tiles(8))], ids=repr)
@pytest.mark.parametrize("name", KERNELS)
def test_transforms_give_the_gradient_of_autograd_and_make_no_dense_matrix(name, backend, monkeypatch):
    kernel, X = KERNELS[name]().double(), points(20)
    v = torch.linspace(0, 1, 20, dtype=torch.float64)
    parameters = dict(kernel.named_parameters())

    def fn(parameters, X):
        K = torch.func.functional_call(kernel, parameters, (X,), {"backend": backend}).shift(0.1)
        form = ritz.quadratic_form(functions.log, K, v, method=ritz.Lanczos(20))
        x = ritz.solve(K, v, method=ritz.CG(rtol=1e-10), preconditioner=PivotedCholesky(5))
        probes = ritz.Hutchinson(2)
        return form + v @ x + ritz.logdet(K, preconditioner=PivotedCholesky(5), estimator=probes)

    Y = X.clone().requires_grad_(True)
    want = torch.autograd.grad(fn(parameters, Y), [*parameters.values(), Y])
    dense = []
    for kind in (StationaryOperator, FactoredOperator) if name != "evaluated" else ():
        recorded = kind._recorded
        monkeypatch.setattr(kind, "_recorded", lambda *a, f=recorded: dense.append(1) or f(*a))
    a, b = torch.func.grad(fn, argnums=(0, 1))(parameters, X)
    assert not dense
    for x, y in zip([*a.values(), b], want):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


def test_products_under_vmap_without_gradients():
    kernel, X = RBF().double(), points(10)
    V = points(3, 10)
    with torch.no_grad():
        got = torch.func.vmap(lambda v: kernel(X) @ v)(V)
        torch.testing.assert_close(got, V @ kernel.evaluate(X), rtol=1e-12, atol=1e-12)
        raws = kernel.raw_lengthscale + torch.arange(2.0, dtype=torch.float64).reshape(2, 1, 1)
        named = lambda raw: torch.func.functional_call(kernel, {"raw_lengthscale": raw}, (X,))
        moved = torch.func.vmap(lambda raw: named(raw) @ V[0])(raws)
        kernel.raw_lengthscale += 1
    torch.testing.assert_close(moved[0], got[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved[1], kernel.evaluate(X).detach() @ V[0], rtol=1e-12, atol=1e-12)


class Slow(ritz.kernels.Kernel):
    """Lets other threads in while it is evaluated."""

    def __init__(self):
        super().__init__()
        self.raw = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
        self.wait = threading.Event()

    def evaluate(self, X, Z=None):
        self.wait.wait(1e-4)
        return self.raw * (X @ (X if Z is None else Z).mT)


def test_python_threads_leave_the_parameters_of_a_kernel_in_place():
    kernel, X = Slow(), points(24)
    v, raw, found = torch.ones(24, 1, dtype=torch.float64), kernel.raw, []

    def work():
        for _ in range(3):
            K = kernel(X, backend=Tiles(8))
            (g,) = torch.autograd.grad((K @ v).sum(), [raw], allow_unused=True)
            found.append((kernel.raw is raw or None, g))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert kernel.raw is raw and len(found) == 9
    want = (X @ (X.mT @ v)).sum()
    for _, g in found:
        torch.testing.assert_close(g, want, rtol=1e-12, atol=1e-12)


def test_plain_products_leave_the_kernel_alone(monkeypatch):
    monkeypatch.setattr("ritz.kernels.evaluated.functional_call", None)
    kernel, X = Slow(), points(24)
    with torch.no_grad():
        assert (kernel(X, backend=Tiles(8)) @ torch.ones(24, dtype=torch.float64)).shape == (24,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(OperandError, match=r"X is torch\..*float16; expected float32 or float64"):
        RBF()(points(5).to(dtype))


def test_state_with_other_columns_is_refused():
    a, b = Matern(1.5, active_dims=[0, 2]), Matern(1.5, active_dims=[0, 2])
    a.lengthscale = 3.0
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.raw_lengthscale, a.raw_lengthscale)
    for other in (Matern(1.5, active_dims=[0, 1]), Matern(1.5, active_dims=[1]), Matern(1.5)):
        before = other.raw_lengthscale.detach().clone()
        with pytest.raises(RuntimeError, match="active_dims"):
            (2.0 * other).load_state_dict((2.0 * a).state_dict(), strict=False)
        assert torch.equal(other.raw_lengthscale, before)


def test_float32_pairs_far_from_all_other_points():
    """A few close neighbours far out: 6 of 4000 points leave the mean of ‖u‖² below the limit."""
    X, noise = 0.1 * points(4000, 10), points(6, 10)
    X[:6] = 7.2 * torch.nn.functional.normalize(torch.arange(1.0, 11.0), dim=0) + 0.02 * noise
    X = X.float()
    with torch.no_grad():
        K = (RBF(lengthscale=0.1)(X, backend=Tiles()) @ torch.eye(4000, 6))[:6].double()
    x = X[:6].double()
    want = torch.exp(-(x[:, None] - x).square().sum(2) / 0.02)
    torch.testing.assert_close(K, want, rtol=0, atol=1e-6)
