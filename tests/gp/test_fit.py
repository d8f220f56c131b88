"""Fitting: L-BFGS on its own, both stages, determinism, recovery from breakdowns, limits."""

import math

import pytest
import torch
from tests.gp.problems import data, process

from ritz import Hutchinson, Lanczos
from ritz.gp import ExactGP, fit
from ritz.gp.lbfgs import minimize
from ritz.kernels import RBF, Matern, Scale


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


def test_first_stage_reaches_a_stationary_point():
    X, y = data(80)
    gp = process()
    report = fit(gp, X, y, subset_steps=100)
    assert set(report.stopped) == {"subset"} and report.stopped["subset"] in ("gradient", "progress")
    value = gp.log_marginal_likelihood(X, y)
    assert float(-value.detach() / 80) == pytest.approx(report.loss, rel=1e-12)
    grads = torch.autograd.grad(value / 80, list(gp.parameters()))
    assert max(float(g.abs().max()) for g in grads) < 2e-3
    assert report.loss == min(loss for _, _, loss, _ in report.history)
    assert 0.05 < float(gp.noise.detach()) ** 0.5 < 0.2  # the noise of the data is 0.1


def test_second_stage_improves_and_keeps_the_best():
    X, y = data(120)
    gp = process(logdet=(Hutchinson(20), Lanczos(rtol=1e-4)))
    losses = []
    report = fit(gp, X, y, subset=40, steps=12, callback=lambda step, loss, info: losses.append((step, loss)))
    assert set(report.stopped) == {"subset", "all"}
    stages = [stage for stage, *_ in report.history]
    assert stages == sorted(stages, reverse=True) and [s for s, _ in losses] == list(range(1, len(losses) + 1))
    seen = [loss for stage, _, loss, _ in report.history if stage == "all"]
    assert len(seen) == 13 and report.loss == min(seen) < seen[0]
    with torch.no_grad():
        assert float(-gp.log_marginal_likelihood(X, y) / 120) == report.loss  # fixed probes: the very same number


def test_the_best_step_is_put_back_even_if_the_last_one_is_far_off():
    X, y = data(80)
    gp = process(logdet=(Hutchinson(10), Lanczos(30)))
    report = fit(gp, X, y, subset=None, steps=6, lr=2.0)
    losses = [loss for _, _, loss, _ in report.history]
    assert losses[-1] > min(losses) == report.loss
    with torch.no_grad():
        assert float(-gp.log_marginal_likelihood(X, y) / 80) == report.loss


def test_stages_can_be_left_out():
    X, y = data(60)
    start = process(logdet=(Hutchinson(5), Lanczos(20)))
    before = {k: v.clone() for k, v in start.state_dict().items()}
    report = fit(start, X, y, subset=0, steps=0)
    assert report.history == [] and all(torch.equal(v, before[k]) for k, v in start.state_dict().items())
    assert set(fit(start, X, y, subset=None, steps=2).stopped) == {"all"}
    frozen = process()
    frozen.raw_noise.requires_grad_(False)
    noise = frozen.noise.item()
    fit(frozen, X, y, subset_steps=5)
    assert frozen.noise.item() == noise


def test_deterministic_by_seed():
    X, y = data(100)
    states = []
    for seed in (0, 0, 1):
        gp = process(logdet=(Hutchinson(5), Lanczos(20)))
        fit(gp, X, y, subset=30, steps=3, seed=seed)
        states.append(torch.cat([p.detach().reshape(-1) for p in gp.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_breakdown_is_stepped_back_from():
    X, y = data(100)
    gp = process(logdet=(Hutchinson(5), Lanczos(20)))
    real, calls = gp.log_marginal_likelihood, []

    def sometimes(X, y, **options):
        calls.append(1)
        value, info = real(X, y, **options)
        return (value * math.nan if len(calls) in (3, 4) else value), info

    gp.log_marginal_likelihood = sometimes
    report = fit(gp, X, y, subset=None, steps=8)
    assert math.isfinite(report.loss) and len(report.history) == 9
    assert report.loss == min(loss for *_, loss, _ in report.history if math.isfinite(loss))
    assert all(bool(torch.isfinite(p).all()) for p in gp.parameters())


def test_limits():
    X, y = data(60)
    for options in ({"max_seconds": 0.0}, {"callback": lambda step, loss, info: True}):
        gp = process(logdet=(Hutchinson(5), Lanczos(20)))
        report = fit(gp, X, y, subset=30, steps=50, **options)
        assert len(report.history) <= 2 and "stopped" in report.stopped.values()


def test_from_float32_and_from_far_away():
    X, y = data(80, dtype=torch.float32)
    for start in (0.01, 50.0):
        gp = ExactGP(Scale(Matern(2.5, 3, lengthscale=start)), noise=1.0)
        report = fit(gp, X, y, subset_steps=80)
        assert math.isfinite(report.loss)
    good = fit(ExactGP(Scale(RBF(3)), noise=0.1), X, y).loss
    assert good < 0.3
