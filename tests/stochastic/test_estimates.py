"""Hutchinson's estimator: fixed probes, honest standard errors, exact where the probes span the space."""

import pytest
import torch

import ritz
from ritz import functions as F

N = 40
DTYPES = [torch.float64, torch.float32, torch.complex128, torch.complex64]


@pytest.fixture
def g():
    return torch.Generator().manual_seed(23)


def symmetric(A):
    """Exactly: a product M Mᵀ need not be, and then counts as a general matrix."""
    return (A + A.mH) / 2


@pytest.fixture
def A(g):
    M = torch.randn(N, N, dtype=torch.float64, generator=g)
    return symmetric(M @ M.T / N + torch.eye(N, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probes_are_a_pure_function_of_seed_size_and_dtype(dtype):
    probes = lambda seed=0, n=50, m=7: ritz.Hutchinson(m, seed=seed).probes(n, dtype)
    first, state = probes(), torch.get_rng_state()
    torch.manual_seed(99)
    torch.randn(3)
    assert torch.equal(first, probes()), "the global generator has no say"
    torch.set_rng_state(state)
    probes()
    assert torch.equal(torch.get_rng_state(), state), "and is not moved"
    assert not torch.equal(first, probes(seed=1))
    assert first.shape == (50, 7) and first.dtype == dtype
    torch.testing.assert_close(first.abs(), torch.ones(50, 7, dtype=dtype.to_real()))
    values = {(complex(z).real, complex(z).imag) for z in first.flatten().tolist()}
    assert values == ({(1, 0), (-1, 0), (0, 1), (0, -1)} if dtype.is_complex else {(1, 0), (-1, 0)})
    many = ritz.Hutchinson(1999).probes(2000, dtype)
    assert float((many.sum() / many.numel()).abs()) < 5e-3
    covariance = many[:20].to(torch.complex128) @ many[:20].mH.to(torch.complex128) / 1999
    assert float((covariance - torch.eye(20)).abs().max()) < 0.13
    if dtype.is_complex:  # circular: E[z zᵀ] = 0 as well
        assert float((many[:20] @ many[:20].mT / 1999).abs().max()) < 0.13


def test_golden_probes():
    """The first entries, so that a change of the stream cannot go unnoticed: old results must stay reproducible."""
    assert ritz.Hutchinson(2, seed=0).probes(4, torch.float64).flatten().tolist() == [-1, 1, 1, -1, 1, 1, 1, 1]


def test_probes_beyond_the_size_are_unit_vectors():
    for m in (5, 9):
        Z = ritz.Hutchinson(m).probes(5, torch.float64)
        torch.testing.assert_close(Z @ Z.T / Z.shape[1], torch.eye(5, dtype=torch.float64))
        assert ritz.Hutchinson(m).is_exact(5)
    assert not ritz.Hutchinson(4).is_exact(5)


def test_the_same_loss_in_every_call(A):
    for call in (
        lambda **o: ritz.logdet(A, **o),
        lambda **o: ritz.trace(A, F.exp, **o),
        lambda **o: ritz.diagonal(A, F.exp, **o),
    ):
        assert torch.equal(call(), call())
        assert not torch.equal(call(), call(estimator=ritz.Hutchinson(seed=1)))
        g = torch.Generator().manual_seed(4)
        one, two = call(generator=g), call(generator=g)
        assert not torch.equal(one, two), "a generator moves on"
        assert torch.equal(one, call(generator=torch.Generator().manual_seed(4)))


def test_standard_error_is_the_formula(A):
    m = 8
    Z = ritz.Hutchinson(m).probes(N, torch.float64)
    E = torch.linalg.matrix_exp(A)
    samples = (Z * (E @ Z)).sum(0)
    value, info = ritz.trace(A, F.exp, estimator=ritz.Hutchinson(m), return_info=True)
    torch.testing.assert_close(value, samples.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(info.standard_error, samples.std() / m**0.5, rtol=1e-7, atol=0)
    assert info.details["estimator"] == ritz.Hutchinson(m) and info.num_matvecs == m * info.depth
    value, info = ritz.diagonal(A, F.exp, estimator=ritz.Hutchinson(m), return_info=True)
    torch.testing.assert_close(value, (Z * (E @ Z)).mean(1), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(info.standard_error, (Z * (E @ Z)).std(1) / m**0.5, rtol=1e-6, atol=1e-8)
    value, info = ritz.trace(A, estimator=ritz.Hutchinson(m), return_info=True)
    torch.testing.assert_close(value, (Z * (A @ Z)).sum(0).mean())
    assert info.num_matvecs == m
    sigma = torch.tensor([0.1, 1.0], dtype=torch.float64)
    _, info = ritz.logdet(A, shifts=sigma, estimator=ritz.Hutchinson(m), return_info=True)
    assert info.standard_error.shape == (2,) and not info.standard_error.requires_grad
    assert float(ritz.logdet(A, estimator=ritz.Hutchinson(1), return_info=True)[1].standard_error) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_calibration_and_bias_over_200_seeds(dtype, g):
    """The true error is below two standard errors in about 95 % of the runs, and the mean of the runs is the truth."""
    M = torch.randn(N, N, dtype=dtype, generator=g)
    A = symmetric(M @ M.mH / N + torch.eye(N, dtype=dtype))
    exact = float(torch.linalg.eigvalsh(A).log().sum())
    covered, estimates = 0, []
    for seed in range(200):
        value, info = ritz.logdet(
            A, estimator=ritz.Hutchinson(16, seed=seed), method=ritz.Lanczos(14), return_info=True
        )
        assert not value.is_complex()
        covered += abs(float(value) - exact) <= 2 * float(info.standard_error)
        estimates.append(float(value))
    assert 0.88 <= covered / 200 <= 0.99
    mean, spread = torch.tensor(estimates).mean(), torch.tensor(estimates).std()
    assert abs(float(mean) - exact) < 4 * float(spread) / 200**0.5


def test_gradient_is_that_of_the_estimate(A):
    """With few probes: the derivative of the sample mean, not of the trace."""
    m = 3
    Z = ritz.Hutchinson(m).probes(N, torch.float64)
    B = A.clone().requires_grad_()
    value = ritz.trace(ritz.aslinearoperator(B, hermitian=True), F.inverse, estimator=ritz.Hutchinson(m))
    (found,) = torch.autograd.grad(value, B)
    X = torch.linalg.solve(A, Z)
    torch.testing.assert_close(found, -X @ X.T / m, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_with_enough_probes(dtype, g):
    M = torch.randn(9, 9, dtype=dtype, generator=g)
    A = symmetric(M @ M.mH / 9 + torch.eye(9, dtype=dtype))
    tol = 1e-4 if dtype in (torch.float32, torch.complex64) else 1e-10
    for m in (9, 20):
        probes = ritz.Hutchinson(m)
        value, info = ritz.logdet(A, estimator=probes, return_info=True)
        assert abs(float(value) - float(torch.linalg.eigvalsh(A).log().sum())) < tol * 9
        assert float(info.standard_error) == 0 and info.num_matvecs <= 9 * 9
        diagonal, info = ritz.diagonal(A, F.sqrt, estimator=probes, return_info=True)
        w, Q = torch.linalg.eigh(A)
        assert float((diagonal - ((Q * w.sqrt()) @ Q.mH).diagonal()).abs().max()) < tol
        assert float(info.standard_error.max()) == 0


def test_methods_for_a_hermitian_operator_agree(A):
    """Arnoldi may be asked for; it needs no shifts, and gives the same."""
    lanczos = ritz.trace(A, F.log, method=ritz.Lanczos(N))
    torch.testing.assert_close(ritz.trace(A, F.log, method=ritz.Arnoldi(N)), lanczos, rtol=1e-9, atol=0)
    exact, info = ritz.diagonal(A, return_info=True)
    torch.testing.assert_close(exact, A.diagonal())
    assert float(info.standard_error.max()) == 0


def test_one_run_serves_a_curve(A):
    """tr log(A + σI) for 50 shifts costs one run, and equals 50 runs."""
    sigma = torch.logspace(-2, 2, 50, dtype=torch.float64)
    counting = ritz.Counting(ritz.aslinearoperator(A, hermitian=True))
    curve, info = ritz.logdet(counting, shifts=sigma, method=ritz.Lanczos(N), return_info=True)
    assert counting.num_matvecs == info.num_matvecs == 10 * N and curve.shape == (50,)
    each = torch.stack(
        [ritz.logdet(A + s * torch.eye(N, dtype=torch.float64), method=ritz.Lanczos(N)) for s in sigma[::10]]
    )
    torch.testing.assert_close(curve[::10], each, rtol=1e-9, atol=1e-9)
