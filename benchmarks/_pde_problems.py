"""Linear PDEs y' = A(θ) y with a loss on y(t): grids, fields, stencils; solvers' settings and the search for the best.

wave         u'' = c² Δu, Neumann border, state (u, u'), θ = c; only u is observed. From a smooth bump;
             wave-sharp: from one of 1.5 cells at N = 128, which has all frequencies in it
heat         u' = ∇·(c ∇u), Dirichlet border, faces by arithmetic means, θ = c. From a smooth bump;
             heat-rough: from a hot square, discontinuous
schrodinger  i ψ' = (−½ Δ + V) ψ, periodic, state (Re ψ, Im ψ), θ = V
wave2d       the founding study's stored inputs and targets on 16 × 16 points, with the study's own stencil

Only numpy is imported here; `library="torch"` hands out the same numbers as tensors. The stencils below are written
with what numpy, torch and jax.numpy have in common, for everybody who wants no faster ones.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

Array = Any  # numpy.ndarray, torch.Tensor or jax.Array
NAMES = ("wave", "heat", "heat-rough", "schrodinger", "wave-sharp")
SCALES = {"wave": (3.5, 11.0, 35.0), "heat": (1e4,), "schrodinger": (35.0, 100.0)}  # by kind of equation


class DataMissing(Exception):
    """A set is not there; the text says what to do."""


@dataclass(frozen=True)
class Problem:
    """L(θ) = ½ ‖observed fields of y(t) − target‖² / N², y' = A(θ) y, y(0) = y0; wanted: L and ∂L/∂θ (N² numbers)."""

    name: str
    N: int
    h: float  # distance of grid points
    t: float
    scale: float  # wave: t·ρ with ρ² the spectral radius of −c²Δ; else ‖tA‖
    low: float  # the spectrum of −c²Δ, −∇·c∇ or H lies in [low, high], both ends attained
    high: float
    theta: Array  # (N, N)
    y0: Array  # (fields, N, N)
    target: Array  # (observed fields, N, N)

    @property
    def kind(self) -> str:
        """The equation: the name without what follows a hyphen."""
        return self.name.split("-")[0]

    @property
    def observed(self) -> int:
        """How many fields of the state enter the loss."""
        return 2 if self.kind == "schrodinger" else 1

    @property
    def dtype(self) -> str:
        return str(self.theta.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        product = "t·ρ" if self.kind == "wave" else "‖tA‖"
        return f"{self.name} {self.N}×{self.N}, {product} = {self.scale:g}"

    def loss(self, y: Array) -> Array:
        return 0.5 * ((y[: self.observed] - self.target) ** 2).sum() / self.N**2


# ---------------------------------------------------------------------------------------------
# Stencils: `prepare` turns θ into what the product needs, once per evaluation; `apply` is y ↦ A(θ) y
# ---------------------------------------------------------------------------------------------
def difference(u: Array, axis: int, xp: Any) -> Array:
    """Zeros outside the grid: N + 1 differences along an axis (−2 or −1)."""
    zero = xp.zeros_like(u[..., :1, :] if axis == -2 else u[..., :1])
    padded = xp.concatenate((zero, u, zero), axis)
    return padded[..., 1:, :] - padded[..., :-1, :] if axis == -2 else padded[..., 1:] - padded[..., :-1]


def neumann_laplacian(u: Array, xp: Any) -> Array:
    """Σ (neighbour − centre) over the neighbours there are; divide by h²."""
    zero_x, zero_y = xp.zeros_like(u[..., :1, :]), xp.zeros_like(u[..., :1])
    fx = xp.concatenate((zero_x, u[..., 1:, :] - u[..., :-1, :], zero_x), -2)
    fy = xp.concatenate((zero_y, u[..., 1:] - u[..., :-1], zero_y), -1)
    return fx[..., 1:, :] - fx[..., :-1, :] + fy[..., 1:] - fy[..., :-1]


def periodic_laplacian(u: Array, xp: Any) -> Array:
    return xp.roll(u, 1, -2) + xp.roll(u, -1, -2) + xp.roll(u, 1, -1) + xp.roll(u, -1, -1) - 4 * u


def prepare(problem: Problem, theta: Array, xp: Any) -> tuple[Array, ...]:
    """wave: c²/h²; heat: coefficients of the faces over h², (N+1, N) and (N, N+1); schrodinger: V."""
    if problem.kind == "wave":
        return (theta * theta / problem.h**2,)
    if problem.kind == "schrodinger":
        return (theta,)
    x = xp.concatenate((theta[:1], 0.5 * (theta[1:] + theta[:-1]), theta[-1:]), 0)
    y = xp.concatenate((theta[:, :1], 0.5 * (theta[:, 1:] + theta[:, :-1]), theta[:, -1:]), 1)
    return x / problem.h**2, y / problem.h**2


def apply(problem: Problem, coefficients: tuple[Array, ...], y: Array, xp: Any) -> Array:
    """A y for a state of shape (fields, N, N)."""
    if problem.kind == "wave":
        return xp.stack((y[1], coefficients[0] * neumann_laplacian(y[0], xp)))
    if problem.kind == "schrodinger":
        Hy = coefficients[0] * y - periodic_laplacian(y, xp) * (0.5 / problem.h**2)
        return xp.stack((Hy[1], -Hy[0]))
    fx, fy = coefficients[0] * difference(y, -2, xp), coefficients[1] * difference(y, -1, xp)
    return fx[..., 1:, :] - fx[..., :-1, :] + fy[..., 1:] - fy[..., :-1]


def dense(problem: Problem, theta: Array, xp: Any) -> Array:
    """A as a matrix, column by column (small N only)."""
    coefficients, size = prepare(problem, theta, xp), math.prod(problem.y0.shape)
    basis = xp.eye(size, dtype=problem.y0.dtype).reshape(size, *problem.y0.shape)
    columns = [apply(problem, coefficients, column, xp).reshape(-1) for column in basis]
    return xp.stack(columns).T


# ---------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------
def smooth_field(N: int, seed: int) -> np.ndarray:
    """Random low-frequency cosines on the unit square, largest absolute value 1."""
    x = (np.arange(N) + 0.5) / N
    modes = np.cos(np.pi * np.outer(np.arange(4), x))
    weights = np.random.default_rng(seed).standard_normal((4, 4))
    weights[0, 0] = 0.0
    field = modes.T @ weights @ modes
    return field / np.abs(field).max()


def bump(x: np.ndarray, y: np.ndarray, at: tuple[float, float], width: float) -> np.ndarray:
    return np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * width**2))


@lru_cache(maxsize=32)
def _numbers(name: str, N: int) -> dict[str, Any]:
    """Everything but t, in float64."""
    kind = name.split("-")[0]
    if kind == "wave":
        h, x = 1.0 / N, (np.arange(N) + 0.5) / N
        theta = 1.0 + 0.3 * smooth_field(N, 0)
    elif kind == "schrodinger":
        h, x = 16.0 / N, np.arange(N) * 16.0 / N
        angle = 2 * np.pi * x / 16.0
        theta = 10.0 * smooth_field(N, 1) + 5.0 * (np.cos(3 * angle)[:, None] + np.cos(3 * angle)[None, :])
    else:
        h, x = 1.0 / (N + 1), np.arange(1, N + 1) / (N + 1)
        theta = 1.0 + 0.3 * smooth_field(N, 0)
    X, Y = np.meshgrid(x, x, indexing="ij")
    if kind == "wave":
        width, there = (0.012, (0.41, 0.44)) if name == "wave-sharp" else (0.05, (0.45, 0.4))
        u = bump(X, Y, (0.4, 0.45), width)
        y0, target = np.stack([u, np.zeros_like(u)]), bump(X, Y, there, 1.6 * width)[None]
    elif kind == "schrodinger":
        psi = bump(X, Y, (7.0, 8.0), 1.0) * np.exp(1j * (4.0 * X + 2.0 * Y))
        aim = bump(X, Y, (8.0, 8.5), 1.2) * np.exp(1j * (4.0 * X + 2.0 * Y))
        y0, target = np.stack([psi.real, psi.imag]), np.stack([aim.real, aim.imag])
    else:
        square = ((np.abs(X - 0.4) < 0.15) & (np.abs(Y - 0.45) < 0.15)).astype(float)
        y0 = (square if name == "heat-rough" else bump(X, Y, (0.4, 0.45), 0.05))[None]
        target = (0.1 if name == "heat-rough" else 0.02) * bump(X, Y, (0.6, 0.5), 0.3)[None]
    return {"h": h, "theta": theta, "y0": y0, "target": target}


@lru_cache(maxsize=32)
def _spectrum(name: str, N: int) -> tuple[float, float]:
    """Both ends of the spectrum of the symmetric operator behind A (wave: C(−Δ)C, similar to −c²Δ)."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    numbers = _numbers(name, N)
    problem = Problem(name=name, N=N, t=0.0, scale=0.0, low=0.0, high=0.0, **numbers)
    coefficients = prepare(problem, problem.theta, np)

    def product(x: np.ndarray) -> np.ndarray:
        x = x.reshape(1, N, N)
        if problem.kind == "wave":
            return -(problem.theta * neumann_laplacian(problem.theta * x, np)).ravel() / problem.h**2
        if problem.kind == "schrodinger":
            return apply(problem, coefficients, np.concatenate([0 * x, x]), np)[0].ravel()
        return -apply(problem, coefficients, x, np).ravel()

    operator = LinearOperator((N * N, N * N), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(N * N)
    high = float(eigsh(operator, 1, which="LA", v0=start, tol=1e-8, return_eigenvectors=False)[0])
    if problem.kind != "schrodinger":
        return 0.0, high
    low = float(eigsh(operator, 1, which="SA", v0=start, tol=1e-6, return_eigenvectors=False)[0])
    return low, high


def scales(name: str, N: int) -> tuple[float, ...]:
    """SCALES; for the heat equation what keeps t when N is not 128."""
    kind = name.split("-")[0]
    return tuple(scale * (((N + 1) / 129.0) ** 2 if kind == "heat" else 1.0) for scale in SCALES[kind])


def make_problem(
    name: str, N: int = 128, scale: float | None = None, dtype: str = "float64", library: str = "torch"
) -> Problem:
    """A problem of NAMES; `dtype` is "float32" or "float64", `library` "torch" or "numpy"."""
    if name not in NAMES:
        raise ValueError(f"unknown problem {name!r}; known: {', '.join(NAMES)}")
    scale = scales(name, N)[-1] if scale is None else scale
    low, high = _spectrum(name, N)
    t = scale / (math.sqrt(high) if name.startswith("wave") else max(high, -low))
    problem = Problem(name=name, N=N, t=t, scale=scale, low=low, high=high, **_numbers(name, N))
    return convert(problem, dtype, library)


def convert(problem: Problem, dtype: str, library: str = "torch") -> Problem:
    """The same problem in another precision or library."""
    arrays = {key: np.array(getattr(problem, key), dtype=dtype) for key in ("theta", "y0", "target")}
    if library == "torch":
        import torch

        arrays = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return replace(problem, **arrays)


# ---------------------------------------------------------------------------------------------
# The founding study's set
# ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Wave2d:
    """Stored pairs y(0), y(1) of y = (u, u'), and the parameter p of u'' = p² S u that made them; torch tensors."""

    inputs: Array  # (3, 2, 16, 16)
    targets: Array  # (3, 2, 16, 16)
    parameter: Array  # (16, 16)
    t: float = 1.0

    def product(self, y: Array, parameter: Array | None = None) -> Array:
        """A y, flattened (2·16·16,): the authors' stencil [[0,1,0],[1,−2,1],[0,1,0]]/dx², border values repeated."""
        import torch

        p = self.parameter if parameter is None else parameter
        u, v = y.reshape(2, *p.shape)
        padded = torch.nn.functional.pad(u[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
        neighbours = padded[2:, 1:-1] + padded[:-2, 1:-1] + padded[1:-1, 2:] + padded[1:-1, :-2]
        return torch.stack([v, p**2 * (neighbours - 2 * u) * (p.shape[0] - 1) ** 2]).reshape(-1)


def wave2d(data: str | None = None, dtype: str = "float64") -> Wave2d:
    """Reads wave2d/16x16_data_*.npy below `data` or RITZ_DATA."""
    import torch

    folders = [Path(p) for p in (data, os.environ.get("RITZ_DATA")) if p]
    folders = [f / tail for f in folders for tail in ("wave2d", ".")]
    folder = next((f for f in folders if (f / "16x16_data_inputs.npy").is_file()), None)
    if folder is None:
        looked = ", ".join(map(str, folders)) or "no folder was given"
        raise DataMissing(
            f"wave2d not found ({looked}); pass --data FOLDER or set RITZ_DATA to the folder with wave2d/"
        )
    arrays = (np.load(folder / f"16x16_data_{part}.npy") for part in ("inputs", "targets", "parameter"))
    return Wave2d(*(torch.from_numpy(a.astype(dtype)) for a in arrays))


# ---------------------------------------------------------------------------------------------
# Settings, and the search for the cheapest that is accurate enough
# ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Setting:
    """How a peer solves a problem. One of `steps` and `rtol` is the knob that `search` turns."""

    method: str
    gradient: str = "backprop"
    steps: int | None = None
    rtol: float | None = None
    order: int | None = None  # degree of a polynomial
    product: str | None = None  # which implementation of y ↦ A y
    segments: int | None = None  # checkpointed pieces of the time interval

    @property
    def label(self) -> str:
        knobs = (("steps", self.steps), ("rtol", self.rtol), ("degree", self.order), ("segments", self.segments))
        return ", ".join([self.method, self.gradient, *(f"{key} {knob:g}" for key, knob in knobs if knob is not None)])


Errors = tuple[float, float]  # relative errors of the observed u(t) and of the gradient, 2-norms


def errors(u: np.ndarray, grad: np.ndarray, reference: Any) -> Errors:
    """`reference` has the arrays u and grad."""
    out = []
    with np.errstate(all="ignore"):  # what an unstable method returns
        for got, exact in ((u, reference.u), (grad, reference.grad)):
            error = np.linalg.norm(np.asarray(got, dtype=np.float64).ravel() - exact.ravel()) / np.linalg.norm(exact)
            out.append(float(error) if np.isfinite(error) else math.inf)
    return out[0], out[1]


def fewest(good: Callable[[int], bool], first: int, limit: int) -> int | None:
    """The smallest good number of steps, to 2 %, by doubling and bisection; `good` must stay true once it is."""
    high = first
    while not good(high):
        if high >= limit:
            return None
        high = min(2 * high, limit)
    low = high // 2 if high > first else first - 1
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def loosest(good: Callable[[float], bool], tightest: float, start: float = 1e-1) -> float | None:
    """The largest tolerance 10^(−k/4) that is good; errors need not be monotone in it, so they are tried in turn."""
    for k in range(round(-4 * math.log10(start)), round(-4 * math.log10(tightest)) + 1):
        if good(10.0 ** (-k / 4)):
            return 10.0 ** (-k / 4)
    return None


def search(
    setting: Setting, measure: Callable[[Setting], Errors], target: float, *, first: int = 1, limit: int = 100_000
) -> tuple[Setting, Errors] | None:
    """Turns the knob of a setting (steps if it has any, else rtol) until both errors are at most `target`."""
    seen: dict[Setting, Errors] = {}

    def good(**knob: Any) -> bool:
        trial = replace(setting, **knob)
        if trial not in seen:
            seen[trial] = measure(trial)
        return max(seen[trial]) <= target

    if setting.steps is not None:
        knob = {"steps": fewest(lambda s: good(steps=s), first, limit)}
    else:
        knob = {"rtol": loosest(lambda r: good(rtol=r), 1e-13)}
    if None in knob.values():
        return None
    found = replace(setting, **knob)
    return found, seen[found]


def best_ms(call: Callable[[], Any], runs: int = 7) -> float:
    """A quick figure to choose by, the shortest of some runs; the benchmark itself measures with _common.measure."""
    call()
    samples = []
    for _ in range(runs):
        start = perf_counter()
        call()
        samples.append(perf_counter() - start)
    return 1e3 * min(samples)


def line(row: dict[str, Any]) -> str:
    """One row of `tune` as text."""
    if "failed" in row:
        return f"  {row['setting'].label}: {row['failed']}"
    counts = f"{row['forward']} + {row['backward']} {row['counted']}" if "forward" in row else "not counted"
    errors = "errors {:.1e} (u), {:.1e} (gradient)".format(*row["errors"])
    return f"  {row['setting'].label}: {row['ms']:.2f} ms, {counts}, {errors}"


def command_line(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="16 × 16 points")
    parser.add_argument("--problem", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--scale", type=float, nargs="+", help="t·ρ or ‖tA‖ (default: SCALES)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--cache", type=Path, help="folder that keeps the references")
    return parser


def show(given: argparse.Namespace, tune: Callable[[Problem, Any], list[dict]], library: str, more: Callable) -> None:
    """Tunes a peer on all problems asked for and prints a line a setting; `more(problem, row)` is printed behind it."""
    import _pde_reference

    N = 16 if given.quick else 128
    for name in given.problem:
        for scale in given.scale or scales(name, N):
            problem = make_problem(name, N, scale, given.dtype, library)
            print(f"{problem.title}, {given.dtype}", flush=True)
            for row in tune(problem, _pde_reference.reference(name, N, scale, given.cache)):
                print(line(row) + more(problem, row), flush=True)
