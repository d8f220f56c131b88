"""Hutch++ and XTrace against their definitions by dense matrices, and against plain probes for the same products."""

import pytest
import torch

import ritz
from ritz import functions as F
from ritz.errors import OperandError
from ritz.stochastic.probes import gaussian

DOUBLE = {"dtype": torch.float64}


def decaying(n=200, rate=0.15, dtype=torch.float64):
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=dtype))[0]
    M = (Q * torch.exp(-rate * torch.arange(n, **DOUBLE)).to(dtype)) @ Q.mH
    return 0.5 * (M + M.mH)


def general(n=40):
    return decaying(n) @ torch.randn(n, n, generator=torch.Generator().manual_seed(1), **DOUBLE)


def naive_xtrace(fA, Omega):
    """The definition: a basis without column i for every probe, held fixed; differentiable in f(A)."""
    n, p = Omega.shape
    found = []
    for i in range(p):
        others = [j for j in range(p) if j != i]
        Q = torch.linalg.qr((fA.detach() @ Omega.to(fA.dtype))[:, others].to(Omega.dtype))[0]
        mu = Omega[:, i] - Q @ (Q.mH @ Omega[:, i])
        weight = (n - p + 1) / mu.abs().square().sum()
        Q, mu = Q.to(fA.dtype), mu.to(fA.dtype)
        found.append((Q.mH @ fA @ Q).diagonal().sum() + weight * (mu.conj() @ fA @ mu))
    return torch.stack(found)


def naive_hutchpp(fA, S, G):
    n, third = S.shape
    Q = torch.linalg.qr((fA.detach() @ S.to(fA.dtype)).to(S.dtype))[0]
    P = G - Q @ (Q.mH @ G)
    P = P * (n - third) ** 0.5 / torch.linalg.vector_norm(P, dim=0)
    Q, P = Q.to(fA.dtype), P.to(fA.dtype)
    return (Q.mH @ fA @ Q).diagonal().sum(), (P.conj() * (fA @ P)).sum(0)


MATRICES = {
    "symmetric": (decaying(40), None),
    "general": (general(), None),
    "complex": (decaying(40, dtype=torch.complex128), None),
    "log": (decaying(40) + torch.eye(40, **DOUBLE), F.log),
    "exp of a general matrix": (0.3 * general(), F.exp),
    "complex log": (decaying(40, dtype=torch.complex128) + torch.eye(40, **DOUBLE), F.log),
}


def dense(M, f):
    if f is None:
        return M
    if f is F.exp:
        return torch.linalg.matrix_exp(M)
    w, V = torch.linalg.eigh(M)
    return (V * w.log().to(V.dtype)) @ V.mH


def posed(name):
    """Operator, its leaf, the same function as a dense matrix, its leaf, and the method; by one of MATRICES."""
    M, f = MATRICES[name]
    A, B, symmetric = M.clone().requires_grad_(), M.clone().requires_grad_(), torch.equal(M, M.mH)
    half = lambda X: 0.5 * (X + X.mH) if symmetric else X  # noqa: E731
    operator = ritz.aslinearoperator(half(A), hermitian=True) if symmetric else A
    method = ritz.Lanczos(rtol=1e-12) if symmetric else ritz.Arnoldi(rtol=1e-12)
    return operator, A, dense(half(B), f), B, method


@pytest.mark.parametrize("name", MATRICES)
def test_xtrace_is_its_definition_and_so_is_its_gradient(name):
    M, f = MATRICES[name]
    operator, A, fB, B, method = posed(name)
    symmetric = torch.equal(M, M.mH)
    value, info = ritz.trace(operator, f, estimator=ritz.XTrace(12, seed=3), method=method, return_info=True)
    samples = naive_xtrace(fB, gaussian(40, 6, M.dtype, M.device, 3, None))
    expected = samples.mean().real if symmetric else samples.mean()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(info.standard_error, samples.detach().std().real / 6**0.5, rtol=1e-7, atol=1e-12)
    value.backward()
    expected.backward()
    torch.testing.assert_close(A.grad, B.grad, rtol=1e-7, atol=1e-9)
    assert f is not None or info.num_matvecs == 12


@pytest.mark.parametrize("name", MATRICES)
def test_hutchpp_is_its_definition_and_so_is_its_gradient(name):
    M, f = MATRICES[name]
    operator, A, fB, B, method = posed(name)
    symmetric = torch.equal(M, M.mH)
    value, info = ritz.trace(operator, f, estimator=ritz.HutchPP(13, seed=3), method=method, return_info=True)
    S, G = ritz.Hutchinson(4, 4).probes(40, M.dtype), gaussian(40, 5, M.dtype, M.device, 3, None)
    known, samples = naive_hutchpp(fB, S, G)
    expected = known + samples.mean()
    expected = expected.real if symmetric else expected
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(info.details["sketched"], known.detach().real, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(info.standard_error, samples.detach().std().real / 5**0.5, rtol=1e-7, atol=1e-12)
    value.backward()
    expected.backward()
    torch.testing.assert_close(A.grad, B.grad, rtol=1e-7, atol=1e-9)
    assert f is not None or info.num_matvecs == 13


def test_functions_with_complex_values():
    M = decaying(40)
    w = torch.linalg.eigvalsh(M)
    f = lambda x: torch.exp(-1j * x)  # noqa: E731
    exact = f(w).sum()
    for estimator in (ritz.XTrace(60), ritz.HutchPP(90)):
        value, info = ritz.trace(M, f, estimator=estimator, method=ritz.Lanczos(rtol=1e-10), return_info=True)
        assert value.is_complex() and float((value - exact).abs()) < 5 * float(info.standard_error) + 1e-6


@pytest.mark.parametrize("estimator", [ritz.XTrace, ritz.HutchPP])
def test_means_over_seeds_are_the_trace_and_errors_are_true(estimator):
    # A slow decay, so that the probes have something left to say; the mean of 300 estimates within four of its errors.
    M = decaying(60, 0.03)
    found, errors = [], []
    for seed in range(300):
        value, info = ritz.trace(M, estimator=estimator(18, seed=seed), return_info=True)
        found.append(value)
        errors.append(info.standard_error)
    found, errors = torch.stack(found), torch.stack(errors)
    exact = M.diagonal().sum()
    assert float((found.mean() - exact).abs()) < 4 * float(found.std()) / 300**0.5
    assert 0.8 < float(errors.square().mean().sqrt() / found.std()) < 1.25


def test_they_beat_plain_probes_for_the_same_products_where_the_spectrum_decays():
    M, exact = decaying(), decaying().diagonal().sum()
    plain = [(ritz.trace(M, estimator=ritz.Hutchinson(60, seed=s)) - exact).abs() for s in range(20)]
    spread = float(torch.stack(plain).square().mean().sqrt())
    for estimator in (ritz.XTrace, ritz.HutchPP):
        errors = [(ritz.trace(M, estimator=estimator(60, seed=s)) - exact).abs() for s in range(20)]
        assert float(torch.stack(errors).square().mean().sqrt()) < 0.2 * spread


def test_log_determinants_and_what_is_exact():
    M = torch.eye(100, **DOUBLE) + 50 * decaying(100, 0.5)
    exact = torch.logdet(M)
    for estimator in (ritz.XTrace(40), ritz.HutchPP(60)):
        value, info = ritz.logdet(M, estimator=estimator, return_info=True)
        assert float((value - exact).abs()) < 4 * float(info.standard_error) < 1e-2 * float(exact)
    # Multiples of I, and matrices of low rank, whose R is singular, have no variance; nor has a whole basis of probes.
    for matrix in (3 * torch.eye(50, **DOUBLE), decaying(60, 5.0), torch.zeros(50, 50, **DOUBLE)):
        for estimator in (ritz.XTrace(40), ritz.HutchPP(60), ritz.XTrace(200), ritz.HutchPP(400)):
            value, info = ritz.trace(matrix, estimator=estimator, return_info=True)
            torch.testing.assert_close(value, matrix.diagonal().sum(), rtol=1e-10, atol=1e-12)
            assert float(info.standard_error) < 1e-10


def test_a_generator_draws_anew_and_seeds_repeat():
    M, g = decaying(60, 0.03), torch.Generator().manual_seed(5)
    for estimator in (ritz.XTrace(10), ritz.HutchPP(12)):
        once = lambda **o: float(ritz.trace(M, estimator=estimator, **o))  # noqa: E731, B023
        assert once() == once() and once(generator=g) != once(generator=g) and once(generator=g) != once()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda M: ritz.XTrace(5), "even number of columns, at least four"),
        (lambda M: ritz.HutchPP(2), "at least three"),
        (lambda M: ritz.trace(M, F.log, estimator=ritz.XTrace(8), shifts=torch.ones(2)), "range of its own"),
        (lambda M: ritz.logdet(M, estimator=ritz.HutchPP(9), shifts=torch.ones(2)), "range of its own"),
        (lambda M: ritz.diagonal(M, F.log, estimator=ritz.XTrace(8)), "expected Hutchinson"),
        (lambda M: ritz.logdet(M, estimator=ritz.XTrace(8), preconditioner=ritz.Jacobi()), "expected Hutchinson"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(OperandError, match=message):
        call(decaying(30))
