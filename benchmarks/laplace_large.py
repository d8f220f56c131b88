"""Benchmark: the evidence of a network whose Gauss–Newton matrix takes terabytes, from the whole of it.

    python benchmarks/laplace_large.py [--data DIR] [--images 1000]

An MLP 784-1024-256-10 (1 068 810 parameters, a matrix of 4.2 TiB in float32) on real digits: log marginal likelihood
at nine prior precisions with standard errors, seconds and peak memory of the process. Bars: ten minutes, 4 GB, on two
cores. ``--exact`` has the exact value as well, from the dense dual (outputs × data, 10 000 × 10 000).
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import _common

DELTAS = [1e-2, 10**-1.5, 1e-1, 10**-0.5, 1.0, 10**0.5, 1e1, 10**1.5, 1e2]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder that holds mnist10k/ (or set RITZ_DATA)")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="also the dense dual, a few minutes and 3 GB more")
    parser.add_argument("--output", type=Path, default=_common.HERE / "results")
    parser.add_argument("--name", help="stem of the result files (default laplace-large-cpu-DATE)")
    return parser.parse_args()


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> int:
    options = arguments()
    import torch
    from _optim_tasks import mnist
    from torch import nn

    import ritz
    from ritz.curvature import DualGGN
    from ritz.laplace import Laplace

    torch.set_num_threads(options.threads)
    images, labels = mnist(options.data)
    x, y = images[: options.images].flatten(1), labels[: options.images]
    x = (x - x.mean()) / x.std()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1024), nn.Tanh(), nn.Linear(1024, 256), nn.Tanh(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(options.epochs):
        for part in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            fit = nn.functional.cross_entropy(model(x[part]), y[part])
            (fit + 0.5 * sum(p.square().sum() for p in model.parameters()) / len(x)).backward()
            optimizer.step()
    model.eval()
    P = sum(p.numel() for p in model.parameters())
    deltas = torch.tensor(DELTAS, dtype=torch.float64)
    began, before = time.perf_counter(), peak_gib()
    la = Laplace(model, "classification", estimator=ritz.Deflated(300, 10, block=20), floor=DELTAS[0]).fit((x, y))
    value, info = la.log_marginal_likelihood(deltas, return_info=True)
    seconds, memory = time.perf_counter() - began, peak_gib()
    environment = _common.environment(options.threads, "cpu") | {"dtype": "float32"}
    result = {
        "environment": environment, "parameters": P, "matrix_tib": 4 * P**2 / 2**40, "images": len(x), "deltas": DELTAS,
        "evidence": value.tolist(), "standard_errors": info.standard_error.tolist(), "seconds": seconds,
        "peak_gib": memory, "peak_before_gib": before, "products": la.posterior.measure.info.num_matvecs,
    }  # fmt: skip
    if options.exact:
        eigenvalues = torch.linalg.eigvalsh(DualGGN(la.posterior.G).to_dense()).double().clamp(min=0.0)
        logdet = torch.log1p(eigenvalues / deltas.unsqueeze(1)).sum(1)
        result["exact"] = (la.log_likelihood() - 0.5 * (deltas * la._squares.sum() + logdet)).tolist()
    path = options.output / f"{options.name or 'laplace-large-cpu-' + environment['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    path.with_suffix(".md").write_text(text)
    print(text)
    return 0


def markdown(result: dict) -> str:
    env = result["environment"]
    exact = result.get("exact")
    more = " exact | error in standard errors |" if exact else ""
    size = f"{result['parameters']:,} parameters (a matrix of {result['matrix_tib']:.1f} TiB)"
    lines = [
        "# Evidence of a network with a million parameters",
        "",
        f"{env['cpu']}, {env['threads']} threads, {env['date']}; torch {env['versions']['torch']}. {size}, "
        f"{result['images']} digits, {result['products']} products: **{result['seconds']:.0f} s, "
        f"{result['peak_gib']:.2f} GiB** at most for the whole process (bars: 600 s, 4 GB).",
        "",
        "| prior precision | log marginal likelihood | standard error |" + more,
        "|---|---|---|" + ("---|---|" if exact else ""),
    ]
    for i, delta in enumerate(result["deltas"]):
        value, error = result["evidence"][i], result["standard_errors"][i]
        more = f" {exact[i]:.1f} | {(value - exact[i]) / error:+.1f} |" if exact else ""
        lines.append(f"| {delta:.3g} | {value:.1f} | {error:.2f} |{more}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
