"""Small things."""

from __future__ import annotations

import torch
from tests.pairing.common import REAL, N, operator, randn, rows

import ritz
from ritz.pairing import Cotangents, Run


def test_a_product_does_not_hand_out_its_operand():
    X = randn(N, 2)
    for A in (ritz.operators.identity(N, dtype=REAL), operator(lambda x: x), operator(lambda x: x.view(x.shape))):
        for Y in (A @ X, A @ X[:, 0]):
            assert Y.untyped_storage().data_ptr() != X.untyped_storage().data_ptr()
        with Run(A) as run:
            for _ in range(2):
                assert run.matmat(X).untyped_storage().data_ptr() != X.untyped_storage().data_ptr()


def test_attach_without_blocks():
    v = randn(N).requires_grad_()
    theta = randn(N).requires_grad_()
    with Run(operator(lambda x: rows(theta, x)), v) as run:
        pass
    (value,) = run.attach([v.detach().sum()], lambda g: Cotangents([], [g.expand(N)]), [], name="sum")
    value.backward()
    torch.testing.assert_close(v.grad, torch.ones_like(v))
    assert theta.grad is None
