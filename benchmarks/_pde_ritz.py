"""ritz on the problems of `_pde_problems`: value and gradient by Krylov spaces.

    python benchmarks/_pde_ritz.py --quick

Products are columns that go through A or its transpose, forward and in backward (`info.num_matvecs`); the pairing that
ends a backward pass is counted apart, in columns: it is one narrow block product with the derivative of A.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _pde_problems as pde
import torch
from _pde_problems import Problem, Setting
from torch import Tensor

import ritz
from ritz.expint import Diffusion, FirstOrder, Grid, Hamiltonian, Laplacian, WaveOperator, wave_multiply

CONTESTANT = "ritz"


def krylov(setting: Setting, kind: type) -> Any:
    return kind(rtol=setting.rtol, max_matvecs=600, reorthogonalize=False)


Route = Callable[[], tuple[Tensor, Any]]  # the observed state, and the report of its computation


def wave_symmetric(problem: Problem, theta: Tensor, setting: Setting) -> Route:
    """u = C w, w'' = −S w with S = C(−Δ)C: Lanczos on half the vector length."""
    S = WaveOperator(theta, Grid((problem.N, problem.N), spacing=problem.h, border="neumann"))
    moves, method = bool(problem.y0[1].any()), krylov(setting, ritz.Lanczos)

    def solve() -> tuple[Tensor, Any]:
        c = theta.reshape(-1)
        u0, v0 = problem.y0[0].reshape(-1) / c, problem.y0[1].reshape(-1) / c if moves else None
        pair, info = wave_multiply(S, u0, v0, problem.t, method=method, return_info=True)
        return (c * pair[0]).reshape(1, problem.N, problem.N), info

    return solve


def neumann(problem: Problem) -> ritz.LinearOperator:
    return Laplacian(Grid((problem.N, problem.N), spacing=problem.h, border="neumann"), dtype=problem.theta.dtype)


def wave_operator(theta: Tensor, laplacian: ritz.LinearOperator) -> ritz.LinearOperator:
    """(u, v)' = (v, c²Δu)."""
    return FirstOrder(ritz.operators.Diagonal((theta * theta).reshape(-1)) @ laplacian)


def wave_system(problem: Problem, theta: Tensor, setting: Setting) -> Route:
    """The system as it stands: Arnoldi, in substeps where that is cheaper than a long orthogonalisation."""
    method = replace(krylov(setting, ritz.Arnoldi), max_matvecs=setting.order or 600)
    laplacian = neumann(problem)

    def solve() -> tuple[Tensor, Any]:
        A = wave_operator(theta, laplacian)
        y, info = ritz.expm_multiply(A, problem.y0.reshape(-1), problem.t, method=method, return_info=True)
        return y.reshape(2, problem.N, problem.N)[:1], info

    return solve


def heat(problem: Problem, theta: Tensor, setting: Setting) -> Route:
    grid = Grid((problem.N, problem.N), spacing=problem.h, border="dirichlet")
    A = Diffusion(theta, grid)
    method: Any = krylov(setting, ritz.Lanczos)
    if setting.method == "shift and invert":
        method = ritz.ShiftInvert(krylov=ritz.Lanczos(rtol=setting.rtol))
    elif setting.method == "Chebyshev":
        method = ritz.Chebyshev(bounds=(-1.01 * problem.high, 0.0), rtol=setting.rtol)

    def solve() -> tuple[Tensor, Any]:
        y, info = ritz.expm_multiply(A, problem.y0.reshape(-1), problem.t, method=method, return_info=True)
        return y.reshape(1, problem.N, problem.N), info

    return solve


def schrodinger(problem: Problem, theta: Tensor, setting: Setting) -> Route:
    grid = Grid((problem.N, problem.N), spacing=problem.h, border="periodic")
    H = Hamiltonian(theta, grid, dtype=theta.dtype.to_complex())
    psi = torch.complex(problem.y0[0], problem.y0[1]).reshape(-1)
    method: Any = krylov(setting, ritz.Lanczos)
    if setting.method == "Chebyshev":
        method = ritz.Chebyshev(bounds=(problem.low - 1.0, 1.01 * problem.high), rtol=setting.rtol)

    def solve() -> tuple[Tensor, Any]:
        y, info = ritz.expm_multiply(H, psi, -1j * problem.t, method=method, return_info=True)
        return torch.stack([y.real, y.imag]).reshape(2, problem.N, problem.N), info

    return solve


ROUTES: dict[str, dict[str, Callable[[Problem, Tensor, Setting], Route]]] = {
    "wave": {"symmetric Lanczos": wave_symmetric, "Arnoldi": wave_system},
    "heat": {"shift and invert": heat, "Lanczos": heat, "Chebyshev": heat},
    "schrodinger": {"Lanczos": schrodinger, "Chebyshev": schrodinger},
}


def settings(problem: Problem) -> list[Setting]:
    """Routes; Arnoldi with spaces of a few lengths, of which the fastest is reported."""
    found = []
    for route in ROUTES[problem.name.split("-")[0]]:
        lengths = (15, 25, 40, 600) if route == "Arnoldi" else (None,)
        found += [Setting(route, "Frechet", rtol=0.0, order=length) for length in lengths]
    return found


def load() -> None:
    """Load the compiled code, which problems of the size of a warm-up do without."""
    from ritz.expint import bands_code

    for dtype in ("float32", "float64"):
        bands_code.product(dtype), bands_code.lanczos(dtype)


def make(problem: Problem, setting: Setting, *, count: bool = True) -> tuple[Callable[[], tuple], dict[str, Any]]:
    """call() -> (value, observed u(t), gradient) and {"counted", "forward", "backward"}, by one run.

    Operators are made once and θ is changed in place, as in training: what depends on θ is made anew in every call.
    """
    theta = problem.theta.clone().requires_grad_()
    solve = ROUTES[problem.name.split("-")[0]][setting.method](problem, theta, setting)
    last: list[Any] = []

    def call() -> tuple[Tensor, Tensor, Tensor]:
        theta.detach().mul_(1.0)
        y, info = solve()
        last[:] = [info]
        loss = problem.loss(y)
        (grad,) = torch.autograd.grad(loss, theta)
        return loss.detach(), y.detach()[: problem.observed], grad

    info: dict[str, Any] = {"counted": "products with A and its transpose"}
    if setting.method == "shift and invert":
        info["counted"] = "solves"
    if count:
        call()
        info["forward"] = sum(i.num_matvecs for i in last)
        info["backward"] = sum(i.backward.num_matvecs for i in last)
    return call, info


def tune(problem: Problem, reference: Any, target: float = 1e-4) -> list[dict[str, Any]]:
    """The loosest accurate tolerance of every route, fastest first: setting, errors, ms, counts; last come failures."""
    found, failed = [], []
    for start in settings(problem):

        def measure(setting: Setting) -> pde.Errors:
            try:
                _, u, grad = make(problem, setting, count=False)[0]()
            except ritz.RitzError:
                return float("inf"), float("inf")
            return pde.errors(u.numpy(), grad.numpy(), reference)

        hit = pde.search(start, measure, target)
        if hit is None:
            failed.append({"setting": start, "failed": f"no errors of {target:g} at any tolerance"})
            continue
        call, info = make(problem, hit[0])
        found.append({"setting": hit[0], "errors": hit[1], "ms": pde.best_ms(call)} | info)
    found.sort(key=lambda row: row["ms"])
    best: dict[str, dict[str, Any]] = {}
    for row in found:
        best.setdefault(row["setting"].method, row)
    return list(best.values()) + failed


def wave2d_errors(data: str | None) -> tuple[float, float]:
    """The founding study's stored targets from its stored inputs, in float32 and float64: relative distance."""
    found = []
    for dtype in ("float32", "float64"):
        study = pde.wave2d(data, dtype)
        A = ritz.aslinearoperator(study.product, shape=study.inputs[0].numel(), dtype=study.inputs.dtype)
        got = torch.stack([ritz.expm_multiply(A, y.reshape(-1), study.t) for y in study.inputs])
        stored = study.targets.reshape(len(got), -1)
        found.append(float((got - stored).norm() / stored.norm()))
    return found[0], found[1]


def main() -> None:
    import warnings

    import _pde_reference

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="16 × 16 points")
    parser.add_argument("--problem", nargs="+", choices=pde.NAMES, default=list(pde.NAMES))
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--cache", type=Path, help="folder that keeps the references")
    parser.add_argument("--data", help="folder that holds wave2d/ (or set RITZ_DATA): only the founding study's set")
    given = parser.parse_args()
    warnings.simplefilter("ignore", ritz.ConvergenceWarning)
    torch.set_num_threads(1)
    if given.data:
        print(
            "wave2d: stored targets differ by {:.1e} in float32, {:.1e} in float64".format(*wave2d_errors(given.data))
        )
        return
    N = 16 if given.quick else 128
    for name in given.problem:
        for scale in pde.scales(name, N):
            problem = pde.make_problem(name, N, scale, given.dtype)
            print(f"{problem.title}, {given.dtype}", flush=True)
            for row in tune(problem, _pde_reference.reference(name, N, scale, given.cache)):
                print(pde.line(row), flush=True)


if __name__ == "__main__":
    main()
