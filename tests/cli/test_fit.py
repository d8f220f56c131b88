"""``ritz gp fit``: what it writes, says and repeats."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pandas
import pytest
from tests.cli.tables import fit, numbers, text, write

from ritz.cli import main
from ritz.commands import model as model_module
from ritz.commands.store import load

FILES = ["figure.png", "metrics.json", "model.json", "model.safetensors"]


def metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def same_tensors(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_results(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(data, tmp_path / "new" / "out") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "60 rows, 3 columns, the first row holds names" in out and "column 'y', from 2 inputs" in out
    assert "48 rows to train, 12 to test" in out and "constant predictor" in out and "the subset, 20 rows" in out
    assert sorted(os.listdir(tmp_path / "new" / "out")) == FILES
    assert (tmp_path / "new" / "out" / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    facts = metrics(tmp_path / "new" / "out")
    assert facts["data"]["columns"]["features"] == ["a", "b"]
    assert [phase["phase"] for phase in facts["training"]] == ["subset", "all"]
    assert len(facts["training"][1]["loss"]) == 3 and np.isfinite(facts["training"][1]["loss"]).all()
    assert facts["results"]["model"]["rmse"] < facts["results"]["constant"]["rmse"]
    assert os.listdir(tmp_path / "new") == ["out"]


def test_scores_are_in_the_units_of_the_target(data: Path, tmp_path: Path) -> None:
    assert fit(data, tmp_path / "out") == 0
    saved, values = load(tmp_path / "out"), numbers()
    train, test = saved.X.shape[0], values.shape[0] - saved.X.shape[0]
    assert (train, test) == (48, 12)
    held_out = [
        row
        for row in range(60)
        if not np.isclose(values[row, 2], saved.y * saved.scaling.y_scale + saved.scaling.y_mean).any()
    ]
    y = values[held_out, 2]
    constant = metrics(tmp_path / "out")["results"]["constant"]
    mean, std = saved.scaling.y_mean, saved.scaling.y_scale
    assert constant["rmse"] == pytest.approx(np.sqrt(np.mean((y - mean) ** 2)), rel=1e-10)
    density = np.exp(-0.5 * ((y - mean) / std) ** 2) / np.sqrt(2 * np.pi * std**2)
    assert constant["nll"] == pytest.approx(-np.log(density).mean(), rel=1e-10)


def test_json_is_all_that_is_printed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(data, tmp_path / "out", "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    printed, written = json.loads(out), metrics(tmp_path / "out")
    assert printed.pop("out") == str(tmp_path / "out")
    assert printed == written


@pytest.mark.parametrize(
    "name, content, target",
    [
        ("t.csv", text(numbers()), "y"),
        ("t.csv", text(numbers()), "2"),
        ("t.csv", text(numbers(), names=None), "-1"),
        ("t.csv", text(numbers(), names=None), "2"),
        ("t.csv.gz", gzip.compress(text(numbers()).encode()), "-1"),
        ("t.csv", "\ufeff" + text(numbers()).replace("\n", "\r\n"), "y"),
        ("t.csv", text(numbers()).replace(",", ";"), "y"),
        ("t.csv", text(numbers()).replace(",", "\t"), "y"),
        ("t.csv", '"' + text(numbers()).replace(",", '", "').replace("\n", '"\n"').rstrip('"'), "y"),
        ("T.CSV", "\n" + text(numbers()) + "\n\n", "y"),
    ],
    ids="name position no-header no-header-position gzip bom-crlf semicolon tab quotes blank-lines".split(),
)  # fmt: skip
def test_the_same_table_in_other_clothes(
    name: str, content: str | bytes, target: str, model: Path, tmp_path: Path
) -> None:
    assert fit(write(tmp_path / name, content), tmp_path / "out", target=target) == 0
    assert same_tensors(tmp_path / "out", model)
    assert metrics(tmp_path / "out")["results"] == metrics(model)["results"]


def test_header_by_request(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "t.csv", text(numbers(), "2019,2020,y"))
    assert fit(data, tmp_path / "out", target="y") == 1
    assert "--header yes" in capsys.readouterr().err
    assert fit(data, tmp_path / "out", "--header", "yes", target="y") == 0
    assert same_tensors(tmp_path / "out", model)
    assert metrics(tmp_path / "out")["data"]["columns"]["features"] == ["2019", "2020"]


def test_target_in_front(tmp_path: Path, model: Path) -> None:
    data = write(tmp_path / "t.csv", text(numbers()[:, [2, 0, 1]], "y,a,b"))
    assert fit(data, tmp_path / "out", target="0") == 0
    assert same_tensors(tmp_path / "out", model)


def test_seed_decides(data: Path, model: Path, tmp_path: Path) -> None:
    for name, seed in (("again", "0"), ("other", "1")):
        assert fit(data, tmp_path / name, "--seed", seed) == 0
    assert same_tensors(tmp_path / "again", model)
    assert not same_tensors(tmp_path / "other", model)


def test_columns_left_out(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = numbers()
    frame = pandas.DataFrame({"id": "x", "a": values[:, 0], "one": 1.0, "b": values[:, 1], "y": values[:, 2]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert fit(tmp_path / "t.csv", tmp_path / "out", "--drop", "id") == 0
    out = capsys.readouterr().out
    assert "left out as asked: id" in out and "left out because constant: one" in out
    assert same_tensors(tmp_path / "out", model)


def test_repeated_rows_stay_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.tile(numbers(25), (4, 1))
    assert fit(write(tmp_path / "t.csv", text(values)), tmp_path / "out") == 0
    assert "75 rows repeat the inputs of another" in capsys.readouterr().out
    facts = metrics(tmp_path / "out")
    assert facts["data"]["repeated_inputs"] == 75
    assert (facts["data"]["train"], facts["data"]["test"]) == (80, 20)
    train = {tuple(row) for row in load(tmp_path / "out").X.tolist()}
    assert len(train) == 20


def test_phases_can_be_switched_off(data: Path, tmp_path: Path) -> None:
    assert fit(data, tmp_path / "first", "--steps", "0") == 0
    assert [phase["phase"] for phase in metrics(tmp_path / "first")["training"]] == ["subset"]
    assert fit(data, tmp_path / "second", "--no-subset") == 0
    facts = metrics(tmp_path / "second")
    assert [phase["phase"] for phase in facts["training"]] == ["all"]
    assert set(facts["results"]) == {"constant", "model"}


def test_subset_as_large_as_the_table(data: Path, tmp_path: Path) -> None:
    assert fit(data, tmp_path / "out", "--subset", "500") == 0
    facts = metrics(tmp_path / "out")
    assert [phase["points"] for phase in facts["training"]] == [48]
    assert set(facts["results"]) == {"constant", "model"}


@pytest.mark.parametrize("kernel", ["matern12", "matern32", "matern52", "rbf"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kernels_and_dtypes(kernel: str, dtype: str, data: Path, tmp_path: Path) -> None:
    assert fit(data, tmp_path / "out", "--kernel", kernel, "--dtype", dtype) == 0
    assert str(load(tmp_path / "out").X.dtype) == f"torch.{dtype}"
    scored = metrics(tmp_path / "out")["results"]
    assert scored["model"]["rmse"] < scored["constant"]["rmse"]


def test_budget_ends_training(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(data, tmp_path / "out", "--steps", "100000", "--lr", "1e-6", "--budget", "2") == 0
    assert "time is up" in capsys.readouterr().out
    second = metrics(tmp_path / "out")["training"][1]
    assert second["stopped"] and second["seconds"] < 10 and len(second["steps"]) < 100000


def test_force_replaces_results_and_nothing_else(data: Path, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out"
    assert fit(data, out, "--seed", "1") == 0
    write(out / "notes.txt", "mine")
    assert fit(data, out) == 1
    assert not same_tensors(out, model)
    assert fit(data, out, "--force") == 0
    assert same_tensors(out, model)
    assert sorted(os.listdir(out)) == sorted([*FILES, "notes.txt"])


def test_an_empty_directory_may_be_given(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert fit(data, Path(".")) == 0
    assert sorted(os.listdir(tmp_path / "out")) == FILES


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    "stop, code", [(KeyboardInterrupt, 130), (MemoryError, 1), (ZeroDivisionError, 70)], ids=lambda value: str(value)
)
def test_nothing_is_left_when_a_fit_stops(
    exists: bool, stop: type[BaseException], code: int, data: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    def interrupted(*args: object) -> None:
        raise stop

    if exists:
        assert fit(data, tmp_path / "out") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(model_module, "fit_all", interrupted)
    capsys.readouterr()
    assert fit(data, tmp_path / "out", "--force") == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("ritz: ")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "out").exists() == exists


def test_one_input(tmp_path: Path) -> None:
    data = write(tmp_path / "t.csv", text(numbers()[:, [0, 2]], "a,y"))
    assert fit(data, tmp_path / "out") == 0


def test_ard(data: Path, tmp_path: Path) -> None:
    arguments = ["--subset", "20", "--subset-steps", "3", "--steps", "1", "--probes", "2", "--depth", "5"]
    assert main(["gp", "fit", str(data), "--target", "y", "--out", str(tmp_path / "out"), *arguments]) == 0
    assert load(tmp_path / "out").spec.ard
    assert any(value.numel() == 2 for value in load(tmp_path / "out").gp.parameters())
