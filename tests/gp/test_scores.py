"""Scores against formulas written out, SciPy's normal distribution, and what chance makes of calibrated predictions."""

import math

import numpy as np
import pytest
import torch

from ritz.errors import NonFiniteError, OperandError
from ritz.gp import scores

stats = pytest.importorskip("scipy.stats")


def predictions(n=400, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    mean, z = (torch.randn(n, dtype=torch.float64, generator=g) for _ in range(2))
    variance = torch.rand(n, dtype=torch.float64, generator=g) + 0.2
    return mean.to(dtype), variance.to(dtype), (mean + variance.sqrt() * z).to(dtype)


def test_errors():
    mean, _, y = predictions()
    error = mean.numpy() - y.numpy()
    assert float(scores.rmse(mean, y)) == pytest.approx(np.sqrt(np.mean(error**2)))
    assert float(scores.smse(mean, y)) == pytest.approx(np.mean(error**2) / np.var(y.numpy()))
    assert float(scores.smse(y.mean().expand(400), y)) == pytest.approx(1.0)


def test_log_densities():
    mean, variance, y = predictions()
    want = -stats.norm.logpdf(y.numpy(), mean.numpy(), variance.sqrt().numpy()).mean()
    assert float(scores.nll(mean, variance, y)) == pytest.approx(want)
    train = 3 + 2 * y
    trivial = -stats.norm.logpdf(y.numpy(), train.numpy().mean(), train.numpy().std()).mean()
    assert float(scores.msll(mean, variance, y, train)) == pytest.approx(want - trivial)
    assert float(scores.msll(y.mean().expand(400), y.var(correction=0), y, y)) == pytest.approx(0.0, abs=1e-12)
    one = torch.tensor(2.0)
    assert float(scores.nll(mean, one, y)) == pytest.approx(float(scores.nll(mean, one.expand(400), y)))


def test_coverage_counts():
    z = torch.tensor([0.0, 0.5, -1.0, 1.5, -2.5])  # in units of the standard deviation
    level = lambda width: math.erf(width / math.sqrt(2))
    found = scores.coverage(torch.ones(5), torch.full((5,), 4.0), 1 + 2 * z, [level(w) for w in (0.25, 1.2, 2.0, 3.0)])
    assert found.tolist() == pytest.approx([0.2, 0.6, 0.8, 1.0])
    share = scores.coverage(*predictions(50), levels=torch.tensor([0.999999999], dtype=torch.float64))
    assert share.shape == (1,) and float(share) == 1.0


def test_calibration_of_calibrated_and_of_overconfident_predictions():
    mean, variance, y = predictions(20_000)
    table = scores.calibration(mean, variance, y)
    assert table.levels.tolist() == pytest.approx(list(scores.LEVELS)) and len(table.coverage) == 20
    assert bool(((table.coverage - table.levels).abs() < 4 * table.standard_error).all()) and table.error < 0.01
    assert float(table.standard_error[9]) == pytest.approx(math.sqrt(0.5 * 0.5 / 20_000))
    narrow = scores.calibration(mean, variance / 9, y, levels=[0.5, 0.9])
    assert bool((narrow.coverage < narrow.levels - 10 * narrow.standard_error).all())
    want = [2 * stats.norm.cdf(stats.norm.ppf(0.5 + p / 2) / 3) - 1 for p in (0.5, 0.9)]
    np.testing.assert_allclose(narrow.coverage.numpy(), want, atol=0.015)


def test_several_outputs_and_float32():
    mean, variance, y = predictions(300)
    folded = [t.reshape(100, 3) for t in (mean, variance, y)]
    assert float(scores.nll(*folded)) == pytest.approx(float(scores.nll(mean, variance, y)))
    torch.testing.assert_close(scores.coverage(*folded), scores.coverage(mean, variance, y))
    mean_, variance_, y_ = folded  # one variance a point, as predict has it for outputs of one kernel
    shared, spread = variance_[:, 0], variance_[:, :1].expand(100, 3)
    for score in (scores.nll, scores.coverage):
        torch.testing.assert_close(score(mean_, shared, y_), score(mean_, spread, y_))
    with pytest.raises(OperandError, match=r"variance has shape \(99,\)"):
        scores.nll(mean_, shared[:99], y_)
    short = predictions(300, dtype=torch.float32)
    value = scores.nll(*short)
    assert value.dtype == torch.float64 and float(value) == pytest.approx(
        float(scores.nll(mean, variance, y)), rel=1e-5
    )
    assert not scores.rmse(mean.clone().requires_grad_(True), y).requires_grad


def test_scores_are_found_beside_the_processes():
    import ritz

    assert ritz.gp.scores is scores and "scores" in ritz.gp.__all__


def test_arguments():
    mean, variance, y = predictions(10)
    for bad in (lambda: scores.rmse(mean[:5], y), lambda: scores.rmse(mean[:0], y[:0]), lambda: scores.rmse([1.0], y)):
        with pytest.raises(OperandError, match="mean"):
            bad()
    with pytest.raises(OperandError, match="noise=True"):
        scores.nll(mean, torch.zeros(10), y)
    with pytest.raises(NonFiniteError, match="y"):
        scores.nll(mean, variance, y * math.nan)
    for levels in ([0.0], [1.0], [math.nan]):
        with pytest.raises(OperandError, match="levels"):
            scores.coverage(mean, variance, y, levels)
