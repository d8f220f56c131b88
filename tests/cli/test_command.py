"""The command itself: help, version, info, benchmarks, exit codes, signals, and one run in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tests.cli.tables import QUICK

import ritz
from ritz.cli import main
from ritz.commands import info
from ritz.errors import DomainError


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ritz {ritz.__version__}\n"


@pytest.mark.parametrize("command", ["", "gp", "gp fit", "gp predict", "demo", "bench", "info"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: ritz {command}".rstrip())
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize("command", ["", "gp", "gp fit", "gp predict", "bench", "cook", "gp fit --json"])
def test_incomplete_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "--help)" in err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "threads" in out and "cpu" in out
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ritz"] == ritz.__version__ and facts["threads"] >= 1
    assert facts["devices"][0]["name"] == "cpu" and "tiles" in facts["kernel_backends"]


def test_info_names_the_extra_of_a_missing_package(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    version = info._version
    monkeypatch.setattr(info, "_version", lambda name: None if name == "scikit-learn" else version(name))
    assert main(["info"]) == 0
    assert "missing: pip install ritz[sklearn]" in capsys.readouterr().out


def test_bench_runs_a_script_and_passes_its_code_on(tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "count.py").write_text("import sys; print(sys.argv[1:]); sys.exit(7)")
    (tmp_path / "benchmarks" / "_shared.py").write_text("")
    monkeypatch.setattr(ritz, "__file__", str(tmp_path / "src" / "ritz" / "__init__.py"))
    assert main(["bench", "count", "--rows", "3"]) == 7
    assert capfd.readouterr().out == "['--rows', '3']\n"
    assert main(["bench", "../count"]) == 1
    assert capfd.readouterr().err == "ritz: there is no benchmark '../count'; there is: count\n"


def test_bench_without_a_checkout(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ritz, "__file__", str(tmp_path / "a" / "b" / "ritz" / "__init__.py"))
    assert main(["bench", "gradients"]) == 1
    assert "source checkout" in capsys.readouterr().err


def failing(error: BaseException):
    def run(*args: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    "error, code, says",
    [
        (DomainError("log of\n -1"), 1, "ritz: log of -1\n"),
        (ValueError("odd"), 70, "ritz: a defect in ritz: ValueError: odd (--traceback shows where)\n"),
        (KeyboardInterrupt(), 130, "ritz: interrupted\n"),
    ],
    ids=["RitzError", "defect", "interrupt"],
)
def test_codes(error: BaseException, code: int, says: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "collect", failing(error))
    assert main(["info"]) == code
    assert capsys.readouterr() == ("", says)


def test_traceback_on_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "collect", failing(ValueError("odd")))
    assert main(["info", "--traceback"]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("ritz: a defect in ritz: ValueError: odd (--traceback shows where)\n")


def test_warnings_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> dict:
        warnings.warn("loose\nends", ritz.ConvergenceWarning, stacklevel=2)
        return {}

    monkeypatch.setattr(info, "collect", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["info", "--json"]) == 0
    assert capsys.readouterr().err == "ritz: warning: loose ends\n"


def test_signal_handler_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_a_process(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ritz.cli", "gp", "fit", str(data), "--target", "y", "--out", "out", *QUICK]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "wrote     out: model.safetensors" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["data.csv", "out"]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    "number, code, says", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_leave_nothing_behind(number: int, code: int, says: str, data: Path, tmp_path: Path) -> None:
    more = ["--subset", "20", "--steps", "1000000", "--lr", "1e-6", "--probes", "2"]
    command = [sys.executable, "-m", "ritz.cli", "gp", "fit", str(data), "--target", "y", "--out", "out", *more]
    job = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert job.stdout is not None
        while not job.stdout.readline().startswith("subset"):
            assert job.poll() is None
        job.send_signal(number)
        _, err = job.communicate(timeout=60)
    finally:
        job.kill()
    assert (job.returncode, err) == (code, f"ritz: {says}\n")
    assert os.listdir(tmp_path) == ["data.csv"]


def test_only_the_commands_print() -> None:
    root = Path(ritz.__file__).parent
    allowed = {root / "cli.py", *(root / "commands").glob("*.py")}
    for path in set(root.rglob("*.py")) - allowed:
        code = [line.split("#")[0] for line in path.read_text().splitlines() if ">>>" not in line]
        assert not any(line.lstrip().startswith("print(") for line in code), path


def test_demo_small_twice(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["demo", "--small", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["out"] == "ritz-demo"
        results = report["results"]
        assert results["model"]["rmse"] < results["subset"]["rmse"] < results["constant"]["rmse"]
        assert results["model"]["nll"] < results["constant"]["nll"]
    assert sorted(os.listdir("ritz-demo")) == ["figure.png", "metrics.json", "model.json", "model.safetensors"]
