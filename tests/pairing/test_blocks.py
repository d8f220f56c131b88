"""Blocks come out right whatever a callable does with them."""

from __future__ import annotations

import pytest
import torch
from tests.pairing.common import REAL, Calls, N, W, operator, randn, rows, squared_norm

from ritz.pairing import Run

d4 = torch.linspace(1, 2, 4, dtype=REAL)


M4 = randn(4, 4, seed=5)


MISHANDLED = {
    "d * x": (lambda x: d4 * x, torch.diag(d4)),
    "x @ M": (lambda x: x @ M4, M4.T),
    "vectors only": (lambda x: torch.dot(d4, x) * d4, torch.outer(d4, d4)),
    "sum over everything": (
        lambda x: d4 * x.sum() if x.ndim == 1 else d4[:, None] * x.sum(),
        torch.outer(d4, torch.ones(4, dtype=REAL)),
    ),
    "assertion": (lambda x: _only_vectors(x), torch.diag(d4)),
    "blocks only": (lambda X: _only_blocks(X), M4),
    "flip": (lambda x: x.flip(-1), torch.eye(4, dtype=REAL).flip(0)),
}


def _only_vectors(x):
    assert x.ndim == 1
    return d4 * x


def _only_blocks(X):
    n, k = X.shape
    return M4 @ X


@pytest.mark.parametrize("name", MISHANDLED)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_blocks_come_out_right_whatever_the_callable_does_with_them(name, width):
    fn, dense = MISHANDLED[name]
    X = randn(4, width)
    torch.testing.assert_close(operator(fn, 4) @ X, dense @ X)
    with Run(operator(fn, 4)) as run:
        torch.testing.assert_close(run.matmat(X), dense @ X)
        torch.testing.assert_close(run.matmat(X), dense @ X)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_square_block_trap(n):
    d = torch.linspace(1, 2, n, dtype=REAL).requires_grad_()
    A = operator(lambda x: d * x, n)
    X = randn(n, n)  # d * X has the right shape and scales columns instead of rows
    torch.testing.assert_close(A @ X, torch.diag(d) @ X)
    (got,) = torch.autograd.grad(squared_norm(A, X), d)
    torch.testing.assert_close(got, torch.autograd.grad((torch.diag(d) @ X).square().sum(), d)[0])


def test_block_is_taken_at_its_word():
    calls = Calls(lambda x: W @ x)
    operator(calls, block=True) @ randn(N, 3)
    assert calls.widths == [3]
    calls = Calls(lambda x: W @ x)
    operator(calls, block=False) @ randn(N, 3)
    assert calls.widths == [1, 1, 1]


def test_columns_are_probed_once_over_many_runs():
    theta = randn(N).requires_grad_()
    calls = Calls(lambda x: rows(theta, W @ x))
    A = operator(calls)
    for _ in range(3):
        squared_norm(A, randn(N, 3)).backward()
    probes = calls.widths[:3]
    assert probes == [1, 1, 2]
    assert 1 not in calls.widths[3:]
