"""How a model is made and fitted, as a value; free of torch, so that ``ritz --help`` may read its defaults."""

from __future__ import annotations

from dataclasses import dataclass

KERNELS = {"matern12": 0.5, "matern32": 1.5, "matern52": 2.5, "rbf": None}  # smoothness ν, rougher first


@dataclass(frozen=True)
class Recipe:
    """Model and schedule of a fit.

    Attributes:
        kernel: a name in ``KERNELS``.
        ard: one length-scale for each input, or one for all.
        dtype: "float32" or "float64"; None: by the number of rows.
        subset: points of the first phase (Cholesky, L-BFGS); 0 leaves it out.
        subset_steps: its step limit.
        steps: step limit of the second phase (all points, L-BFGS); 0 leaves it out.
        lr: step size of Adam, which then takes the place of L-BFGS in the second phase.
        probes, depth: of the stochastic log-determinant in the second phase; depth None adapts.
        budget: seconds for everything, scoring included; None is no limit.
    """

    kernel: str = "matern32"
    ard: bool = True
    dtype: str | None = None
    subset: int = 1000
    subset_steps: int = 40
    steps: int = 12
    lr: float | None = None
    probes: int = 8
    depth: int | None = None
    budget: float | None = None
