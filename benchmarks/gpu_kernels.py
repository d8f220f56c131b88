"""Benchmark on a GPU: kernel products and likelihood steps — ritz's Triton and torch tiles, KeOps — in one run.

    python benchmarks/gpu_kernels.py [--quick] [--sizes 50000,200000] [--dims 3,9,30] [--vectors 1,16] [--tune]

Float32, Gaussian kernel with length-scales. Times are medians between device events. `--tune` times other blocks than
those of ritz.kernels.triton_plan. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _common
import numpy as np
import torch

import ritz
from ritz.kernels import RBF, Tiles, TritonTiles

PROBES, DEPTH, NOISE = 15, 20, 0.1  # a step: y and 15 probes, 16 vectors
CONTESTANTS = ("ritz Triton", "ritz torch", "KeOps")
BARS = {1: 1.5, 16: 5.0}  # KeOps' time over ours, by the number of vectors


def arguments() -> argparse.Namespace:
    def whole(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=whole, default=[50_000, 200_000])
    parser.add_argument("--dims", type=whole, default=[3, 9, 30])
    parser.add_argument("--vectors", type=whole, default=[1, 16])
    parser.add_argument("--contestant", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--quick", action="store_true", help="n = 20 000, and a shorter clock")
    parser.add_argument("--no-step", action="store_true", help="products only")
    parser.add_argument("--tune", action="store_true", help="times of ritz Triton for other blocks, and nothing else")
    parser.add_argument("--seconds", type=float, default=5.0, help="no more samples of one configuration after that")
    parser.add_argument("--output", type=Path, default=_common.HERE / "results", help="folder for JSON and table")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.seconds = [20_000], min(options.seconds, 1.0)
    return options


def samples_of(call: Callable[[], Any], device: torch.device, limit: float) -> list[float]:
    """Seconds per call: two warm-up calls, which compile, then 3 to 50 timed ones."""
    for _ in range(2):
        call()
    out: list[float] = []
    while len(out) < 3 or (len(out) < 50 and sum(out) < limit):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize(device)
            out.append(start.elapsed_time(stop) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            out.append(time.perf_counter() - begin)
    return out


# ---------------------------------------------------------------------------------------------
# Contestants: each gives an operator exp(−‖(x − z)/ℓ‖²/2) on X with a gradient in ℓ
# ---------------------------------------------------------------------------------------------
def problem(n: int, d: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the unit cube, and length-scales that keep r² near 1 in any dimension."""
    X = torch.from_numpy(np.random.default_rng(1).random((n, d))).to(device, torch.float32)
    return X, torch.full((1, d), 0.4 * d**0.5, device=device)


def ours(backend: Any, X: torch.Tensor, scales: torch.Tensor) -> tuple[Any, torch.Tensor]:
    kernel = RBF(X.shape[1], lengthscale=scales).to(X.device)
    return kernel(X, backend=backend), kernel.raw_lengthscale


def keops(X: torch.Tensor, scales: torch.Tensor) -> tuple[Any, torch.Tensor]:
    from pykeops.torch import LazyTensor

    raw = scales.clone().requires_grad_(True)

    def product(V: torch.Tensor) -> torch.Tensor:
        U = X / raw
        r2 = ((LazyTensor(U[:, None, :]) - LazyTensor(U[None, :, :])) ** 2).sum(-1)
        return (-r2 / 2).exp() @ V.contiguous()

    shape = (X.shape[0],) * 2
    return ritz.operators.FunctionOperator(product, shape, X.dtype, X.device, psd=True, block=True), raw


def operator(name: str, X: torch.Tensor, scales: torch.Tensor) -> tuple[Any, torch.Tensor]:
    if name == "KeOps":
        return keops(X, scales)
    return ours(TritonTiles() if name == "ritz Triton" else Tiles(), X, scales)


def step(K: Any, raw: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Gradient in ℓ of yᵀK̂⁻¹y + log det K̂ at a fixed depth: the same products for everybody."""
    A = K + NOISE * ritz.operators.identity(len(y), dtype=y.dtype, device=y.device)
    method = ritz.Lanczos(DEPTH)
    value = ritz.quadratic_form(ritz.functions.inverse, A, y, method=method)
    value = value + ritz.logdet(A, estimator=ritz.Hutchinson(PROBES), method=method)
    return torch.autograd.grad(value, raw)[0]


def error_of(name: str, X: torch.Tensor, scales: torch.Tensor, V: torch.Tensor) -> float:
    """Relative error of the first 1000 rows of a product, against float64 differences."""
    K, _ = operator(name, X, scales)
    with torch.no_grad():
        got = (K @ V)[:1000].double()
        rows = torch.zeros_like(got)
        U = (X / scales).double()
        for a in range(0, len(X), 10_000):
            r2 = torch.cdist(U[:1000], U[a : a + 10_000], compute_mode="donot_use_mm_for_euclid_dist").square()
            rows += torch.exp(-r2 / 2) @ V[a : a + 10_000].double()
    return float((got - rows).norm() / rows.norm())


def benchmark(options: argparse.Namespace, device: torch.device, rate: dict[str, float] | None) -> Iterator[dict]:
    """One record a configuration; whoever fails is printed, and yields none."""
    for n in options.sizes:
        for d in options.dims:
            X, scales = problem(n, d, device)
            V = torch.from_numpy(np.random.default_rng(2).standard_normal((n, max(options.vectors)))).to(X)
            for name in options.contestant:
                base = {"contestant": name, "n": n, "d": d}
                try:
                    K, raw = operator(name, X, scales)
                    for k in options.vectors:
                        W = V[:, :k].contiguous()
                        with torch.no_grad():
                            found = samples_of(lambda W=W, K=K: K @ W, device, options.seconds)
                        record = base | {"task": "product", "k": k, "error": error_of(name, X, scales, W)}
                        yield record | summary(found, rate, n, d, k)
                    if not options.no_step:
                        y = V[:, 0].contiguous()
                        found = samples_of(lambda y=y, K=K, raw=raw: step(K, raw, y), device, options.seconds)
                        yield base | {"task": "step", "k": 1 + PROBES} | summary(found, None, n, d, 1 + PROBES)
                except (ImportError, RuntimeError, ritz.RitzError) as error:
                    print(f"  failed: {name}, n = {n}, d = {d}: {str(error).splitlines()[0]}", flush=True)


def summary(found: list[float], rate: dict[str, float] | None, n: int, d: int, k: int) -> dict:
    out: dict[str, Any] = {"median_s": float(np.median(found)), "runs": len(found)}
    out["iqr_s"] = float(np.subtract(*np.percentile(found, [75, 25])))
    if rate is not None:
        from _gpu_ceiling import least_time

        parts = least_time(rate, n, d, k)
        out |= {"least_s": parts, "fraction": max(parts.values()) / out["median_s"]}
    return out


def tune(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """Times of ritz Triton for other blocks, products only."""
    for d in options.dims:
        X, scales = problem(options.sizes[0], d, device)
        for k in options.vectors:
            V = torch.randn(len(X), k, device=device)
            for rows, columns, warps in [(None,) * 3] + [
                (r, c, w) for r in (32, 64, 128) for c in (32, 64, 128) for w in (4, 8)
            ]:
                base = {"task": "tune", "n": len(X), "d": d, "k": k, "blocks": [rows, columns, warps]}
                try:
                    K, _ = ours(TritonTiles(rows, columns, warps), X, scales)
                    with torch.no_grad():
                        yield base | summary(samples_of(lambda K=K, V=V: K @ V, device, 1.0), None, len(X), d, k)
                except Exception as error:  # whatever the compiler raises for more than the device has
                    yield base | {"failed": type(error).__name__}


# ---------------------------------------------------------------------------------------------
def table(result: dict) -> str:
    lines = [f"# Kernel products on {result['device']}, float32, {result['environment']['date']}", ""]
    if result["rates"]:
        rate = result["rates"]
        lines += [
            f"Measured rates: TF32 {rate['tf32'] / 1e12:.0f} and float32 {rate['float32'] / 1e12:.0f} Tflop/s in "
            f"torch.matmul, {rate['exp'] / 1e12:.2f} · 10¹² exponentials/s.",
            "",
        ]
    lines += ["| task | n | d | vectors | contestant | ms | KeOps / this | fraction of ceiling | error |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    records = result["records"]
    for r in records:
        peer = next((p for p in records if p["contestant"] == "KeOps" and _same(p, r)), None)
        ratio = f"{peer['median_s'] / r['median_s']:.2f}" if peer else "–"
        fraction = f"{r['fraction']:.2f}" if "fraction" in r and r["contestant"] == "ritz Triton" else "–"
        error = f"{r['error']:.1e}" if "error" in r else "–"
        lines.append(
            f"| {r['task']} | {r['n']} | {r['d']} | {r['k']} | {r['contestant']} | {1e3 * r['median_s']:.2f} ± "
            f"{1e3 * r['iqr_s']:.2f} | {ratio} | {fraction} | {error} |"
        )
    for k, bar in BARS.items():
        ratios = [
            p["median_s"] / r["median_s"]
            for r in records
            for p in records
            if r["contestant"] == "ritz Triton" and p["contestant"] == "KeOps" and _same(p, r)
            if r["task"] == "product" and r["k"] == k
        ]
        if ratios:
            worst = min(ratios)
            lines += ["", f"Bar: ≥ {bar} × KeOps at {k} vectors: {worst:.2f}, {'met' if worst >= bar else 'not met'}."]
    return "\n".join(lines) + "\n"


def _same(a: dict, b: dict) -> bool:
    return all(a[key] == b[key] for key in ("task", "n", "d", "k"))


def main() -> int:
    options = arguments()
    if not torch.cuda.is_available():
        print(
            "benchmarks/gpu_kernels.py needs a CUDA device, and torch sees none here: run it on a machine with a GPU."
        )
        return 1
    device = torch.device("cuda")
    environment = _common.environment(torch.get_num_threads(), "cuda") | {"dtype": "float32"}
    stem = f"gpu_kernels-{'tune-' if options.tune else ''}{environment['date']}" + ("-quick" if options.quick else "")
    path = options.output / f"{stem}.json"
    result: dict[str, Any] = {"environment": environment, "device": torch.cuda.get_device_name(device), "rates": None}
    result["records"] = []
    if not options.tune:
        from _gpu_ceiling import rates

        result["rates"] = rates(lambda call: float(np.median(samples_of(call, device, 1.0))), device)
    for record in tune(options, device) if options.tune else benchmark(options, device, result["rates"]):
        result["records"].append(record)
        _common.write_json(path, result)  # after every record: an interrupted run leaves what it has
        shown = ("contestant", "task", "n", "d", "k", "blocks", "median_s", "fraction", "error", "failed")
        print("  " + ", ".join(f"{key} {record[key]}" for key in shown if key in record), flush=True)
    if not options.tune:
        path.with_suffix(".md").write_text(table(result))
        print("\n" + table(result))
    return 0 if result["records"] else 1


if __name__ == "__main__":
    sys.exit(main())
