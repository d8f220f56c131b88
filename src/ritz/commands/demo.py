"""``ritz demo``: the main job on a shipped data set, within a budget."""

from __future__ import annotations

import gzip
import tempfile
from importlib import resources
from pathlib import Path

from .fit import FitOptions, run_fit
from .recipe import Recipe

SMALL_ROWS = 1500
START = 5.0  # seconds that loading torch, and the figure at the end, may take of the budget


def run_demo(out: Path, small: bool, budget: float, seed: int, as_json: bool) -> None:
    """Fit the shipped elevators set, or with ``small`` its first rows; results in ``out`` are replaced."""
    if small:
        recipe = Recipe(subset=300, subset_steps=15, steps=3, probes=4, depth=20)
    else:
        recipe = Recipe(budget=max(budget - START, 1.0))
    shipped = resources.files("ritz").joinpath("data", "elevators.csv.gz")
    with resources.as_file(shipped) as data, tempfile.TemporaryDirectory(prefix="ritz-") as folder:
        if small:
            rows = gzip.decompress(data.read_bytes()).splitlines(keepends=True)[:SMALL_ROWS]
            data = Path(folder) / data.name.removesuffix(".gz")
            data.write_bytes(b"".join(rows))
        run_fit(FitOptions(data, out, header=False, force=True, as_json=as_json, seed=seed, recipe=recipe))
