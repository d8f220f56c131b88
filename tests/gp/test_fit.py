"""Fitting: the optimizers on their own, both stages, what they start from, recovery from breakdowns, limits, memory."""

import gc
import math
import warnings

import pytest
import torch
from tests.gp.problems import data, process

from ritz import Auto, Hutchinson, Lanczos
from ritz.errors import ConvergenceWarning, OperandError
from ritz.gp import ExactGP, LeaveOneOut, ZeroMean, fit
from ritz.gp.adam import Adam
from ritz.gp.lbfgs import LBFGS, minimize
from ritz.gp.start import kept_preconditioner, start_noise
from ritz.gp.training import HeldOut
from ritz.kernels import RBF, Matern, Scale
from ritz.result import Info
from ritz.solve import Landmarks, RandomlyPivotedCholesky

EXACT = (Hutchinson(1000), Lanczos(rtol=1e-6))  # as many probes as points: nothing random, but by products


def standing(gp, report, X, y):
    """The loss at the parameters of ``gp``, as its second stage saw it."""
    gp.preconditioner = report.preconditioner
    with torch.no_grad():
        return float(-(gp.log_marginal_likelihood(X, y) + gp.log_prior()) / y.numel())


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


def test_held_out_score_of_independent_outputs_is_the_mean_of_their_scores():
    X = torch.linspace(0, 1, 40, dtype=torch.float64).unsqueeze(1)
    Y = torch.cat([torch.sin(6 * X), torch.cos(6 * X), X], 1)
    gp = ExactGP(Scale(RBF(lengthscale=0.3)), mean=ZeroMean(), noise=0.05).double()
    new = X + 0.01
    joint = HeldOut(new, Y).score(gp, X, Y)
    alone = [HeldOut(new, Y[:, a]).score(gp, X, Y[:, a]) for a in range(3)]
    assert joint == pytest.approx(sum(alone) / 3, rel=1e-10)
