"""``ritz demo``: the main job on a shipped data set, within a budget."""

from __future__ import annotations

import gzip
import tempfile
import time
from importlib import resources
from pathlib import Path

from .fit import FitOptions, run_fit
from .recipe import Recipe

SMALL_ROWS = 1500


def run_demo(out: Path, small: bool, budget: float, seed: int, as_json: bool) -> None:
    """Fit the shipped elevators set; ``small`` takes its first rows and a few steps."""
    if small:
        recipe = Recipe(subset=300, subset_steps=15, steps=3, probes=4, depth=15)
    else:
        recipe = Recipe(budget=budget)
    shipped = resources.files("ritz.data").joinpath("elevators.csv.gz")
    with resources.as_file(shipped) as data, tempfile.TemporaryDirectory(prefix="ritz-") as folder:
        if small:
            rows = gzip.decompress(data.read_bytes()).splitlines(keepends=True)[:SMALL_ROWS]
            data = Path(folder) / "elevators.csv"
            data.write_bytes(b"".join(rows))
        run_fit(FitOptions(data, out, header=False, force=True, as_json=as_json, seed=seed, recipe=recipe))
