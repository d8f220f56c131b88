"""Arnoldi: the identities that define it, and its adjoint against autograd through a textbook loop."""

import pytest
import torch
from tests.krylov import loops

from ritz.errors import NonFiniteError
from ritz.krylov.arnoldi import ArnoldiState, adjoint_arnoldi, run_arnoldi

DTYPES = [torch.float64, torch.float32, torch.complex128, torch.complex64]
FIELDS = ("Q", "H", "residual", "norm", "depth")
BARS = ("Q_bar", "H_bar", "residual_bar", "norm_bar")


def problem(n, m, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, n, dtype=dtype, generator=g), torch.randn(n, m, dtype=dtype, generator=g), g


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_identities(m, dtype, reorthogonalize):
    n, k = 30, 8
    A, V, _ = problem(n, m, dtype)
    s = run_arnoldi(lambda X: A @ X, V, k, reorthogonalize=reorthogonalize)
    tol = 100 * torch.finfo(dtype).eps
    Q, e_k = s.Q.mT, torch.eye(k, dtype=dtype)[-1]
    assert (A @ Q - Q @ s.H - s.residual.unsqueeze(2) * e_k).abs().max() < tol * A.norm()
    assert (Q.mH @ Q - torch.eye(k)).abs().max() < tol
    assert (Q.mH @ s.residual.unsqueeze(2)).abs().max() < tol * A.norm()
    assert torch.equal(s.H.tril(-2), torch.zeros_like(s.H))
    sub = s.H.diagonal(-1, 1, 2)
    assert torch.equal(sub, sub.abs().to(dtype)) and (sub.abs() > 0).all()
    torch.testing.assert_close(s.Q[:, 0] * s.norm.unsqueeze(1), V.mT)
    assert s.depth.tolist() == [k] * m


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_continued_run_equals_uninterrupted(m, reorthogonalize):
    A, V, _ = problem(30, m, torch.complex128)
    kind = {"reorthogonalize": reorthogonalize}
    whole = run_arnoldi(lambda X: A @ X, V, 9, **kind)
    part = run_arnoldi(lambda X: A @ X, V, 2, **kind)
    for k in (5, 9):
        part = run_arnoldi(lambda X: A @ X, V, k, state=part, **kind)
    for f in FIELDS:
        assert torch.equal(getattr(part, f), getattr(whole, f)), f


def test_spends_one_block_product_a_step_forward_and_backward():
    A, V, _ = problem(20, 4, torch.float64)
    shapes = []

    def product(X):
        shapes.append(tuple(X.shape))
        return A @ X

    s = run_arnoldi(product, V, 6)
    assert shapes == [(20, 4)] * 6
    for flag in (True, False):
        shapes.clear()
        adjoint_arnoldi(product, s, H_bar=torch.ones_like(s.H), reorthogonalize=flag)
        assert shapes == [(20, 4)] * 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("m,n,k", [(1, 20, 1), (1, 20, 2), (3, 20, 7), (1, 15, 12), (3, 8, 7)])
@pytest.mark.parametrize("seed", [0, 1])
def test_adjoint_equals_autograd_through_the_loop(m, n, k, dtype, reorthogonalize, seed):
    A, V, g = problem(n, m, dtype, seed)

    def loop(A, v):
        return loops.arnoldi(A, v, k, reorthogonalize)

    bars = [loops.cotangents(loop(A, V[:, i]), g) for i in range(m)]
    A_bar, V_bar = loops.gradients(loop, A, V, bars)
    s = run_arnoldi(lambda X: A @ X, V, k, reorthogonalize=reorthogonalize)
    given = {name: loops.stack(bars, i) for i, name in enumerate(BARS)}
    variants = [{"reorthogonalize": False}] if not reorthogonalize else [{}, {"project": False}]
    for variant in variants:
        Lam, v_bar = adjoint_arnoldi(lambda X: A.mH @ X, s, **given, **variant)
        assert loops.error(torch.einsum("mki,mkj->ij", Lam, s.Q.conj()), A_bar) < 1e-11, variant
        assert loops.error(v_bar, V_bar) < 1e-11, variant


@pytest.mark.parametrize("output", range(4))
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_adjoint_of_each_output_alone(output, reorthogonalize):
    m, n, k = 2, 15, 6
    A, V, g = problem(n, m, torch.complex128)

    def loop(A, v):
        return loops.arnoldi(A, v, k, reorthogonalize)

    bars = [loops.cotangents(loop(A, V[:, i]), g) for i in range(m)]
    bars = [[b if i == output else None for i, b in enumerate(column)] for column in bars]
    A_bar, V_bar = loops.gradients(loop, A, V, bars)
    s = run_arnoldi(lambda X: A @ X, V, k, reorthogonalize=reorthogonalize)
    given = {BARS[output]: loops.stack(bars, output)}
    Lam, v_bar = adjoint_arnoldi(lambda X: A.mH @ X, s, **given, reorthogonalize=reorthogonalize)
    got = torch.einsum("mki,mkj->ij", Lam, s.Q.conj())
    assert (got - A_bar).norm() <= 1e-11 * (A_bar.norm() + V_bar.norm())
    assert (v_bar - V_bar).norm() <= 1e-11 * (A_bar.norm() + V_bar.norm())


def test_one_pass_adjoint_is_exact_where_orthogonality_is_lost():
    """It differentiates the numbers that the loop computed; the projected adjoint takes QᵀQ = I for granted."""
    n = 11
    i = torch.arange(n, dtype=torch.float64)
    A, V = 1 / (i[:, None] + i[None] + 1), torch.ones(n, 1, dtype=torch.float64)  # Hilbert
    Q, H, residual, norm = loops.arnoldi(A, V[:, 0], n, False)
    assert (Q @ Q.T - torch.eye(n)).abs().max() > 1e-3
    state = ArnoldiState(Q[None], H[None], residual[None], norm[None], torch.tensor([n]))
    g = torch.Generator().manual_seed(0)
    bars = [loops.cotangents((Q, H, residual, norm), g)]
    A_bar, _ = loops.gradients(lambda A, v: loops.arnoldi(A, v, n, False), A, V, bars)
    given = {name: loops.stack(bars, i) for i, name in enumerate(BARS)}
    errors = []
    for flag in (False, True):
        Lam, _ = adjoint_arnoldi(lambda X: A.T @ X, state, **given, reorthogonalize=flag)
        errors.append(loops.error(Lam[0].T @ Q, A_bar))
    assert errors[0] < 1e-6 and errors[1] > 1e-2, errors


def test_nan_names_the_step():
    A, V, _ = problem(12, 2, torch.float64)
    A[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="step 1 "):
        run_arnoldi(lambda X: A @ X, V, 5)
