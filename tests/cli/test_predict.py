"""``ritz gp predict``: the same numbers as in memory, for every way to give a table."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas
import pytest
from tests.cli.tables import fit, numbers, text, write

from ritz.cli import main
from ritz.commands import model as model_module
from ritz.commands.store import load

NEW = numbers(17, seed=5)


@pytest.fixture(scope="module")
def expected(model: Path) -> np.ndarray:
    """Mean and std of NEW, from the model in memory and the formulas of the exact Gaussian process."""
    saved = load(model)
    gp, X, y = saved.gp, saved.X.double(), saved.y.double()
    Z = saved.spec.tensor((NEW[:, :2] - saved.scaling.x_mean) / saved.scaling.x_scale).double()
    kernel = gp.kernel.double()
    K = kernel.evaluate(X).detach().numpy() + gp.noise.item() * np.eye(len(X))
    C = kernel.evaluate(X, Z).detach().numpy()
    prior = kernel.evaluate(Z).detach().numpy().diagonal()
    offset = gp.mean(X).mean().item() if callable(gp.mean) else 0.0
    mean = offset + C.T @ np.linalg.solve(K, y.numpy() - offset)
    variance = prior - (C * np.linalg.solve(K, C)).sum(0) + gp.noise.item()
    return np.column_stack(
        [mean * saved.scaling.y_scale + saved.scaling.y_mean, np.sqrt(variance) * saved.scaling.y_scale]
    )


def predicted(path: Path) -> np.ndarray:
    frame = pandas.read_csv(path)
    assert list(frame.columns) == ["mean", "std"]
    return frame.to_numpy()


@pytest.mark.parametrize(
    "names, columns",
    [("a,b", [0, 1]), ("a,b,y", [0, 1, 2]), ("b,a", [1, 0]), ("y,b,a", [2, 1, 0])],
    ids=lambda value: str(value),
)
def test_round_trip(names: str, columns: list[int], model: Path, expected, tmp_path: Path, capsys) -> None:
    new = write(tmp_path / "new.csv", text(NEW[:, columns], names))
    out = tmp_path / "p.csv"
    assert main(["gp", "predict", str(model), str(new), "--out", str(out)]) == 0
    np.testing.assert_allclose(predicted(out), expected, rtol=1e-6)
    assert ("against column 'y': RMSE" in capsys.readouterr().out) == ("y" in names)


def test_equal_to_the_model_that_was_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    kept = []
    predict = model_module.predict
    monkeypatch.setattr(model_module, "predict", lambda gp, *rest: kept.append(gp) or predict(gp, *rest))
    assert fit(data, tmp_path / "out") == 0
    saved = load(tmp_path / "out")
    for name, value in kept[0].state_dict().items():
        assert (saved.gp.state_dict()[name] == value).all()
    Z = saved.spec.tensor(saved.scaling.inputs(NEW[:, :2]))
    mean, std = saved.scaling.outputs(*predict(kept[0], saved.X, saved.y, Z))
    write(tmp_path / "new.csv", text(NEW))
    assert (
        main(["gp", "predict", str(tmp_path / "out"), str(tmp_path / "new.csv"), "--out", str(tmp_path / "p.csv")]) == 0
    )
    np.testing.assert_array_equal(predicted(tmp_path / "p.csv"), np.column_stack([mean, std]))


def test_without_header(tmp_path: Path, expected: np.ndarray) -> None:
    data = write(tmp_path / "t.csv", text(numbers()[:, [0, 2, 1]], None))
    assert fit(data, tmp_path / "out", target="1") == 0
    for columns in ([0, 1], [0, 2, 1]):
        new = write(tmp_path / "new.csv", text(NEW[:, columns], None))
        assert (
            main(["gp", "predict", str(tmp_path / "out"), str(new), "--out", str(tmp_path / "p.csv"), "--force"]) == 0
        )
        np.testing.assert_allclose(predicted(tmp_path / "p.csv"), expected, rtol=1e-6)


def test_wrong_number_of_columns_without_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "t.csv", text(numbers(), None))
    assert fit(data, tmp_path / "out") == 0
    new = write(tmp_path / "new.csv", text(NEW[:, [0, 1, 2, 2]], None))
    capsys.readouterr()
    assert main(["gp", "predict", str(tmp_path / "out"), str(new)]) == 1
    assert "has 4 columns, expected 3, or 2 without the target" in capsys.readouterr().err


def test_standard_output_is_csv(model: Path, expected: np.ndarray, tmp_path: Path, capsys) -> None:
    new = write(tmp_path / "new.csv", text(NEW))
    assert main(["gp", "predict", str(model), str(new)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    np.testing.assert_allclose(pandas.read_csv(io.StringIO(out)).to_numpy(), expected, rtol=1e-6)


def test_json(model: Path, expected: np.ndarray, tmp_path: Path, capsys) -> None:
    new = write(tmp_path / "new.csv", text(NEW))
    assert main(["gp", "predict", str(model), str(new), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose(np.column_stack([printed["mean"], printed["std"]]), expected, rtol=1e-6)
    assert printed["rows"] == 17
    assert printed["scores"]["rmse"] == pytest.approx(np.sqrt(np.mean((expected[:, 0] - NEW[:, 2]) ** 2)), rel=1e-5)


def test_a_single_row(model: Path, expected: np.ndarray, tmp_path: Path) -> None:
    new = write(tmp_path / "new.csv", text(NEW[:1, :2], "a,b"))
    assert main(["gp", "predict", str(model), str(new), "--out", str(tmp_path / "p.csv")]) == 0
    np.testing.assert_allclose(predicted(tmp_path / "p.csv"), expected[:1], rtol=1e-6)


def test_an_incomplete_target_is_not_needed(model: Path, expected: np.ndarray, tmp_path: Path) -> None:
    content = text(NEW).splitlines()
    content[3] = content[3].rsplit(",", 1)[0] + ","
    new = write(tmp_path / "new.csv", "\n".join(content))
    assert main(["gp", "predict", str(model), str(new), "--out", str(tmp_path / "p.csv")]) == 0
    np.testing.assert_allclose(predicted(tmp_path / "p.csv"), expected, rtol=1e-6)


def test_what_was_left_out_may_be_absent(tmp_path: Path) -> None:
    values = np.column_stack([numbers(), np.ones(60), np.arange(60.0)])
    assert (
        fit(write(tmp_path / "t.csv", text(values, "a,b,y,one,id")), tmp_path / "out", "--drop", "id", target="y") == 0
    )
    answers = []
    for names, new in (("a,b", NEW[:, :2]), ("a,b,one,id", np.column_stack([NEW[:, :2], NEW[:, :2]]))):
        write(tmp_path / "new.csv", text(new, names))
        out = tmp_path / f"{len(names)}.csv"
        assert main(["gp", "predict", str(tmp_path / "out"), str(tmp_path / "new.csv"), "--out", str(out)]) == 0
        answers.append(predicted(out))
    np.testing.assert_array_equal(*answers)
