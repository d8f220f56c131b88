"""Gradients of solve against autograd through dense algebra, for every kind of operator and every method."""

import pytest
import torch

import ritz
from ritz.errors import SecondDerivativeError, TransformError
from ritz.result import Status
from ritz.solve import CG, GMRES, MINRES, Direct, Jacobi, solve
from ritz.testing import laplacian_2d, problem

METHODS = [CG(rtol=1e-12), MINRES(rtol=1e-12), GMRES(rtol=1e-12), Direct()]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def loss_of(x):
    weight = normal(*x.shape, seed=7, dtype=x.dtype)
    return (x * weight).abs().square().sum() + (x * weight).sum().real


def compare(ours, theirs, leaves, tolerance=1e-9):
    got, expected = torch.autograd.grad(loss_of(ours), leaves), torch.autograd.grad(loss_of(theirs), leaves)
    for g, h in zip(got, expected):
        assert float((g - h).norm()) <= tolerance * float(h.norm())


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("columns", [(), (3,)])
@pytest.mark.parametrize("name", ["spd_well", "complex_positive", "repeated", "one_by_one"])
def test_dense(name, columns, method):
    p = problem(name)
    A = p.matrix.clone().requires_grad_()
    b = normal(p.n, *columns, dtype=A.dtype).requires_grad_()
    compare(solve(ritz.aslinearoperator(A, psd=True), b, method=method), torch.linalg.solve(A, b), (A, b))


@pytest.mark.parametrize("name", ["indefinite", "complex_indefinite"])
@pytest.mark.parametrize("method", METHODS[1:], ids=str)
def test_indefinite(name, method):
    p = problem(name)
    A = p.matrix.clone().requires_grad_()
    b = normal(p.n, 2, dtype=A.dtype).requires_grad_()
    compare(solve(A, b, method=method), torch.linalg.solve(A, b), (A, b))


@pytest.mark.parametrize("name", ["nonsymmetric", "nonsymmetric_nonnormal", "complex_general", "complex_symmetric"])
def test_nonsymmetric(name):
    p = problem(name)
    A = p.matrix.clone().requires_grad_()
    b = normal(p.n, 2, dtype=A.dtype).requires_grad_()
    compare(solve(A, b), torch.linalg.solve(A, b), (A, b))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_sparse_values(method):
    L = laplacian_2d(5)
    values = L.values().clone().requires_grad_()
    A = ritz.operators.Sparse(L.crow_indices(), L.col_indices(), values, L.shape, psd=True)
    rows = torch.repeat_interleave(torch.arange(25), L.crow_indices().diff())
    dense = torch.zeros(25, 25, dtype=torch.float64).index_put((rows, L.col_indices()), values)
    b = normal(25, 2).requires_grad_()
    compare(solve(A, b, method=method), torch.linalg.solve(dense, b), (values, b))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("block", [True, False])
def test_callable_with_captured_tensors(method, block):
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    points = torch.linspace(0, 1, 20, dtype=torch.float64).unsqueeze(1).requires_grad_()

    def K():
        return torch.exp(-0.5 * ((points - points.mT) / scale) ** 2)

    fn = (lambda X: K() @ X + noise * X) if block else (lambda x: (K() @ x.unsqueeze(1)).squeeze(1) + noise * x)
    A = ritz.aslinearoperator(fn, shape=20, dtype=torch.float64, psd=True)
    b = normal(20, 2).requires_grad_()
    dense = K() + noise * torch.eye(20, dtype=torch.float64)
    compare(solve(A, b, method=method), torch.linalg.solve(dense, b), (scale, noise, points, b), 1e-8)


def test_nonsymmetric_callable():
    M = problem("nonsymmetric").matrix.clone().requires_grad_()
    A = ritz.aslinearoperator(lambda X: M @ X, shape=16, dtype=torch.float64)
    b = normal(16, 2).requires_grad_()
    compare(solve(A, b), torch.linalg.solve(M, b), (M, b))


def test_gram_operator_with_columns_that_finish_apart():
    """Its adjoint product is recorded for a fixed width, and the block shrinks on the way."""
    M = normal(30, 12).requires_grad_()
    F = ritz.aslinearoperator(lambda X: M @ X, shape=(30, 12), dtype=torch.float64)
    A = F.mH @ F
    b = normal(12, 2, seed=1).requires_grad_()
    x, info = solve(A, b, method=CG(rtol=1e-12), return_info=True)
    one_step = torch.linalg.eigh(M.detach().mT @ M.detach()).eigenvectors[:, 0]
    weight = torch.stack([one_step, normal(12)], 1)
    got = torch.autograd.grad(x, (M, b), weight)
    expected = torch.autograd.grad(torch.linalg.solve(M.mT @ M, b), (M, b), weight)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)
    assert info.backward.details["steps"][0] < info.backward.details["steps"][1]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_gradcheck(method):
    A0 = problem("spd_well", n=5).matrix
    b0 = normal(5, 2).requires_grad_()
    theta = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)

    def f(theta, b):
        A = ritz.aslinearoperator(theta[0] * A0 + theta[1] * torch.diag(torch.arange(5.0).double()), psd=True)
        return solve(A, b, method=method)

    assert torch.autograd.gradcheck(f, (theta, b0))


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", [CG(), MINRES(), CG(rtol=0.0, atol=1e-3), Direct()], ids=str)
def test_scale_of_the_cotangent_does_not_matter(scale, dtype, method):
    A = problem("spd_well").matrix.to(dtype)
    b = normal(16, 2).to(dtype).requires_grad_()
    weight = normal(16, 2, seed=1).to(dtype)
    x, info = solve(ritz.aslinearoperator(A, psd=True), b, method=method, return_info=True)
    (g,) = torch.autograd.grad(x, b, scale * weight)
    expected = torch.linalg.solve(A, weight)
    assert info.backward.status is Status.CONVERGED
    assert float((g / scale - expected).norm()) <= 1e-2 * float(expected.norm())


def test_zero_cotangent_columns_cost_nothing():
    A = ritz.Counting(ritz.aslinearoperator(problem("spd_well").matrix, psd=True))
    b = normal(16, 3).requires_grad_()
    x, info = solve(A, b, method=CG(), return_info=True)
    before = A.num_matvecs
    (g,) = torch.autograd.grad(x[:, 1].sum(), b)
    assert A.num_matvecs - before == info.backward.num_matvecs == info.backward.depth + 1
    assert bool((g[:, [0, 2]] == 0).all())
    (g,) = torch.autograd.grad(0.0 * solve(A, b, method=CG()).sum(), b)
    assert bool((g == 0).all())


def test_backward_has_its_own_report_and_tolerance():
    A = ritz.aslinearoperator(problem("spd_ill", n=60, condition=1e3).matrix, psd=True)
    b = normal(60, 2).requires_grad_()
    x, info = solve(A, b, method=CG(rtol=1e-3), backward=CG(rtol=1e-10), return_info=True)
    assert info.backward is None and info.method.rtol == 1e-3
    (g,) = torch.autograd.grad(x.sum(), b)
    back = info.backward
    assert back.method.rtol == 1e-10 and back.status is Status.CONVERGED and back.depth > info.depth
    assert float(back.residual.max()) <= 1e-10
    expected = torch.linalg.solve(A.to_dense(), torch.ones(60, 2, dtype=torch.float64))
    assert float((g - expected).norm() / expected.norm()) < 1e-7
    _, same = solve(A, b, method=CG(rtol=1e-3), return_info=True)
    y, info = solve(A, b, method=MINRES(rtol=1e-5), backward=Direct(), return_info=True)
    torch.autograd.grad(y.sum(), b)
    assert isinstance(info.backward.method, Direct) and same.method == CG(rtol=1e-3, max_steps=600)


def test_an_absolute_tolerance_becomes_relative_in_backward():
    A = ritz.aslinearoperator(problem("spd_well", n=40).matrix, psd=True)
    b = (1e4 * normal(40)).requires_grad_()
    x, info = solve(A, b, method=CG(rtol=0.0, atol=1e-2), return_info=True)
    torch.autograd.grad(x, b, torch.full((40,), 1e-12, dtype=torch.float64))
    assert info.backward.method.atol == 0.0
    assert info.backward.method.rtol == pytest.approx(1e-2 / float(b.detach().norm()))


def test_backward_uses_the_preconditioner():
    d = torch.logspace(0, 4, 80, dtype=torch.float64)
    A = ritz.aslinearoperator(torch.diag(d) + 0.01, psd=True)
    b = normal(80).requires_grad_()
    x, info = solve(A, b, method=CG(), preconditioner=Jacobi(), return_info=True)
    torch.autograd.grad(x.sum(), b)
    _, plain = solve(A, torch.ones(80, dtype=torch.float64), method=CG(), return_info=True)
    assert info.backward.depth < 0.2 * plain.depth


def test_failure_in_backward_is_told_apart():
    A = ritz.aslinearoperator(problem("spd_ill", n=60, condition=1e6).matrix, psd=True)
    b = (A.to_dense() @ normal(60)).requires_grad_()
    x, info = solve(A, b, method=CG(rtol=1e-4), backward=CG(max_steps=3), return_info=True)
    assert info.status is Status.CONVERGED
    with pytest.warns(ritz.errors.ConvergenceWarning, match="backward of solve by CG.*reached after 3 steps"):
        torch.autograd.grad(x.sum(), b)
    assert info.backward.status is Status.MAX_STEPS
    x = solve(A, b, method=CG(rtol=1e-4), backward=CG(max_steps=3), on_failure="raise")
    with pytest.raises(ritz.errors.ConvergenceError, match="backward of solve"):
        torch.autograd.grad(x.sum(), b)


def test_cotangent_with_nan_is_named():
    b = normal(16).requires_grad_()
    x = solve(problem("spd_well").matrix, b, method=CG())
    with pytest.raises(ritz.errors.NonFiniteError, match="cotangent"):
        x.backward(torch.full((16,), float("nan"), dtype=torch.float64))


def test_backward_twice_and_fresh_report():
    b = normal(16).requires_grad_()
    x, info = solve(problem("spd_well").matrix, b, method=CG(rtol=1e-10), return_info=True)
    (g,) = torch.autograd.grad(x.sum(), b, retain_graph=True)
    first = info.backward
    (h,) = torch.autograd.grad(x.sum(), b)
    assert torch.equal(g, h) and info.backward is not first and info.backward.depth == first.depth


def test_first_guess_is_a_constant():
    b = normal(16)
    guess = normal(16, seed=2).requires_grad_()
    assert not solve(problem("spd_well").matrix, b, method=CG(), x0=guess).requires_grad


def test_without_gradients_nothing_is_attached():
    A = ritz.aslinearoperator(problem("spd_well").matrix.clone().requires_grad_(), psd=True)
    with torch.no_grad():
        assert not solve(A, normal(16), method=CG()).requires_grad
    assert not solve(problem("spd_well").matrix, normal(16)).requires_grad


def test_changing_the_result_in_place_cannot_spoil_the_gradient():
    A = problem("spd_well").matrix.clone().requires_grad_()
    b = normal(16)
    x = solve(ritz.aslinearoperator(A, psd=True), b, method=CG(rtol=1e-12))
    y = x.sum()
    with torch.no_grad():
        x.mul_(3.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(y, A)


@pytest.mark.parametrize("method", [CG(rtol=1e-12), Direct()], ids=str)
def test_torch_func_grad(method):
    A, b = problem("spd_well").matrix, normal(16, 2)
    f = lambda A, b: loss_of(solve(ritz.aslinearoperator(A, psd=True), b, method=method))
    g = lambda A, b: loss_of(torch.linalg.solve(A, b))
    got, expected = torch.func.grad(f, (0, 1))(A, b), torch.func.grad(g, (0, 1))(A, b)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_second_derivatives_and_vmap_are_refused_by_name():
    A = problem("spd_well").matrix.clone().requires_grad_()
    b = normal(16).requires_grad_()
    (g,) = torch.autograd.grad(solve(A, b, method=CG()).sum(), A, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="solve was differentiated twice"):
        torch.autograd.grad(g.sum(), b)
    with pytest.raises(TransformError, match="vmap"):
        torch.func.vmap(lambda v: solve(A.detach(), v))(normal(3, 16))
