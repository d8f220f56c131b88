"""Benchmark: value and gradient through linear PDEs, Krylov spaces against ODE solvers.

    python benchmarks/pde.py                                       # all problems, 128 × 128, one thread
    python benchmarks/pde.py --problem wave --scale 11 --dtype float32 --only ritz torchdiffeq
    python benchmarks/pde.py --quick                               # 16 × 16: a smoke test
    python benchmarks/pde.py --redraw benchmarks/results/pde-cpu-DATE.json
    python benchmarks/pde.py --retime benchmarks/results/pde-cpu-DATE.json   # without the search

Every contestant is tuned to the cheapest setting whose u(t) and gradient are both within 1e-4 of an independent
reference (`_pde_reference.py`), in a process of its own; then that setting is timed. Work–precision curves are the same
search at other targets. Settings that an earlier run found (`--retime`) are checked against the reference again and
timed in one run; a setting whose errors are no longer within the target is told. Products: columns that go through A or
Aᵀ, those of the gradient included (a vector–Jacobian product of A is one); the pairing that ends ritz's backward pass
is one narrow block and not counted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _common
import numpy as np

CONTESTANTS = ("ritz", "torchdiffeq", "diffrax", "direct")
MODULES = {
    "ritz": "_pde_ritz",
    "torchdiffeq": "_pde_torchdiffeq",
    "diffrax": "_pde_diffrax",
    "direct": "_pde_reference",
}
TARGET, CURVE = 1e-4, (1e-2, 1e-6, 1e-8)
DEFAULT = ("wave", "wave-sharp", "heat", "schrodinger")
# glibc would hand the memory of every call back to the system and fault it in again at the next, which costs whoever
# keeps more than 30 MB of states or vectors. For all contestants; other systems ignore it.
KEEP_FREED = {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", nargs="+", default=list(DEFAULT))
    parser.add_argument("--scale", type=float, nargs="+", help="t·ρ or ‖tA‖; default: those of the problem")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "float64"), default=["float64"])
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--curve", nargs="*", default=["wave"], help="problems with work–precision curves")
    parser.add_argument("--quick", action="store_true", help="16 × 16 points")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for one contestant on one problem")
    parser.add_argument("--cache", type=Path, help="folder that keeps the references")
    parser.add_argument("--output", type=Path, default=_common.HERE / "results")
    parser.add_argument("--name", help="stem of the result files (default pde-cpu-DATE)")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="go on with a run that was cut off")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="only the table and the figures of a finished run")
    parser.add_argument("--retime", type=Path, metavar="JSON", help="time the settings of an earlier run, in one run")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def worker(task: dict[str, Any]) -> None:
    """Tune and time one contestant on one problem; prints JSON."""
    warnings.simplefilter("ignore")
    if task["contestant"] != "diffrax":
        import torch

        torch.set_num_threads(1)
    else:
        _common.pin_cores(1)
    import _pde_problems as pde
    import _pde_reference

    module = importlib.import_module(MODULES[task["contestant"]])
    name, N, scale, dtype = task["problem"], task["N"], task["scale"], task["dtype"]
    library = "torch" if task["contestant"] in ("ritz", "torchdiffeq") else "numpy"
    problem = pde.make_problem(name, N, scale, dtype, library)
    if "memory" in task:
        setting = pde.Setting(**task["memory"])
        small = pde.make_problem(name, 8, 1.0, dtype, library)
        module.make(small, setting)[0]()  # code and pools are not the method's
        getattr(module, "load", lambda: None)()
        call, _ = module.make(problem, setting)
        print(json.dumps({"peak_bytes": _common.peak_memory(call)}))
        return
    reference = _pde_reference.reference(name, N, scale, task["cache"])
    if "known" in task:
        again = [retime(module, problem, reference, task["target"], row) for row in task["known"]]
        again.sort(key=lambda row: row.get("ms", float("inf")))
        print(json.dumps({"rows": again, "reference": reference.how}))
        return
    rows: list[dict[str, Any]] = []
    # One after the other where there are many, and what is found is printed at once: a time limit loses the rest only.
    starts = module.settings(problem) if task["contestant"] in ("torchdiffeq", "diffrax") else [None]
    for start in starts:
        some = {} if start is None else {"choices": [start]}
        for row in module.tune(problem, reference, task["target"], **some):
            if "ms" in row:
                samples = _common.measure(module.make(problem, row["setting"], **uncounted(module))[0], max_time=8.0)
                row["ms"], row["runs"] = 1e3 * statistics.median(samples), len(samples)
            row["label"], row["setting"] = row["setting"].label, asdict(row["setting"])
            rows.append(row)
        rows.sort(key=lambda row: row.get("ms", float("inf")))
        print(
            json.dumps({"rows": rows, "reference": reference.how, "tried": f"{len(rows)} of {len(starts)}"}), flush=True
        )


def uncounted(module: Any) -> dict[str, bool]:
    """Keyword arguments of a module's `make` that leave out the count of products (for diffrax two compilations)."""
    return {} if module.CONTESTANT == "direct" else {"count": False}


def retime(module: Any, problem: Any, reference: Any, target: float, row: dict[str, Any]) -> dict[str, Any]:
    """A row of an earlier run with its errors and its time measured anew."""
    import _pde_problems as pde

    if "ms" not in row:
        return row
    setting = pde.Setting(**row["setting"])
    # Adaptive depths are those of today's code, which the products of solvers with given steps do not depend on.
    fresh = module.CONTESTANT == "ritz"
    call, info = module.make(problem, setting, **({} if fresh else uncounted(module)))
    _, u, grad = call()
    found = pde.errors(*(np.asarray(a) for a in (u, grad)), reference)
    if max(found) > target:
        told = f"errors {found[0]:.1e} (u), {found[1]:.1e} (gradient) at the setting that an earlier run found"
        return {"label": row["label"], "setting": row["setting"], "failed": told}
    samples = _common.measure(call, max_time=8.0)
    return (
        row | (info if fresh else {}) | {"errors": found, "ms": 1e3 * statistics.median(samples), "runs": len(samples)}
    )


def call_worker(task: dict[str, Any], limit: float) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve()), "--worker", json.dumps(task)]
    environment = os.environ | _common.thread_variables(1) | KEEP_FREED
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as late:
        rest = {"label": f"{task['contestant']}, the other settings", "failed": f"not tuned within {limit:g} s"}
        lines = (late.stdout or b"").decode().split("\n")[:-1]
        found = json.loads(lines[-1]) if lines else {"rows": []}
        return found | {"rows": [*found["rows"], rest]}
    if done.returncode:
        return {"rows": [{"label": task["contestant"], "failed": done.stderr.strip().splitlines()[-1][:300]}]}
    return json.loads(done.stdout.splitlines()[-1])


def tasks(options: argparse.Namespace) -> list[dict[str, Any]]:
    import _pde_problems as pde

    N, found = 16 if options.quick else 128, []
    for name in options.problem:
        scales = options.scale or pde.scales(name, N)
        for scale in scales:
            for dtype in options.dtype:
                targets = [TARGET]
                if name in options.curve and scale == scales[len(scales) // 2] and dtype == "float64":
                    targets += CURVE
                for target in targets:
                    for contestant in options.only:
                        if contestant == "direct" and not name.startswith("heat"):
                            continue
                        cache = str(options.cache) if options.cache else None
                        found.append(
                            {"problem": name, "N": N, "scale": scale, "dtype": dtype, "target": target}
                            | {"contestant": contestant, "cache": cache}
                        )
    return found


KEY = ("problem", "N", "scale", "dtype", "target", "contestant")
Record = dict[str, Any]


def key(record: Record) -> tuple:
    return tuple(record[k] for k in KEY)


def perform(task: Record, limit: float) -> Record:
    """The record of a task: the rows of its contestant, with peak memory for ritz and for torchdiffeq by backprop."""
    record = {k: task[k] for k in KEY} | call_worker(task, limit)
    good = [row for row in record["rows"] if "ms" in row]
    if task["target"] == TARGET and task["contestant"] in ("ritz", "torchdiffeq"):
        plain = [row for row in good if row["setting"]["gradient"] == "backprop"]
        for row in good if task["contestant"] == "ritz" else (plain or good)[:1]:
            row |= call_worker({k: v for k, v in task.items() if k != "known"} | {"memory": row["setting"]}, limit)
    return record


def told(task: Record, record: Record) -> str:
    good = [row for row in record["rows"] if "ms" in row]
    best = f"{good[0]['label']}: {good[0]['ms']:.2f} ms" if good else record["rows"][0].get("failed", "nothing")
    return f"{task['problem']} {task['scale']:g} {task['dtype']} {task['target']:g}, {task['contestant']}: {best}"


def begin(options: argparse.Namespace) -> tuple[Path, dict[str, Any], list[Record]]:
    """Where results go, what is there already, and what is to be done."""
    wanted = tasks(options)
    if options.resume:  # what failed is repeated
        result = json.loads(options.resume.read_text())
        again = {key(task) for task in wanted}
        kept = [r for r in result["records"] if key(r) not in again or any("ms" in row for row in r["rows"])]
        done = {key(r) for r in kept}
        return options.resume, result | {"records": kept}, [task for task in wanted if key(task) not in done]
    environment = _common.environment(1, "cpu")
    for name in ("torchdiffeq", "diffrax"):
        environment["versions"][name] = _common.metadata.version(name)
    path = options.output / f"{options.name or 'pde-cpu-' + environment['date']}.json"
    if options.retime:
        known = json.loads(options.retime.read_text())["records"]
        cache = str(options.cache) if options.cache else None
        wanted = [{k: r[k] for k in KEY} | {"cache": cache, "known": r["rows"]} for r in known]
    return path, {"environment": environment, "records": []}, wanted


def main() -> int:
    options = arguments()
    if options.worker:
        worker(json.loads(options.worker))
        return 0
    from _pde_report import figures, markdown

    if options.redraw:
        path, result = options.redraw, json.loads(options.redraw.read_text())
    else:
        import tempfile

        options.cache = options.cache or Path(tempfile.mkdtemp())
        path, result, wanted = begin(options)
        began = time.monotonic()
        for task in wanted:
            record = perform(task, options.limit)
            result["records"].append(record)
            _common.write_json(path, result)
            print(f"{time.monotonic() - began:6.0f} s  {told(task, record)}", flush=True)
    table = markdown(result)
    path.with_suffix(".md").write_text(table)
    figures(result, path)
    print("\n" + table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
