"""Small tables for the tests of the command line, and the shortest useful fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ritz.cli import main

QUICK = ["--subset", "20", "--subset-steps", "4", "--steps", "2", "--probes", "2", "--depth", "8", "--no-ard"]


def numbers(rows: int = 60, seed: int = 0) -> np.ndarray:
    """Two inputs and a noisy smooth target of other units."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 2)) * [1.0, 30.0] + [5.0, 0.0]
    y = 100.0 + 10.0 * np.sin(X[:, 0]) + 0.2 * X[:, 1] + 0.5 * rng.normal(size=rows)
    return np.column_stack([X, y])


def text(values: np.ndarray, names: str | None = "a,b,y") -> str:
    """As csv, every number to the last bit."""
    lines = [] if names is None else [names]
    return "\n".join(lines + [",".join(repr(float(value)) for value in row) for row in values]) + "\n"


def write(path: Path, content: str | bytes) -> Path:
    """A file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fit(data: Path, out: Path, *more: str, target: str = "-1") -> int:
    """``ritz gp fit``, quickly."""
    return main(["gp", "fit", str(data), "--target", target, "--out", str(out), *QUICK, *more])
