"""Lanczos: the identities that define it, and its adjoint against autograd through a textbook loop."""

import importlib

import pytest
import torch
from tests.krylov import loops

from ritz.errors import NonFiniteError
from ritz.krylov.lanczos import adjoint_lanczos, run_lanczos
from ritz.krylov.progress import Progress

DTYPES = [torch.float64, torch.float32, torch.complex128, torch.complex64]
FIELDS = ("Q", "alpha", "beta", "residual", "norm", "depth")
BARS = ("Q_bar", "alpha_bar", "beta_bar", "residual_bar", "norm_bar")


def problem(n, m, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, dtype=dtype, generator=g)
    return A + A.mH, torch.randn(n, m, dtype=dtype, generator=g), g


def tridiagonal(state):
    off = state.beta[:, :-1]
    return torch.diag_embed(state.alpha) + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_identities(m, dtype, reorthogonalize):
    n, k = 30, 8
    A, V, _ = problem(n, m, dtype)
    s = run_lanczos(lambda X: A @ X, V, k, reorthogonalize=reorthogonalize)
    tol = 100 * torch.finfo(dtype).eps
    Q, e_k = s.Q.mT, torch.eye(k, dtype=dtype)[-1]
    assert (A @ Q - Q @ tridiagonal(s).to(dtype) - s.residual.unsqueeze(2) * e_k).abs().max() < tol * A.norm()
    assert (Q.mH @ Q - torch.eye(k)).abs().max() < tol
    assert (Q.mH @ s.residual.unsqueeze(2)).abs().max() < tol * A.norm()
    torch.testing.assert_close(s.Q[:, 0] * s.norm.unsqueeze(1), V.mT)
    torch.testing.assert_close(s.beta[:, -1], s.residual.norm(dim=1))
    assert s.Q.shape == (m, k, n) and s.Q.is_contiguous()
    assert s.alpha.shape == s.beta.shape == (m, k) and s.alpha.dtype == A.real.dtype
    assert s.depth.tolist() == [k] * m and s.depth.dtype == torch.int64


def test_stays_orthogonal_where_the_plain_recurrence_does_not():
    A = torch.diag(torch.cat([torch.linspace(0, 1, 199, dtype=torch.float64), torch.tensor([10.0])]))
    V = torch.ones(200, 1, dtype=torch.float64)
    loss = []
    for flag in (True, False):
        Q = run_lanczos(lambda X: A @ X, V, 60, reorthogonalize=flag).Q[0]
        loss.append(float((Q @ Q.T - torch.eye(60)).abs().max()))
    assert loss[0] < 1e-14 and loss[1] > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_continued_run_equals_uninterrupted(m, dtype, reorthogonalize):
    A, V, _ = problem(30, m, dtype)
    kind = {"reorthogonalize": reorthogonalize}
    whole = run_lanczos(lambda X: A @ X, V, 9, **kind)
    part = run_lanczos(lambda X: A @ X, V, 2, **kind)
    kept = [getattr(part, f).clone() for f in FIELDS]
    for k in (5, 9):
        part = run_lanczos(lambda X: A @ X, V, k, state=part, **kind)
    for f in FIELDS:
        assert torch.equal(getattr(part, f), getattr(whole, f)), f
    first = run_lanczos(lambda X: A @ X, V, 2, **kind)
    for f, before in zip(FIELDS, kept, strict=True):
        assert torch.equal(getattr(first, f), before)
    with pytest.raises(ValueError, match="expected k >= 10"):
        run_lanczos(lambda X: A @ X, V, 9, state=whole)


def test_spends_one_block_product_a_step_forward_and_backward():
    A, V, _ = problem(20, 4, torch.float64)
    shapes = []

    def product(X):
        shapes.append(tuple(X.shape))
        return A @ X

    s = run_lanczos(product, V, 6)
    assert shapes == [(20, 4)] * 6
    shapes.clear()
    adjoint_lanczos(product, s, alpha_bar=torch.ones_like(s.alpha))
    assert shapes == [(20, 4)] * 6


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("m", [1, 3])
def test_products_are_not_written_to(m, reorthogonalize):
    """A product may return its input, or a tensor it keeps."""
    kept = torch.randn(12, m, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = kept.clone()
    s = run_lanczos(lambda X: kept, kept, 2, reorthogonalize=reorthogonalize)
    adjoint_lanczos(lambda X: kept, s, Q_bar=torch.ones_like(s.Q), reorthogonalize=reorthogonalize)
    assert torch.equal(kept, before)
    s = run_lanczos(lambda X: X, kept, 2, reorthogonalize=reorthogonalize)
    assert s.depth.tolist() == [1] * m


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("m,n,k", [(1, 20, 1), (1, 20, 2), (3, 20, 7), (1, 15, 12), (3, 8, 7)])
@pytest.mark.parametrize("seed", [0, 1])
def test_adjoint_equals_autograd_through_the_loop(m, n, k, dtype, reorthogonalize, seed):
    A, V, g = problem(n, m, dtype, seed)

    def loop(A, v):
        return loops.lanczos(A, v, k, reorthogonalize)

    bars = [loops.cotangents(loop(A, V[:, i]), g) for i in range(m)]
    A_bar, V_bar = loops.gradients(loop, A, V, bars)
    s = run_lanczos(lambda X: A @ X, V, k, reorthogonalize=reorthogonalize)
    given = {name: loops.stack(bars, i) for i, name in enumerate(BARS)}
    Lam, v_bar = adjoint_lanczos(lambda X: A.mH @ X, s, **given, reorthogonalize=reorthogonalize)
    assert loops.error(torch.einsum("mki,mkj->ij", Lam, s.Q.conj()), A_bar) < 1e-11
    assert loops.error(v_bar, V_bar) < 1e-11


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("output", range(5))
def test_adjoint_of_each_output_alone(output, reorthogonalize):
    m, n, k = 2, 15, 6
    A, V, g = problem(n, m, torch.complex128)

    def loop(A, v):
        return loops.lanczos(A, v, k, reorthogonalize)

    bars = [loops.cotangents(loop(A, V[:, i]), g) for i in range(m)]
    bars = [[b if i == output else None for i, b in enumerate(column)] for column in bars]
    A_bar, V_bar = loops.gradients(loop, A, V, bars)
    s = run_lanczos(lambda X: A @ X, V, k, reorthogonalize=reorthogonalize)
    given = {BARS[output]: loops.stack(bars, output)}
    Lam, v_bar = adjoint_lanczos(lambda X: A.mH @ X, s, **given, reorthogonalize=reorthogonalize)
    got = torch.einsum("mki,mkj->ij", Lam, s.Q.conj())
    assert (got - A_bar).norm() <= 1e-11 * (A_bar.norm() + V_bar.norm())
    assert (v_bar - V_bar).norm() <= 1e-11 * (A_bar.norm() + V_bar.norm())


@pytest.mark.parametrize("size", [1e-140, 1e140])
def test_adjoint_is_linear_down_to_tiny_and_up_to_huge_cotangents(size):
    A, V, g = problem(15, 2, torch.float64)
    s = run_lanczos(lambda X: A @ X, V, 6)
    bar = torch.randn(2, 6, dtype=torch.float64, generator=g)
    plain = adjoint_lanczos(lambda X: A @ X, s, alpha_bar=bar)
    scaled = adjoint_lanczos(lambda X: A @ X, s, alpha_bar=bar * size)
    for x, y in zip(plain, scaled, strict=True):
        torch.testing.assert_close(x, y / size, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [1, 3])
def test_nan_names_the_step(step):
    A, V, _ = problem(12, 2, torch.float64)
    count = [0]

    def product(X):
        count[0] += 1
        return A @ X * (float("nan") if count[0] == step else 1.0)

    with pytest.raises(NonFiniteError, match=f"step {step} "):
        run_lanczos(product, V, 5)
    count[0] = 0  # a continued run counts on
    with pytest.raises(NonFiniteError, match=f"step {step + 2} "):
        run_lanczos(product, V, 9, state=run_lanczos(lambda X: A @ X, V, 2))
    V[0, 1] = float("inf")
    with pytest.raises(NonFiniteError, match="starting vector"):
        run_lanczos(lambda X: A @ X, V, 5)


def test_bookkeeping_in_tensors_equals_bookkeeping_on_the_host(monkeypatch):
    """The CPU keeps track in Python numbers, other devices in tensors: the same runs, breakdowns included."""
    A = torch.diag(torch.tensor([1.0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8], dtype=torch.float64))
    V = torch.zeros(12, 4, dtype=torch.float64)
    V[:, 0], V[:5, 1], V[:2, 2] = 1, 1, 1
    host = run_lanczos(lambda X: A @ X, V, 11)
    monkeypatch.setattr(importlib.import_module("ritz.krylov.lanczos"), "progress", Progress)
    device = run_lanczos(lambda X: A @ X, V, 11)
    assert host.depth.tolist() == [8, 2, 1, 0]
    for f in FIELDS:
        assert torch.equal(getattr(host, f), getattr(device, f)), f
    with pytest.raises(NonFiniteError, match="step 1 "):
        run_lanczos(lambda X: A @ X / 0, V, 11)
