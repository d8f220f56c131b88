"""Preconditioners: identities against dense algebra, pivots, shifts found in sums, differentiable log-determinants."""

import pytest
import torch

import ritz
from ritz.errors import DomainError, OperandError
from ritz.pairing import pair_by_autograd
from ritz.solve import (
    CG,
    DiagonalPreconditioner,
    Direct,
    Jacobi,
    LowRankPreconditioner,
    PivotedCholesky,
    RandomlyPivotedCholesky,
    solve,
    split_shift,
)
from ritz.testing import problem


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kernel(n=60, scale=0.2, dtype=torch.float64):
    x = torch.linspace(0, 1, n, dtype=torch.float64).unsqueeze(1)
    return torch.exp(-0.5 * torch.cdist(x, x) ** 2 / scale**2).to(dtype)


def hermitian(n=30, seed=0):
    G = normal(n, n, seed=seed, dtype=torch.complex128) * torch.logspace(0, -6, n, dtype=torch.float64)
    K = G @ G.mH
    return (K + K.mH) / 2


CASES = {
    "jacobi": lambda dtype: Jacobi().build(
        ritz.aslinearoperator((kernel() + torch.diag(torch.arange(60.0))).to(dtype))
    ),
    "diagonal": lambda dtype: DiagonalPreconditioner(torch.linspace(0.1, 9, 60, dtype=dtype)),
    "greedy": lambda dtype: PivotedCholesky(8).build(ritz.aslinearoperator(kernel(dtype=dtype), psd=True), 1e-2),
    "random": lambda dtype: RandomlyPivotedCholesky(8).build(
        ritz.aslinearoperator(kernel(dtype=dtype), psd=True), 1e-2
    ),
    "low rank": lambda dtype: LowRankPreconditioner(normal(60, 5).to(dtype), 0.3),
    "rank zero": lambda dtype: LowRankPreconditioner(torch.zeros(60, 0, dtype=dtype), 0.3),
}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("case", CASES)
def test_identities(case, dtype, tolerance):
    P = CASES[case](dtype)
    eye = torch.eye(60, dtype=dtype)
    D = P.to_dense()
    assert P.psd and P.hermitian and D.dtype == dtype
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    close(P.matmat(eye), D)
    close(P.solve(D), eye)
    root = P.invsqrt(eye)
    close(root, root.mH)
    close(root @ D @ root, eye)
    close(P.diagonal(), D.diagonal())
    close(P.logdet(), torch.linalg.slogdet(D.double()).logabsdet.to(dtype))


def test_complex_identities():
    K = hermitian()
    P = RandomlyPivotedCholesky(10).build(ritz.aslinearoperator(K, psd=True), 0.1)
    eye = torch.eye(30, dtype=K.dtype)
    D = P.to_dense()
    torch.testing.assert_close(D, D.mH)
    torch.testing.assert_close(P.solve(D), eye)
    torch.testing.assert_close(P.invsqrt(P.invsqrt(D)), eye)
    torch.testing.assert_close(P.logdet(), torch.linalg.slogdet(D).logabsdet)
    S = P.pivots
    expected = K[:, S] @ torch.linalg.solve(K[S][:, S], K[S]) + 0.1 * eye
    torch.testing.assert_close(D, expected)
    d = Jacobi().build(ritz.aslinearoperator(K, psd=True))
    torch.testing.assert_close(d.to_dense(), torch.diag(K.diagonal()))


@pytest.mark.parametrize("method", [PivotedCholesky(12), RandomlyPivotedCholesky(12)])
def test_factor_is_the_partial_cholesky_factor(method):
    K = kernel()
    P = method.build(ritz.aslinearoperator(K, psd=True).shift(0.5))
    S = P.pivots
    assert len(set(S.tolist())) == 12
    expected = K[:, S] @ torch.linalg.solve(K[S][:, S], K[S])
    # 12 columns of this kernel have condition 1e13: the product is fixed to the square root of the rounding only
    torch.testing.assert_close(P.factor @ P.factor.mT, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close((P.factor @ P.factor.mT)[S][:, S], K[S][:, S], rtol=0, atol=1e-9)


def test_greedy_pivots_are_the_largest():
    d = torch.tensor([1.0, 5.0, 3.0, 4.0, 2.0], dtype=torch.float64)
    P = PivotedCholesky(3).build(ritz.aslinearoperator(torch.diag(d), psd=True), 0.1)
    assert P.pivots.tolist() == [1, 3, 2]


def test_random_pivots_are_drawn_by_the_diagonal():
    d = torch.tensor([1.0, 0.0, 6.0, 3.0], dtype=torch.float64)
    A = ritz.aslinearoperator(torch.diag(d), psd=True)
    first = torch.tensor([int(RandomlyPivotedCholesky(1, seed=s).build(A, 0.1).pivots) for s in range(1000)])
    share = torch.bincount(first, minlength=4) / 1000
    torch.testing.assert_close(share.double(), d / 10, rtol=0, atol=0.05)


def test_random_pivots_depend_on_the_seed_only():
    A = ritz.aslinearoperator(kernel(), psd=True)
    one, same, other = (RandomlyPivotedCholesky(10, seed=s).build(A, 0.1).pivots.tolist() for s in (3, 3, 4))
    assert one == same != other
    shorter = RandomlyPivotedCholesky(10, seed=3).build(ritz.Counting(A), 0.1).pivots.tolist()
    assert shorter == one


def test_random_pivoting_is_near_the_best_approximation():
    """Chen et al., Theorem 2.3: with a few times r columns the expected trace error is near that of the best rank r."""
    K = kernel(200, 0.05)
    tail = float(torch.linalg.eigvalsh(K)[:-10].sum())
    errors = []
    for seed in range(10):
        P = RandomlyPivotedCholesky(20, seed=seed).build(ritz.aslinearoperator(K, psd=True), 1.0)
        errors.append(float(K.trace() - (P.factor**2).sum()))
    assert sum(errors) / 10 < tail


def test_columns_are_all_it_needs():
    """Counting knows its diagonal by n products only; the rest are columns: r, or the candidates of some blocks."""
    counts = []
    for method in (PivotedCholesky(7), RandomlyPivotedCholesky(7)):
        A = ritz.Counting(ritz.aslinearoperator(kernel(), psd=True))
        with torch.no_grad():
            method.build(A, 0.1)
        counts.append(A.num_matvecs - 60)
    assert counts[0] == 7 and 7 <= counts[1] <= 14


def test_rank_stops_where_the_operator_is_exhausted():
    p = problem("rank_deficient")
    P = RandomlyPivotedCholesky(12).build(ritz.aslinearoperator(p.matrix, psd=True), 0.1)
    assert P.factor.shape == (16, 6)
    torch.testing.assert_close(P.to_dense(), p.matrix + 0.1 * torch.eye(16, dtype=torch.float64))
    G = normal(30, 5, dtype=torch.complex128)
    K = G @ G.mH
    A = ritz.Counting(ritz.aslinearoperator(K, psd=True))
    with torch.no_grad():
        P = PivotedCholesky(12).build(A, 0.1)
    assert P.factor.shape == (30, 5) and A.num_matvecs == 30 + 5
    torch.testing.assert_close(P.to_dense(), K + 0.1 * torch.eye(30, dtype=K.dtype))
    assert RandomlyPivotedCholesky(50).build(ritz.aslinearoperator(kernel(), psd=True), 0.1).factor.shape[1] < 30
    assert PivotedCholesky(3).build(ritz.aslinearoperator(problem("zero").matrix, psd=True), 0.1).factor.shape == (
        10,
        0,
    )


def test_shift_is_found_in_a_sum():
    K = ritz.aslinearoperator(kernel(), psd=True)
    noise = torch.tensor(0.3, dtype=torch.float64)
    for A, value in [
        (K.shift(0.3), 0.3),
        (K.shift(noise).shift(0.2), 0.5),
        (K + 2.0 * ritz.operators.identity(60, dtype=torch.float64), 2.0),
        (K.shift(0.3).declare(psd=True), 0.3),
        (ritz.Counting(K.shift(0.3)), 0.3),
    ]:
        rest, found = split_shift(A)
        assert float(found) == pytest.approx(value)
        torch.testing.assert_close(rest.to_dense(), K.to_dense())
    assert split_shift(K) == (K, None)
    assert float(RandomlyPivotedCholesky(5).build(K.shift(0.3), 0.2).noise) == pytest.approx(0.5)


def test_without_a_shift_the_rest_of_the_diagonal_stands_in():
    K = kernel() + 0.3 * torch.eye(60, dtype=torch.float64)
    P = RandomlyPivotedCholesky(10).build(ritz.aslinearoperator(K, psd=True))
    left = K.diagonal() - (P.factor**2).sum(1)
    torch.testing.assert_close(P.noise, float(left.mean()))
    A = ritz.aslinearoperator(kernel() + 1e-3 * torch.eye(60, dtype=torch.float64), psd=True)
    _, info = solve(A, normal(60), method=CG(), preconditioner=RandomlyPivotedCholesky(20), return_info=True)
    _, plain = solve(A, normal(60), method=CG(), return_info=True)
    assert info.depth <= 0.7 * plain.depth


def test_inverse_is_accurate_where_one_projection_is_not_enough():
    """s²/σ² = 1e10 in float32: what one pass of I − U Uᴴ leaves of a large direction is blown up by 1/σ² = 1e4."""
    F = 1e3 * torch.linalg.qr(normal(80, 6)).Q.float()
    P = LowRankPreconditioner(F, 1e-4)
    x = F @ normal(6, 20, seed=1).float()
    got = (x.double() * P.solve(x).double()).sum(0)
    expected = (x.double() ** 2).sum(0) / (1e6 + 1e-4)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0.0)


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["dense", "callable"])
@pytest.mark.parametrize("method", [PivotedCholesky(6), RandomlyPivotedCholesky(6)])
def test_logdet_is_differentiable_with_pivots_fixed(wrap, method):
    x = torch.linspace(0, 1, 40, dtype=torch.float64).unsqueeze(1)
    scale = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    K = torch.exp(-0.5 * torch.cdist(x, x) ** 2 / scale**2)
    if wrap == "dense":
        A = ritz.aslinearoperator(K, psd=True)
    else:
        A = ritz.aslinearoperator(lambda X: K @ X, shape=40, dtype=torch.float64, psd=True)
    P = method.build(A.shift(noise))
    got = torch.autograd.grad(P.logdet(), (scale, noise))
    S = P.pivots
    K = torch.exp(-0.5 * torch.cdist(x, x) ** 2 / scale**2)
    D = K[:, S] @ torch.linalg.solve(K[S][:, S], K[S]) + noise * torch.eye(40, dtype=torch.float64)
    expected = torch.autograd.grad(torch.linalg.slogdet(D).logabsdet, (scale, noise))
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def test_jacobi_logdet_is_differentiable():
    K = kernel().requires_grad_()
    P = Jacobi().build(ritz.aslinearoperator(K, psd=True), 0.5)
    (g,) = torch.autograd.grad(P.logdet(), K)
    torch.testing.assert_close(g, torch.diag(1 / (K.detach().diagonal() + 0.5)))


def test_pairing_with_a_preconditioner_reaches_the_operator():
    """⟨Λ, dP Q⟩ through P's own tensors, which hang on those of A: what a preconditioned log-determinant needs."""
    K = kernel(30).requires_grad_()
    noise = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    P = RandomlyPivotedCholesky(4).build(ritz.aslinearoperator(K, psd=True).shift(noise))
    Lam, Q = normal(30, 3, seed=1), normal(30, 3, seed=2)
    parts = pair_by_autograd(P.matmat, P.tensors(), Lam, Q)
    got = torch.autograd.grad(P.tensors(), (K, noise), parts)
    S = P.pivots
    block = (K[S][:, S] + K[S][:, S].mT) / 2
    D = K[:, S] @ torch.linalg.solve(block, K[:, S].mT) + noise * torch.eye(30, dtype=torch.float64)
    expected = torch.autograd.grad((Lam * (D @ Q)).sum(), (K, noise))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_solution_does_not_depend_on_the_preconditioner():
    K = kernel().requires_grad_()
    b = normal(60)
    A = ritz.aslinearoperator(K, psd=True).shift(0.1)
    grads = [
        torch.autograd.grad(solve(A, b, method=CG(rtol=1e-12), preconditioner=P).sum(), K)[0]
        for P in (None, RandomlyPivotedCholesky(10), Jacobi(), RandomlyPivotedCholesky(10).build(A))
    ]
    for g in grads[1:]:
        torch.testing.assert_close(g, grads[0], rtol=1e-7, atol=1e-7)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_refusals():
    K = ritz.aslinearoperator(kernel(), psd=True)
    with pytest.raises(DomainError, match=r"positive entries; 1 of 3 .* d\[1\] = -2"):
        DiagonalPreconditioner(torch.tensor([1.0, -2.0, 3.0]))
    with pytest.raises(DomainError, match="shift σ² > 0; got -1"):
        PivotedCholesky(3).build(K, -1.0)
    with pytest.raises(DomainError, match="positive semidefinite"):
        PivotedCholesky(3).build(ritz.aslinearoperator(-torch.eye(3), psd=True), 1.0)
    with pytest.raises(OperandError, match="rank=0"):
        RandomlyPivotedCholesky(0)
    with pytest.raises(OperandError, match="preconditioner is a Dense; expected"):
        solve(K, normal(60), method=CG(), preconditioner=K)
    with pytest.raises(OperandError, match=r"shape \(3, 3\); the operator has shape \(60, 60\)"):
        solve(K, normal(60), method=CG(), preconditioner=DiagonalPreconditioner(torch.ones(3)))
    with pytest.raises(OperandError, match="Direct.. takes no preconditioner"):
        solve(K, normal(60), method=Direct(), preconditioner=Jacobi())
