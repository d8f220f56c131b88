"""Exhausted Krylov spaces: the right depth, masked rest, identities on what exists, finite adjoints."""

import pytest
import torch
from tests.krylov import loops

from ritz.krylov.arnoldi import adjoint_arnoldi, run_arnoldi
from ritz.krylov.lanczos import adjoint_lanczos, run_lanczos

FLOAT = {"dtype": torch.float64}


def rotated(eigenvalues, dtype, seed=0):
    """A dense Hermitian matrix with these eigenvalues."""
    n = len(eigenvalues)
    g = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(n, n, dtype=dtype, generator=g))
    A = (U * torch.tensor(eigenvalues, dtype=dtype)) @ U.mH
    return (A + A.mH) / 2


CASES = {  # name: (eigenvalues, depth of a generic start)
    "multiple of the identity": ([2.0] * 20, 1),
    "zero": ([0.0] * 20, 1),
    "repeated": ([1.0] * 5 + [2.0] * 5 + [4.0] * 10, 3),
    "rank deficient": ([0.0] * 17 + [1.0, 2.0, 3.0], 4),
    "indefinite": ([-1.0] * 10 + [1.0] * 10, 2),
    "k > n": ([1.0, 2.0, 3.0, 4.0, 5.0], 5),
    "tiny scale": ([1e-30] * 5 + [3e-30] * 5, 2),
    "huge scale": ([1e30] * 5 + [3e30] * 5, 2),
}


def small(s, i):
    """The small matrix of run i (k, k) of either method."""
    if hasattr(s, "H"):
        return s.H[i]
    off = s.beta[i, :-1]
    return torch.diag(s.alpha[i]) + torch.diag(off, 1) + torch.diag(off, -1)


@pytest.mark.parametrize("run", [run_lanczos, run_arnoldi])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_depth_mask_and_identities(name, run, dtype, reorthogonalize):
    if name == "k > n" and not reorthogonalize:
        pytest.skip(
            "without reorthogonalisation the iteration goes on past n with ghost directions; nothing is promised"
        )
    eigenvalues, depth = CASES[name]
    if dtype == torch.float32 and name == "huge scale":
        eigenvalues = [x / 1e12 for x in eigenvalues]
    A, n, k = rotated(eigenvalues, dtype), len(eigenvalues), 8
    g = torch.Generator().manual_seed(1)
    V = torch.randn(n, 3, dtype=dtype, generator=g)
    V[:, 1] = 0
    calls = [0]

    def product(X):
        calls[0] += 1
        return A @ X

    s = run(product, V, k, reorthogonalize=reorthogonalize)
    assert s.depth.tolist() == [depth, 0, depth]
    assert calls[0] == depth  # nothing is left to do: no further product
    assert s.norm[1] == 0
    assert not s.Q[:, depth:].any() and not s.Q[1].any() and not s.residual.any()
    tol = 1e4 * torch.finfo(dtype).eps
    for i in (0, 2):
        Q, T = s.Q[i, :depth].T, small(s, i)
        assert (A @ Q - Q @ T[:depth, :depth].to(dtype)).norm() <= tol * A.norm()
        assert (Q.mH @ Q - torch.eye(depth)).abs().max() < tol
        filler = T[0, 0] * torch.eye(k - depth, dtype=T.dtype)
        assert torch.equal(T[depth:, depth:], filler) and not T[depth:, :depth].any() and not T[:depth, depth:].any()
    assert not small(s, 1).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("method", ["lanczos", "arnoldi"])
def test_gradient_is_that_of_the_effective_part(method, dtype, reorthogonalize):
    """Runs of depth 3, 2 and 0 in one block: each has the gradient of the loop cut at its depth."""
    A = rotated([1.0] * 4 + [2.0] * 4 + [4.0] * 4, dtype)
    g = torch.Generator().manual_seed(2)
    V = torch.randn(12, 3, dtype=dtype, generator=g)
    V[:, 1] = (A @ A - 5 * A + 4 * torch.eye(12)) @ V[:, 1]  # an eigenvector for 2 …
    V[:, 1] += (A @ A - 3 * A + 2 * torch.eye(12)) @ V[:, 0]  # … plus one for 4
    V[:, 2] = 0
    k, depths = 6, [3, 2, 0]
    run, adjoint = (run_lanczos, adjoint_lanczos) if method == "lanczos" else (run_arnoldi, adjoint_arnoldi)
    s = run(lambda X: A @ X, V, k, reorthogonalize=reorthogonalize)
    assert s.depth.tolist() == depths
    names = ("Q_bar", "alpha_bar", "beta_bar") if method == "lanczos" else ("Q_bar", "H_bar")
    like = [s.Q, s.alpha, s.beta[:, :-1]] if method == "lanczos" else [s.Q, s.H]
    given = dict(zip(names, loops.cotangents(like, g), strict=True))
    noise = torch.randn(
        s.residual.shape, dtype=dtype, generator=g
    )  # the residual is rounding: its cotangent is ignored
    extra = {"residual_bar": noise, "norm_bar": torch.ones_like(s.norm), "reorthogonalize": reorthogonalize}
    Lam, v_bar = adjoint(lambda X: A.mH @ X, s, **given, **extra)
    assert torch.isfinite(Lam).all() and torch.isfinite(v_bar).all()
    assert not Lam[2].any() and not v_bar[:, 2].any()
    for i, d in enumerate(depths[:2]):
        assert not Lam[i, d:].any()
        if method == "lanczos":
            alpha_bar = given["alpha_bar"][i, :d].clone()
            alpha_bar[0] += given["alpha_bar"][i, d:].sum()  # the filler repeats alpha[0]
            cut = [given["Q_bar"][i, :d], alpha_bar, given["beta_bar"][i, : d - 1], None, torch.ones(())]
        else:
            H_bar = given["H_bar"][i, :d, :d].clone()
            H_bar[0, 0] += given["H_bar"][i].diagonal()[d:].sum()
            cut = [given["Q_bar"][i, :d], H_bar, None, torch.ones(())]
        A_bar, V_bar = loops.gradients(
            lambda A, v, d=d: getattr(loops, method)(A, v, d, reorthogonalize), A, V[:, i : i + 1], [cut]
        )
        assert loops.error(Lam[i].T @ s.Q[i].conj(), A_bar) < 1e-10
        assert loops.error(v_bar[:, i], V_bar[:, 0]) < 1e-10


def test_breakdown_survives_a_continued_run():
    A = rotated([1.0] * 5 + [2.0] * 5 + [4.0] * 10, torch.float64)
    V = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), **FLOAT)
    for run in (run_lanczos, run_arnoldi):
        whole = run(lambda X: A @ X, V, 9)
        part = run(lambda X: A @ X, V, 9, state=run(lambda X: A @ X, V, 5))
        after = run(lambda X: A @ X, V, 9, state=run(lambda X: A @ X, V, 3))
        for f in whole.__dataclass_fields__:
            assert torch.equal(getattr(part, f), getattr(whole, f)), f
            assert torch.equal(getattr(after, f), getattr(whole, f)), f
        assert whole.depth.tolist() == [3, 3]
