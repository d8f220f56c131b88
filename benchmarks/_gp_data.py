"""The regression sets of the race: one split, one standardisation and one parametrisation for every contestant."""

from __future__ import annotations

import gzip
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from _common import ROOT

# Training rows by default (None: all of them), so that two cores finish in about a quarter of an hour.
SETS: dict[str, int | None] = {
    "concrete": None,
    "airfoil": None,
    "elevators": None,
    "kin40k": 4000,
    "protein": 4000,
    "keggdirected": 4000,
}
GROUPED = ("keggdirected",)  # two thirds of its rows repeat the inputs of another one
TRAIN = 0.8
NOISE_FLOOR = 1e-4  # of GPyTorch's default constraint; everybody gets it
START = 0.0  # every raw parameter: length-scales, output scale and noise are log 2 = 0.693 each


@dataclass
class Split:
    """Standardised by the statistics of the training rows; `unit` and `centre` lead back to raw targets."""

    name: str
    X: np.ndarray  # (n, d)
    y: np.ndarray  # (n,)
    Xs: np.ndarray  # (n*, d)
    ys: np.ndarray  # (n*,), raw units
    centre: float
    unit: float
    about: dict[str, object] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.y)


class DataMissing(Exception):
    """A set is not there; the text says what to do."""


def find(name: str, data: str | None) -> Path:
    folders = [Path(p) for p in (data, os.environ.get("RITZ_DATA")) if p]
    tails = (f"uci/{name}/data.csv.gz", f"{name}/data.csv.gz", f"{name}.csv.gz")
    candidates = [folder / tail for folder in folders for tail in tails]
    candidates.append(ROOT / f"src/ritz/data/{name}.csv.gz")  # elevators comes with the package
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        looked = ", ".join(map(str, folders)) or "no folder was given"
        raise DataMissing(
            f"data set {name} not found ({looked}); pass --data FOLDER or set RITZ_DATA to the folder that holds "
            f"uci/{name}/data.csv.gz (numbers without a header, the last column is the target)"
        )
    return path


def grouped(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One row for each distinct input, with the mean of its targets, and how many rows it stands for."""
    X, where, counts = np.unique(table[:, :-1], axis=0, return_inverse=True, return_counts=True)
    mean = np.bincount(where.ravel(), weights=table[:, -1]) / counts
    return np.column_stack([X, mean]), counts


def load(name: str, data: str | None = None, rows: int | None = None, seed: int = 0) -> Split:
    """The split 80/20 of `seed`; `rows` keeps that many training rows (the test part stays whole)."""
    path = find(name, data)
    with gzip.open(path, "rt") as stream:
        table = np.loadtxt(stream, delimiter=",")
    about: dict[str, object] = {"rows": len(table), "seed": seed}
    if name in GROUPED:
        table, counts = grouped(table)
        about["grouped"] = (
            f"{int(counts.sum()) - len(counts)} of {int(counts.sum())} rows repeat the inputs of another one; the "
            f"{len(counts)} groups are one row each with their mean target (largest: {int(counts.max())} rows). "
            "Everybody learns one noise variance for all of them; with per-group counts it would be σ²/count"
        )
    order = np.random.default_rng(seed).permutation(len(table))
    cut = int(TRAIN * len(table))
    train, test = table[order[:cut]], table[order[cut:]]
    about["train_full"], about["test"] = len(train), len(test)
    train = train[:rows]
    about["train"] = len(train)
    centre, unit = train.mean(0), train.std(0)
    unit[unit < 1e-12 * np.maximum(np.abs(centre), 1.0)] = 1.0  # a constant column carries nothing
    scaled, scaled_test = (train - centre) / unit, (test - centre) / unit
    return Split(
        name,
        np.ascontiguousarray(scaled[:, :-1]),
        scaled[:, -1].copy(),
        np.ascontiguousarray(scaled_test[:, :-1]),
        test[:, -1].copy(),
        float(centre[-1]),
        float(unit[-1]),
        about,
    )


def many_rows(n: int, data: str | None) -> Split:
    """n training rows of kin40k for the scaling runs; beyond its 40 000 the rows repeat with jitter (s.d. 0.05)."""
    split = load("kin40k", data)
    X = np.concatenate([split.X, split.Xs])
    y = np.concatenate([split.y, (split.ys - split.centre) / split.unit])
    if n > len(y):
        index = np.arange(n) % len(y)
        jitter = 0.05 * np.random.default_rng(1).standard_normal((n, X.shape[1]))
        jitter[: len(y)] = 0.0
        X, y = X[index] + jitter, y[index]
    return Split("kin40k", X[:n], y[:n], split.Xs[:1], split.ys[:1], split.centre, split.unit)


# ---------------------------------------------------------------------------------------------
# Parameters: [raw length-scales (d), raw output scale, raw noise, mean], each value softplus(raw)
# ---------------------------------------------------------------------------------------------
def start(d: int) -> np.ndarray:
    theta = np.full(d + 3, START)
    theta[-1] = 0.0
    return theta


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


def describe(theta: np.ndarray) -> dict[str, object]:
    """Length-scales, output scale, noise variance and mean, in standardised units."""
    return {
        "lengthscales": [float(x) for x in softplus(theta[:-3])],
        "outputscale": float(softplus(theta[-3])),
        "noise": float(softplus(theta[-2])) + NOISE_FLOOR,
        "mean": float(theta[-1]),
    }


# ---------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------
LEVELS = {0.5: 0.6744897501960817, 0.9: 1.6448536269514722, 0.95: 1.959963984540054}


def scores(split: Split, mean: np.ndarray, variance: np.ndarray) -> dict[str, float]:
    """RMSE, NLL (nats a row) and interval coverage in raw units, from predictions in standardised ones."""
    m, s = mean * split.unit + split.centre, np.sqrt(variance) * split.unit
    ys = split.ys[: len(m)]
    z = (ys - m) / s
    out = {
        "rmse": float(np.sqrt(np.mean((ys - m) ** 2))),
        "nll": float(np.mean(0.5 * z**2 + np.log(s)) + 0.5 * math.log(2 * math.pi)),
    }
    for level, quantile in LEVELS.items():
        out[f"cover{round(100 * level)}"] = float(np.mean(np.abs(z) <= quantile))
    return out
