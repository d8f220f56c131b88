"""Benchmark: accuracy of gradients through e^{tA}y against the depth, for the three rules and the ODE adjoint.

    python benchmarks/pde_gradients.py                 # 16 × 16 wave, t·ρ = 11, float64
    python benchmarks/pde_gradients.py --size 12 --scale 20

Arnoldi on the first-order system at a fixed depth, loss ½‖u(t) − target‖²/n, gradient in all entries of the speed;
exact values by autograd through the exponential of the dense matrix. `Adjoint()` and `Unrolled()` are derivatives of
the computed value, `Frechet()` that of the limit, from as many products again. torchdiffeq's rk4 and its continuous
adjoint get as many evaluations.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

import _common


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--scale", type=float, default=11.0)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 12, 16, 20, 24, 32, 40])
    parser.add_argument("--output", type=Path, default=_common.HERE / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import _pde_problems as pde
    import _pde_reference
    import _pde_torchdiffeq
    import torch
    from _pde_ritz import neumann, wave_operator

    import ritz

    problem = pde.make_problem("wave", options.size, options.scale, "float64")
    exact = _pde_reference.dense_reference(pde.convert(problem, "float64", "numpy"))
    rules = {"Frechet": ritz.Frechet(), "Adjoint": ritz.Adjoint(), "Unrolled": ritz.Unrolled()}
    rows: list[dict[str, Any]] = []
    for depth in options.depths:
        row: dict[str, Any] = {"depth": depth}
        for name, rule in rules.items():
            theta = problem.theta.clone().requires_grad_()
            A = wave_operator(theta, neumann(problem))
            y, info = ritz.expm_multiply(
                A, problem.y0.reshape(-1), problem.t, method=ritz.Arnoldi(depth), gradient=rule, return_info=True
            )
            u = y.reshape(problem.y0.shape)[:1]
            (grad,) = torch.autograd.grad(problem.loss(u), theta)
            row["value"], row[name] = pde.errors(u.detach().numpy(), grad.numpy(), exact)
        for gradient in ("backprop", "adjoint"):
            if depth % 4 == 0:
                setting = pde.Setting("rk4", gradient, steps=depth // 4, product="slices")
                _, u, grad = _pde_torchdiffeq.make(problem, setting, count=False)[0]()
                row["rk4 value"], row[f"rk4 {gradient}"] = pde.errors(u.numpy(), grad.numpy(), exact)
        rows.append(row)
    columns = ["depth", "value", *rules, "rk4 value", "rk4 backprop", "rk4 adjoint"]
    cell = lambda x: str(x) if isinstance(x, int) else "–" if x is None else f"{x:.1e}"  # noqa: E731
    lines = [
        f"# Gradients against depth, {_common.time.strftime('%Y-%m-%d')}",
        "",
        f"{problem.title}, float64; relative errors (2-norm) of u(t) and of the gradient in {problem.N**2} speeds. "
        "Depth: products forward; as many again in backward (twice as many for rk4's adjoint).",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows),
    ]
    environment = _common.environment(1, "cpu")
    path = options.output / f"pde-gradients-cpu-{environment['date']}.json"
    _common.write_json(path, {"environment": environment, "problem": problem.title, "rows": rows})
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
