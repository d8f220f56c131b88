"""Benchmark: products with a kernel matrix by each back end, against the product with a stored dense matrix.

    python benchmarks/kernel_products.py [--n 13279] [--columns 11] [--rounds 3] [--kernel RBF ...]

Bars, in the same run: NumbaTiles ≤ 2.5 × the stored product, Tiles ≤ 6 ×; workspace ≤ 64 MB; relative error ≤ 1e-5 in
float32 against float64. Every back end runs in a process of its own; they take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common
import numpy as np
from _common import ROOT

DENSE = "dense K @ X"
BACKENDS = (DENSE, "Stored", "Tiles", "NumbaTiles")
KERNELS = ("RBF", "Matern 3/2", "Matern 5/2")
TIME_BARS = {"NumbaTiles": 2.5, "Tiles": 6.0}
WORKSPACE_BAR, ERROR_BAR = 64e6, 1e-5
LENGTHSCALE = 3.0  # of standardised inputs: entries of K between 0.01 and 1
COLOURS = {DENSE: "0.5", "Stored": "tab:cyan", "Tiles": "tab:green", "NumbaTiles": "tab:blue"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=13_279)
    parser.add_argument("--d", type=int, default=18, help="18: rows of elevators (up to 16 599); else normal points")
    parser.add_argument("--columns", type=int, default=11, help="right-hand sides")
    parser.add_argument("--pair-columns", type=int, default=110, help="width of the timed gradient contraction")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="no more samples of one configuration after that")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--output", type=Path, default=_common.HERE / "results")
    parser.add_argument("--name", help="stem of the result files (default kernel-products-cpu-DATE)")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing: table and figure of a saved run")
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def points(n: int, d: int) -> np.ndarray:
    if d == 18 and n <= 16_599:
        from _gp_data import load

        split = load("elevators")
        return np.concatenate([split.X, split.Xs])[:n]
    return np.random.default_rng(0).standard_normal((n, d))


# -- worker ----------------------------------------------------------------------------------------
def peak_workspace(call: Callable[[], Any]) -> int:
    """Most bytes alive at once in tensors that torch operations made during the call, plus numpy's share.

    Storages are counted once, until they are freed. What compiled code allocates for itself shows in the growth of the
    process only, which is reported beside it.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Meter(TorchDispatchMode):
        now = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.seen: set[int] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # storages that come in were there before, or are counted already
            known = {
                leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
            }
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    storage = leaf.untyped_storage()
                    if storage._cdata not in known and storage._cdata not in self.seen:
                        self.add(storage)
            return out

        def add(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, size)

        def drop(self, key: int, size: int) -> None:
            self.seen.discard(key)
            self.now -= size

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    with Meter() as meter:
        out = call()
    numpy_peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    result = sum(t.numel() * t.element_size() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
    return max(meter.peak + numpy_peak - result, 0)


def work(spec: dict) -> list[dict]:
    import torch

    torch.set_num_threads(spec["threads"])
    dtype = getattr(torch, spec["dtype"])
    P = torch.from_numpy(points(spec["n"], spec["d"]))
    rng = torch.Generator().manual_seed(0)
    V = torch.randn(spec["n"], spec["columns"], generator=rng, dtype=torch.float64)
    Lam, Q = (torch.randn(spec["n"], spec["pair_columns"], generator=rng, dtype=dtype) for _ in range(2))
    records = []
    for name in spec["kernels"]:
        record: dict[str, Any] = {"kernel": name, "backend": spec["backend"]}
        X, B = P.to(dtype), V.to(dtype)
        began = time.perf_counter()
        product, pairing, layout = contender(name, X, B, (Lam, Q), spec["backend"])
        Y = product()
        record["first_s"] = time.perf_counter() - began  # compiles, and fills what is stored
        record["samples"] = _common.measure(product, max_time=spec["seconds"])
        if pairing is not None:
            record["pair_samples"] = _common.measure(pairing, min_runs=3, max_time=spec["seconds"])
        if spec["check"]:
            reference = apply(name, P, V)
            record["error"] = float((Y.double() - reference).norm() / reference.norm())
            peak_workspace(lambda B=B: B + B)  # what torch and Python load on first use is not the product's
            record["growth_bytes"] = _common.peak_memory(product)
            record["workspace_bytes"] = peak_workspace(product)
        if layout:
            record["layout"] = layout
        records.append(record)
    return records


def contender(name: str, X: Any, B: Any, pair: tuple[Any, Any], backend: str) -> tuple[Any, Any, str | None]:
    """The product as a callable, the gradient contraction or None, and for the dense matrix how it is multiplied."""
    import torch

    if backend == DENSE:
        K, Bt = dense(name, X), B.mT.contiguous()
        layouts = {"K @ X": lambda: K @ B, "(Xᵀ K)ᵀ": lambda: (Bt @ K).mT}  # BLAS likes one or the other
        trial = {k: min(_common.measure(f, min_runs=3, min_time=0.0)) for k, f in layouts.items()}
        best = min(trial, key=lambda k: trial[k])
        return layouts[best], None, best
    operator = build(name, X, backend)

    @torch.no_grad()
    def product() -> Any:
        return operator @ B

    return product, lambda: operator.pair(*pair), None


def build(name: str, X: Any, backend: str) -> Any:
    import ritz

    found = getattr(ritz.kernels, backend, None)
    if found is None:
        raise RuntimeError(f"this version of ritz has no back end {backend}")
    if name == "RBF":
        kernel = ritz.kernels.RBF(ard_num_dims=X.shape[1], lengthscale=LENGTHSCALE)
    else:
        nu = {"Matern 3/2": 1.5, "Matern 5/2": 2.5}[name]
        kernel = ritz.kernels.Matern(nu, ard_num_dims=X.shape[1], lengthscale=LENGTHSCALE)
    return kernel(X, backend=found())


def profile(name: str, r: Any) -> Any:
    """Entries from distances, in plain torch."""
    if name == "RBF":
        return (-0.5 * r.square()).exp()
    a = r * (3.0 if name == "Matern 3/2" else 5.0) ** 0.5
    return (1 + a) * (-a).exp() if name == "Matern 3/2" else (1 + a + a.square() / 3) * (-a).exp()


def rows(name: str, X: Any) -> Any:
    import torch

    U = X.double() / LENGTHSCALE
    for a in range(0, len(U), 256):
        r = torch.cdist(U[a : a + 256], U, compute_mode="donot_use_mm_for_euclid_dist")
        yield slice(a, a + 256), profile(name, r)


def dense(name: str, X: Any) -> Any:
    """The whole matrix, made in float64 by blocks of rows and kept in the dtype of X."""
    K = X.new_empty(len(X), len(X))
    for i, block in rows(name, X):
        K[i] = block.to(X.dtype)
    return K


def apply(name: str, X: Any, V: Any) -> Any:
    """K V in float64, the reference."""
    Y = V.new_empty(V.shape)
    for i, block in rows(name, X):
        Y[i] = block @ V
    return Y


# -- driver ----------------------------------------------------------------------------------------
def launch(spec: dict, timeout: float) -> tuple[list[dict], str | None]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        env = os.environ | _common.thread_variables(spec["threads"])
        if importlib.util.find_spec("ritz") is None:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), env.get("PYTHONPATH")]))
        command = [sys.executable, __file__, "--spec", str(path)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return [], f"no answer within {timeout:.0f} s"
        if done.returncode == 0:
            return json.loads(path.with_suffix(".out.json").read_text()), None
        said = [line for line in done.stderr.splitlines() if line and not line[0].isspace()]
        return [], said[-1][:400] if said else f"exit status {done.returncode}"


def benchmark(options: argparse.Namespace, path: Path) -> dict:
    environment = _common.environment(options.threads, "cpu")
    environment["dtype"] = options.dtype
    settings = {k: getattr(options, k) for k in ("n", "d", "columns", "pair_columns", "rounds")}
    merged: dict[tuple[str, str], dict] = {}
    result: dict[str, Any] = {"environment": environment, "settings": settings, "rows": []}
    for turn in range(options.rounds):
        for backend in options.backend:
            spec = settings | {"backend": backend, "kernels": options.kernel, "check": turn == 0}
            spec |= {k: getattr(options, k) for k in ("dtype", "threads", "seconds")}
            found, error = launch(spec, options.timeout)
            for r in found:
                entry = merged.setdefault((r["kernel"], backend), r | {"samples": [], "pair_samples": []})
                for key in ("samples", "pair_samples"):
                    entry[key] = entry[key] + r.get(key, [])
                times = ", ".join(f"{1e3 * np.median(r[k]):.0f} ms" for k in ("samples", "pair_samples") if r.get(k))
                print(f"  round {turn + 1}: {r['kernel']}, {backend}: {times} (product, pairing)", flush=True)
            if error:
                print(f"  round {turn + 1}: {backend}: FAILED: {error}", flush=True)
                merged.setdefault(("—", backend), {"kernel": "—", "backend": backend, "failure": error, "samples": []})
            environment["load_average_end"] = os.getloadavg()
            result["rows"] = list(merged.values())
            _common.write_json(path, result)
    return result


def bars(result: dict) -> list[dict]:
    """Each bar with its figure; a ratio needs the dense product of the same kernel and run."""
    for r in result["rows"]:
        if r["samples"]:
            r["median_s"] = float(np.median(r["samples"]))
            r["pair_s"] = float(np.median(r["pair_samples"])) if r["pair_samples"] else None
    dense_s = {r["kernel"]: r["median_s"] for r in result["rows"] if r["backend"] == DENSE and "median_s" in r}
    out = []
    for r in result["rows"]:
        if "median_s" not in r:
            continue
        if r["kernel"] in dense_s:
            r["ratio"] = r["median_s"] / dense_s[r["kernel"]]
        limits = [("time over the stored product", r.get("ratio"), TIME_BARS.get(r["backend"]))]
        if r["backend"] != DENSE:
            limits.append(("relative error", r.get("error"), ERROR_BAR))
        if r["backend"] in TIME_BARS:
            limits.append(("workspace, bytes", r.get("workspace_bytes"), WORKSPACE_BAR))
        for claim, figure, limit in limits:
            if limit is not None and figure is not None:
                row = {"kernel": r["kernel"], "backend": r["backend"], "claim": claim, "figure": figure}
                out.append(row | {"limit": limit, "met": bool(figure <= limit)})
    return out


def markdown(result: dict) -> str:
    env, s = result["environment"], result["settings"]
    result["bars"] = bars(result)
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items() if v and k in ("ritz", "torch", "numpy"))
    lines = [
        "# Products with a kernel matrix",
        "",
        f"n = {s['n']}, d = {s['d']}, {s['columns']} right-hand sides, {env['dtype']}; {env['cpu']}, {env['threads']} "
        f"threads, {env['date']}; {versions}; load average {env['load_average'][0]:.1f} before, "
        f"{env['load_average_end'][0]:.1f} after.",
        "",
        "| kernel | back end | bar | figure | limit | met |",
        "|---|---|---|---|---|---|",
    ]
    for b in result["bars"]:
        met = "yes" if b["met"] else "**no**"
        lines.append(f"| {b['kernel']} | {b['backend']} | {b['claim']} | {b['figure']:.3g} | {b['limit']:g} | {met} |")
    lines += [
        "",
        "| kernel | back end | product ms | over dense | first product s | "
        f"pairing of {s['pair_columns']} columns, ms | workspace MB | growth of the process MB | relative error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(r: dict, key: str, form: str, scale: float = 1.0) -> str:
        return "—" if r.get(key) is None else format(r[key] * scale, form)

    for r in sorted(result["rows"], key=lambda r: (r["kernel"], BACKENDS.index(r["backend"]))):
        cells = [cell(r, "median_s", ".1f", 1e3), cell(r, "ratio", ".2f"), cell(r, "first_s", ".2f")]
        layout = f" ({r['layout']})" if r.get("layout") else ""
        cells += [cell(r, "pair_s", ".0f", 1e3), cell(r, "workspace_bytes", ".1f", 1e-6)]
        cells += [cell(r, "growth_bytes", ".1f", 1e-6), cell(r, "error", ".1e")]
        row = f"| {r['kernel']} | {r['backend']}{layout} | {' | '.join(cells)} | {r.get('failure', '')}"
        lines.append(row.rstrip("| ") + " |")
    return "\n".join(lines) + "\n"


def figure(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in result["rows"] if "median_s" in r]
    kernels = [k for k in KERNELS if any(r["kernel"] == k for r in timed)]
    backends = [b for b in BACKENDS if any(r["backend"] == b for r in timed)]
    if not timed:
        return
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    width = 0.8 / len(backends)
    for ax, key, title in ((axes[0], "median_s", "product"), (axes[1], "pair_s", "gradient contraction")):
        for i, backend in enumerate(backends):
            at = [(kernels.index(r["kernel"]) + (i - (len(backends) - 1) / 2) * width, 1e3 * r[key])
                  for r in timed if r["backend"] == backend and r.get(key)]  # fmt: skip
            if at:
                drawn = ax.bar(*zip(*at, strict=True), width, color=COLOURS[backend], label=backend)
                ax.bar_label(drawn, fmt="%.0f", fontsize=8, padding=2)
        ax.set_xticks(range(len(kernels)), kernels)
        ax.set(ylabel="ms", title=title, ylim=(0, 1.12 * ax.get_ylim()[1]))
        ax.grid(alpha=0.3, axis="y")
    axes[0].legend(fontsize=9)
    s = result["settings"]
    fig.suptitle(f"n = {s['n']}, d = {s['d']}, {s['columns']} vectors (contraction: {s['pair_columns']}), "
                 f"{result['environment']['dtype']}, {result['environment']['threads']} threads")  # fmt: skip
    fig.tight_layout()
    fig.savefig(path, dpi=140)
    plt.close(fig)


def main() -> int:
    options = arguments()
    if options.spec:
        spec = json.loads(options.spec.read_text())
        _common.pin_cores(spec["threads"])
        options.spec.with_suffix(".out.json").write_text(json.dumps(work(spec)))
        return 0
    if options.redraw:
        path, result = options.redraw, json.loads(options.redraw.read_text())
    else:
        path = options.output / f"{options.name or 'kernel-products-cpu-' + time.strftime('%Y-%m-%d')}.json"
        result = benchmark(options, path)
    text = markdown(result)
    _common.write_json(path, result)
    path.with_suffix(".md").write_text(text)
    figure(result, path.with_suffix(".png"))
    print("\n" + text)
    return 0 if any(r["samples"] for r in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
