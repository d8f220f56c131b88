"""Whatever is wrong with the input: a non-zero code, one sentence on standard error, and nothing on the disk."""

from __future__ import annotations

import gzip
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.cli.tables import fit, numbers, text, write

from ritz.cli import main

GOOD = text(numbers())
LINES = GOOD.splitlines(keepends=True)


def with_cell(row: int, column: int, value: str) -> str:
    cells = LINES[row].strip().split(",")
    cells[column] = value
    return "".join(LINES[:row]) + ",".join(cells) + "\n" + "".join(LINES[row + 1 :])


def with_column(column: int, value: float) -> str:
    values = numbers()
    values[:, column] = value
    return text(values)


def one_sentence(captured: str) -> str:
    assert captured.count("\n") == 1 and captured.startswith("ritz: ")
    assert "Traceback" not in captured
    return captured


# name of the file, its content, further options, what the sentence has to mention
TABLES = {
    "empty": ("t.csv", "", [], "empty"),
    "blank lines": ("t.csv", "\n\n  \n", [], "empty"),
    "header only": ("t.csv", "a,b,y\n", [], "no row of data"),
    "one row": ("t.csv", "".join(LINES[:2]), [], "1 rows of data; at least 10"),
    "too few rows": ("t.csv", "".join(LINES[:9]), [], "8 rows of data; at least 10"),
    "binary": ("t.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", [], "not a text file"),
    "utf-16": ("t.csv", GOOD.encode("utf-16"), [], "not a text file"),
    "latin-1": ("t.csv", GOOD.replace("a,b", "größe,b").encode("latin-1"), [], "UTF-8"),
    "long row": ("t.csv", GOOD + "1,2,3,4\n", [], "line 62 has 4 fields where the first row has 3"),
    "short row": ("t.csv", GOOD + "1,2\n", [], "line 62 has 2 fields where the first row has 3"),
    "open quote": ("t.csv", GOOD + '"1,2,3\n', [], "t.csv"),
    "text in a column": ("t.csv", with_cell(7, 1, "tall"), [], "column 'b' holds text ('tall' in data row 7)"),
    "text in the target": ("t.csv", with_cell(7, 2, "tall"), [], "column 'y' holds text"),
    "text without a header": ("t.csv", "".join(LINES[1:]) + "1,2,x\n", [], "column 2 holds text ('x' in data row 61)"),
    "NaN": ("t.csv", with_cell(3, 0, "nan"), [], "column 'a' holds a missing value in data row 3"),
    "empty cell": ("t.csv", with_cell(3, 0, ""), [], "column 'a' holds a missing value in data row 3"),
    "Inf": ("t.csv", with_cell(4, 1, "-inf"), [], "column 'b' holds Inf in data row 4"),
    "overflow": ("t.csv", with_cell(4, 1, "1e999"), [], "column 'b' holds Inf"),
    "too large to square": ("t.csv", with_cell(4, 1, "1e300"), [], "rescale"),
    "constant target": ("t.csv", with_column(2, 3.5), [], "column 'y') is constant"),
    "constant inputs": ("t.csv", text(numbers() * [0.0, 0.0, 1.0]), [], "cannot be split"),
    "only the target": ("t.csv", "y\n" + "".join(f"{i}\n" for i in range(20)), [], "nothing but the target"),
    "mixed first row": ("t.csv", "1.5,x,2.5\n" + "".join(LINES[1:]), [], "--header yes"),
    "repeated name": ("t.csv", GOOD.replace("a,b,y", "a,a,y"), [], "'a' more than once"),
    "unnamed column": ("t.csv", GOOD.replace("a,b,y", ",b,y"), [], "column 0 (counted from 0) has no name"),
    "wrong extension": ("t.parquet", GOOD, [], "*.csv or *.csv.gz"),
    "not gzip": ("t.csv.gz", GOOD, [], "not gzip-compressed"),
    "truncated gzip": ("t.csv.gz", gzip.compress(GOOD.encode())[:-20], [], "cannot be decompressed"),
    "damaged gzip": ("t.csv.gz", gzip.compress(GOOD.encode())[:12] + b"\xff" * 200, [], "cannot be decompressed"),
    "gzip without .gz": ("t.csv", gzip.compress(GOOD.encode()), [], "rename it"),
    "no such target": ("t.csv", GOOD, ["--target", "z"], "no column 'z' for --target; the columns are a, b, y"),
    "target by name, no header": ("t.csv", "".join(LINES[1:]), ["--target", "y"], "give a position"),
    "target too large": ("t.csv", GOOD, ["--target", "3"], "--target 3 is out of range"),
    "target too small": ("t.csv", GOOD, ["--target", "-4"], "--target -4 is out of range"),
    "no such drop": ("t.csv", GOOD, ["--drop", "z"], "no column 'z' for --drop"),
    "target dropped": ("t.csv", GOOD, ["--drop", "y"], "both --target and --drop"),
    "everything dropped": ("t.csv", GOOD, ["--drop", "a", "--drop", "b"], "nothing but the target"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.replace(" ", "-"))
def test_bad_table(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, more, mentions = TABLES[case]
    data = write(tmp_path / name, content)
    assert fit(data, tmp_path / "deep" / "out", *more) == 1
    assert mentions in one_sentence(capsys.readouterr().err)
    assert os.listdir(tmp_path) == [name]


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(tmp_path / "none.csv", tmp_path / "out") == 1
    assert "there is no such file" in one_sentence(capsys.readouterr().err)
    assert not os.listdir(tmp_path)


def test_directory_as_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.csv").mkdir()
    assert fit(tmp_path / "t.csv", tmp_path / "out") == 1
    assert "is a directory" in one_sentence(capsys.readouterr().err)


def test_out_is_a_file(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "out", "mine")
    assert fit(data, tmp_path / "out", "--force") == 1
    assert "is a file" in one_sentence(capsys.readouterr().err)
    assert (tmp_path / "out").read_text() == "mine"


def test_out_below_a_file(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(data, data / "out") == 1
    assert "cannot be written" in one_sentence(capsys.readouterr().err)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    assert fit(data, folder / "out") == 1
    assert "permission denied" in one_sentence(capsys.readouterr().err)


def test_no_permission_as_told_by_the_system(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    assert fit(data, tmp_path / "new" / "out") == 1
    assert "cannot be written: permission denied" in one_sentence(capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["data.csv"]


def test_results_are_not_replaced_unasked(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out" / "notes.txt", "mine")
    assert fit(data, tmp_path / "out") == 1
    assert "--force" in one_sentence(capsys.readouterr().err)
    assert os.listdir(tmp_path / "out") == ["notes.txt"]


@pytest.mark.parametrize("package", ["pandas", "safetensors", "matplotlib"])
def test_missing_package(
    package: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert fit(data, tmp_path / "out") == 3
    assert f"{package}: pip install ritz[cli]" in one_sentence(capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["data.csv"]


OPTIONS = {
    "nothing to fit": (["--no-subset", "--steps", "0"], "nothing to fit"),
    "negative subset": (["--subset", "-3"], "expected a whole number from 1, not '-3'"),
    "text for steps": (["--steps", "many"], "expected a whole number from 0, not 'many'"),
    "infinite budget": (["--budget", "inf"], "expected a number above 0"),
    "whole test set": (["--test-fraction", "1"], "expected a number between 0 and 1"),
    "unknown kernel": (["--kernel", "cubic"], "invalid choice: 'cubic'"),
    "unknown option": (["--ford"], "--ford"),
}


@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.replace(" ", "-"))
def test_bad_options(case: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more, mentions = OPTIONS[case]
    assert fit(data, tmp_path / "out", *more) == 2
    assert mentions in one_sentence(capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["data.csv"]


HALF = numbers()[:5]
# names, values (or the whole text), what the sentence has to mention
NEW = {
    "column lacking": ("a,y", HALF[:, [0, 2]], "lacks column 'b'"),
    "extra column": ("a,b,y,c", np.column_stack([HALF, HALF[:, 0]]), "has column 'c', which the model does not know"),
    "other names": ("u,v", HALF[:, :2], "lacks columns 'a', 'b'"),
    "no header": (None, HALF, "has no header, the table that the model was fitted on had one"),
    "NaN": ("a,b", HALF[:, :2] * [1.0, np.nan], "column 'b' holds a missing value"),
    "Inf": ("a,b", HALF[:, :2] * [np.inf, 1.0], "column 'a' holds Inf"),
}


@pytest.mark.parametrize("case", NEW, ids=lambda case: case.replace(" ", "-"))
def test_bad_new_table(case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, values, mentions = NEW[case]
    new = write(tmp_path / "new.csv", text(values, names))
    assert main(["gp", "predict", str(model), str(new), "--out", str(tmp_path / "p.csv")]) == 1
    assert mentions in one_sentence(capsys.readouterr().err)
    assert os.listdir(tmp_path) == ["new.csv"]


def damage_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)


def damage_facts_missing(folder: Path) -> None:
    (folder / "model.json").unlink()


def damage_tensors_missing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damage_facts(folder: Path) -> None:
    (folder / "model.json").write_text('{"format": ')


def damage_other_json(folder: Path) -> None:
    (folder / "model.json").write_text("[1, 2]")


def damage_version(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))


def damage_spec(folder: Path) -> None:
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"matern32"', '"matern99"'))


def damage_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def damage_truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_bad_model(damage, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    damage(folder)
    assert main(["gp", "predict", str(folder), str(data), "--out", str(tmp_path / "p.csv")]) == 1
    assert str(folder) in one_sentence(capsys.readouterr().err)
    assert not (tmp_path / "p.csv").exists()


def test_model_is_a_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gp", "predict", str(data), str(data)]) == 1
    assert "is a file; give the directory" in one_sentence(capsys.readouterr().err)


def test_predictions_are_not_replaced_unasked(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gp", "predict", str(model), str(data), "--out", str(data)]) == 1
    assert "exists; replace it with --force" in one_sentence(capsys.readouterr().err)
