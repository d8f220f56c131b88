"""Cost contracts: products, width of the pairing, bytes kept for backward, flat memory; and the report with it."""

import gc
import warnings

import pytest
import torch

import ritz
from ritz import functions as F
from ritz.errors import ConvergenceError, ConvergenceWarning
from ritz.testing import laplacian_2d, suitesparse

N = 300


@pytest.fixture(scope="module")
def definite():
    """Diagonal, condition 1e4: known functions, honest Krylov behaviour."""
    return torch.logspace(-2, 2, N, dtype=torch.float64)


@pytest.fixture
def v():
    return torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def counted(d):
    return ritz.Counting(ritz.operators.Diagonal(d).declare(hermitian=True))


def general(d):
    return ritz.Counting(ritz.aslinearoperator(lambda x: d * x, shape=d.shape[0], dtype=d.dtype))


@pytest.mark.parametrize("k", [20, 60, 100])
@pytest.mark.parametrize(
    ("f", "width"),
    [(F.log, 12), (F.exp, 16), (F.sqrt, 16), (F.inverse, 3), (lambda x: torch.exp(-x), 20)],
    ids=["log", "exp", "sqrt", "inverse", "callable"],
)
def test_width_of_the_pairing(f, width, k, definite, v):
    """X has a small numerical rank almost independent of the depth: the pairing sees about 10 columns, not k."""
    d = definite.clone().requires_grad_()
    A = counted(d / 10)
    ritz.quadratic_form(f, A, v, method=ritz.Lanczos(k), gradient=ritz.Frechet(rtol=1e-8)).backward()
    assert 0 < A.num_paired <= width
    (gradient,) = torch.autograd.grad(
        ritz.quadratic_form(f, counted(d / 10), v, method=ritz.Lanczos(k), gradient=ritz.Frechet(rtol=1e-14)), d
    )
    assert float((d.grad - gradient).norm() / gradient.norm()) < 1e-7


K = 15
CALLS = {
    "form": lambda A, v, **o: ritz.quadratic_form(F.exp, A, v, method=ritz.Lanczos(K), **o),
    "multiply": lambda A, v, **o: ritz.funm_multiply(F.exp, A, v, method=ritz.Lanczos(K), **o),
    "bilinear": lambda A, v, **o: ritz.bilinear_form(F.exp, A, v, v, method=ritz.Lanczos(K), **o),
    "grid": lambda A, v, **o: ritz.expm_multiply(A, v, torch.tensor([0.1, 0.2]), method=ritz.Lanczos(K), **o),
    "trace": lambda A, v, **o: ritz.trace(A, F.exp, estimator=ritz.Hutchinson(4), method=ritz.Lanczos(K), **o),
    "logdet curve": lambda A, v, **o: ritz.logdet(
        A, shifts=torch.tensor([0.1, 0.2, 1.0]), estimator=ritz.Hutchinson(4), method=ritz.Lanczos(K), **o
    ),
    "diagonal": lambda A, v, **o: ritz.diagonal(A, F.exp, estimator=ritz.Hutchinson(4), method=ritz.Lanczos(K), **o),
}
#                     forward, backward by Frechet, backward by Adjoint
COSTS = {
    "form": (K, 0, K),
    "multiply": (K, K, K),
    "bilinear": (K, K, K),
    "grid": (K, 2 * K, K),
    "trace": (4 * K, 0, 4 * K),
    "logdet curve": (4 * K, 0, 4 * K),
    "diagonal": (4 * K, 4 * K, 4 * K),
}


@pytest.mark.parametrize("rule", [ritz.Frechet(), ritz.Adjoint()], ids=["Frechet", "Adjoint"])
@pytest.mark.parametrize("name", CALLS)
def test_products(name, rule, definite, v):
    """The table of costs; Info agrees with the counter, forward and backward."""
    forward, frechet, adjoint = COSTS[name]
    backward = frechet if rule == ritz.Frechet() else adjoint
    d = (definite / 30).requires_grad_()
    A = counted(d)
    out, info = CALLS[name](A, v, gradient=rule, return_info=True)
    assert (A.num_forward, A.num_adjoint, A.num_paired) == (forward, 0, 0)
    assert info.num_matvecs == forward and info.depth == K and info.status is ritz.Status.FIXED
    assert info.method == ritz.Lanczos(K) and info.backward is None
    out.sum().backward()
    assert (A.num_forward, A.num_adjoint) == (forward, backward) and A.num_paired > 0
    assert info.backward is not None and info.backward.num_matvecs == backward
    assert bool(torch.isfinite(d.grad).all()) and float(d.grad.abs().max()) > 0


@pytest.mark.parametrize("name", CALLS)
def test_nothing_wanted_nothing_done(name, definite, v):
    """Without a tensor that requires grad, and under no_grad or inference_mode: k products, no graph."""
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            A = counted(definite / 30)
            out = CALLS[name](A, v)
        assert not out.requires_grad and out.grad_fn is None
        assert (A.num_forward, A.num_adjoint, A.num_paired) == (COSTS[name][0], 0, 0)
    d = (definite / 30).requires_grad_()
    with torch.no_grad():
        assert not CALLS[name](counted(d), v).requires_grad


def test_gradient_in_the_vector_alone_pairs_nothing(definite, v):
    x = v.clone().requires_grad_()
    A = counted(definite / 30)
    ritz.quadratic_form(F.exp, A, x, method=ritz.Lanczos(K)).backward()
    assert A.num_paired == 0
    torch.testing.assert_close(x.grad, 2 * torch.exp(definite / 30) * v, rtol=1e-9, atol=1e-9)


def live_bytes():
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in gc.get_objects():
            if type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def test_bytes_kept_for_backward():
    """A form keeps n·r numbers, f(A)v its basis of n·k; the k-vector basis of a form is gone before backward."""
    n, k = 4000, 80
    d = torch.linspace(0.1, 3, n, dtype=torch.float64).requires_grad_()
    x = torch.ones(n, dtype=torch.float64)
    kept = {}
    for name, call in (
        ("form", lambda A: ritz.quadratic_form(F.log, A, x, method=ritz.Lanczos(k))),
        ("vector", lambda A: ritz.funm_multiply(F.log, A, x, method=ritz.Lanczos(k))),
    ):
        A = counted(d)
        before = live_bytes()
        out = call(A)
        kept[name] = (live_bytes() - before) / (8 * n)
        out.sum().backward()
        del out, A
    assert kept["form"] < 20 < k < kept["vector"] < k + 20, kept


def test_memory_is_flat():
    """200 steps of value and gradient leave nothing behind: no cycle holds a basis until the collector runs."""
    d = torch.linspace(0.5, 3, 200, dtype=torch.float64).requires_grad_()
    x = torch.ones(200, dtype=torch.float64)

    def step():
        A = ritz.aslinearoperator(lambda y: d * y, shape=200, dtype=torch.float64, hermitian=True)
        value, info = ritz.quadratic_form(F.log, A, x, method=ritz.Lanczos(8), return_info=True)
        out, late = ritz.funm_multiply(F.exp, A, x, method=ritz.Lanczos(8), return_info=True)
        torch.autograd.grad(value + out.sum(), d)
        ritz.logdet(A, method=ritz.Lanczos(4))  # a graph that is dropped without backward
        return info, late

    def tensors():
        return sum(type(o) is torch.Tensor for o in gc.get_objects())

    for _ in range(5):
        step()
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        for _ in range(200):
            step()
        assert tensors() - before < 20
    finally:
        gc.enable()


# -- adaptive depth ---------------------------------------------------------------------------------------------------


def market():
    bus = suitesparse("1138_bus").to_dense()
    scale = bus.diagonal().rsqrt()
    scaled = scale[:, None] * bus * scale  # condition 1e5 or so, instead of 1e7
    g = torch.Generator().manual_seed(0)
    M = torch.randn(60, 60, dtype=torch.float64, generator=g)
    return {
        "Laplacian": laplacian_2d(12).to_dense(),
        "scaled 1138_bus": (scaled + scaled.T) / 2,
        "log-spread": torch.diag(torch.logspace(-3, 1, 150, dtype=torch.float64)),
        "nonsymmetric": 3 * torch.eye(60, dtype=torch.float64) + M / 60**0.5,
    }


MARKET = market()


BUS = "scaled 1138_bus"
TABLE = [
    (case, f, rtol)
    for case in MARKET
    if case != BUS
    for f in ("log", "rsqrt", "exp(-x)", "sqrt")
    for rtol in (1e-4, 1e-8)
]
TABLE += [(BUS, "log", 1e-4), (BUS, "rsqrt", 1e-4), pytest.param(BUS, "rsqrt", 1e-8, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("case", "function", "rtol"), TABLE)
def test_rtol_is_honoured(case, function, rtol):
    """The true error of f(A)v is at most about 10 rtol, and the depth is not the whole space."""
    f, dense = {
        "log": (F.log, torch.log),
        "rsqrt": (F.rsqrt, lambda x: x**-0.5),
        "sqrt": (F.sqrt, lambda x: x**0.5),
        "exp(-x)": (lambda x: torch.exp(-x), lambda x: torch.exp(-x)),
    }[function]
    matrix = MARKET[case]
    n = matrix.shape[0]
    v = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    symmetric = case != "nonsymmetric"
    if symmetric:
        w, Q = torch.linalg.eigh(matrix)
        exact = Q @ (dense(w) * (Q.T @ v))
    else:
        w, Q = torch.linalg.eig(matrix)
        exact = (Q @ (dense(w) * torch.linalg.solve(Q, v + 0j))).real
    method = (ritz.Lanczos if symmetric else ritz.Arnoldi)(rtol=rtol, max_matvecs=1200)
    A = ritz.Counting(ritz.aslinearoperator(matrix, hermitian=symmetric or None))
    y, info = ritz.funm_multiply(f, A, v, method=method, return_info=True)
    assert float((y - exact).norm() / exact.norm()) < 10 * rtol
    # Of the power network the whole Krylov space of v has 969 dimensions, which rounding may name either way.
    ends = (ritz.Status.CONVERGED, ritz.Status.EXHAUSTED) if case == BUS else (ritz.Status.CONVERGED,)
    assert info.status in ends and info.num_matvecs == A.num_matvecs == info.depth
    assert info.depth < n or case == "log-spread"
    assert float(info.residual.max()) <= rtol and info.method == method
    if symmetric:
        form, info = ritz.quadratic_form(f, matrix, v, method=method, return_info=True)
        assert abs(float(form - v @ exact)) < 10 * rtol * float(v.norm() * exact.norm())


def test_a_missed_tolerance_is_told():
    matrix, v = MARKET["log-spread"], torch.ones(150, dtype=torch.float64)
    method = ritz.Lanczos(rtol=1e-10, max_matvecs=20)
    with pytest.warns(
        ConvergenceWarning,
        match=r"step limit reached after 20 steps \(20 products\); worst residual .* target of 1e-10; allow more",
    ):
        _, info = ritz.funm_multiply(F.log, matrix, v, method=method, return_info=True)
    assert info.status is ritz.Status.MAX_STEPS and info.depth == 20 and float(info.residual) > 1e-10
    for call in (
        lambda mode: ritz.funm_multiply(F.log, matrix, v, method=method, on_failure=mode),
        lambda mode: ritz.quadratic_form(F.log, matrix, v, method=method, on_failure=mode),
        lambda mode: ritz.logdet(matrix, method=method, on_failure=mode),
        lambda mode: ritz.diagonal(matrix, F.log, method=method, on_failure=mode),
    ):
        with pytest.raises(ConvergenceError, match="step limit"):
            call("raise")
        call("ignore")  # warnings are errors in this suite


def test_backward_reports_its_own_convergence():
    """The forward space converges at once (an eigenvector), the cotangent's does not."""
    A = MARKET["log-spread"].clone().requires_grad_()
    e = torch.eye(150, dtype=torch.float64)[3]
    out, info = ritz.funm_multiply(
        F.log, ritz.aslinearoperator(A), e, method=ritz.Lanczos(max_matvecs=20), return_info=True
    )
    assert info.status is ritz.Status.EXHAUSTED and info.depth == 1
    with pytest.warns(ConvergenceWarning, match="backward of f"):
        out.sum().backward()
    assert info.backward.status is ritz.Status.MAX_STEPS and info.backward.depth == 20
    better = ritz.Frechet(method=ritz.Lanczos(140))
    out, info = ritz.funm_multiply(
        F.log, ritz.aslinearoperator(A), e, method=ritz.Lanczos(5), gradient=better, return_info=True
    )
    out.sum().backward()
    assert info.backward.depth > 100 and info.backward.method == ritz.Lanczos(140)


def test_auto_says_what_it_chose():
    M = MARKET["nonsymmetric"]
    v = torch.ones(60, dtype=torch.float64)
    for A, kind in ((M, ritz.Arnoldi()), (M + M.T, ritz.Lanczos())):
        _, info = ritz.funm_multiply(F.exp, A, v, return_info=True)
        assert info.method == kind


# -- surroundings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "rule", [ritz.Frechet(), ritz.Adjoint(), ritz.Unrolled()], ids=["Frechet", "Adjoint", "Unrolled"]
)
def test_autocast_outside_changes_nothing(name, rule):
    values = []
    for enabled in (False, True):
        M = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
        M = (M @ M.T / 40 + torch.eye(40)).requires_grad_()
        v = torch.randn(40, generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = CALLS[name](ritz.aslinearoperator(M, hermitian=True), v, gradient=rule).sum()
            if rule != ritz.Unrolled():
                (gradient,) = torch.autograd.grad(out, M)
        if rule == ritz.Unrolled():  # the recorded steps are torch's: it wants backward outside of autocast
            (gradient,) = torch.autograd.grad(out, M)
        assert out.dtype == gradient.dtype == torch.float32
        values.append((out.detach(), gradient))
    for found, expected in zip(values[1], values[0]):
        assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_without_reorthogonalisation_n_steps_do_not_exhaust_the_space():
    """Clustered eigenvalues: after n steps of the plain recurrence half of the basis repeats the other half."""
    eigenvalues = torch.cat([torch.logspace(-4, -1, 55, dtype=torch.float64), torch.linspace(10, 11, 5).double()])
    v = torch.ones(60, dtype=torch.float64)
    A = torch.diag(eigenvalues)
    want = float(eigenvalues.log().sum())
    method = ritz.Lanczos(reorthogonalize=False, rtol=1e-8)
    value, info = ritz.quadratic_form(F.log, A, v, method=method, return_info=True)
    assert info.status is ritz.Status.CONVERGED and info.depth > 60
    assert abs(float(value) - want) < 1e-6 * abs(want)
    short = ritz.Lanczos(reorthogonalize=False, rtol=1e-8, max_matvecs=60)
    with pytest.warns(ConvergenceWarning):
        _, info = ritz.quadratic_form(F.log, A, v, method=short, return_info=True)
    assert info.status is ritz.Status.MAX_STEPS
