"""The references agree with identities, finite differences and autograd through other routes."""

import math

import pytest
import torch

from ritz.testing import market, oracles

HERMITIAN = ["spd_well", "repeated", "complex_positive"]
GENERAL = ["nonsymmetric", "nonsymmetric_normal", "defective", "jordan", "complex_general", "complex_symmetric"]
FUNCTIONS = {
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "inverse": torch.reciprocal,
    "cube": lambda x: x**3,
}


def close(actual, expected, tol=1e-9):
    scale = max(1.0, torch.linalg.norm(expected).item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol * scale)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inner(X, Y):
    return torch.real((X.conj() * Y).sum())


@pytest.mark.parametrize("name", HERMITIAN + GENERAL)
def test_inverse_functions(name):
    A = market.problem(name).matrix
    A = A / torch.linalg.matrix_norm(A, 2)
    close(oracles.funm(torch.log, oracles.funm(torch.exp, A)), A)
    root = oracles.funm(torch.sqrt, A)
    close(root @ root, A)
    close(oracles.funm(lambda x: x**3, A), A @ A @ A)
    close(oracles.funm(torch.reciprocal, A) @ A, torch.eye(A.shape[0], dtype=A.dtype))


@pytest.mark.parametrize("name", ["spd_well", "nonsymmetric_normal", "jordan", "complex_general"])
@pytest.mark.parametrize("f", ["exp", "log", "sqrt"])
def test_contour_agrees_with_the_other_routes(name, f):
    A = market.problem(name).matrix
    options = {"jordan": (1.0, 0.7), "spd_well": (0.55, 0.5), "nonsymmetric_normal": (1.5, 1.4)}
    contour = options.get(name, (2.0 + 0.0j, 1.9))
    close(oracles.funm(FUNCTIONS[f], A, contour=contour), oracles.funm(FUNCTIONS[f], A), 1e-8)


def test_real_in_real_out_and_complex_when_needed():
    A = market.problem("nonsymmetric_normal").matrix
    assert oracles.funm(torch.log, A).dtype == torch.float64
    assert oracles.funm(torch.sin, A).dtype == torch.float64
    rotated = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    # A half turn by the principal logarithm: [[0, −π/2], [π/2, 0]].
    close(oracles.funm(torch.log, rotated), math.pi / 2 * rotated)
    negative = torch.tensor([[-1.0, 1.0], [0.0, -2.0]], dtype=torch.float64)
    assert oracles.funm(torch.sqrt, negative).dtype == torch.complex128


def test_float32_and_sparse_come_in_as_float64_dense():
    L = market.problem("laplacian_1d").matrix
    assert oracles.funm(torch.exp, L).layout == torch.strided
    A = market.problem("spd_well").matrix
    assert oracles.funm(torch.exp, A.float()).dtype == torch.float64


def test_failures_are_reported():
    with pytest.raises(ArithmeticError, match="not finite"):
        oracles.funm(torch.log, market.problem("indefinite").matrix)
    A = torch.tensor([[1.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    with pytest.raises(ArithmeticError, match="includes a singularity"):
        oracles.funm(lambda z: z**2 / (z - 1.5), A)
    with pytest.raises(ArithmeticError, match="did not settle"):
        oracles.funm(lambda z: torch.log(z - 1.5), A, contour=(2.0, 1.5))
    with pytest.raises(ValueError, match="sign"):
        oracles.logdet(torch.diag(torch.tensor([1.0, -1.0])))


@pytest.mark.parametrize("name", HERMITIAN + GENERAL)
@pytest.mark.parametrize("f", list(FUNCTIONS))
def test_frechet_against_central_differences(name, f):
    A = market.problem(name).matrix
    A = A / torch.linalg.matrix_norm(A, 2)
    E = randn(*A.shape, seed=3, dtype=A.dtype)
    E = E / torch.linalg.matrix_norm(E, 2)
    # Perturbing a Jordan block by h moves its eigenvalues by h^(1/3), yet f of it moves by O(h).
    if name in HERMITIAN:
        E = (E + E.mH) / 2
    h = 1e-5 * torch.linalg.svdvals(A)[-1].item()
    contour = (0.5, 2.0) if f == "cube" else None  # the same circle on both sides
    forward, backward = (oracles.funm(FUNCTIONS[f], A + s * h * E, contour=contour) for s in (1, -1))
    difference = (forward - backward) / (2 * h)
    exact = oracles.frechet(FUNCTIONS[f], A, E, contour=contour)
    assert torch.linalg.norm(exact - difference) < 2e-6 * torch.linalg.norm(exact)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_frechet_is_linear_in_directions_of_any_size(size):
    A, E = market.problem("nonsymmetric").matrix, randn(16, 16, seed=1)
    close(oracles.frechet(torch.exp, A, size * E) / size, oracles.frechet(torch.exp, A, E), 1e-12)
    assert torch.count_nonzero(oracles.frechet(torch.exp, A, torch.zeros(16, 16))) == 0
    B = torch.zeros(3, 3, dtype=torch.float64)
    close(oracles.frechet(torch.exp, B, size * torch.ones(3, 3).double()) / size, torch.ones(3, 3).double())


@pytest.mark.parametrize("name", ["spd_well", "nonsymmetric", "complex_positive", "complex_general"])
@pytest.mark.parametrize("f", ["exp", "log"])
def test_gradients_pair_with_directions(name, f):
    """⟨G, E⟩ equals the derivative of the form along E: the adjoint, conjugations included."""
    A = market.problem(name).matrix
    n, f = A.shape[0], FUNCTIONS[f]
    u, v = randn(n, seed=4, dtype=A.dtype), randn(n, seed=5, dtype=A.dtype)
    E = randn(n, n, seed=6, dtype=A.dtype)
    L = oracles.frechet(f, A, E)
    close(inner(oracles.bilinear_form_gradient(f, A, u, v), E), torch.real(torch.vdot(u, L.to(u.dtype) @ v)))
    close(inner(oracles.quadratic_form_gradient(f, A, v), E), torch.real(torch.vdot(v, L @ v)))
    close(inner(oracles.trace_gradient(f, A), E), torch.real(torch.trace(L)))


def test_trace_gradient_is_the_derivative_of_f():
    A = market.problem("nonsymmetric").matrix
    close(oracles.trace_gradient(torch.exp, A), torch.linalg.matrix_exp(A).mT)
    close(oracles.trace_gradient(torch.log, A), torch.linalg.inv(A).mT)
    close(oracles.trace(torch.exp, A), torch.linalg.matrix_exp(A).trace())


@pytest.mark.parametrize("name", ["spd_well", "complex_positive", "hilbert"])
def test_logdet(name):
    A = market.problem(name).matrix
    close(oracles.logdet(A), torch.linalg.eigvalsh(A).log().sum())
    close(oracles.logdet(A), torch.real(oracles.trace(torch.log, A)))
    M = A.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.linalg.slogdet(M).logabsdet, M)
    close(oracles.logdet_gradient(A), expected)


def test_gradients_agree_with_autograd():
    A = market.problem("complex_general").matrix.requires_grad_()
    v = randn(14, seed=7, dtype=A.dtype)
    value = torch.real(torch.vdot(v, torch.linalg.matrix_exp(A) @ v))
    (expected,) = torch.autograd.grad(value, A)
    close(oracles.quadratic_form_gradient(torch.exp, A, v), expected)
    close(torch.real(oracles.quadratic_form(torch.exp, A, v)), value.detach())


LANCZOS = ["spd_well", "indefinite", "complex_indefinite", "laplacian_1d"]


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("name", LANCZOS)
def test_lanczos_identities(name, k, reorthogonalize):
    A = market.problem(name).dense
    v = randn(A.shape[0], seed=8, dtype=A.dtype)
    Q, alpha, beta, r, norm = result = oracles.lanczos(A, v, k, reorthogonalize=reorthogonalize)
    assert not alpha.is_complex() and not beta.is_complex() and (beta > 0).all() and beta.shape == (k - 1,)
    T = result.T.to(A.dtype)
    close(Q @ T + torch.outer(r, torch.eye(k, dtype=A.dtype)[-1]), A @ Q)
    close(Q.mH @ Q, torch.eye(k, dtype=A.dtype))
    close(Q.mH @ r, torch.zeros(k, dtype=A.dtype))
    close(norm * Q[:, 0], v)


def test_reorthogonalisation_is_what_keeps_the_basis_orthogonal():
    A, v = market.problem("1138_bus").matrix, randn(1138, seed=9)
    losses = []
    for flag in (True, False):
        Q = oracles.lanczos(A, v, 60, reorthogonalize=flag).Q
        losses.append(torch.linalg.matrix_norm(Q.T @ Q - torch.eye(60, dtype=Q.dtype), 2).item())
    assert losses[0] < 1e-13 and losses[1] > 1e-6


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("name", ["nonsymmetric", "complex_general", "nonsymmetric_nonnormal", "advection_diffusion"])
def test_arnoldi_identities(name, k, reorthogonalize):
    A = market.problem(name).dense
    v = randn(A.shape[0], seed=10, dtype=A.dtype)
    Q, H, r, norm = oracles.arnoldi(A, v, k, reorthogonalize=reorthogonalize)
    close(Q @ H + torch.outer(r, torch.eye(k, dtype=A.dtype)[-1]), A @ Q)
    close(Q.mH @ Q, torch.eye(k, dtype=A.dtype))
    close(Q.mH @ r, torch.zeros(k, dtype=A.dtype))
    close(H, torch.triu(H, -1))
    close(norm * Q[:, 0], v)


def test_arnoldi_on_a_hermitian_matrix_is_lanczos():
    A, v = market.problem("complex_indefinite").matrix, randn(14, seed=11, dtype=torch.complex128)
    close(oracles.arnoldi(A, v, 6).H, oracles.lanczos(A, v, 6).T.to(A.dtype))


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
@pytest.mark.parametrize("k", [1, 4])
def test_golub_kahan_identities(shape, dtype, k, reorthogonalize):
    A, v = randn(*shape, seed=12, dtype=dtype), randn(shape[1], seed=13, dtype=dtype)
    U, alpha, beta, V, r, norm = result = oracles.golub_kahan(A, v, k, reorthogonalize=reorthogonalize)
    B, last = result.B.to(dtype), torch.eye(k, dtype=dtype)[-1]
    close(A @ V, U @ B)
    close(A.mH @ U, V @ B.mT + torch.outer(r, last))
    close(U.mH @ U, torch.eye(k, dtype=dtype))
    close(V.mH @ V, torch.eye(k, dtype=dtype))
    close(norm * V[:, 0], v)
    assert (alpha > 0).all() and (beta > 0).all()


def test_products_may_be_functions():
    A, v = market.problem("nonsymmetric").matrix, randn(16, seed=14)
    assert torch.equal(oracles.arnoldi(lambda x: A @ x, v, 3).H, oracles.arnoldi(A, v, 3).H)
    f = oracles.golub_kahan(lambda x: A @ x, v, 3, adjoint=lambda x: A.T @ x)
    close(f.alpha, oracles.golub_kahan(A, v, 3).alpha)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_loops_are_differentiable(dtype, reorthogonalize):
    M, v = randn(5, 5, seed=15, dtype=dtype).requires_grad_(), randn(5, seed=16, dtype=dtype).requires_grad_()

    def hermitian(M, v):
        return oracles.lanczos((M + M.mH) / 2, v, 3, reorthogonalize=reorthogonalize)

    def general(M, v):
        return oracles.arnoldi(M, v, 3, reorthogonalize=reorthogonalize)

    def rectangular(M, v):
        return oracles.golub_kahan(M, v, 3, reorthogonalize=reorthogonalize)

    for function in (hermitian, general, rectangular):
        assert torch.autograd.gradcheck(function, (M, v))


def test_lanczos_gradient_does_not_depend_on_reorthogonalisation():
    v = randn(16, seed=17)
    gradients = []
    for flag in (True, False):
        M = market.problem("spd_well").matrix.requires_grad_()
        result = oracles.lanczos((M + M.T) / 2, v, 5, reorthogonalize=flag)
        weights = [randn(*x.shape, seed=18 + i) for i, x in enumerate(result)]
        gradients.append(torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, result)), M)[0])
    close(*gradients, 1e-9)


def test_breakdown_and_bad_depth_raise():
    A, e = market.problem("identity_multiple", n=4).matrix, torch.eye(4, dtype=torch.float64)[0]
    for run in (oracles.lanczos, oracles.arnoldi, oracles.golub_kahan):
        with pytest.raises(ZeroDivisionError, match="dimension 1"):
            run(A, e, 2)
        with pytest.raises(ZeroDivisionError, match="dimension 0"):
            run(A, 0 * e, 1)
        with pytest.raises(ValueError, match="at least 1"):
            run(A, e, 0)
