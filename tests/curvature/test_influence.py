"""Influence functions against dense inverses and against leaving an example out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ritz
from ritz.curvature import GGN, KFAC, CrossEntropy, Hessian, SquaredError, influence
from ritz.errors import OperandError

DOUBLE = {"dtype": torch.float64}


def test_pairs_are_those_of_a_dense_inverse():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3, **DOUBLE), torch.randint(0, 2, (12,))
    P = sum(p.numel() for p in model.parameters())
    test, train = torch.randn(2, P, **DOUBLE), torch.randn(5, P, **DOUBLE)
    for A in (GGN(model, CrossEntropy(), None, (x, y)), KFAC(model, CrossEntropy(), None, (x, y))):
        dense = torch.linalg.inv(A.to_dense() + 0.1 * torch.eye(P, **DOUBLE))
        want = -test @ dense @ train.mT
        method = None if isinstance(A, KFAC) else ritz.CG(rtol=1e-12)
        torch.testing.assert_close(influence(test, train, A, damping=0.1, method=method), want, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(influence(train, test, A, damping=0.1, method=method), want.mT, rtol=1e-6, atol=1e-8)
        one = influence(test[0], train[1], A, damping=0.1, method=method)
        assert one.shape == () and float(one) == pytest.approx(float(want[0, 1]), rel=1e-6)


def test_it_predicts_what_leaving_an_example_out_does():
    """Ridge regression, where the objective without example j is minimised in closed form."""
    torch.manual_seed(0)
    n, d, decay = 200, 3, 0.1
    x, w0 = torch.randn(n, d, **DOUBLE), torch.randn(d, 1, **DOUBLE)
    y = x @ w0 + 0.1 * torch.randn(n, 1, **DOUBLE)
    unit = torch.eye(d, **DOUBLE)
    fit = lambda keep: torch.linalg.solve(x[keep].mT @ x[keep] / n + decay * unit, x[keep].mT @ y[keep] / n)  # noqa: E731
    everything = torch.arange(n)
    w = fit(everything)
    model = nn.Linear(d, 1, bias=False, **DOUBLE)
    model.weight.data = w.mT.clone()
    A = Hessian(model, SquaredError(), None, (x, y))
    z, t = torch.randn(1, d, **DOUBLE), torch.zeros(1, 1, **DOUBLE)
    test = ((z @ w - t) * z).reshape(1, d)
    train = (x @ w - y) * x
    got = influence(test, train, A, damping=decay, method=ritz.CG(rtol=1e-12))[0]
    loss = lambda v: 0.5 * float((z @ v - t).square())  # noqa: E731
    left_out = torch.tensor([(loss(w) - loss(fit(everything[everything != j]))) * n for j in range(20)], **DOUBLE)
    torch.testing.assert_close(got[:20], left_out, rtol=0.1, atol=1e-3)


def test_bad_input():
    A = torch.eye(3, **DOUBLE)
    with pytest.raises(OperandError, match=r"train_gradients has shape \(2, 4\)"):
        influence(torch.ones(1, 3, **DOUBLE), torch.ones(2, 4, **DOUBLE), A)
