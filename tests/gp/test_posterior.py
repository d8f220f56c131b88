"""Predictions against dense formulas, on both paths; variances that cannot be negative."""

import pytest
import torch
from tests.gp.problems import data, process

from ritz import CG, ConvergenceWarning
from ritz.errors import OperandError
from ritz.gp import ExactGP
from ritz.kernels import RBF, Scale


def textbook(gp, X, y, Xs):
    k = gp.kernel.evaluate
    K = k(X) + gp.noise * torch.eye(len(y), dtype=X.dtype)
    C = k(X, Xs)
    mean = gp.mean(Xs) + C.mT @ torch.linalg.solve(K, y - gp.mean(X))
    return mean, k(Xs).diagonal() - (C * torch.linalg.solve(K, C)).sum(0)


@pytest.mark.parametrize("options", [{}, {"solver": CG(rtol=1e-11)}], ids=["dense", "iterative"])
def test_mean_and_variance(options):
    X, y = data(90)
    Xs, _ = data(600, seed=1)  # several blocks of columns
    gp = process(**options)
    posterior = gp.condition(X, y)
    mean, variance = posterior.predict(Xs)
    want = textbook(gp, X, y, Xs)
    torch.testing.assert_close(mean, want[0].detach(), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(variance, want[1].detach(), rtol=1e-8, atol=1e-9)
    noisy = posterior.predict(Xs, noise=True)[1]
    torch.testing.assert_close(noisy - variance, gp.noise.detach().expand(600))
    assert not mean.requires_grad and (posterior.info is None) == (not options)


@pytest.mark.parametrize("options", [{}, {"solver": CG(rtol=1e-11)}], ids=["dense", "iterative"])
def test_gradients_in_the_test_points(options):
    X, y = data(40)
    Xs = data(7, seed=1)[0].requires_grad_(True)
    gp = process(**options)
    posterior = gp.condition(X, y)
    for got, want in zip(posterior.predict(Xs), textbook(gp, X, y, Xs)):
        (a,), (b,) = (torch.autograd.grad(v.sum(), Xs, retain_graph=True) for v in (got, want))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    again = posterior.mean(Xs).sum()  # what is cached survives a backward pass
    again.backward()


def test_later_training_does_not_reach_the_posterior():
    X, y = data(30)
    gp = process()
    posterior = gp.condition(X, y)
    before = posterior.predict(X)
    gp.noise, gp.kernel.outputscale = 3.0, 9.0
    for a, b in zip(before, posterior.predict(X)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"solver": CG(rtol=1e-3)}], ids=["dense", "iterative"])
def test_variance_is_never_negative(options, dtype):
    X, y = data(60, dtype=dtype)
    gp = ExactGP(Scale(RBF(lengthscale=5.0)), noise=2e-6 if not options else 1e-2, **options).to(dtype)
    posterior = gp.condition(X, y)
    for Xs in (X, X + 1e-5, 0.5 * X):
        v = posterior.variance(Xs)
        assert bool((v >= 0).all()) and float(v.max()) < 0.1


def test_an_unconverged_solve_only_enlarges_the_variance():
    X, y = data(120)
    Xs, _ = data(25, seed=1)
    exact = textbook(process(), X, y, Xs)[1].detach()
    gp = process(solver=CG(max_steps=2))
    with pytest.warns(ConvergenceWarning):
        posterior = gp.condition(X, y)
    posterior._P = None  # without its preconditioner two steps are far from enough
    with pytest.warns(ConvergenceWarning):
        rough = posterior.variance(Xs)
    assert bool((rough >= exact - 1e-12).all()) and float((rough - exact).max()) > 1e-3


def test_shapes_and_arguments():
    X, y = data(20)
    posterior = process().condition(X, y)
    assert posterior.mean(X[:0]).shape == posterior.variance(X[:0]).shape == (0,)
    assert "20 observations" in repr(posterior)
    for bad in (X[:, :2], X.float(), X.numpy()):
        with pytest.raises(OperandError, match="Xs"):
            posterior.mean(bad)
    one = ExactGP(RBF().double(), noise=0.1).condition(X[:, 0], y)
    torch.testing.assert_close(one.mean(X[:, 0]), one.mean(X[:, :1]))
