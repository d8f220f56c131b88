"""Adjoint products of a callable."""

from __future__ import annotations

import pytest
import torch
from tests.pairing.common import DTYPES, REAL, Calls, N, W, only_pairing, operator, randn, squared_norm

import ritz
from ritz.errors import AdjointUnavailableError
from ritz.operators import Dense, FunctionOperator
from ritz.pairing import Cotangents, Pair, Run


@DTYPES
def test_adjoint_product_records_the_forward_product_once(dtype):
    M = randn(4, N, dtype=dtype)
    calls = Calls(lambda x: M @ x)
    A = FunctionOperator(calls, (4, N), dtype, "cpu", block=True)
    adjoint = A.adjoint_product(2)
    for seed in range(4):
        Y = randn(4, 2, seed=seed, dtype=dtype)
        torch.testing.assert_close(adjoint(Y), M.mH @ Y)
    assert calls.widths == [2]


@DTYPES
def test_a_run_over_the_gram_operator_records_once(dtype):
    M = randn(4, N, dtype=dtype).requires_grad_()
    calls = Calls(lambda x: M @ x)
    A = FunctionOperator(calls, (4, N), dtype, "cpu", block=True)
    X = randn(N, 2, dtype=dtype)
    for G in (A.mH @ A, A.mT @ A):
        calls.widths.clear()
        with Run(G) as run:
            for _ in range(5):
                Y = run.matmat(X)
        assert len(calls.widths) <= 5 + 3  # one each step, one to capture the adjoint's side, one or two recordings
        (value,) = run.attach([Y.abs().square().sum()], lambda g, Y=Y: Cotangents([Pair(2 * g * Y)], []), [X], name="G")
        (got,) = torch.autograd.grad(value, M)
        left = M.mH if G.hermitian else M.mT
        torch.testing.assert_close(Y, (left @ (M @ X)).detach())
        torch.testing.assert_close(got, torch.autograd.grad((left @ (M @ X)).abs().square().sum(), M)[0])


def test_given_adjoint_is_used():
    M = randn(4, N)
    forward, backward = Calls(lambda x: M @ x), Calls(lambda y: M.T @ y)
    A = FunctionOperator(forward, (4, N), REAL, "cpu", adjoint=backward)
    torch.testing.assert_close(A.mH @ randn(4), M.T @ randn(4))
    assert (forward.widths, backward.widths) == ([], [1])


HIDDEN = {
    "NumPy": lambda x: torch.from_numpy(W.numpy() @ x.numpy()),
    "NumPy after detach": lambda x: torch.from_numpy(W.numpy() @ x.detach().numpy()),
    "partly NumPy": lambda x: W @ x + torch.from_numpy(W.numpy() @ x.detach().numpy()),
    "an offset": lambda x: W @ x + 1.0,
}


@pytest.mark.parametrize("name", HIDDEN)
def test_an_adjoint_that_autograd_cannot_give_is_refused_by_name(name):
    A = operator(HIDDEN[name])
    with pytest.raises(AdjointUnavailableError, match="pass adjoint=..., or hermitian=True"):
        A.mH @ randn(N)
    with pytest.raises(AdjointUnavailableError):
        squared_norm(A, randn(N).requires_grad_()).backward()


def test_products_alone_do_not_need_an_adjoint():
    A = operator(HIDDEN["NumPy"])
    torch.testing.assert_close(squared_norm(A, randn(N)), (W @ randn(N)).square().sum())
    factor = randn(N).requires_grad_()
    B = ritz.operators.Diagonal(factor) @ A @ Dense(W)
    only_pairing(B, randn(N)).backward()  # only the left factor wants a gradient: no adjoint of A is needed
    torch.testing.assert_close(factor.grad, 2 * factor.detach() * (W @ W @ randn(N)).square())
