"""Starts of a fit, early stops, subsets."""

import math

import pytest
import torch
from tests.gp.fitting import EXACT
from tests.gp.problems import data, process

from ritz import Auto, Hutchinson, Lanczos
from ritz.errors import OperandError
from ritz.gp import ExactGP, ZeroMean, fit
from ritz.gp.adam import Adam
from ritz.gp.lbfgs import LBFGS
from ritz.gp.start import kept_preconditioner, start_noise
from ritz.gp.training import HeldOut
from ritz.kernels import RBF, Scale
from ritz.result import Info
from ritz.solve import Landmarks, RandomlyPivotedCholesky


def test_curvature_of_a_subset_saves_likelihoods():
    X, y = data(150, d=4)
    counts = []
    for handed in (True, False):
        gp = process(4, logdet=(Hutchinson(4), Lanczos(rtol=1e-4)), preconditioner=None)
        first = fit(gp, X, y, subset=75, steps=0)
        assert set(first.stopped) == {"subset"} and first.curvature
        second = fit(gp, X, y, subset=None, optimizer=LBFGS(30, ftol=1e-5), earlier=first if handed else None)
        counts.append(second.evaluations["all"])
    assert counts[0] < counts[1]


@pytest.mark.parametrize("options", [{}, {"logdet": EXACT}])
def test_noise_curve_finds_noise_and_scale_together(options):
    X, y = data(80, d=1)
    gp = process(1, noise=0.025, **options)
    gp.kernel.outputscale = 2.5

    def value(noise, scale):  # an oracle: a grid of dense likelihoods
        other = process(1, noise=noise)
        other.kernel.outputscale = scale
        with torch.no_grad():
            return float(other.log_marginal_likelihood(X, y))

    before = value(0.025, 2.5)
    found = start_noise(gp, X, y)
    noise, scale = gp.noise.item(), gp.kernel.outputscale.item()
    assert value(noise, scale) - before == pytest.approx(found.gain, rel=1e-5)
    assert found.scale == pytest.approx(scale / 2.5) and (found.before, found.after) == pytest.approx((0.025, noise))
    assert found.gain > 5 and scale < 2.5
    for factor in (0.9, 1.1):  # the best scale along the line σ²/s = constant
        assert value(noise * factor, scale * factor) < value(noise, scale)
    for factor in (0.8, 1.25):  # and about the best noise, as far as the grid is fine
        assert value(noise * factor, scale) < value(noise, scale)


def test_noise_start_in_a_fit():
    X, y = data(80)
    gp = process(noise=2.0, logdet=EXACT)
    report = fit(gp, X, y, subset=None, steps=2, start_noise=True)
    assert report.noise_start.after < 1.0 < report.noise_start.before and "noise from the curve" in str(report)
    with torch.no_grad():
        before = float(-process(noise=2.0).log_marginal_likelihood(X, y)) / 80
    assert report.history[0][2] == pytest.approx(before - report.noise_start.gain / 80, abs=1e-4)
    gp.raw_noise.requires_grad_(False)
    with pytest.raises(OperandError, match="one learned noise"):
        fit(gp, X, y, subset=None, start_noise=True)


def test_preconditioner_is_chosen_once_and_settings_come_back():
    X, y = data(150)
    gp = process(logdet=(Hutchinson(6), Lanczos(rtol=1e-4)))
    settings = (gp.solver, gp.logdet, gp.preconditioner)
    seen = []
    report = fit(gp, X, y, subset=50, steps=4, callback=lambda *_: seen.append(gp.preconditioner))
    assert (gp.solver, gp.logdet, gp.preconditioner) == settings
    errors = report.standard_errors
    assert set(errors) == {"plain", "preconditioned"} and errors["preconditioned"] < errors["plain"]
    used = [p for p, (stage, *_) in zip(seen, report.history, strict=True) if stage == "all"]
    assert isinstance(report.preconditioner, Landmarks) and all(p == report.preconditioner for p in used)
    text = str(report)
    assert "kept: preconditioned" in text and "evaluations by LBFGS" in text and "residual" in text
    assert report.accuracy["residual"] < 1e-2 and report.accuracy["standard_error"] > 0
    plain = process(logdet=(Hutchinson(6), Lanczos(rtol=1e-4)), preconditioner=None)
    report = fit(plain, X, y, subset=None, steps=1)
    assert report.preconditioner is None and report.standard_errors == {} and "kept" not in str(report)


def test_what_a_likelihood_chose_is_kept():
    def said(**details):
        return Info(None, 0, 0, details=details)

    asked, pivots = RandomlyPivotedCholesky(5), torch.tensor([4, 1, 7])
    assert kept_preconditioner(Auto(), said(preconditioner=None)) is None
    assert kept_preconditioner(Auto(), said(preconditioner=asked, pivots=pivots)) == Landmarks((4, 1, 7))
    assert kept_preconditioner(asked, said(preconditioner=asked, pivots=pivots)) == Landmarks((4, 1, 7))
    for other in (Auto(), asked, None):  # the dense path, and an evaluation that broke down, say nothing
        assert kept_preconditioner(other, said()) is other and kept_preconditioner(other, None) is other


@pytest.mark.parametrize("options", [{}, {"logdet": EXACT}])
def test_early_stop_keeps_the_best_held_out_score(options):
    X, y = data(90)
    Xv, yv = data(40, seed=5)
    gp = process(**options)
    steps = {"subset": None, "optimizer": Adam(30, lr=0.3, final=1.0)} if options else {"subset_steps": 30}
    report = fit(gp, X, y, validation=HeldOut(Xv, yv, every=1, patience=3, rows=25), **steps)
    index = torch.linspace(0, 39, 25, dtype=torch.float64).round().long()
    mean, variance = gp.condition(X, y).predict(Xv[index], noise=True)
    score = float(-torch.distributions.Normal(mean, variance.sqrt()).log_prob(yv[index]).mean())
    scores = [s for *_, s in report.scores]
    assert min(scores) == pytest.approx(score, rel=1e-6) and report.scores[0][1] == 0
    if report.stopped == {report.scores[0][0]: "validation"}:
        assert scores.index(min(scores)) == len(scores) - 4
    else:
        assert scores.index(min(scores)) > len(scores) - 4
    assert "held-out score" in str(report)
    with pytest.raises(OperandError, match="patience"):
        HeldOut(Xv, yv, patience=0)


def test_early_stop_stops():
    # held-out targets of another function: training can only make their score worse
    X, y = data(90)
    gp = process()
    before = {k: v.clone() for k, v in gp.state_dict().items()}
    report = fit(gp, X, y, validation=HeldOut(X, torch.flip(y, [0]), every=1, patience=2))
    assert report.stopped == {"subset": "validation"} and len(report.scores) == 3
    assert all(torch.equal(v, before[k]) for k, v in gp.state_dict().items())


def test_subset_of_observations_with_their_own_noise():
    from ritz.gp import FixedNoise

    X, y = data(60)
    gp = ExactGP(Scale(RBF(3)), noise=FixedNoise(torch.linspace(0.01, 0.1, 60, dtype=torch.float64)), logdet=EXACT)
    report = fit(gp, X, y, subset=30, steps=2)
    assert set(report.stopped) == {"subset", "all"} and math.isfinite(report.loss)


def test_held_out_score_of_independent_outputs_is_the_mean_of_their_scores():
    X = torch.linspace(0, 1, 40, dtype=torch.float64).unsqueeze(1)
    Y = torch.cat([torch.sin(6 * X), torch.cos(6 * X), X], 1)
    gp = ExactGP(Scale(RBF(lengthscale=0.3)), mean=ZeroMean(), noise=0.05).double()
    new = X + 0.01
    joint = HeldOut(new, Y).score(gp, X, Y)
    alone = [HeldOut(new, Y[:, a]).score(gp, X, Y[:, a]) for a in range(3)]
    assert joint == pytest.approx(sum(alone) / 3, rel=1e-10)
