"""Counting what goes through an operator."""

from __future__ import annotations

import torch

import ritz
from ritz.operators import Dense
from ritz.pairing import Cotangents, Pair, Run
from ritz.testing import check_operator

REAL = torch.float64


def test_keeps_the_contract():
    W = torch.randn(3, 4, dtype=REAL, requires_grad=True)
    check_operator(ritz.Counting(Dense(W)))
    check_operator(ritz.Counting(ritz.aslinearoperator(lambda x: W @ x, shape=(3, 4), dtype=REAL)))


def test_counts_columns_in_both_directions():
    A = ritz.Counting(Dense(torch.randn(3, 4, dtype=REAL)))
    A @ torch.ones(4, dtype=REAL)
    A @ torch.ones(4, 5, dtype=REAL)
    A.mH @ torch.ones(3, 2, dtype=REAL)
    A.mT @ torch.ones(3, dtype=REAL)
    A.adjoint_product(2)(torch.ones(3, 2, dtype=REAL))
    assert (A.num_forward, A.num_adjoint, A.num_matvecs, A.num_paired) == (6, 5, 11, 0)


def test_counts_through_algebra_and_runs():
    W = torch.randn(3, 3, dtype=REAL, requires_grad=True)
    A = ritz.Counting(ritz.aslinearoperator(lambda x: W @ x, shape=3, dtype=REAL, block=True))
    B = 2 * A + A @ A
    X = torch.ones(3, 4, dtype=REAL)
    with Run(B) as run:
        Y = run.matmat(X)
    assert run.num_matvecs == 4 and A.num_forward == 12
    (value,) = run.attach([Y.sum()], lambda g: Cotangents([Pair(g.expand(3, 4))], []), [X], name="sum")
    assert A.num_matvecs == 12
    value.backward()
    assert A.num_paired == 12


def test_counts_are_an_operators_own():
    A = Dense(torch.eye(2))
    first, second = ritz.Counting(A), ritz.Counting(A)
    first @ torch.ones(2)
    assert (first.num_matvecs, second.num_matvecs) == (1, 0)
