"""The torchdiffeq contestant: explicit Runge-Kutta methods with backpropagation, checkpointing or the adjoint equation.

The vector field is one autograd function with a hand-written transpose, stencils by slices in place, or by a CSR matrix
where that is faster. Settings with `steps` take that many equal steps (dopri5, dopri8 and bosh3 by equal smallest and
largest step), those with `rtol` choose steps by error (atol = rtol/10); both end exactly at t, without interpolation.

Counting: one for every product with A (each evaluation of the vector field), one for every product with its transpose
(each vector-Jacobian product; the gradient in the coefficients comes with it and is not counted). What is recomputed
counts again.

    python benchmarks/_pde_torchdiffeq.py --quick
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import _common
import _pde_problems as pde
import torch
from _pde_problems import Problem, Setting
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchdiffeq import odeint, odeint_adjoint

CONTESTANT = "torchdiffeq"
FIXED_GRID = ("rk4", "midpoint", "euler")
STABLE = {"euler": 2.0, "midpoint": 2.0, "bosh3": 2.51, "rk4": 2.785, "dopri5": 3.3}  # on the negative axis
EVALUATIONS = {"euler": 1, "rk4": 4, "midpoint": 2, "bosh3": 3, "dopri5": 6, "dopri8": 13}
COUNTS = {"forward": 0, "backward": 0}


# ---------------------------------------------------------------------------------------------
# Vector fields
# ---------------------------------------------------------------------------------------------
def neumann_slices(problem: Problem, scale: float) -> Callable[[Tensor], Tensor]:
    N = problem.N
    centre = torch.full((N, N), -4.0 * scale, dtype=problem.theta.dtype)
    for edge in (centre[0], centre[-1], centre[:, 0], centre[:, -1]):
        edge += scale

    def laplacian(u: Tensor) -> Tensor:
        out = centre * u
        out[1:] += u[:-1]
        out[:-1] += u[1:]
        out[:, 1:] += u[:, :-1]
        out[:, :-1] += u[:, 1:]
        return out

    return laplacian


def periodic_slices(problem: Problem, scale: float) -> Callable[[Tensor], Tensor]:
    def laplacian(u: Tensor) -> Tensor:  # (2, N, N)
        out = u * -4.0
        out[:, 1:] += u[:, :-1]
        out[:, 0] += u[:, -1]
        out[:, :-1] += u[:, 1:]
        out[:, -1] += u[:, 0]
        out[..., 1:] += u[..., :-1]
        out[..., 0] += u[..., -1]
        out[..., :-1] += u[..., 1:]
        out[..., -1] += u[..., 0]
        return out.mul_(scale)

    return laplacian


def stored(problem: Problem, periodic: bool, scale: float) -> Callable[[Tensor], Tensor]:
    """The same Laplacians by a CSR matrix."""
    N, dtype = problem.N, problem.theta.dtype
    index = torch.arange(N * N).reshape(N, N)
    if periodic:
        pairs = [(index.roll(shift, axis), index) for axis in (0, 1) for shift in (1, -1)]
    else:
        pairs = [(index[1:], index[:-1]), (index[:, 1:], index[:, :-1])]
        pairs += [pair[::-1] for pair in pairs]
    rows, cols = (torch.cat([pair[k].reshape(-1) for pair in pairs]) for k in (0, 1))
    centre, every = -torch.bincount(rows, minlength=N * N).to(dtype), index.reshape(-1)
    where = torch.stack([torch.cat([rows, every]), torch.cat([cols, every])])
    values = scale * torch.cat([torch.ones(len(rows), dtype=dtype), centre])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta state, invariants
        M = torch.sparse_coo_tensor(where, values, (N * N, N * N)).coalesce().to_sparse_csr()
        M = torch.sparse_csr_tensor(M.crow_indices().int(), M.col_indices().int(), M.values(), M.shape)  # MKL's type
    if periodic:
        return lambda u: torch.stack([M.mv(part.reshape(-1)).view(N, N) for part in u])
    return lambda u: M.mv(u.reshape(-1)).view(N, N)


class Wave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, laplacian: Callable, a: Tensor, y: Tensor) -> Tensor:
        COUNTS["forward"] += 1
        Lu = laplacian(y[0])
        ctx.laplacian = laplacian
        ctx.save_for_backward(a, Lu)
        out = torch.empty_like(y)
        out[0] = y[1]
        torch.mul(a, Lu, out=out[1])
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        COUNTS["backward"] += 1
        a, Lu = ctx.saved_tensors
        out = torch.empty_like(g)
        out[0] = ctx.laplacian(a * g[1])
        out[1] = g[0]
        return None, Lu * g[1], out


class Schrodinger(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, laplacian: Callable, V: Tensor, y: Tensor) -> Tensor:
        COUNTS["forward"] += 1
        ctx.laplacian = laplacian
        ctx.save_for_backward(V, y)
        return turned(laplacian, V, y, 1.0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        COUNTS["backward"] += 1
        V, y = ctx.saved_tensors
        return None, (g[0] * y[1]).addcmul_(g[1], y[0], value=-1), turned(ctx.laplacian, V, g, -1.0)


def turned(laplacian: Callable, V: Tensor, y: Tensor, sign: float) -> Tensor:
    """sign · (H y₁, −H y₀); `laplacian` has the factor −1/(2h²) in it."""
    H = laplacian(y).addcmul_(V, y)
    out = torch.empty_like(y)
    torch.mul(H[1], sign, out=out[0])
    torch.mul(H[0], -sign, out=out[1])
    return out


def divergence(qx: Tensor, qy: Tensor) -> Tensor:
    out = qx[1:] - qx[:-1]
    out += qy[:, 1:]
    out -= qy[:, :-1]
    return out


def differences(u: Tensor) -> tuple[Tensor, Tensor]:
    N = len(u)
    dx, dy = u.new_empty(N + 1, N), u.new_empty(N, N + 1)
    dx[0], dx[-1], dy[:, 0], dy[:, -1] = u[0], -u[-1], u[:, 0], -u[:, -1]
    torch.sub(u[1:], u[:-1], out=dx[1:-1])
    torch.sub(u[:, 1:], u[:, :-1], out=dy[:, 1:-1])
    return dx, dy


class Heat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fx: Tensor, fy: Tensor, y: Tensor) -> Tensor:
        COUNTS["forward"] += 1
        dx, dy = differences(y[0])
        ctx.save_for_backward(fx, fy, dx, dy)
        return divergence(fx * dx, fy * dy)[None]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        COUNTS["backward"] += 1
        fx, fy, dx, dy = ctx.saved_tensors
        gx, gy = differences(g[0])
        return -(gx * dx), -(gy * dy), divergence(fx * gx, fy * gy)[None]


def vector_field(problem: Problem, product: str | None) -> Callable[..., Tensor]:
    """(*coefficients, y) -> A y; `product` is "slices" or "CSR"."""
    if problem.kind == "heat":
        return Heat.apply
    periodic = problem.kind == "schrodinger"
    scale = -0.5 / problem.h**2 if periodic else 1.0
    if product == "CSR":
        laplacian = stored(problem, periodic, scale)
    else:
        laplacian = (periodic_slices if periodic else neumann_slices)(problem, scale)
    rule = Schrodinger if periodic else Wave
    return lambda a, y: rule.apply(laplacian, a, y)


# ---------------------------------------------------------------------------------------------
# Solvers
# ---------------------------------------------------------------------------------------------
def options(setting: Setting, start: float, end: float) -> dict[str, Any]:
    """Keyword arguments of odeint for one interval."""
    if setting.method in FIXED_GRID:
        steps = setting.steps

        def grid(_: Any, __: Tensor, t: Tensor) -> Tensor:
            return torch.linspace(float(t[0]), float(t[-1]), steps + 1, dtype=t.dtype)

        return {"method": setting.method, "options": {"grid_constructor": grid}}
    choice: dict[str, Any] = {"step_t": torch.tensor([end], dtype=torch.float64)}
    tolerances = {"rtol": setting.rtol, "atol": None if setting.rtol is None else 0.1 * setting.rtol}
    if setting.steps is not None:  # every step is accepted; a hair longer, so that rounding leaves no crumb at the end
        length = abs(end - start) / setting.steps * (1 + 1e-9)
        choice |= {"first_step": length, "min_step": length, "max_step": length}
        tolerances = {"rtol": 1.0, "atol": 1.0}
    return {"method": setting.method, "options": choice} | tolerances


def solve(problem: Problem, setting: Setting, field: Callable, coefficients: tuple[Tensor, ...]) -> Tensor:
    """The state at t."""

    def func(_: Tensor, y: Tensor) -> Tensor:
        return field(*coefficients, y)

    def times(start: float, end: float) -> Tensor:
        return torch.tensor([start, end], dtype=torch.float64)

    if setting.gradient == "adjoint":
        back = options(setting, problem.t, 0.0)
        more = {"adjoint_options": back["options"], "adjoint_params": coefficients}
        if setting.rtol is not None:  # the integral for the parameters need not steer the steps
            more["adjoint_options"] |= {"norm": "seminorm"}
        forward = options(setting, 0.0, problem.t)
        return odeint_adjoint(func, problem.y0, times(0.0, problem.t), **forward, **more)[-1]
    if setting.gradient == "backprop":
        return odeint(func, problem.y0, times(0.0, problem.t), **options(setting, 0.0, problem.t))[-1]

    def piece(y: Tensor, start: float, end: float, steps: int | None, *coefficients: Tensor) -> Tensor:
        arguments = options(replace(setting, steps=steps), start, end)
        return odeint(lambda _, y: field(*coefficients, y), y, times(start, end), **arguments)[-1]

    y, total = problem.y0, setting.steps or setting.segments
    pieces = min(setting.segments, total)
    cuts = [total * k // pieces for k in range(pieces + 1)]
    for first, last in zip(cuts, cuts[1:]):
        steps = None if setting.steps is None else last - first
        start, end = problem.t * first / total, problem.t * last / total
        y = checkpoint(piece, y, start, end, steps, *coefficients, use_reentrant=False)
    return y


def make(problem: Problem, setting: Setting, *, count: bool = True) -> tuple[Callable[[], tuple], dict[str, Any]]:
    """call() -> (value, observed u(t), gradient) and {"counted", "forward", "backward"}: products, by one run."""
    field = vector_field(problem, setting.product)
    theta = problem.theta.clone().requires_grad_()

    def call() -> tuple[Tensor, Tensor, Tensor]:
        y = solve(problem, setting, field, pde.prepare(problem, theta, torch))
        loss = problem.loss(y)
        (grad,) = torch.autograd.grad(loss, theta)
        return loss.detach(), y.detach()[: problem.observed], grad

    info: dict[str, Any] = {"counted": "products with A and its transpose"}
    if count:
        COUNTS.update(forward=0, backward=0)
        loss = problem.loss(solve(problem, setting, field, pde.prepare(problem, theta, torch)))
        info["forward"] = COUNTS["forward"]
        torch.autograd.grad(loss, theta)
        info["backward"] = sum(COUNTS.values()) - info["forward"]
    return call, info


# ---------------------------------------------------------------------------------------------
# Tuning
# ---------------------------------------------------------------------------------------------
def settings(problem: Problem) -> list[Setting]:
    """What is tuned. Explicit methods on the heat equation need so many steps that their states are checkpointed.

    There only methods without an error estimate: the others stack their stages along a last axis, which takes many
    times as long per product (minutes per gradient at N = 128); ask for them by `choices`.
    """
    if problem.kind == "heat":
        fixed = [Setting(m, "checkpoint", steps=1, segments=64) for m in ("midpoint", "rk4", "euler")]
        return [*fixed, Setting("rk4", "adjoint", steps=1)]
    methods = ("dopri8", "rk4", "dopri5")
    fixed = [Setting(m, g, steps=1) for m in methods for g in ("backprop", "adjoint")]
    adaptive = [Setting(m, g, rtol=0.0) for m in ("dopri8", "dopri5") for g in ("backprop", "adjoint")]
    return [*fixed, *adaptive, Setting("bosh3", steps=1), Setting("midpoint", steps=1)]


def fastest_product(problem: Problem) -> str:
    """Slices or CSR, by a trial of value and gradient over ten steps of rk4."""
    if problem.kind == "heat":
        return "slices"
    short = replace(problem, t=problem.t * 1e-3)
    trial = {p: make(short, Setting("rk4", steps=10, product=p), count=False)[0] for p in ("slices", "CSR")}
    return min(trial, key=lambda p: pde.best_ms(trial[p]))


def range_of_steps(problem: Problem, setting: Setting, fewest_products: int) -> tuple[int, int]:
    """Where to look: not beyond four times the evaluations of the best so far."""
    limit = min(20_000, 4 * fewest_products // EVALUATIONS[setting.method])
    if problem.kind != "heat" or setting.steps is None:
        return 1, limit
    first = math.ceil(problem.t * problem.high / STABLE[setting.method])
    return first, first if setting.gradient == "adjoint" else max(limit, 2 * first)


def tune(
    problem: Problem, reference: Any, target: float = 1e-4, choices: list[Setting] | None = None
) -> list[dict[str, Any]]:
    """The cheapest accurate setting of every method, fastest first: setting, errors, ms, counts; last come failures."""
    product, fewest_products = fastest_product(problem), 40_000
    found, failed = [], []

    def measure(setting: Setting) -> pde.Errors:
        try:
            _, u, grad = make(problem, setting, count=False)[0]()
        except (AssertionError, RuntimeError):  # torchdiffeq asserts that steps and states are finite
            return float("inf"), float("inf")
        return pde.errors(u.numpy(), grad.numpy(), reference)

    for start in settings(problem) if choices is None else choices:
        start = replace(start, product=product)
        first, limit = range_of_steps(problem, start, fewest_products)
        hit = pde.search(start, measure, target, first=first, limit=limit)
        if hit is None:
            tried = "" if start.steps is None else f" in up to {limit} steps"
            failed.append({"setting": start, "failed": f"no errors of {target:g}{tried}"})
            continue
        call, info = make(problem, hit[0])
        fewest_products = min(fewest_products, info["forward"])
        runs = 3 if problem.kind == "heat" else 7
        found.append({"setting": hit[0], "errors": hit[1], "ms": pde.best_ms(call, runs)} | info)
    return sorted(found, key=lambda row: row["ms"]) + failed


# ---------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------
def peak_bytes(problem: Problem, setting: Setting) -> int:
    """Growth of the peak resident set over one value and gradient, in a process of its own."""
    spec = {"problem": [problem.name, problem.N, problem.scale, problem.dtype], "setting": asdict(setting)}
    command = [sys.executable, str(Path(__file__).resolve()), "--memory", json.dumps(spec)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def memory_worker(text: str) -> None:
    spec = json.loads(text)
    name, N, scale, dtype = spec["problem"]
    setting = Setting(**spec["setting"])
    small = replace(setting, steps=setting.steps and 4, segments=setting.segments and 2)
    make(pde.make_problem(name, 8, 1.0, dtype), small, count=False)[0]()  # code and thread pools are not the method's
    call, _ = make(pde.make_problem(name, N, scale, dtype), setting, count=False)
    print(_common.peak_memory(call))


def main() -> None:
    parser = pde.command_line(__doc__.splitlines()[0])
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        memory_worker(given.memory)
        return

    def peak(problem: Problem, row: dict[str, Any]) -> str:
        return "" if "failed" in row else f", peak {peak_bytes(problem, row['setting']) / 2**20:.1f} MiB"

    pde.show(given, tune, "torch", peak)


if __name__ == "__main__":
    main()
