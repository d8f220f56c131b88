"""What solve promises about its operands, its report and its warnings."""

import pytest
import torch

import ritz
from ritz.errors import ConvergenceError, ConvergenceWarning, NonFiniteError, OperandError
from ritz.result import Status
from ritz.solve import CG, GMRES, MINRES, Direct, solve
from ritz.testing import problem

METHODS = [CG(), MINRES(), GMRES(), Direct()]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_shapes(method):
    A = problem("spd_well").matrix
    b = normal(16, 2)
    block = solve(A, b, method=method)
    assert block.shape == (16, 2) and solve(A, b[:, 0], method=method).shape == (16,)
    assert solve(A, b[:, :1], method=method).shape == (16, 1)
    assert solve(A, b[:, :0], method=method).shape == (16, 0)
    torch.testing.assert_close(solve(A, b[:, 1], method=method), block[:, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_operands_are_left_alone(method):
    A, b, x0 = problem("spd_well").matrix, normal(16, 2), normal(16, 2, seed=1)
    copies = A.clone(), b.clone(), x0.clone()
    solve(A, b, method=method, x0=x0)
    assert all(torch.equal(t, c) for t, c in zip((A, b, x0), copies))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_noncontiguous_operands(method):
    A, b = problem("complex_positive").matrix, normal(2, 14, dtype=torch.complex128)
    x = solve(A, b.mH, method=method)
    torch.testing.assert_close(x, solve(A, b.mH.resolve_conj().contiguous(), method=method), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"b": normal(15)}, OperandError, r"b has shape \(15,\); expected \(16,\)"),
        ({"b": normal(16).float()}, OperandError, "b is torch.float32"),
        ({"b": torch.full((16,), float("nan"), dtype=torch.float64)}, NonFiniteError, "b has 16 NaN"),
        ({"x0": normal(16, 2)}, OperandError, r"x0 has shape \(16, 2\); expected that of b, \(16,\)"),
        ({"x0": torch.full((16,), float("inf"), dtype=torch.float64)}, NonFiniteError, "x0 has 16 NaN or Inf"),
        ({"A": normal(16, 15)}, OperandError, "solve needs a square operator"),
        ({"on_failure": "explode"}, OperandError, "on_failure='explode'"),
        ({"backward": "cg"}, OperandError, "method is 'cg'"),
        ({"shifts": torch.tensor([float("nan")])}, NonFiniteError, "shifts has 1 NaN"),
    ],
)
def test_bad_operands(options, error, words):
    options = {"A": problem("spd_well").matrix, "b": normal(16), "method": CG(), **options}
    with pytest.raises(error, match=words):
        solve(options.pop("A"), options.pop("b"), **options)


@pytest.mark.parametrize("method", METHODS[:3], ids=str)
def test_a_product_with_nan_is_named(method):
    A = ritz.aslinearoperator(lambda X: X * float("nan"), shape=16, dtype=torch.float64, psd=True, block=True)
    with pytest.raises(NonFiniteError, match="product with A returned NaN or Inf .* in step 1"):
        solve(A, normal(16), method=method)


@pytest.mark.parametrize("method", [CG(max_steps=4), MINRES(max_steps=4)], ids=str)
def test_the_warning_has_the_figures(method):
    A = ritz.aslinearoperator(problem("spd_ill", n=50, condition=1e4).matrix, psd=True)
    b = normal(50, 3)
    b[:, 0] = 0.0
    name = type(method).__name__
    words = rf"solve by {name}\(.*\) at n=50 in torch.float64: step limit reached after 4 steps \(10 products\); worst "
    words += r"residual \d\.\d+ \(column [12]\) against a target of 1e-06; allow more steps, or improve"
    with pytest.warns(ConvergenceWarning, match=words) as caught:
        x, info = solve(A, b, method=method, return_info=True)
    assert caught[0].filename == __file__
    assert info.status is Status.MAX_STEPS and info.depth == 4
    assert info.details["status"] == (Status.CONVERGED, Status.MAX_STEPS, Status.MAX_STEPS)
    assert info.details["steps"] == (0, 4, 4)
    residual = (b - A @ x)[:, 1:].norm(dim=0) / b[:, 1:].norm(dim=0)
    torch.testing.assert_close(info.residual[1:], residual)
    with pytest.raises(ConvergenceError, match=words):
        solve(A, b, method=method, on_failure="raise")
    y = solve(A, b, method=method, on_failure="ignore")  # warnings are errors in this suite
    assert torch.equal(x, y)


def test_the_method_in_the_report_can_be_passed_back():
    A, b = ritz.aslinearoperator(problem("spd_well").matrix, psd=True), normal(16)
    for method in METHODS:
        x, info = solve(A, b, method=method, return_info=True)
        y, again = solve(A, b, method=info.method, return_info=True)
        assert torch.equal(x, y) and again.method == info.method


def test_a_callable_without_flags_is_taken_at_the_callers_word():
    M = problem("spd_well").matrix.clone().requires_grad_()
    A = ritz.aslinearoperator(lambda X: M @ X, shape=16, dtype=torch.float64)
    b = normal(16).requires_grad_()
    x, info = solve(A, b, method=CG(rtol=1e-10), return_info=True)
    torch.testing.assert_close(x, torch.linalg.solve(M, b))
    (g,) = torch.autograd.grad(x.sum(), M)
    assert info.backward.num_matvecs == info.backward.depth + 1
    opaque = ritz.aslinearoperator(lambda X: torch.from_numpy(M.detach().numpy() @ X.numpy()), shape=16, dtype=b.dtype)
    x = solve(opaque, b, method=CG(rtol=1e-10))  # autograd cannot give an adjoint product, and none is needed
    torch.testing.assert_close(torch.autograd.grad(x.sum(), b)[0], torch.linalg.solve(M, torch.ones_like(b)))


def test_scipy_operators_and_dense_arrays_are_taken():
    scipy = pytest.importorskip("scipy.sparse")
    M = problem("spd_well").matrix
    b = normal(16)
    expected = torch.linalg.solve(M, b)
    torch.testing.assert_close(solve(scipy.csr_matrix(M.numpy()), b), expected)
    torch.testing.assert_close(solve(M.numpy(), b), expected)


def test_the_loop_keeps_nothing():
    """Values of one step are not held by the next: neither graph nor blocks survive."""
    import gc
    import weakref

    A = problem("spd_well").matrix.clone().requires_grad_()
    x, info = solve(ritz.aslinearoperator(A, psd=True), normal(16), method=CG(), return_info=True)
    x.sum().backward()
    watch = weakref.ref(x.grad_fn)
    del x
    gc.collect()
    assert watch() is None and info.backward is not None
