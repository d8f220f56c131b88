"""Fitting a Gaussian process: stages, objectives, settings."""

import gc
import math
import warnings

import pytest
import torch
from tests.gp.fitting import EXACT, standing
from tests.gp.problems import data, process

from ritz import Hutchinson, Lanczos
from ritz.errors import ConvergenceWarning, OperandError
from ritz.gp import ExactGP, LeaveOneOut, fit
from ritz.gp.adam import Adam
from ritz.gp.lbfgs import LBFGS
from ritz.kernels import RBF, Matern, Scale


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
    report = fit(gp, X, y, subset=40, optimizer=Adam(12), callback=lambda step, loss, info: losses.append((step, loss)))
    assert set(report.stopped) == {"subset", "all"}
    stages = [stage for stage, *_ in report.history]
    assert stages == sorted(stages, reverse=True) and [s for s, _ in losses] == list(range(1, len(losses) + 1))
    seen = [loss for stage, _, loss, _ in report.history if stage == "all"]
    assert len(seen) == 13 and report.loss == min(seen) < seen[0]
    assert standing(gp, report, X, y) == report.loss  # fixed probes: the very same number


def test_the_best_step_is_put_back_even_if_the_last_one_is_far_off():
    X, y = data(80)
    gp = process(logdet=(Hutchinson(10), Lanczos(30)))
    report = fit(gp, X, y, subset=None, optimizer=Adam(6, lr=2.0, final=1.0))
    losses = [loss for _, _, loss, _ in report.history]
    assert losses[-1] > min(losses) == report.loss
    assert standing(gp, report, X, y) == report.loss


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


def test_priors_are_part_of_what_is_maximised():
    X, y = data(60)
    pull = {"noise": torch.distributions.LogNormal(torch.tensor(0.0), torch.tensor(0.01))}
    for options in ({}, {"logdet": EXACT}):
        gp = process(priors=pull, **options)
        report = fit(gp, X, y, subset=None if options else 1000, steps=25)
        assert float(gp.noise.detach()) == pytest.approx(1.0, abs=0.1)
        with torch.no_grad():
            there = float(-(gp._dense(X, y)[0] + gp.log_prior()) / 60)
        assert report.loss == pytest.approx(there, abs=1e-6)


def test_leave_one_out_as_the_objective():
    X, y = data(60)
    gp = process()
    report = fit(gp, X, y, objective=LeaveOneOut(), subset_steps=100)
    value = gp.leave_one_out(X, y)
    assert report.loss == pytest.approx(float(-value.detach() / 60), rel=1e-9)
    grads = torch.autograd.grad(value / 60, list(gp.parameters()))
    assert max(float(g.abs().max()) for g in grads) < 2e-3
    other = process()
    fit(other, X, y, subset_steps=100)
    assert float(other.leave_one_out(X, y).detach()) < float(value.detach())


def test_warnings_of_a_stage_become_one():
    X, y = data(60, dtype=torch.float32)
    gp = process(
        dtype=torch.float32, noise=2e-5, noise_floor=1e-6, logdet=(Hutchinson(5), Lanczos(10)), preconditioner=None
    )
    gp.raw_noise.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(gp, X, y, subset=None, optimizer=Adam(3))
    assert (
        len(caught) == 1
        and caught[0].category is ConvergenceWarning
        and "warnings of this kind" in str(caught[0].message)
    )


def test_bad_settings():
    X, y = data(30)
    for options, words in (
        ({"optimizer": "adam"}, "expected LBFGS"),
        ({"optimizer": LBFGS(3), "lr": 0.1}, "step size to the optimizer"),
        ({"validation": (X[:, :2], y[:5])}, "expected"),
    ):
        with pytest.raises(OperandError, match=words):
            fit(process(), X, y, **options)
    with pytest.raises(OperandError, match="ard_num_dims=5"):  # a mistake, not a breakdown to step back from
        fit(process(5), X, y)
    for wrong in (
        lambda: Adam(-1),
        lambda: Adam(3, 0.0),
        lambda: Adam(3, final=2.0),
        lambda: LBFGS(2.5),
        lambda: LBFGS(ftol=-1),
    ):
        with pytest.raises(OperandError, match="expected"):
            wrong()


@pytest.mark.parametrize("optimizer", [Adam(17), LBFGS(17, memory=4, ftol=1e-4, line_steps=3)])
def test_memory_stays_flat(optimizer):
    X, y = data(40)
    gp = process(logdet=(Hutchinson(3), Lanczos(25)))
    start = {k: v.clone() for k, v in gp.state_dict().items()}
    counts, steps = [], []

    def count(step, loss, info):
        steps.append(step)
        if len(steps) % 8 == 0:
            gc.collect()
            counts.append(sum(o.numel() for o in gc.get_objects() if issubclass(type(o), torch.Tensor)))

    while len(steps) < 50:
        gp.load_state_dict(start)
        fit(gp, X, y, subset=None, optimizer=optimizer, callback=count)
    assert max(counts[1:]) <= min(counts[1:]) + 120  # less than one block of the probes, and pairs that come and go
