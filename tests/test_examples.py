"""Every script in examples/ runs at its small size; the folder is globbed, so that none can be forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert SCRIPTS, "examples/ holds no script"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_example_runs(script: Path, tmp_path: Path) -> None:
    """Its closing assertions hold, and whatever it writes goes below the folder it runs in (or to --out)."""
    pytest.importorskip("matplotlib")
    source = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"RITZ_SMALL": "1", "MPLBACKEND": "Agg", "PYTHONPATH": source}
    run = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, f"{script.name} failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 150, "an example fits on a few screens"
