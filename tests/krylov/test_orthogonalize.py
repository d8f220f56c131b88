import importlib

import pytest
import torch

from ritz.krylov.orthogonalize import add, coefficients, dots, norms, project_out, safe_norms, subtract

DTYPES = [torch.float64, torch.float32, torch.complex128, torch.complex64]


def bases(m, j, n, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(m, n, j, dtype=dtype, generator=g))
    return q.mT.contiguous(), torch.randn(m, n, dtype=dtype, generator=g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
def test_remainder_is_orthogonal_and_nothing_is_lost(m, dtype):
    Q, W = bases(m, 5, 40, dtype)
    before = W.clone()
    R, c = project_out(Q, W)
    eps = torch.finfo(dtype).eps
    assert torch.equal(W, before)
    assert (Q.conj() @ R.unsqueeze(2)).abs().max() < 10 * eps
    assert (W - R - (c.unsqueeze(1) @ Q).squeeze(1)).abs().max() < 20 * eps
    torch.testing.assert_close(c, torch.einsum("mjn,mn->mj", Q.conj(), W), rtol=100 * eps, atol=100 * eps)


@pytest.mark.parametrize("m", [1, 3])
def test_second_pass_is_what_keeps_orthogonality_under_cancellation(m):
    Q, W = bases(m, 5, 40, torch.float64)
    W = Q.sum(1) + 1e-10 * W  # nearly all of w lies in the span
    one, two = (project_out(Q, W, passes)[0] for passes in (1, 2))
    loss = [((Q @ R.unsqueeze(2)).abs().amax((1, 2)) / R.norm(dim=1)).max().item() for R in (one, two)]
    assert loss[0] > 1e-8 and loss[1] < 1e-14


@pytest.mark.parametrize("passes", [1, 2])
def test_run_by_run_equals_batched(passes, monkeypatch):
    """Which of the two is used depends on the size only; the numbers agree to rounding."""
    Q, W = bases(3, 5, 40, torch.float64)
    module = importlib.import_module("ritz.krylov.orthogonalize")
    results = []
    for choice in (True, False):
        monkeypatch.setattr(module, "_one_by_one", lambda Q, choice=choice: choice)
        results.append(project_out(Q, W, passes))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3])
def test_building_blocks(m, dtype):
    Q, W = bases(m, 4, 30, dtype)
    c = coefficients(Q, W)
    dense = torch.einsum("mj,mjn->mn", c, Q)
    close = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype in (torch.float32, torch.complex64) else {"rtol": 1e-13, "atol": 1e-13}
    )
    torch.testing.assert_close(subtract(Q, c, W), W - dense, **close)
    torch.testing.assert_close(subtract(Q, c, (X := W.clone()), out=X), W - dense, **close)
    torch.testing.assert_close(add(Q, c, W.clone()), W + dense, **close)
    torch.testing.assert_close(dots(Q[:, 0], W), (Q[:, 0].conj() * W).sum(1), **close)
    torch.testing.assert_close(norms(W), (W.abs() ** 2).sum(1).sqrt(), **close)


def test_norms_of_single_precision_are_summed_in_double():
    x = torch.rand(1, 2_000_000, generator=torch.Generator().manual_seed(0))
    exact = x.double().norm()
    assert abs(norms(x).double() - exact) / exact < 1e-7  # float32 sums: 1e-5
    assert norms(torch.full((1, 4), 1e-30)).item() == pytest.approx(2e-30)  # squares would vanish


@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_safe_norms_neither_overflow_nor_underflow(size):
    x = torch.full((2, 4), size, dtype=torch.float64)
    x[1] = 0
    assert safe_norms(x).tolist() == pytest.approx([2 * size, 0.0])
