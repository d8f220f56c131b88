"""Reference values and gradients, and the peer that has a direct solver: rational schemes for the heat equation.

wave, schrodinger   SciPy's DOP853 at a tolerance of 1e-12, then the adjoint system (y, λ, ∂L/∂θ) backwards by the same
heat, heat-rough    Radau IIA of order 9, 64 steps, sparse direct solves, exact gradient of the discrete scheme

Both report their distance to a coarser run. `check()` compares all of them on a small grid with autograd through the
exponential of the dense matrix, and the stored wave2d targets with DOP853.

    python benchmarks/_pde_reference.py --data FOLDER       # FOLDER holds wave2d/; or set RITZ_DATA

No torch, jax or ritz is needed except in `check()`.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import _pde_problems as pde
import numpy as np
import scipy.sparse as sp
from _pde_problems import Problem, Setting
from scipy.integrate import solve_ivp
from scipy.sparse.linalg import splu

CONTESTANT = "direct"


@dataclass(frozen=True)
class Reference:
    value: float
    u: np.ndarray  # observed fields of y(t)
    grad: np.ndarray  # (N, N)
    how: str


# ---------------------------------------------------------------------------------------------
# Waves: an explicit method of order 8 and the adjoint system
# ---------------------------------------------------------------------------------------------
def transposed(problem: Problem, coefficients: tuple[np.ndarray, ...], x: np.ndarray) -> np.ndarray:
    """Aᵀ x (wave, schrodinger)."""
    if problem.kind == "schrodinger":
        return -pde.apply(problem, coefficients, x, np)
    return np.stack([pde.neumann_laplacian(coefficients[0] * x[1], np), x[0]])


def pairing(problem: Problem, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """xᵀ (∂A/∂a) y for every entry of a = c²/h² or V."""
    if problem.kind == "schrodinger":
        return x[0] * y[1] - x[1] * y[0]
    return x[1] * pde.neumann_laplacian(y[0], np)


def explicit_reference(problem: Problem, rtol: float) -> tuple[float, np.ndarray, np.ndarray]:
    coefficients = pde.prepare(problem, problem.theta, np)
    shape, size = problem.y0.shape, problem.y0.size
    options = {"method": "DOP853", "rtol": rtol, "atol": 1e-2 * rtol, "t_eval": [0.0]}

    def forward(_: float, y: np.ndarray) -> np.ndarray:
        return pde.apply(problem, coefficients, y.reshape(shape), np).ravel()

    def backward(_: float, z: np.ndarray) -> np.ndarray:
        y, x = z[:size].reshape(shape), z[size : 2 * size].reshape(shape)
        parts = pde.apply(problem, coefficients, y, np), -transposed(problem, coefficients, x), -pairing(problem, x, y)
        return np.concatenate([part.ravel() for part in parts])

    y = solve_ivp(forward, (0.0, problem.t), problem.y0.ravel(), **options | {"t_eval": [problem.t]}).y[:, 0]
    u = y.reshape(shape)[: problem.observed]
    cotangent = np.zeros(shape)  # scaled: an absolute tolerance must not swallow it
    cotangent[: problem.observed] = u - problem.target
    start = np.concatenate([y, cotangent.ravel(), np.zeros(problem.N**2)])
    grad = solve_ivp(backward, (problem.t, 0.0), start, **options).y[2 * size :, 0].reshape(problem.theta.shape)
    if problem.kind == "wave":
        grad = grad * 2.0 * problem.theta / problem.h**2
    return float(problem.loss(y.reshape(shape))), u, grad / problem.N**2


# ---------------------------------------------------------------------------------------------
# Heat: y ↦ r(τA)^m y with r in partial fractions, sparse LU of τA − pole, exact gradient
# ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rational:
    """r(z) = constant + Re Σ residue / (z − pole), one pole of every conjugate pair, its residue doubled."""

    constant: float
    residues: tuple[complex, ...]
    poles: tuple[complex, ...]

    def __call__(self, z: np.ndarray) -> np.ndarray:
        return self.constant + sum((r / (z - p)).real for r, p in zip(self.residues, self.poles))


def halved(constant: float, residues: np.ndarray, poles: np.ndarray) -> Rational:
    keep = [(r, p) for r, p in zip(residues, poles) if p.imag > -1e-10]
    pairs = [(2 * r, p) if p.imag > 1e-10 else (complex(r.real), complex(p.real)) for r, p in keep]
    return Rational(constant, *(tuple(complex(x) for x in part) for part in zip(*pairs)))


@lru_cache
def pade(k: int, m: int) -> Rational:
    """Padé approximant k/m of exp: Gauss (s, s), order 2s; Radau IIA (s − 1, s), order 2s − 1."""
    f = math.factorial
    top = [f(k + m - j) * f(k) / (f(k + m) * f(j) * f(k - j)) for j in range(k + 1)]
    bottom = [f(k + m - j) * f(m) / (f(k + m) * f(j) * f(m - j)) * (-1) ** j for j in range(m + 1)]
    P, Q = np.polynomial.Polynomial(top), np.polynomial.Polynomial(bottom)
    poles = Q.roots().astype(complex)
    return halved(top[-1] / bottom[-1] if k == m else 0.0, P(poles) / Q.deriv()(poles), poles)


@lru_cache
def best_rational(n: int) -> Rational:
    """Nearly best approximation of exp on (−∞, 0] with n poles: Carathéodory-Fejér (Trefethen et al. 2006)."""
    K, count, scale = 75, 1024, 9.0
    w = np.exp(2j * np.pi * np.arange(count) / count)
    x = w.real
    F = np.exp(scale * (x - 1) / (x + 1 + 1e-16))
    c = np.fft.fft(F).real / count
    f = np.polyval(c[K::-1], w)
    H = np.array([[c[1 + i + j] if i + j < K else 0.0 for j in range(K)] for i in range(K)])
    U, S, Vh = np.linalg.svd(H)
    u, v = U[::-1, n], Vh[n]
    zeros = np.zeros(count - K)
    b = np.fft.fft(np.concatenate([u, zeros])) / np.fft.fft(np.concatenate([v, zeros]))
    roots = np.roots(v)
    q = roots[np.abs(roots) > 1]
    values = (f - S[n] * w**K * b) * np.polyval(np.poly(q), w)
    top = (np.fft.fft(values).real / count)[n::-1]
    residues = np.array([np.polyval(top, a) / np.polyval(np.poly(np.delete(q, k)), a) for k, a in enumerate(q)])
    poles = scale * (q - 1) ** 2 / (q + 1) ** 2
    return halved(0.0, 4 * residues * poles / (q**2 - 1), poles)


def heat_matrix(coefficients: tuple[np.ndarray, np.ndarray], N: int) -> sp.csc_array:
    fx, fy = coefficients
    centre = -(fx[1:] + fx[:-1] + fy[:, 1:] + fy[:, :-1]).ravel()
    right = np.concatenate([fy[:, 1:-1], np.zeros((N, 1))], axis=1).ravel()[:-1]  # no bond across the end of a row
    down = fx[1:-1].ravel()
    return sp.csc_array(sp.diags_array([down, right, centre, right, down], offsets=[-N, -1, 0, 1, N], format="csc"))


def faces_to_theta(gx: np.ndarray, gy: np.ndarray, h: float) -> np.ndarray:
    """The transpose of the mean over faces."""
    out = 0.5 * (gx[1:] + gx[:-1] + gy[:, 1:] + gy[:, :-1])
    out[0] += 0.5 * gx[0]
    out[-1] += 0.5 * gx[-1]
    out[:, 0] += 0.5 * gy[:, 0]
    out[:, -1] += 0.5 * gy[:, -1]
    return out / h**2


def rational_gradient(problem: Problem, r: Rational, steps: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Value, u(t) and the exact gradient of the scheme: one LU per pole, two solves per pole and step."""
    N, tau = problem.N, problem.t / steps
    coefficients = pde.prepare(problem, problem.theta, np)
    A = heat_matrix(coefficients, N) * tau
    identity = sp.eye_array(N * N, format="csc")
    options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
    factors = [splu(A - (p.real if p.imag == 0 else p) * identity, **options) for p in r.poles]

    def solve(factor: Any, pole: complex, b: np.ndarray) -> np.ndarray:
        return factor.solve(b if pole.imag == 0 else b.astype(complex))

    def step(y: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        parts = [solve(factor, p, y) for factor, p in zip(factors, r.poles)]
        return r.constant * y + sum((w * x).real for w, x in zip(r.residues, parts)), parts

    y, kept = problem.y0.ravel(), []
    for _ in range(steps):
        y, parts = step(y)
        kept.append(parts)
    u = y.reshape(1, N, N)
    x = (u - problem.target).ravel() / N**2
    gx, gy = np.zeros((N + 1, N)), np.zeros((N, N + 1))
    for parts in reversed(kept):  # A is symmetric: the transposed step is the step
        x, duals = step(x)
        for w, a, b in zip(r.residues, parts, duals):
            a, b = a.reshape(N, N), b.reshape(N, N)
            gx += tau * (w * pde.difference(a, -2, np) * pde.difference(b, -2, np)).real
            gy += tau * (w * pde.difference(a, -1, np) * pde.difference(b, -1, np)).real
    return float(problem.loss(u)), u, faces_to_theta(gx, gy, problem.h)


SCHEMES: dict[str, Callable[[int | None], Rational]] = {
    "gauss 6": lambda _: pade(3, 3),  # implicit Runge-Kutta, three stages; does not damp what is stiff
    "radau 5": lambda _: pade(2, 3),  # damps it
    "best rational": best_rational,  # no Runge-Kutta method: one step, `order` poles
}


def settings(problem: Problem) -> list[Setting]:
    if problem.kind != "heat":
        return []
    return [
        Setting("gauss 6", "discrete", steps=1),
        Setting("radau 5", "discrete", steps=1),
        *(Setting("best rational", "discrete", steps=1, order=n) for n in range(4, 9)),
    ]


def make(problem: Problem, setting: Setting) -> tuple[Callable[[], tuple], dict[str, Any]]:
    """call() -> (value, u, gradient), factorisations included since they depend on θ; counts of solves."""
    r = SCHEMES[setting.method](setting.order)
    problem = pde.convert(problem, "float64", "numpy")
    real = sum(p.imag == 0 for p in r.poles)
    each = f"{real} real + {len(r.poles) - real} complex"
    info = {"counted": "solves", "factorizations": each, "forward": setting.steps * len(r.poles)}
    info["backward"] = info["forward"]
    return lambda: rational_gradient(problem, r, setting.steps), info


def tune(problem: Problem, reference: Reference, target: float = 1e-4) -> list[dict[str, Any]]:
    """The cheapest accurate setting of every scheme, fastest first: setting, errors, ms, counts."""
    found, done = [], set()
    for start in settings(problem):
        if start.method in done:
            continue

        def measure(setting: Setting) -> pde.Errors:
            _, u, grad = make(problem, setting)[0]()
            return pde.errors(u, grad, reference)

        hit = pde.search(start, measure, target, limit=1 if start.order else 200)
        if hit is None:
            continue
        done.add(start.method)
        call, info = make(problem, hit[0])
        found.append({"setting": hit[0], "errors": hit[1], "ms": pde.best_ms(call, 3)} | info)
    return sorted(found, key=lambda row: row["ms"])


# ---------------------------------------------------------------------------------------------
# Cached references, checks
# ---------------------------------------------------------------------------------------------
def compute(problem: Problem) -> Reference:
    if problem.kind == "heat":
        how, fine = "Radau IIA of order 9, 64 steps, direct solves", rational_gradient(problem, pade(4, 5), 64)
        coarse = rational_gradient(problem, pade(4, 5), 32)
    else:
        how, fine = "DOP853 and its adjoint system, rtol 1e-12", explicit_reference(problem, 1e-12)
        coarse = explicit_reference(problem, 1e-10)
    result = Reference(*fine, how)
    du, dg = pde.errors(coarse[1], coarse[2], result)
    return Reference(*fine, f"{how}; a coarser run differs by {du:.0e} (u) and {dg:.0e} (gradient)")


def reference(name: str, N: int, scale: float | None = None, cache: Path | None = None) -> Reference:
    """Of the float64 problem; kept in `cache` if that folder is given."""
    problem = pde.make_problem(name, N, scale, "float64", "numpy")
    key = hashlib.sha256(repr((problem.t, pde.SCALES)).encode())
    for array in (problem.theta, problem.y0, problem.target):
        key.update(array.tobytes())
    path = None if cache is None else Path(cache) / f"pde-{name}-{N}-{key.hexdigest()[:12]}.npz"
    if path is not None and path.is_file():
        with np.load(path) as file:
            return Reference(float(file["value"]), file["u"], file["grad"], str(file["how"]))
    result = compute(problem)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, value=result.value, u=result.u, grad=result.grad, how=result.how)
    return result


def dense_reference(problem: Problem) -> Reference:
    """Autograd through the exponential of the dense matrix (small N)."""
    import torch

    problem = pde.convert(problem, "float64", "torch")
    theta = problem.theta.requires_grad_()
    A = pde.dense(problem, theta, torch)
    y = (torch.linalg.matrix_exp(problem.t * A) @ problem.y0.reshape(-1)).reshape(problem.y0.shape)
    loss = problem.loss(y)
    (grad,) = torch.autograd.grad(loss, theta)
    u = y.detach()[: problem.observed]
    return Reference(loss.item(), u.numpy(), grad.numpy(), "dense exponential")


def wave2d_error(data: str | None) -> float:
    """Relative distance of the stored targets to DOP853 with the authors' stencil."""
    import torch

    study = pde.wave2d(data)
    A = torch.stack([study.product(e) for e in torch.eye(study.inputs[0].numel(), dtype=torch.float64)]).T.numpy()
    got = [
        solve_ivp(lambda _, y: A @ y, (0.0, study.t), x.ravel(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
        for x in study.inputs.numpy()
    ]
    stored = study.targets.reshape(len(got), -1).numpy()
    return float(np.linalg.norm(np.stack(got) - stored) / np.linalg.norm(stored))


def check(N: int, data: str | None) -> float:
    worst = 0.0
    for name in pde.NAMES:
        problem = pde.make_problem(name, N, library="numpy")
        got, exact = compute(problem), dense_reference(problem)
        errors = pde.errors(got.u, got.grad, exact)
        worst = max(worst, *errors, abs(got.value / exact.value - 1))
        print(f"{problem.title}: u {errors[0]:.1e}, gradient {errors[1]:.1e} off the dense exponential ({got.how})")
    try:
        print(f"wave2d: stored targets differ by {wave2d_error(data):.1e} from DOP853 with the authors' stencil")
    except pde.DataMissing as missing:
        print(f"skipped: {missing}")
    return worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder that holds wave2d/ (or set RITZ_DATA)")
    parser.add_argument("--size", type=int, default=16, help="points along each side")
    options = parser.parse_args()
    assert check(options.size, options.data) < 1e-8
