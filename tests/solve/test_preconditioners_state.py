"""Low-rank preconditioners whose data changed after they were built, default devices, empty and dependent columns."""

import pytest
import torch

from ritz.kernels import RBF, Linear
from ritz.operators import aslinearoperator
from ritz.solve import Landmarks, LowRankPreconditioner, Nystrom, PivotedCholesky, RandomlyPivotedCholesky


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("noise", [torch.tensor(0.3).double(), torch.linspace(0.1, 0.5, 12).double()], ids=["σ²", "D"])
def test_changes_in_place_do_not_reach_a_preconditioner(noise):
    noise, F = noise.clone(), randn(12, 3)
    P = LowRankPreconditioner(F, noise)
    dense = F @ F.mT + (noise * torch.eye(12).double())
    noise.mul_(10)
    F.mul_(3)
    X = randn(12, 2, seed=1)
    torch.testing.assert_close(P.logdet(), torch.logdet(dense))
    torch.testing.assert_close(P @ X, dense @ X)
    torch.testing.assert_close(P.diagonal(), dense.diagonal())
    torch.testing.assert_close(P.solve(X), torch.linalg.solve(dense, X))
    B = P.inverse_root() @ X
    torch.testing.assert_close(B.mT @ B, X.mT @ torch.linalg.solve(dense, X))


@pytest.mark.parametrize("built", [torch.enable_grad, torch.no_grad])
def test_gradients_reach_the_noise_and_the_factor(built):
    noise, F = torch.tensor(0.3, dtype=torch.float64, requires_grad=True), randn(12, 3).requires_grad_(True)
    with built():
        P = LowRankPreconditioner(F, noise)
    got = torch.autograd.grad(P.logdet(), (F, noise))
    want = torch.autograd.grad(torch.logdet(F @ F.mT + noise * torch.eye(12).double()), (F, noise))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shift", [None, 0.1])
def test_landmarks_leave_out_dependent_columns_only(shift):
    F = randn(20, 8)
    F[4] = F[2]  # columns 2 and 4 of K are the same
    K = F @ F.mT
    P = Landmarks((1, 2, 4, 7, 9, 11)).build(aslinearoperator(K).declare(psd=True), shift)
    kept = set(P.pivots.tolist())
    assert len(kept) == 5 and kept | {2, 4} == {1, 2, 4, 7, 9, 11} and len(kept & {2, 4}) == 1
    S = [1, 2, 7, 9, 11]
    want = K[:, S] @ torch.linalg.solve(K[S][:, S], K[S])
    torch.testing.assert_close(P.factor @ P.factor.mT, want)


@pytest.mark.parametrize("noise", [None, 0.1, torch.zeros(0, dtype=torch.float64)], ids=["none", "σ²", "D"])
@pytest.mark.parametrize(
    "method",
    [PivotedCholesky(), PivotedCholesky(3), RandomlyPivotedCholesky(), Landmarks(()), Nystrom(3)],
    ids=repr,
)
def test_no_rows(method, noise):
    P = method.build(RBF().double()(torch.zeros(0, 2, dtype=torch.float64)), noise)
    assert P.factor.shape == (0, 0) and float(P.logdet()) == 0
    assert P.solve(torch.zeros(0, 2, dtype=torch.float64)).shape == (0, 2)


def test_columns_in_full_precision():
    """bfloat16 autocast outside would leave three digits of the columns."""
    X = randn(30, 4).float()
    K, want = Linear()(X), X.double() @ X.double().mT
    with torch.autocast("cpu", dtype=torch.bfloat16):
        C = K.columns([1, 5])
        P = PivotedCholesky(4).build(K, 0.1)
    torch.testing.assert_close(C.double(), want[:, [1, 5]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(P.factor @ P.factor.mT, want, rtol=1e-4, atol=1e-4)
