"""Benchmark: evidence of a network by its whole Gauss–Newton matrix, against the dense route.

    python benchmarks/curvature_evidence.py --data DIR [--images 1000] [--seeds 20]

Real digits (mnist10k). One process, threads fixed, medians. Relative errors against the eigenvalues of the whole matrix
in float64; the dense route assembles it from Jacobian rows by torch.func and decomposes it in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common

DELTAS = [1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2]
ERROR_BAR, SPEED_BAR = 0.015, 5.0  # for prior precisions of at least 0.1
CURVE_ERROR_BAR, CURVE_SPEED_BAR = 0.02, 1.5  # from 1e-3 on


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder that holds mnist10k/ (or set RITZ_DATA)")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=60, help="of training before the curvature is looked at")
    parser.add_argument("--seeds", type=int, default=20, help="of the evidence, for the coverage of its standard error")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=_common.HERE / "results")
    parser.add_argument("--name", help="stem of the result files (default curvature-evidence-cpu-DATE)")
    return parser.parse_args()


def digits(data: str | None, count: int) -> tuple[Any, Any]:
    from _optim_tasks import mnist

    images, labels = mnist(data)
    x = images[:count].unsqueeze(1)
    return (x - x.mean()) / x.std(), labels[:count]


def networks() -> dict[str, Any]:
    from torch import nn

    def cnn() -> nn.Module:
        first, second = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(784, 10))

    def mlp() -> nn.Module:
        layers = [nn.Flatten(), nn.Linear(784, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)

    return {"CNN 8-16, 9 098 parameters": cnn, "MLP 784-128-64-10, 109 386 parameters": mlp}


def trained(make: Callable[[], Any], x: Any, y: Any, epochs: int) -> Any:
    """Adam on the log-posterior with a unit prior."""
    import torch

    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            fit = torch.nn.functional.cross_entropy(model(x[part]), y[part])
            (fit + 0.5 * sum(p.square().sum() for p in model.parameters()) / len(x)).backward()
            optimizer.step()
    return model.eval()


# -- evidence --------------------------------------------------------------------------------------
def dense_rows(model: Any, x: Any) -> Any:
    """Rows Rᵀ J with R Rᵀ the Hessian of the softmax loss, by torch.func, example by example."""
    import torch
    from torch.func import functional_call, jacrev, vmap

    params = {n: p.detach() for n, p in model.named_parameters()}
    one = jacrev(lambda p, z: functional_call(model, p, (z.unsqueeze(0),)).squeeze(0))
    parts = [torch.cat([j.flatten(2) for j in vmap(one, (None, 0))(params, z).values()], 2) for z in x.split(100)]
    with torch.no_grad():
        p = torch.softmax(model(x), 1)
        root = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)
        return torch.cat([r.mT @ j for r, j in zip(root.split(100), parts)]).flatten(0, 1)


def evidence(options: argparse.Namespace, x: Any, y: Any) -> dict:
    import torch

    import ritz
    from ritz.laplace import Laplace

    model = trained(next(iter(networks().values())), x, y, options.epochs)
    deltas = torch.tensor(DELTAS, dtype=torch.float64)
    began = time.perf_counter()
    rows = dense_rows(model, x)
    eigenvalues = torch.linalg.eigvalsh(rows.mT @ rows).double().clamp(min=0.0)
    dense_s = time.perf_counter() - began
    print(f"  dense, float32: {dense_s:.1f} s", flush=True)
    exact_values = torch.linalg.eigvalsh(rows.double().mT @ rows.double()).clamp(min=0.0)
    posterior = Laplace(model, "classification", structure="diag").fit((x, y))
    base = posterior.log_likelihood() - 0.5 * deltas * posterior._squares.sum()

    def of(values: Any) -> Any:
        return base - 0.5 * torch.log1p(values / deltas.unsqueeze(1)).sum(1)

    exact, in_float32 = of(exact_values), of(eigenvalues)
    found: list[dict] = [_record("dense, float32", dense_s, in_float32, exact, None)]
    for structure in ("kron", "ekfac", "diag"):
        began = time.perf_counter()
        value = Laplace(model, "classification", structure=structure).fit((x, y)).log_marginal_likelihood(deltas)
        found.append(_record(structure, time.perf_counter() - began, value, exact, None))
    settings = {
        "full, from 0.1 on": {"estimator": ritz.Deflated(300, 20, block=20), "floor": 0.1},
        "full, from 0.001 on": {"estimator": ritz.Deflated(300, 20, block=20), "floor": 1e-3},
        "full, 10 plain probes": {"estimator": ritz.Hutchinson(10), "floor": 0.1},
    }
    for name, options_of_full in settings.items():
        low = options_of_full["floor"]
        asked = deltas[deltas >= low]
        times, scores = [], []
        value = error = None
        for seed in range(options.seeds if name == "full, from 0.1 on" else 3):
            estimator = options_of_full["estimator"]
            chosen = options_of_full | {"estimator": type(estimator)(**vars(estimator) | {"seed": seed})}
            began = time.perf_counter()
            la = Laplace(model, "classification", **chosen).fit((x, y))
            got, info = la.log_marginal_likelihood(asked, return_info=True)
            times.append(time.perf_counter() - began)
            scores.append(((got - exact[deltas >= low]) / info.standard_error).tolist())
            value, error = (got, info.standard_error) if value is None else (value, error)
        record = _record(name, statistics.median(times), value, exact[deltas >= low], error)
        record["scores"] = scores
        found.append(record | {"speedup": dense_s / record["seconds"]})
        print(f"  {name}: {record['seconds']:.1f} s, errors {record['errors']}", flush=True)
    return {"deltas": DELTAS, "exact": exact.tolist(), "rows": found}


def _record(name: str, seconds: float, value: Any, exact: Any, error: Any) -> dict:
    relative = ((value - exact).abs() / exact.abs()).tolist()
    own = None if error is None else (error / exact.abs()).tolist()
    return {"contestant": name, "seconds": seconds, "evidence": value.tolist(),
            "errors": [float(f"{e:.3g}") for e in relative], "standard_errors": own}  # fmt: skip


# -- report ----------------------------------------------------------------------------------------
def markdown(result: dict) -> str:
    env = result["environment"]
    lines = ["# Evidence by the whole Gauss–Newton matrix", "", f"{env['cpu']}, {env['threads']} threads, "
             f"{env['date']}; torch {env['versions']['torch']}; "
             f"{result['images']} digits of mnist10k.", ""]  # fmt: skip
    found = result["evidence"]
    lines += ["Log marginal likelihood of the CNN by its prior precision; exact: "
              + ", ".join(f"{d:g}: {v:.1f}" for d, v in zip(found["deltas"], found["exact"])) + ".", "",
              "| curvature | s | speed, dense = 1 | error at each prior precision, % | standard error, % |",
              "|---|---|---|---|---|"]  # fmt: skip
    for row in found["rows"]:
        speed = f"{row['speedup']:.1f}" if "speedup" in row else "—"
        own = "—" if row["standard_errors"] is None else ", ".join(f"{100 * e:.2f}" for e in row["standard_errors"])
        errors = ", ".join(f"{100 * e:.3g}" for e in row["errors"])
        lines.append(f"| {row['contestant']} | {row['seconds']:.1f} | {speed} | {errors} | {own} |")
    lines += ["", *bars(found)]
    return "\n".join(lines) + "\n"


def bars(found: dict) -> list[str]:
    rows = {row["contestant"]: row for row in found["rows"]}
    out = ["| bar | figure | met |", "|---|---|---|"]
    limits = {"full, from 0.1 on": (ERROR_BAR, SPEED_BAR), "full, from 0.001 on": (CURVE_ERROR_BAR, CURVE_SPEED_BAR)}
    for name, (error, speed) in limits.items():
        row = rows[name]
        worst = max(row["errors"])
        met = worst <= error and row["speedup"] >= speed
        out.append(f"| {name}: within {100 * error:g} % at {speed:g} times the dense speed | {100 * worst:.2f} %, "
                   f"{row['speedup']:.1f} times | {'yes' if met else '**no**'} |")  # fmt: skip
    scores = [s for run in rows["full, from 0.1 on"]["scores"] for s in run[:1]]
    inside = sum(abs(s) <= 2 for s in scores)
    out.append(f"| standard error at 0.1: within two of them on {len(scores)} seeds (94 % expected of twenty probes) | "
               f"{inside} of {len(scores)} | {'yes' if inside >= 0.8 * len(scores) else '**no**'} |")  # fmt: skip
    best = max(range(len(found["exact"])), key=lambda i: found["exact"][i])
    others = {n: rows[n]["evidence"][best] for n in ("kron", "ekfac", "diag")}
    top = found["exact"][best]
    out.append(f"| evidence of the whole matrix above its approximations at {found['deltas'][best]:g} | {top:.1f} "
               f"against {', '.join(f'{n} {v:.1f}' for n, v in others.items())} | "
               f"{'yes' if max(others.values()) < top else '**no**'} |")  # fmt: skip
    return out


def main() -> int:
    options = arguments()
    import torch

    torch.set_num_threads(options.threads)
    environment = _common.environment(options.threads, "cpu") | {"dtype": "float32"}
    x, y = digits(options.data, options.images)
    result = {"environment": environment, "images": len(x), "evidence": evidence(options, x, y)}
    path = options.output / f"{options.name or 'curvature-evidence-cpu-' + environment['date']}.json"
    _common.write_json(path, result)
    table = markdown(result)
    path.with_suffix(".md").write_text(table)
    print("\n" + table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
