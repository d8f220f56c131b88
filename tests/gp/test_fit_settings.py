"""Fitting: settings asked for are used, those that cannot be are refused before any work, failures are said."""

import math
import warnings

import pytest
import torch
from tests.gp.problems import data, process

from ritz import Hutchinson, Lanczos
from ritz.errors import ConvergenceWarning, OperandError
from ritz.gp import ExactGP, FixedNoise, LeaveOneOut, MarginalLikelihood, fit
from ritz.gp.adam import Adam
from ritz.gp.lbfgs import LBFGS
from ritz.gp.training import HeldOut, told_once
from ritz.kernels import RBF, Scale
from ritz.solve import Direct

PRODUCTS = (Hutchinson(5), Lanczos(20))


def state(gp):
    return torch.cat([p.detach().reshape(-1) for p in gp.parameters()])


def unchanged(gp, message, X, y, **options):
    """A fit is refused, and has not touched the parameters: it was refused before its first stage."""
    before = state(gp)
    with pytest.raises(OperandError, match=message):
        fit(gp, X, y, **options)
    assert torch.equal(state(gp), before)


class Broken:
    """The marginal likelihood, not a number for more than ``limit`` points."""

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, gp, X, y):
        value, info = MarginalLikelihood()(gp, X, y)
        return (value * math.nan if len(X) > self.limit else value), info


# -- what ran -----------------------------------------------------------------------------------------------------


def test_where_cholesky_serves_all_points_one_stage_runs_and_it_is_the_one_asked_for():
    X, y = data(40)
    report = fit(process(), X, y, subset_steps=4)
    assert set(report.stopped) == {"subset"} and report.optimizer is None
    for options, optimizer in (
        ({"subset_steps": 0, "steps": 3}, LBFGS(3)),
        ({"optimizer": Adam(3, 0.05)}, Adam(3, 0.05)),
        ({"optimizer": LBFGS(3)}, LBFGS(3)),
        ({"lr": 0.05, "steps": 3}, Adam(3, 0.05)),
        ({"lr": 0.05, "steps": 3, "subset": 20}, Adam(3, 0.05)),
        ({"subset": None, "steps": 3}, LBFGS(3)),
    ):
        gp = process()
        start = float(-gp.log_marginal_likelihood(X, y).detach() / 40)
        report = fit(gp, X, y, **options)
        assert set(report.stopped) == {"all"} and report.optimizer == optimizer and report.info.method == Direct()
        assert report.history[0][2] == pytest.approx(start, rel=1e-12) and len(report.history) == 4
        assert report.loss < start
        assert float(-gp.log_marginal_likelihood(X, y).detach() / 40) == pytest.approx(report.loss, rel=1e-12)
    for options in ({"lr": 0.05, "steps": 0}, {"optimizer": Adam(0)}):  # no steps: the other stage is all there is
        assert set(fit(process(), X, y, subset_steps=2, **options).stopped) == {"subset"}
    forced = process(logdet=PRODUCTS)
    report = fit(forced, X, y, subset=20, subset_steps=2, optimizer=Adam(2))
    assert set(report.stopped) == {"subset", "all"}


def test_a_plain_function_as_the_mean_gets_the_dtype_of_the_data():
    X, y = data(40, dtype=torch.float32)
    weights = torch.tensor([0.2, -0.1, 0.3])
    report = fit(ExactGP(Scale(RBF(3)), mean=lambda X: X @ weights), X, y, subset_steps=6)
    double = ExactGP(Scale(RBF(3)), mean=lambda X: X @ weights.double()).double()
    expected = fit(double, X.double(), y.double(), subset_steps=6)
    assert report.loss == pytest.approx(expected.loss, abs=1e-4)
    losses = [loss for *_, loss, _ in report.history]
    assert any(loss != torch.tensor(loss).item() for loss in losses)  # in float64: a line search needs the digits


# -- what is refused ----------------------------------------------------------------------------------------------


def test_held_out_data_must_be_of_the_kind_of_the_training_data():
    X, y = data(30)
    Xv, yv = data(8, seed=3)
    for Xw, yw in ((Xv, yv.unsqueeze(1)), (Xv[:, :2], yv), (Xv.float(), yv.float())):
        unchanged(process(), "validation has X", X, y, subset_steps=1, validation=(Xw, yw))
    report = fit(process(1), X[:, 0], y, subset_steps=2, validation=(Xv[:, 0], yv))
    column = fit(process(1), X[:, :1], y, subset_steps=2, validation=(Xv[:, :1], yv))
    assert report.scores == column.scores != []


def test_curvature_of_other_parameters_is_refused():
    X, y = data(40)
    earlier = fit(process(), X, y, subset_steps=4)
    frozen = process(logdet=PRODUCTS)
    frozen.raw_noise.requires_grad_(False)
    unchanged(frozen, "earlier is the report of a fit of 6 parameters and this process trains 5", X, y, earlier=earlier)


def test_what_only_the_second_stage_would_refuse_is_refused_first():
    X, y = data(2001, d=1)
    first = {"subset": 20, "subset_steps": 1}
    unchanged(process(1), "leave that stage out with steps=0", X, y, objective=LeaveOneOut(), **first)
    assert set(fit(process(1), X, y, objective=LeaveOneOut(), steps=0, **first).stopped) == {"subset"}
    X, y = data(40)
    noise = torch.full((40,), 0.1, dtype=torch.float64)
    for options, message in (
        ({"start_noise": True}, "leave start_noise out"),
        ({"validation": data(5)}, "leave validation out"),
    ):
        gp = ExactGP(Scale(RBF(3)), noise=FixedNoise(noise), logdet=PRODUCTS).double()
        unchanged(gp, message, X, y, **first, **options)
    gp = ExactGP(Scale(RBF(3)), noise=FixedNoise(noise, new=0.1), logdet=PRODUCTS).double()
    assert fit(gp, X, y, **first, steps=1, validation=data(5)).scores


# -- what is said -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_noise", [False, True])
def test_a_start_that_breaks_down_is_said_and_changes_nothing(start_noise):
    X, y = data(40)
    gp = process(noise=2.0, logdet=PRODUCTS)
    before = state(gp)
    with pytest.warns(
        ConvergenceWarning, match="stage 'all' of fit changed nothing: .*the loss came out as nan"
    ) as told:
        report = fit(gp, X, y, objective=Broken(0), subset=None, start_noise=start_noise)
    assert len(told) == 1 and told[0].filename == __file__ and report.stopped == {"all": "start is not finite"}
    assert torch.equal(state(gp), before) and report.noise_start is None and report.loss == math.inf


def test_a_second_stage_that_breaks_down_leaves_what_the_first_one_found():
    X, y = data(40)
    expected, gp = process(logdet=PRODUCTS), process(logdet=PRODUCTS)
    first = fit(expected, X, y, subset=20, subset_steps=4, steps=0)
    with pytest.warns(ConvergenceWarning, match="stage 'all' of fit changed nothing"):
        report = fit(gp, X, y, objective=Broken(20), subset=20, subset_steps=4, start_noise=True)
    assert torch.equal(state(gp), state(expected)) and report.loss == first.loss < math.inf


def test_warnings_are_told_apart_by_their_words():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with told_once("all"):
            for i in range(3):
                warnings.warn(f"block of {i} columns: residual {10.0**-i:.2g}", ConvergenceWarning, stacklevel=1)
            warnings.warn("noise 3e-05: rounding", ConvergenceWarning, stacklevel=1)
            warnings.warn("block of 7 columns: residual nan", ConvergenceWarning, stacklevel=1)
    texts = [str(w.message) for w in caught]
    assert texts == [
        "block of 0 columns: residual 1 (4 warnings of this kind in stage 'all' of fit)",
        "noise 3e-05: rounding",
    ]


def test_the_look_at_the_step_limit_takes_no_patience():
    X, y = data(40)
    worse = HeldOut(X, torch.flip(y, [0]), every=4, patience=1)  # another function: every score is worse than the first
    stopped = [
        fit(process(), X, y, optimizer=LBFGS(steps, ftol=0.0), validation=worse).stopped["all"] for steps in (3, 4, 6)
    ]
    assert stopped == ["steps", "validation", "validation"]
