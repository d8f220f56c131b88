"""Blocks of random pivots, given columns, sketches, the default rank, and noise that differs from row to row."""

import pytest
import torch

import ritz
from ritz.errors import DomainError, OperandError
from ritz.operators import Dense, Diagonal
from ritz.solve import (
    CG,
    Landmarks,
    LowRankPreconditioner,
    Nystrom,
    PivotedCholesky,
    RandomlyPivotedCholesky,
    default_rank,
    solve,
    split_noise,
)
from ritz.solve.pivoting import random_blocks


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kernel(n=300, d=3, scale=1.0, seed=0):
    X = normal(n, d, seed=seed)
    a = 3**0.5 * torch.cdist(X, X) / scale
    return (1 + a) * torch.exp(-a)


def one_by_one(K, rank, generator):
    """Chen, Epperly, Tropp, Webber, Algorithm 1: the textbook loop."""
    F, d = torch.zeros(len(K), rank, dtype=K.dtype), K.diagonal().clone()
    for i in range(rank):
        s = int(torch.multinomial(d.clamp(min=0), 1, generator=generator))
        g = K[:, s] - F[:, :i] @ F[s, :i]
        F[:, i] = g / g[s].sqrt()
        d = d - F[:, i] ** 2
    return float(d.sum())


class Reading(Dense):
    """Counts calls of columns and the columns read."""

    def columns(self, idx):
        self.calls, self.read = getattr(self, "calls", 0) + 1, getattr(self, "read", 0) + len(idx)
        return super().columns(idx)


def test_blocks_are_as_good_as_one_by_one():
    """Mean trace left over by 60 pivots: equal in distribution, so within 3 standard errors of each other."""
    K, rank = kernel(), 60
    blocks = [random_blocks(K.diagonal(), lambda i: K[:, i], rank, K.dtype, seed).left for seed in range(40)]
    generator = torch.Generator().manual_seed(0)
    single = [one_by_one(K, rank, generator) for _ in range(40)]
    blocks, single = torch.tensor(blocks), torch.tensor(single)
    spread = (blocks.var() / 40 + single.var() / 40).sqrt()
    assert abs(float(blocks.mean() - single.mean())) < 3 * float(spread)
    assert float(spread) < 0.02 * float(single.mean())
    uniform = [float(K.trace() - (landmark(K, seed).factor ** 2).sum()) for seed in range(10)]
    assert float(blocks.mean()) < 0.97 * sum(uniform) / 10  # the test can tell a worse rule


def landmark(K, seed):
    S = torch.randperm(len(K), generator=torch.Generator().manual_seed(seed))[:60]
    return Landmarks(S).build(ritz.aslinearoperator(K, psd=True), 1.0)


def test_second_pivot_has_the_right_distribution():
    """P(first = i, second = j) = d_i/Σd · d'_j/Σd' by hand, from blocks of two candidates."""
    K = torch.tensor([[2.0, 1.6, 0.1], [1.6, 1.5, 0.0], [0.1, 0.0, 1.0]], dtype=torch.float64)
    d, want = K.diagonal(), torch.zeros(3, 3, dtype=torch.float64)
    for i in range(3):
        left = d - K[:, i] ** 2 / K[i, i]
        left[i] = 0
        want[i] = d[i] / d.sum() * left / left.sum()
    found, N = torch.zeros(3, 3, dtype=torch.float64), 1500
    for seed in range(N):
        i, j = random_blocks(d, lambda s: K[:, s], 2, K.dtype, seed).pivots.tolist()
        found[i, j] += 1 / N
    assert float((found - want).abs().max()) < 4 * (0.25 / N) ** 0.5


def test_columns_come_in_blocks():
    A = Reading(kernel(), psd=True)
    with torch.no_grad():
        P = RandomlyPivotedCholesky(100).build(A, 0.1)
    assert len(set(P.pivots.tolist())) == 100
    assert A.calls <= 8 and A.read <= 160
    with torch.no_grad():
        PivotedCholesky(100).build(greedy := Reading(kernel(), psd=True), 0.1)
    assert greedy.calls == greedy.read == 100


def test_random_pivots_of_degenerate_matrices():
    """Equal rows, zero rows, exact rank: no pivot twice, no failure, and the matrix is met."""
    G = normal(40, 5, dtype=torch.complex128)
    G = torch.cat([G, G, torch.zeros(20, 5, dtype=G.dtype)])
    K = G @ G.mH
    for seed in range(5):
        P = RandomlyPivotedCholesky(50, seed=seed).build(ritz.aslinearoperator(K, psd=True), 0.1)
        assert P.factor.shape == (100, 5) and len(set(P.pivots.tolist())) == 5
        torch.testing.assert_close(P.factor @ P.factor.mH, K)
    single = K.to(torch.complex64)
    P = RandomlyPivotedCholesky(50).build(ritz.aslinearoperator((single + single.mH) / 2, psd=True), 0.1)
    assert P.dtype == torch.complex64 and P.factor.dtype == torch.complex128 and P.factor.shape[1] <= 12


def test_landmarks_keep_the_pivots():
    K = kernel(80)
    A = ritz.aslinearoperator(K, psd=True).shift(0.1)
    P = RandomlyPivotedCholesky(10).build(A)
    again = Landmarks(P.pivots).build(A)
    assert Landmarks(P.pivots) == Landmarks(P.pivots.tolist()) and hash(Landmarks([1, 2])) is not None
    torch.testing.assert_close(again.to_dense(), P.to_dense())
    assert torch.equal(again.pivots, P.pivots)
    alone = Landmarks(P.pivots).build(ritz.aslinearoperator(K, psd=True))
    torch.testing.assert_close(alone.noise, float((K.diagonal() - (P.factor**2).sum(1)).mean()))


def test_nystrom_is_the_projection_on_the_sketch():
    """F Fᵀ = K^½ Π K^½ with Π the projector on the range of K^½ Ω, computed another way; near-optimal in rank."""
    K = kernel(120)
    P = Nystrom(15, seed=3).build(ritz.aslinearoperator(K, psd=True), 0.1)
    w, U = torch.linalg.eigh(K)
    root = (U * w.clamp(min=0).sqrt()) @ U.mT
    omega = torch.linalg.qr(normal(120, 15, seed=3)).Q
    basis = torch.linalg.qr(root @ omega).Q
    torch.testing.assert_close(P.factor @ P.factor.mT, root @ basis @ basis.mT @ root, rtol=0, atol=1e-9)
    left = float(K.trace() - (P.factor**2).sum())
    assert float(w[:-15].sum()) < left < 1.5 * float(w[:-8].sum())
    assert Nystrom(15, seed=4).build(ritz.aslinearoperator(K, psd=True), 0.1).pivots is None
    exhausted = Nystrom(12).build(ritz.aslinearoperator(normal(40, 3) @ normal(40, 3).mT, psd=True), 0.1)
    torch.testing.assert_close(exhausted.to_dense(), normal(40, 3) @ normal(40, 3).mT + 0.1 * torch.eye(40).double())


def test_nystrom_products_come_in_one_block():
    A = ritz.Counting(ritz.aslinearoperator(kernel(50), psd=True))
    Nystrom(7).build(A, 0.1)
    assert A.num_matvecs == 7


def test_default_rank():
    assert [default_rank(n) for n in (3, 50, 600, 2000, 13279, 10**5, 10**7)] == [3, 10, 50, 90, 230, 500, 500]
    A = ritz.aslinearoperator(kernel(), psd=True)
    assert RandomlyPivotedCholesky().build(A, 1e-6).factor.shape[1] == PivotedCholesky().resolve(300) == 30
    smooth = torch.exp(-0.5 * torch.cdist(x := normal(300, 1), x) ** 2)
    for method in (RandomlyPivotedCholesky(), PivotedCholesky()):
        P = method.build(ritz.aslinearoperator(smooth, psd=True).shift(0.5))
        left = float(smooth.trace() - (P.factor**2).sum())
        r = P.factor.shape[1]
        assert r < 15 and left <= 0.5  # R⁻¹ A R⁻ᴴ is between 1 and 2 then
        if method == PivotedCholesky():
            one_less = PivotedCholesky(r - 1).build(ritz.aslinearoperator(smooth, psd=True), 0.5)
            assert float(smooth.trace() - (one_less.factor**2).sum()) > 0.5
        B = P.inverse_root()._numeric(P.inverse_root()._numeric(smooth + 0.5 * torch.eye(300).double()).mT)
        assert 1 - 1e-9 < float(torch.linalg.eigvalsh(B).min()) and float(torch.linalg.eigvalsh(B).max()) <= 2


# -- noise that differs from row to row -------------------------------------------------------------------------------


def varied(n=80):
    return torch.logspace(-3, 1, n, dtype=torch.float64)


@pytest.mark.parametrize(
    "method", [PivotedCholesky(20), RandomlyPivotedCholesky(20), Nystrom(20), Landmarks(range(20))]
)
def test_diagonal_noise(method):
    K, d = kernel(80), varied()
    A = ritz.aslinearoperator(K, psd=True) + Diagonal(d)
    P = method.build(A)
    D = P.factor @ P.factor.mT + torch.diag(d)
    eye = torch.eye(80, dtype=torch.float64)
    torch.testing.assert_close(P.to_dense(), D)
    torch.testing.assert_close(P.diagonal(), D.diagonal())
    torch.testing.assert_close(P.solve(D), eye)
    root = P.invsqrt(eye)
    torch.testing.assert_close(root @ D @ root.mT, eye)
    torch.testing.assert_close(P.logdet(), torch.logdet(D))
    b = normal(80)
    x, info = solve(A, b, method=CG(rtol=1e-9), preconditioner=P, return_info=True)
    torch.testing.assert_close(x, torch.linalg.solve(K + torch.diag(d), b), rtol=1e-6, atol=1e-6)
    _, plain = solve(A, b, method=CG(rtol=1e-9), return_info=True)
    assert info.depth < 0.75 * plain.depth


def test_pivots_look_at_the_noise():
    """Rows with much noise matter little: the scaled kernel decides."""
    K, d = torch.eye(6, dtype=torch.float64), torch.tensor([1.0, 1e-3, 1.0, 1e-2, 1.0, 1.0], dtype=torch.float64)
    P = PivotedCholesky(2).build(ritz.aslinearoperator(K, psd=True) + Diagonal(d))
    assert P.pivots.tolist() == [1, 3]


def test_noise_is_found_in_a_sum():
    K, d = ritz.aslinearoperator(kernel(30), psd=True), varied(30)
    for A, want in [
        (K + Diagonal(d), d),
        (K + 2.0 * Diagonal(d), 2 * d),
        ((K + Diagonal(d)).shift(0.5), d + 0.5),
        (K.shift(torch.tensor(0.5).double()) + Diagonal(d), d + 0.5),
        (ritz.Counting(K + Diagonal(d).declare(psd=True)), d),
        (K.shift(0.5), torch.full((30,), 0.5).double()),
        (K.shift(0.5) + Diagonal(-d), torch.full((30,), 0.5).double()),  # not noise: it stays in K
    ]:
        rest, noise = split_noise(A)
        torch.testing.assert_close(torch.as_tensor(noise, dtype=torch.float64).expand(30), want)
        torch.testing.assert_close(rest.to_dense(), A.to_dense() - torch.diag(want))
    P = PivotedCholesky(3).build(K.shift(0.5), d)
    torch.testing.assert_close(P.noise, d + 0.5)


def test_refusals():
    K = ritz.aslinearoperator(kernel(30), psd=True)
    for call, error, words in [
        (lambda: Landmarks([1, 1]), OperandError, "distinct"),
        (lambda: Landmarks([0.5]), OperandError, "whole"),
        (lambda: Landmarks([40]).build(K, 0.1), OperandError, "column 40; the operator has 30"),
        (lambda: Nystrom(0), OperandError, "rank=0"),
        (lambda: PivotedCholesky(3).build(K, -varied(30)), DomainError, r"30 entries are not.*d\[0\]"),
        (lambda: LowRankPreconditioner(normal(30, 2), torch.ones(7)), OperandError, r"\(7,\); expected"),
    ]:
        with pytest.raises(error, match=words):
            call()
