"""The model behind the commands: its prior, its clock, and the same predictions on every path."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.cli.tables import fit, numbers, text, write

from ritz.cli import main
from ritz.commands import fit as fit_module
from ritz.commands import model
from ritz.commands.console import Console
from ritz.commands.recipe import Recipe
from ritz.gp import ExactGP
from ritz.kernels import RBF, Scale


def problem(n: int, spec: model.Spec) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 3))
    y = np.sin(2 * X[:, 0]) + 0.3 * X[:, 1] + 0.1 * rng.normal(size=n)
    return spec.tensor(X), spec.tensor((y - y.mean()) / y.std())


@pytest.mark.parametrize("dtype, rtol", [("float64", 1e-9), ("float32", 2e-4)])
def test_predictions_are_the_same_on_every_path(dtype: str, rtol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model.Spec("matern32", True, dtype)
    X, y = problem(150, spec)
    gp = model.build(spec, 3)
    new = X[:40] + 0.1
    exact = model.predict(gp, X, y, new)
    monkeypatch.setattr("ritz.gp.posterior.DOUBLE_UP_TO", 10)
    middle = model.predict(gp, X, y, new)
    monkeypatch.setattr("ritz.gp.posterior.FACTOR_UP_TO", 20)
    gp.logdet = (model.Hutchinson(2), model.Lanczos(5))
    large = model.predict(gp, X, y, new)
    for found, tolerance in ((middle, rtol), (large, 1e-3)):
        np.testing.assert_allclose(found[0], exact[0], rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(found[1], exact[1], rtol=tolerance)


def test_a_linear_target_does_not_carry_the_kernel_away() -> None:
    spec = model.Spec("matern32", True, "float64")
    X, _ = problem(120, spec)
    y = X @ torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    noise = torch.randn(120, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (y - y.mean()) / y.std() + 0.1 * noise
    gp = model.build(spec, 3)
    with Console(quiet=True).phase("subset", 1) as phase:
        model.fit_subset(gp, X, y, Recipe(subset_steps=60), phase, model.Clock(None, 0.0))
    assert phase.loss[-1] < phase.loss[0]
    assert gp.kernel.outputscale.item() < 30  # 3600 without the prior
    assert gp.kernel.base_kernel.lengthscale.max().item() < 300


def test_the_prior_is_fitted_and_not_in_the_likelihood() -> None:
    spec = model.Spec("rbf", False, "float64")
    X, y = problem(60, spec)
    gp = model.build(spec, 3)
    plain = ExactGP(Scale(RBF()))
    plain.load_state_dict(gp.state_dict())  # a stored model has its hyper-parameters and no more
    with torch.no_grad():
        assert gp.log_marginal_likelihood(X, y).item() == plain.log_marginal_likelihood(X, y).item()
    with Console(quiet=True).phase("subset", 1) as phase:
        model.fit_subset(gp, X, y, Recipe(subset_steps=60, steps=0), phase, model.Clock(None, 0.0))
    assert phase.loss[-1] < phase.loss[0]
    posterior = gp.log_marginal_likelihood(X, y) + gp.log_prior()
    for g in torch.autograd.grad(posterior, list(gp.parameters())):
        assert float(g.abs().max()) < 0.05  # the most probable hyper-parameters
    likelihood = torch.autograd.grad(gp.log_marginal_likelihood(X, y), list(gp.parameters()))
    assert max(float(g.abs().max()) for g in likelihood) > 0.2  # which are not the most likely ones


def test_clock() -> None:
    now = time.perf_counter()
    assert model.Clock(None, 5.0).end(0.3) == math.inf
    assert model.Clock(100.0, 40.0).end() - now == pytest.approx(60.0, abs=0.5)
    assert model.Clock(90.0, 80.0).end() - now == pytest.approx(30.0, abs=0.5)
    assert model.Clock(100.0, 40.0).end(0.5) - now == pytest.approx(30.0, abs=0.5)


def test_no_step_is_begun_that_cannot_end_in_time(data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(model, "_step_seconds", lambda *args: 1e6)
    assert fit(data, tmp_path / "out", "--budget", "30") == 0
    assert "48 rows: Krylov, L-BFGS: 0 steps" in capsys.readouterr().out


def test_the_number_of_threads_is_restored(data: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert fit(data, tmp_path / "out", "--budget", "60") == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_few_rows_are_scored_where_that_is_costly(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "FACTOR_UP_TO", 40)
    monkeypatch.setattr(fit_module, "SCORED", 5)
    data = write(tmp_path / "t.csv", text(numbers()))
    assert fit(data, tmp_path / "out") == 0
    assert "scored on 5 of the test rows" in capsys.readouterr().out


def test_a_covariance_that_breaks_down_is_one_sentence(model: Path, data: Path, capsys, monkeypatch) -> None:
    def broken(*args: object) -> None:
        from ritz.errors import DomainError

        raise DomainError("the covariance is not\npositive definite")

    monkeypatch.setattr("ritz.commands.model.predict", broken)
    assert main(["gp", "predict", str(model), str(data)]) == 1
    assert capsys.readouterr().err == "ritz: the covariance is not positive definite\n"
