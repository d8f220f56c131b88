"""The optimizers behind a fit."""

import math

import pytest
import torch
from tests.gp.fitting import EXACT, standing
from tests.gp.problems import data, process

from ritz import Hutchinson, Lanczos
from ritz.gp import fit
from ritz.gp.adam import Adam
from ritz.gp.lbfgs import LBFGS, minimize


def rosenbrock(x):
    x = x.detach().requires_grad_(True)
    f = (1 - x[:-1]).square().sum() + 100 * (x[1:] - x[:-1].square()).square().sum()
    (g,) = torch.autograd.grad(f, x)
    return float(f.detach()), g


def test_lbfgs_finds_the_minimum():
    found = minimize(rosenbrock, torch.full((6,), -1.2, dtype=torch.float64), max_steps=200, ftol=0, gtol=1e-9)
    torch.testing.assert_close(found.x, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-7)
    assert found.reason == "gradient" and found.evaluations < 150


def test_lbfgs_survives_walls():
    # −log x + x with NaN behind the wall at 0 and infinity beyond 3
    def walled(x):
        v = float(x[0])
        if v <= 0:
            return math.nan, torch.full((1,), math.nan, dtype=torch.float64)
        if v > 3:
            return math.inf, torch.zeros(0)
        return v - math.log(v), torch.tensor([1 - 1 / v], dtype=torch.float64)

    for start in (2.9, 1e-3):
        found = minimize(walled, torch.tensor([start], dtype=torch.float64))
        assert float(found.x[0]) == pytest.approx(1.0, abs=1e-3)
    stuck = minimize(walled, torch.tensor([5.0], dtype=torch.float64))
    assert stuck.reason == "start is not finite" and float(stuck.x[0]) == 5.0


@pytest.mark.parametrize("optimizer", [Adam(8), LBFGS(8)])
def test_breakdown_is_stepped_back_from(optimizer):
    X, y = data(100)
    gp = process(logdet=(Hutchinson(5), Lanczos(20)))
    real, calls = gp.log_marginal_likelihood, []

    def sometimes(X, y, **options):
        calls.append(1)
        value, info = real(X, y, **options)
        return (value * math.nan if len(calls) in (3, 4) else value), info

    gp.log_marginal_likelihood = sometimes
    report = fit(gp, X, y, subset=None, optimizer=optimizer)
    assert math.isfinite(report.loss) and len(calls) == report.evaluations["all"] >= 6
    assert report.loss == min(loss for *_, loss, _ in report.history if math.isfinite(loss)) < report.history[0][2]
    assert "nan" in report.trouble
    gp.log_marginal_likelihood = real
    assert standing(gp, report, X, y) == report.loss


def test_lbfgs_takes_the_curvature_it_is_given():
    x = torch.full((6,), -1.2, dtype=torch.float64)
    scales = torch.logspace(0, 4, 6, dtype=torch.float64)

    def bowl(x):
        return float(0.5 * (scales * x * x).sum()), scales * x

    eye = torch.eye(6, dtype=torch.float64)
    method = LBFGS(ftol=0.0)
    state, _ = method.step(method.begin(x, *bowl(x), [(e, scales * e) for e in eye]), bowl)
    assert float(state.x.abs().max()) < 1e-12  # six exact pairs are the Hessian: one Newton step
    state, _ = method.step(method.begin(x, *bowl(x)), bowl)
    assert float(state.x.abs().max()) > 0.1


def test_lbfgs_trusts_gradients_where_values_are_rounded():
    # values rounded to 1e-2, gradients exact: the plain line search gets stuck where the slope is hidden
    def rounded(x):
        value, g = (
            0.5 * float((torch.tensor([1.0, 30.0], dtype=torch.float64) * x * x).sum()),
            x * torch.tensor([1.0, 30.0]),
        )
        return 1e-2 * math.ceil(value / 1e-2 + 0.4 * math.sin(1e5 * float(x.sum()))), g

    ends = {}
    for noise in (0.0, 2e-2):
        method = LBFGS(40, ftol=0.0, gtol=1e-6, noise=noise)
        x = torch.tensor([3.0, 1.0], dtype=torch.float64)
        state, reason = method.begin(x, *rounded(x)), None
        while reason is None and state.count < method.steps:
            state, reason = method.step(state, rounded)
        ends[noise] = float(state.x.abs().max())
    assert ends[2e-2] < 1e-5 < ends[0.0]


def test_adam_follows_the_textbook_and_its_schedule():
    x = torch.full((4,), 0.5, dtype=torch.float64)
    p = x.clone().requires_grad_(True)
    torch_adam = torch.optim.Adam([p], lr=0.1, eps=1e-12)
    method = Adam(5, 0.1, final=1.0)
    state = method.begin(x, *rosenbrock(x))
    for _ in range(5):
        state, _ = method.step(state, rosenbrock)
        p.grad = rosenbrock(p.detach())[1]
        torch_adam.step()
    torch.testing.assert_close(state.x, p.detach(), rtol=1e-12, atol=0)
    rates = [Adam(11, 0.2, final=0.1).rate(i) for i in range(11)]
    assert rates[0] == 0.2 and rates[5] == pytest.approx(0.11) and rates[10] == pytest.approx(0.02)
    assert rates == sorted(rates, reverse=True)


def test_lbfgs_on_products_finds_the_optimum_of_cholesky():
    X, y = data(40)
    dense, products = process(), process(logdet=EXACT, preconditioner=None)
    exact = fit(dense, X, y, subset_steps=200)
    report = fit(products, X, y, subset=20, subset_steps=4, optimizer=LBFGS(60, ftol=1e-9))
    assert report.stopped["all"] in ("gradient", "progress") and report.info.method == EXACT
    assert report.loss == pytest.approx(exact.loss, abs=2e-6)
    for p, q in zip(products.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-2)
    with torch.no_grad():
        assert float(-dense.log_marginal_likelihood(X, y) / 40) == pytest.approx(exact.loss, abs=1e-10)


def test_lbfgs_stops_where_the_fixed_probe_objective_is_stationary():
    X, y = data(70)
    gp = process(logdet=(Hutchinson(8), Lanczos(rtol=1e-6)))
    report = fit(gp, X, y, subset=30, optimizer=LBFGS(60, gtol=1e-4, ftol=1e-10))
    assert report.stopped["all"] in ("gradient", "progress")
    gp.preconditioner = report.preconditioner
    loss = -gp.log_marginal_likelihood(X, y) / 70
    grads = torch.autograd.grad(loss, list(gp.parameters()))
    assert max(float(g.abs().max()) for g in grads) < 2e-3
    assert report.history[-1][2] < report.history[0][2]
