"""R⁻¹ of a low-rank preconditioner and B = R⁻¹ A R⁻ᴴ: products and pairings against dense algebra and autograd."""

import pytest
import torch

import ritz
from ritz.pairing import pair_by_autograd
from ritz.solve import InverseRoot, LowRankPreconditioner, Preconditioned, RandomlyPivotedCholesky
from ritz.solve.root import newton_root


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_root(F, noise):
    """P^(-1/2) by an eigendecomposition in plain torch; good for separate eigenvalues only."""
    n = F.shape[0]
    w, U = torch.linalg.eigh(F @ F.mH + noise * torch.eye(n, dtype=F.dtype))
    return (U * w.rsqrt()) @ U.mH


def differences(f, x, direction, h=1e-6):
    return (f(x + h * direction) - f(x - h * direction)) / (2 * h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_products(dtype):
    F, X = normal(30, 4, dtype=dtype), normal(30, 3, seed=1, dtype=dtype)
    noise = torch.tensor(0.3, dtype=torch.float64)
    R = InverseRoot(F, noise)
    want = dense_root(F, noise) @ X
    torch.testing.assert_close(R @ X, want)
    torch.testing.assert_close(R._rmatmat(X), want)
    torch.testing.assert_close(R._recorded(X, F, noise), want)
    torch.testing.assert_close(R.inverse(X), dense_root(F, noise) @ want)
    F.zero_()  # it stays what it was made from
    noise.zero_()
    torch.testing.assert_close(R @ X, want)
    torch.testing.assert_close(R._recorded(X, *R.tensors()), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_pairing_against_finite_differences(dtype):
    """Also where F has equal singular values and zero ones, at which eigenvectors have no derivative."""
    Lam, Q = normal(20, 3, seed=1, dtype=dtype), normal(20, 3, seed=2, dtype=dtype)
    orthonormal = torch.linalg.qr(normal(20, 4, dtype=dtype)).Q
    flat = orthonormal * torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=torch.float64)
    for F in (normal(20, 4, dtype=dtype), flat, torch.zeros(20, 2, dtype=dtype)):
        F = F.clone().requires_grad_()
        noise = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        to_F, to_noise = InverseRoot(F, noise).pair(Lam, Q)
        E = normal(*F.shape, seed=3, dtype=dtype)
        F0, s0 = F.detach(), noise.detach()
        value = lambda F=F0, s=s0: (Lam.conj() * (dense_root(F, s) @ Q)).real.sum()
        want = differences(value, F0, E)
        torch.testing.assert_close((to_F.conj() * E).real.sum(), want, rtol=1e-6, atol=1e-7)
        want = differences(lambda s, value=value: value(s=s), s0, torch.ones(()))
        torch.testing.assert_close(to_noise, want, rtol=1e-6, atol=1e-7)
        recorded = pair_by_autograd(lambda X, F=F, s=noise: InverseRoot(F, s)._recorded(X, F, s), (F, noise), Lam, Q)
        torch.testing.assert_close(recorded[0], to_F, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(recorded[1], to_noise, rtol=1e-8, atol=1e-8)


def test_any_order():
    F, noise = normal(8, 2).requires_grad_(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    X = normal(8, 2, seed=1).requires_grad_()
    f = lambda F, s, X: InverseRoot(F, s) @ X
    assert torch.autograd.gradcheck(f, (F, noise, X))
    assert torch.autograd.gradgradcheck(f, (F, noise, X))


def test_newton_root():
    w = torch.logspace(0, 10, 12, dtype=torch.float64)
    U = torch.linalg.qr(normal(12, 12)).Q
    M = (U * w) @ U.mT
    X = newton_root(M)
    torch.testing.assert_close(X @ X, M, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.linalg.eigvalsh((X + X.mT) / 2), w.sqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("ratio", [1e5, 1e7])
def test_float32_keeps_the_large_directions(ratio):
    """P^(-1/2) P P^(-1/2) = I at s²/σ² = 1e7: the two terms of P^(-1/2) cancel there down to 3e-4 of their size."""
    F = ratio**0.5 * torch.linalg.qr(normal(80, 6)).Q
    P = LowRankPreconditioner(F, 1.0, torch.float32)
    X = (F @ normal(6, 5, seed=1)).float()
    got = P.inverse_root() @ X
    assert got.dtype == torch.float32
    want = (X.double() / (ratio + 1) ** 0.5).float()
    limit = 1e-7 * ratio**0.5  # what rounding X itself to float32 does
    assert float((got - want).norm() / want.norm()) < limit
    assert float((P.inverse_root()._numeric(X.double()) - dense_root(F, 1.0) @ X.double()).norm()) < 1e-9 * ratio**0.5
    one_pass = X - (F.float() @ (F.mT.float() @ X)) * ((1 - (ratio + 1) ** -0.5) / ratio)
    assert ratio < 1e7 or float((one_pass - want).norm() / want.norm()) > limit  # the test can fail


def operator(n=25):
    G = normal(n, n, seed=5)
    return (G @ G.mT / n + torch.eye(n, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("form", [True, False], ids=["multiple", "general"])
@pytest.mark.parametrize("diagonal", [False, True], ids=["shift", "diagonal"])
def test_pairing_of_the_preconditioned_operator(form, diagonal):
    M, F = operator(), normal(25, 3).requires_grad_()
    noise = torch.rand(25, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.2
    noise = (noise if diagonal else noise[0]).clone().requires_grad_()
    root = LowRankPreconditioner(F, noise).inverse_root()
    A = ritz.Counting(ritz.aslinearoperator(M, psd=True))
    B = Preconditioned(A, root)
    assert B.hermitian and B.psd
    Q = normal(25, 4, seed=2)
    Lam = Q * torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64) if form else normal(25, 4, seed=3)
    outs = [t for t, g in zip(B.tensors(), B.pair(Lam, Q)) if g is not None]
    grads = [g for g in B.pair(Lam, Q) if g is not None]
    A_products = A.num_matvecs // 2
    assert A_products == (4 if form else 8)
    got = torch.autograd.grad(outs, (M, F, noise), grads)

    def value(M, F, noise):
        w = noise.sqrt() if diagonal else torch.ones(25, dtype=torch.float64)
        half = dense_root(F / w.unsqueeze(1), 1.0 if diagonal else noise) / w
        return (Lam * (half @ M @ half.mT @ Q)).sum()

    at = [t.detach() for t in (M, F, noise)]
    for i, g in enumerate(got):
        E = normal(*at[i].shape, seed=9)
        f = lambda x, i=i: value(*at[:i], x, *at[i + 1 :])
        torch.testing.assert_close((g * E).sum(), differences(f, at[i], E, 1e-5), rtol=1e-6, atol=1e-7)


def test_constant_preconditioner_costs_no_product():
    M = operator()
    A = ritz.Counting(ritz.aslinearoperator(M, psd=True))
    with torch.no_grad():
        P = RandomlyPivotedCholesky(3).build(ritz.aslinearoperator(M, psd=True), 0.1)
    Q = normal(25, 2)
    grads = Preconditioned(A, P.inverse_root()).pair(Q, Q)
    assert A.num_matvecs == 0 and grads[0] is not None and grads[1:] == (None,) * (len(grads) - 1)


def test_operator_checks():
    M, F = operator().detach(), normal(25, 3)
    P = LowRankPreconditioner(F, 0.5)
    ritz.testing.check_operator(P.inverse_root())
    ritz.testing.check_operator(Preconditioned(ritz.aslinearoperator(M, psd=True), P.inverse_root()))
