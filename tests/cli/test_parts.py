"""The parts that the commands are made of: scores, splits, staged output, figures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from ritz import plot
from ritz.commands import scores
from ritz.commands.dataset import Scaling, split
from ritz.commands.failure import CommandError
from ritz.commands.output import staged_directory, write_file
from ritz.commands.store import to_json


def test_coverage_of_a_calibrated_forecast() -> None:
    rng = np.random.default_rng(0)
    std = rng.uniform(0.5, 2.0, 20000)
    mean = rng.normal(size=20000)
    found = scores.coverage(mean + std * rng.normal(size=20000), mean, std)
    np.testing.assert_allclose(found["observed"], found["nominal"], atol=0.015)
    narrow = scores.coverage(mean + std * rng.normal(size=20000), mean, std / 3)
    assert narrow["observed"][10] < 0.3


def test_score() -> None:
    y, mean, std = np.array([1.0, 3.0]), np.array([0.0, 3.0]), np.array([1.0, 2.0])
    found = scores.score(y, mean, std)
    assert found["rmse"] == pytest.approx(np.sqrt(0.5))
    assert found["nll"] == pytest.approx(0.5 * np.log(2 * np.pi) + (0.5 + np.log(2.0)) / 2)


@pytest.mark.parametrize("fraction, train", [(0.2, 80), (0.5, 50), (0.999, 1), (0.001, 99)])
def test_split_sizes(fraction: float, train: int) -> None:
    X = np.random.default_rng(1).normal(size=(100, 2))
    first, second, repeated = split(X, fraction, seed=3)
    assert (len(first), len(second), repeated) == (train, 100 - train, 0)
    assert sorted([*first, *second]) == list(range(100))
    again = split(X, fraction, seed=3)
    assert (again[0] == first).all()


def test_split_keeps_equal_inputs_together() -> None:
    X = np.array([[0.0], [-0.0], [1.0], [2.0], [1.0], [3.0], [0.0]])
    for seed in range(20):
        train, test, repeated = split(X, 0.4, seed)
        assert repeated == 3
        assert not set(X[train, 0]) & set(X[test, 0])


def test_scaling_round_trip() -> None:
    rng = np.random.default_rng(2)
    X, y = rng.normal(size=(50, 3)) * [1e-9, 1.0, 1e9], 1e6 + rng.normal(size=50)
    scaling = Scaling.of(X, y)
    np.testing.assert_allclose(scaling.inputs(X).std(axis=0), 1.0)
    np.testing.assert_allclose(scaling.outputs(scaling.targets(y), np.ones(50))[0], y, rtol=1e-15)


@pytest.mark.parametrize("exists", [False, True])
def test_a_staged_directory_appears_at_the_end_or_not_at_all(exists: bool, tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    if exists:
        target.mkdir(parents=True)
        (target / "old").write_text("old")
    with pytest.raises(RuntimeError), staged_directory(target, force=True) as stage:
        (stage / "new").write_text("new")
        assert not (target / "new").exists()
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == (["a"] if exists else [])
    with staged_directory(target, force=True) as stage:
        (stage / "new").write_text("new")
    assert sorted(os.listdir(target)) == (["new", "old"] if exists else ["new"])
    assert os.listdir(tmp_path / "a") == ["b"]
    assert (target.stat().st_mode & 0o777) == ((tmp_path / "a").stat().st_mode & 0o777)


def test_write_file_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "f", "one", force=False)
    with pytest.raises(CommandError, match="--force"):
        write_file(tmp_path / "f", "two", force=False)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CommandError, match="no space left on device"):
        write_file(tmp_path / "f", "two", force=True)
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_text() == "one"


def test_json_is_strict() -> None:
    assert json.loads(to_json({"a": [float("nan"), 1.5, (float("inf"),)], "ü": None})) == {
        "a": [None, 1.5, [None]],
        "ü": None,
    }


@pytest.mark.parametrize("phases", [0, 1, 2])
def test_figure_has_a_panel_for_each_phase(phases: int, tmp_path: Path) -> None:
    history = [{"title": f"phase {i}", "steps": [1, 2], "loss": [1.0, 0.5]} for i in range(phases)]
    history.append({"title": "left out", "steps": [], "loss": []})
    coverage = {"nominal": [0.5, 0.9], "observed": [0.4, 0.8]}
    figure = plot.fit_figure(history, coverage, rows=100, title="a title")
    assert [axes.get_title() for axes in figure.axes] == [f"phase {i}" for i in range(phases)] + [
        "calibration on held-out rows"
    ]
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    scales = {"long": 9.0, "short": 0.5}
    figure = plot.fit_figure(history, coverage, rows=100, title="a title", scales=scales)
    (axes,) = (a for a in figure.axes if a.get_title() == "learned length-scales")
    assert [t.get_text() for _, t in sorted(zip(axes.get_yticks(), axes.get_yticklabels()))] == ["long", "short"]
