"""What is there for every operator, on the curvature of a network: against dense matrices and differences."""

import pytest
import torch
from torch import nn

import ritz
from ritz.curvature import GGN, CrossEntropy, Hessian
from ritz.stochastic import frobenius_norm

DOUBLE = {"dtype": torch.float64}


def curvature(kind, temperature=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, y = torch.randn(20, 3, **DOUBLE), torch.randint(0, 4, (20,))
    if temperature is None:
        return kind(model, CrossEntropy(), None, (x, y), reduction="sum")
    params = {n: p.detach() for n, p in model.named_parameters()}

    def scaled(p, x):
        return torch.func.functional_call(model, p, (x,)) / temperature

    return kind(scaled, CrossEntropy(), params, (x, y), reduction="sum", hyperparameters=[temperature])


@pytest.mark.parametrize("kind", [GGN, Hessian])
def test_eigenpairs_traces_norms_and_densities(kind):
    A = curvature(kind)
    M = A.to_dense()
    w = torch.linalg.eigvalsh(M)
    values, vectors = ritz.eigsh(A, 4)
    torch.testing.assert_close(values, w.flip(0)[:4], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(M @ vectors, vectors * values, rtol=1e-6, atol=1e-7)
    for estimate, exact in (
        (ritz.trace(A, estimator=ritz.XTrace(40), return_info=True), M.trace()),
        (ritz.trace(A, estimator=ritz.Hutchinson(40), return_info=True), M.trace()),
        (ritz.trace(A, lambda x: x * x, estimator=ritz.Hutchinson(40), return_info=True), M.square().sum()),
    ):
        assert float((estimate[0] - exact).abs()) < 4 * float(estimate[1].standard_error)
    diagonal, info = ritz.diagonal(A, estimator=ritz.XDiag(60), return_info=True)
    assert float(((diagonal - M.diagonal()).abs() / info.standard_error.clamp(min=1e-9)).median()) < 2
    norm, error = frobenius_norm(A, estimator=ritz.Hutchinson(40))
    assert float((norm - M.norm()).abs()) < 4 * float(error)
    n = M.shape[0]
    grid, density, error = ritz.spectral_density(
        A, 400, width=0.3, estimator=ritz.Hutchinson(n), method=ritz.Lanczos(n)
    )
    exact = torch.distributions.Normal(w, 0.3).log_prob(grid.unsqueeze(1)).exp().sum(1)
    torch.testing.assert_close(density, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [GGN, Hessian])
def test_the_sharpness_is_differentiable_in_a_hyperparameter(kind):
    t = torch.tensor(1.3, requires_grad=True, **DOUBLE)
    (got,) = torch.autograd.grad(ritz.eigsh(curvature(kind, t), 2).values.sum(), t)
    h = 1e-5
    with torch.no_grad():
        up, down = (torch.linalg.eigvalsh(curvature(kind, t + d).to_dense())[-2:].sum() for d in (h, -h))
    torch.testing.assert_close(got, (up - down) / (2 * h), rtol=1e-6, atol=1e-8)
