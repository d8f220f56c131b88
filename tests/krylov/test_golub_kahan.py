"""Golub–Kahan: the identities that define it, and its adjoint against autograd through a textbook loop."""

import pytest
import torch
from tests.krylov import loops

from ritz.errors import NonFiniteError
from ritz.krylov.golub_kahan import adjoint_golub_kahan, run_golub_kahan

DTYPES = [torch.float64, torch.float32, torch.complex128, torch.complex64]
BARS = ("U_bar", "V_bar", "alpha_bar", "beta_bar", "residual_bar", "norm_bar")
FLOAT = {"dtype": torch.float64}


def problem(p, n, m, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(p, n, dtype=dtype, generator=g), torch.randn(n, m, dtype=dtype, generator=g), g


def run(A, V, k, **kind):
    return run_golub_kahan(lambda X: A @ X, lambda X: A.mH @ X, V, k, **kind)


def adjoint(A, s, **given):
    """A_bar from both pairings, and the gradient of the start."""
    Lam, Mu, v_bar = adjoint_golub_kahan(lambda X: A @ X, lambda X: A.mH @ X, s, **given)
    through_A = torch.einsum("mki,mkj->ij", Lam, s.V.conj())
    through_AH = torch.einsum("mki,mkj->ij", Mu, s.U.conj())
    return through_A + through_AH.mH, v_bar, Lam, Mu


def defects(A, s, i):
    """Errors of the four identities of run i on its complete pairs."""
    d = int(s.depth[i])
    U, V = s.U[i, :d].T, s.V[i, :d].T
    B = (torch.diag(s.alpha[i, :d]) + torch.diag(s.beta[i, : d - 1], 1)).to(A.dtype)
    e_d = torch.eye(d, dtype=A.dtype)[-1]
    yield A @ V - U @ B
    yield A.mH @ U - V @ B.mH - s.residual[i].unsqueeze(1) * e_d
    yield U.mH @ U - torch.eye(d)
    yield V.mH @ V - torch.eye(d)
    yield V.mH @ s.residual[i]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("p,n", [(25, 15), (14, 30)])
def test_identities(p, n, m, dtype, reorthogonalize):
    k = 6
    A, V, _ = problem(p, n, m, dtype)
    s = run(A, V, k, reorthogonalize=reorthogonalize)
    tol = 500 * torch.finfo(dtype).eps * A.norm()
    for i in range(m):
        for defect in defects(A, s, i):
            assert defect.abs().max() < tol
    torch.testing.assert_close(s.V[:, 0] * s.norm.unsqueeze(1), V.mT)
    assert s.U.shape == (m, k, p) and s.V.shape == (m, k, n)
    assert s.alpha.shape == (m, k) and s.beta.shape == (m, k - 1) and (s.alpha > 0).all() and (s.beta > 0).all()
    assert s.depth.tolist() == [k] * m


def test_spends_one_block_product_of_each_kind_a_step():
    A, V, _ = problem(9, 12, 4, torch.float64)
    seen = []

    def forward(X):
        seen.append(tuple(X.shape))
        return A @ X

    def backward(X):
        seen.append(tuple(X.shape))
        return A.T @ X

    s = run_golub_kahan(forward, backward, V, 5)
    assert seen == [(12, 4), (9, 4)] * 5
    seen.clear()
    adjoint_golub_kahan(forward, backward, s, alpha_bar=torch.ones_like(s.alpha))
    assert seen == [(12, 4), (9, 4)] * 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("m,p,n,k", [(1, 9, 14, 1), (1, 15, 11, 2), (3, 15, 11, 6), (3, 9, 14, 6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_adjoint_equals_autograd_through_the_loop(m, p, n, k, dtype, reorthogonalize, seed):
    A, V, g = problem(p, n, m, dtype, seed)

    def loop(A, v):
        return loops.golub_kahan(A, v, k)

    bars = [loops.cotangents(loop(A, V[:, i]), g) for i in range(m)]
    A_bar, V_bar = loops.gradients(loop, A, V, bars)
    s = run(A, V, k, reorthogonalize=reorthogonalize)
    given = {name: loops.stack(bars, i) for i, name in enumerate(BARS)}
    got, v_bar, *_ = adjoint(A, s, **given, reorthogonalize=reorthogonalize)
    assert loops.error(got, A_bar) < 1e-10
    assert loops.error(v_bar, V_bar) < 1e-10


@pytest.mark.parametrize("output", range(6))
def test_adjoint_of_each_output_alone(output):
    m, k = 2, 5
    A, V, g = problem(13, 10, m, torch.complex128)

    def loop(A, v):
        return loops.golub_kahan(A, v, k)

    bars = [loops.cotangents(loop(A, V[:, i]), g) for i in range(m)]
    bars = [[b if i == output else None for i, b in enumerate(column)] for column in bars]
    A_bar, V_bar = loops.gradients(loop, A, V, bars)
    got, v_bar, *_ = adjoint(A, run(A, V, k), **{BARS[output]: loops.stack(bars, output)})
    assert (got - A_bar).norm() <= 1e-11 * (A_bar.norm() + V_bar.norm())
    assert (v_bar - V_bar).norm() <= 1e-11 * (A_bar.norm() + V_bar.norm())


def test_is_lanczos_on_the_augmented_matrix():
    from ritz.krylov.lanczos import run_lanczos

    A, V, _ = problem(9, 7, 2, torch.float64)
    both = torch.cat([torch.cat([torch.zeros(9, 9), A], 1), torch.cat([A.T, torch.zeros(7, 7)], 1)])
    start = torch.cat([torch.zeros(9, 2, **FLOAT), V])
    s, big = run(A, V, 4), run_lanczos(lambda X: both @ X, start, 8)
    torch.testing.assert_close(big.beta[:, 0::2], s.alpha)
    torch.testing.assert_close(big.beta[:, 1:-1:2], s.beta)
    torch.testing.assert_close(big.Q[:, 0::2, 9:], s.V)
    torch.testing.assert_close(big.Q[:, 1::2, :9], s.U)


def rank_one():
    return torch.outer(torch.arange(1.0, 6.0, **FLOAT), torch.arange(1.0, 5.0, **FLOAT))


BREAKDOWNS = {  # name: (A, depth of a generic start); every generic start is run beside a zero one
    "rank one": (rank_one(), 1),
    "wide, one row": (torch.arange(1.0, 5.0, **FLOAT).unsqueeze(0), 1),
    "orthogonal columns": (2 * torch.eye(6, 4, **FLOAT), 1),
    "more steps than columns": (problem(6, 4, 1, torch.float64)[0], 4),
    "more steps than rows": (problem(3, 4, 1, torch.float64)[0], 3),
    "zero": (torch.zeros(5, 4, **FLOAT), 0),
}


@pytest.mark.parametrize("name", BREAKDOWNS)
def test_breakdown(name):
    A, depth = BREAKDOWNS[name]
    k = 6
    V = problem(1, 4, 3, torch.float64)[1]
    V[:, 1] = 0
    s = run(A, V, k)
    assert s.depth.tolist() == [depth, 0, depth]
    for i in (0, 2):
        for defect in defects(A, s, i) if depth else ():
            assert defect.abs().max() < 1e-12
    assert not s.U[:, depth:].any() and not s.V[:, depth:].any() and not s.beta[:, max(depth - 1, 0) :].any()
    assert torch.equal(s.alpha[:, depth:], s.alpha[:, :1].expand(3, k - depth))
    given = {bar: torch.ones_like(getattr(s, bar[:-4])) for bar in BARS}
    _, v_bar, Lam, Mu = adjoint(A, s, **given)
    assert all(torch.isfinite(x).all() for x in (v_bar, Lam, Mu))
    assert not v_bar[:, 1].any() and not Lam[:, depth:].any() and not Mu[:, depth:].any()


@pytest.mark.parametrize("name", ["rank one", "wide, one row", "more steps than rows", "more steps than columns"])
def test_gradient_at_breakdown_is_that_of_the_complete_pairs(name):
    """The masked run of k steps has the derivative of the run of ``depth`` steps, filler included."""
    A, depth = BREAKDOWNS[name]
    V = problem(1, 4, 1, torch.float64)[1]
    s, short = run(A, V, 6), run(A, V, depth)
    g = torch.Generator().manual_seed(3)
    alpha_bar = torch.randn(1, 6, generator=g, **FLOAT)
    residual_bar = torch.randn(s.residual.shape, generator=g, **FLOAT)
    cut = alpha_bar[:, :depth].clone()
    cut[:, 0] += alpha_bar[:, depth:].sum()
    kept = float(s.residual.norm() > 0)  # at the other kind of breakdown the residual is rounding: no derivative
    got = adjoint(A, s, alpha_bar=alpha_bar, residual_bar=residual_bar)
    want = adjoint(A, short, alpha_bar=cut, residual_bar=kept * residual_bar)
    torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got[1], want[1], rtol=1e-11, atol=1e-11)


def test_nan_names_the_half_step():
    A, V, _ = problem(9, 12, 2, torch.float64)
    with pytest.raises(NonFiniteError, match="step 2 "):
        run_golub_kahan(lambda X: A @ X, lambda X: A.T @ X / 0, V, 4)
