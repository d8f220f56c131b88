"""Second derivatives and function transforms: right where they are promised, refused by name elsewhere."""

import pytest
import torch
from tests.functions.cases import dense_funm, relative

import ritz
from ritz import functions as F
from ritz.errors import SecondDerivativeError, TransformError

N = 6
# torch's vmap compiles a decomposition with torch.jit.script on first use, which torch itself deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture
def parts():
    g = torch.Generator().manual_seed(11)
    M = torch.randn(N, N, dtype=torch.float64, generator=g) / 3
    return M, torch.randn(N, dtype=torch.float64, generator=g), torch.randn(N, dtype=torch.float64, generator=g)


def matrix(theta, M):
    return 2 * torch.eye(N, dtype=torch.float64) + theta.exp() * (M + M.T) / 2


SIGMA = torch.tensor([0.3, 1.0], dtype=torch.float64)
TIME = torch.tensor([0.4, -0.2], dtype=torch.float64)
#   name: (ritz, dense), both of (A, x, y, **options)
OUTPUTS = {
    "form": (
        lambda A, x, y, **o: ritz.quadratic_form(F.log, A, x, **o),
        lambda A, x, y: x @ dense_funm(torch.log, A, True) @ x,
    ),
    "form of a callable f": (
        lambda A, x, y, **o: ritz.quadratic_form(lambda w: torch.exp(-w * w), A, x, **o),
        lambda A, x, y: x @ dense_funm(lambda w: torch.exp(-w * w), A, True) @ x,
    ),
    "multiply": (
        lambda A, x, y, **o: y @ ritz.funm_multiply(F.exp, A, x, **o),
        lambda A, x, y: y @ torch.linalg.matrix_exp(A) @ x,
    ),
    "bilinear": (
        lambda A, x, y, **o: ritz.bilinear_form(F.sqrt, A, y, x, **o),
        lambda A, x, y: y @ dense_funm(torch.sqrt, A, True) @ x,
    ),
    "grid": (
        lambda A, x, y, **o: (ritz.expm_multiply(A, x, TIME, **o) @ y).sum(),
        lambda A, x, y: sum(y @ torch.linalg.matrix_exp(t * A) @ x for t in TIME),
    ),
    "curve": (
        lambda A, x, y, **o: ritz.quadratic_form(F.log, A, x, shifts=SIGMA, **o).sum(),
        lambda A, x, y: sum(
            x @ dense_funm(torch.log, A + s * torch.eye(N, dtype=torch.float64), True) @ x for s in SIGMA
        ),
    ),
    "logdet": (
        lambda A, x, y, **o: ritz.logdet(A, estimator=ritz.Hutchinson(N), **o) * x.sum(),
        lambda A, x, y: torch.logdet(A) * x.sum(),
    ),
}
FIRST_ORDER = [ritz.Frechet(), ritz.Adjoint()]
ids = lambda x: type(x).__name__ if not isinstance(x, str) else x


def loss(output, theta, x, y, M, **options):
    A = matrix(theta, M)
    if output == "grid":  # the loss of the operator as a callable as well
        A = ritz.aslinearoperator(lambda z: A_of(theta, M, z), shape=N, dtype=torch.float64, hermitian=True, block=True)
    else:
        A = ritz.aslinearoperator(A, hermitian=True)
    return OUTPUTS[output][0](A, x, y, method=ritz.Lanczos(N), **options)


def A_of(theta, M, z):
    return 2 * z + theta.exp() * (M @ z + M.T @ z) / 2


@pytest.mark.parametrize("gradient", FIRST_ORDER, ids=ids)
@pytest.mark.parametrize("output", [o for o in OUTPUTS if o != "logdet"])
@pytest.mark.parametrize("first", ["theta", "x"])
@pytest.mark.parametrize("second", ["theta", "x"])
def test_second_derivatives_are_refused_by_name(output, gradient, first, second, parts):
    """Every pair (first, second) of what one may differentiate in; a constant or a graph behind the cotangent."""
    M, x, y = parts
    for scale in (1.0, None):
        theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        inputs = {"theta": theta, "x": x.clone().requires_grad_()}
        value = loss(output, theta, inputs["x"], y, M, gradient=gradient)
        value = value if scale else value * value
        (d,) = torch.autograd.grad(value, inputs[first], create_graph=True)
        with pytest.raises(SecondDerivativeError, match=r"differentiated twice.*gradient=ritz.Unrolled\(\)"):
            torch.autograd.grad(d.sum(), inputs[second], allow_unused=True)


@pytest.mark.parametrize("output", OUTPUTS)
def test_unrolled_hessians(output, parts):
    M, x, y = parts

    def flat(fn):
        return lambda p: fn(p[0], p[1:])

    p = torch.cat([torch.tensor([0.2], dtype=torch.float64), x])
    ours = torch.autograd.functional.hessian(flat(lambda t, x: loss(output, t, x, y, M, gradient=ritz.Unrolled())), p)
    dense = torch.autograd.functional.hessian(flat(lambda t, x: OUTPUTS[output][1](matrix(t, M), x, y)), p)
    assert relative(ours, dense) < 1e-8


@pytest.mark.parametrize("gradient", [*FIRST_ORDER, ritz.Unrolled()], ids=ids)
@pytest.mark.parametrize("output", OUTPUTS)
def test_torch_func_grad(output, gradient, parts):
    M, x, y = parts
    theta = torch.tensor(0.2, dtype=torch.float64)
    found = torch.func.grad(lambda t, x: loss(output, t, x, y, M, gradient=gradient), argnums=(0, 1))(theta, x)
    expected = torch.func.grad(lambda t, x: OUTPUTS[output][1](matrix(t, M), x, y), argnums=(0, 1))(theta, x)
    for a, b in zip(found, expected):
        assert relative(a, b) < 1e-8


@pytest.mark.parametrize("gradient", FIRST_ORDER, ids=ids)
@pytest.mark.parametrize("output", ["form", "multiply", "bilinear", "grid", "curve"])
def test_vmap_and_forward_mode_are_refused_by_name(output, gradient, parts):
    M, x, y = parts
    theta = torch.tensor(0.2, dtype=torch.float64)
    call = lambda t, x: loss(output, t, x, y, M, gradient=gradient)
    with pytest.raises(TransformError, match="vmap"):
        torch.func.vmap(call, in_dims=(None, 0))(theta, torch.stack([x, y]))
    with pytest.raises(TransformError, match="vmap"):
        torch.func.vmap(call, in_dims=(0, None))(torch.stack([theta, theta]), x)
    for at, tangents in (
        ((theta, x), (torch.ones_like(theta), torch.zeros_like(x))),
        ((theta, x), (torch.zeros_like(theta), y)),
    ):
        with pytest.raises(TransformError, match="forward-mode"):
            torch.func.jvp(call, at, tangents)
    with pytest.raises((TransformError, SecondDerivativeError)):
        torch.func.hessian(lambda x: call(theta, x))(x)


@pytest.mark.parametrize("output", ["form", "multiply", "bilinear", "curve"])
def test_gradcheck_of_the_computed_value(output, parts):
    """Rule A is exact for the value that was computed, however shallow: finite differences agree at depth 3."""
    M, x, y = parts
    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    x = x.clone().requires_grad_()
    options = {"method": ritz.Lanczos(3), "gradient": ritz.Adjoint()}
    operator = lambda t: ritz.aslinearoperator(matrix(t, M), hermitian=True)
    assert torch.autograd.gradcheck(lambda t, x: OUTPUTS[output][0](operator(t), x, y, **options), (theta, x))


def test_terms_that_share_columns(parts):
    """Two functions of one column and run (a callable and a named one), against two calls."""
    from ritz.functions import Term, shared_forms
    from ritz.functions.scalar import Custom

    M, x, y = parts
    V = torch.stack([x, y], 1)
    A = matrix(torch.tensor(0.2, dtype=torch.float64), M).requires_grad_()
    op = ritz.aslinearoperator(A, hermitian=True)
    terms = [Term(F.log, slice(None)), Term(Custom(torch.sin), slice(0, 1)), Term(F.inverse, slice(1, 2), SIGMA)]
    (logs, sine), _ = shared_forms(op, V, terms[:2], method=ritz.Lanczos(N))  # no shifts: the pairing could be ready
    (found,) = torch.autograd.grad(logs.sum() - 2 * sine.sum(), A)
    each = [ritz.quadratic_form(f, op, z, method=ritz.Lanczos(N)) for f, z in ((F.log, x), (F.log, y), (torch.sin, x))]
    assert relative(found, torch.autograd.grad(each[0] + each[1] - 2 * each[2], A)[0]) < 1e-10
    for rule in FIRST_ORDER:
        (logs, sine, inverses), _ = shared_forms(op, V, terms, method=ritz.Lanczos(N), gradient=rule)
        total = logs @ torch.tensor([1.0, 2.0], dtype=torch.float64) + 3 * sine.sum() - inverses.sum()
        (found,) = torch.autograd.grad(total, A)
        B = A.detach().clone().requires_grad_()
        S = (B + B.T) / 2
        dense = lambda f, s=0.0, S=S: dense_funm(f, S + s * torch.eye(N, dtype=torch.float64), True)
        expected = x @ dense(torch.log) @ x + 2 * (y @ dense(torch.log) @ y) + 3 * (x @ dense(torch.sin) @ x)
        expected = expected - sum(y @ dense(torch.reciprocal, s) @ y for s in SIGMA)
        assert relative(total, expected) < 1e-12
        assert relative((found + found.T) / 2, torch.autograd.grad(expected, B)[0]) < 1e-9
