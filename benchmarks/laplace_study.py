"""Benchmark: calibrated networks on six real sets, with the whole Gauss–Newton matrix against what others have.

    python benchmarks/laplace_study.py --data DIR                  # everything: about an hour and a half on two cores
    python benchmarks/laplace_study.py --data DIR --sets yacht cora --methods ritz MAP --seeds 1
    python benchmarks/laplace_study.py --data DIR --resume benchmarks/results/laplace-study-cpu-DATE.json
    python benchmarks/laplace_study.py --redraw benchmarks/results/laplace-study-cpu-DATE.json

A process for every run, `--jobs` at a time with one thread each. Every contestant gets the same network, the same
number of epochs a training, and the choices of `_laplace_methods.py`. See benchmarks/README.md for the bars.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import _common


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder that holds uci/, citation/, mnist10k/ (or set RITZ_DATA)")
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME", help="of the six, by name")
    parser.add_argument(
        "--methods", nargs="+", default=[], metavar="WORD", help="contestants whose name has one of these"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a smoke test: ten epochs")
    parser.add_argument("--output", type=Path, default=_common.HERE / "results")
    parser.add_argument("--name", help="stem of the result files (default laplace-study-cpu-DATE)")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="go on with a run that was cut off")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="only the table and the figure of a finished run")
    return parser.parse_args()


def start_file(folder: str, name: str, seed: int) -> Path:
    return Path(folder) / f"{name}-{seed}.pt"


def make_start(job: dict[str, Any]) -> dict[str, Any]:
    """Train the MAP network that others start from, into a file."""
    import torch
    from _laplace_methods import map_start
    from _laplace_sets import study

    torch.set_num_threads(1)
    began = time.perf_counter()
    found = map_start(study(job["set"], job["data"], job["seed"], job["quick"]), job["seed"])
    torch.save(vars(found), start_file(job["folder"], job["set"], job["seed"]))
    return job | {"seconds": time.perf_counter() - began}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One contestant on one set at one seed: fit, predict, scores."""
    import torch
    from _laplace_methods import METHODS, Start
    from _laplace_report import scores
    from _laplace_sets import study

    torch.set_num_threads(1)
    found = study(job["set"], job["data"], job["seed"], job["quick"])
    start = Start(**torch.load(start_file(job["folder"], job["set"], job["seed"]), weights_only=True))
    row = {k: job[k] for k in ("set", "method", "seed")}

    def work() -> None:
        began = time.perf_counter()
        fit = METHODS[job["method"]](found, job["seed"], start)
        row["fit_s"] = time.perf_counter() - began
        began = time.perf_counter()
        inside = fit.predict(found.test[0])
        row["predict_s"] = time.perf_counter() - began
        outside = None if found.strange is None else fit.predict(found.strange)
        row.update(scores(found, inside, outside), evidence=fit.evidence, about=fit.about)
        fits.append(fit)

    fits: list[Any] = []
    row["peak_bytes"] = _common.peak_memory(work)
    if fits[0].others is not None:
        row["links"] = {k: scores(found, p, None)["nll"] for k, p in fits[0].others(found.test[0]).items()}
    return row


def parallel(call: Any, todo: list[dict[str, Any]], jobs: int, done: Any) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        futures = {pool.submit(call, job): job for job in todo}
        for future in as_completed(futures):
            job, error = futures[future], future.exception()
            if error is None:
                done(future.result())
            else:
                row = {k: job.get(k) for k in ("set", "method", "seed")}
                done(row | {"error": f"{type(error).__name__}: {error}"[:300]})


def new_result(options: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    if options.resume:
        return options.resume, json.loads(options.resume.read_text())
    environment = _common.environment(1, "cpu") | {"dtype": "float32", "jobs": options.jobs}
    for name in ("laplace-torch", "ivon-opt", "curvlinops-for-pytorch", "backpack-for-pytorch"):
        environment["versions"][name] = _common.metadata.version(name)
    path = options.output / f"{options.name or 'laplace-study-cpu-' + environment['date']}.json"
    return path, {"environment": environment, "quick": options.quick, "starts": [], "rows": []}


def main() -> int:
    options = arguments()
    from _laplace_methods import METHODS
    from _laplace_report import figure, markdown
    from _laplace_sets import NAMES

    if options.redraw:
        path, result = options.redraw, json.loads(options.redraw.read_text())
    else:
        names = [n for n in NAMES if not options.sets or n in options.sets]
        methods = [m for m in METHODS if not options.methods or any(word in m for word in options.methods)]
        if not names or not methods:
            raise SystemExit(f"nothing to run; sets are {', '.join(NAMES)}, contestants {', '.join(METHODS)}")
        path, result = new_result(options)
        os.environ.update(_common.thread_variables(1))  # read by the workers when they start
        began = time.monotonic()

        def say(row: dict[str, Any]) -> None:
            what = f"{row['set']}, {row.get('method') or 'start'}, seed {row['seed']}"
            more = row.get("error") or (f"nll {row['nll']:.4f}" if "nll" in row else "")
            print(f"{time.monotonic() - began:6.0f} s  {what}: {more}", flush=True)

        def keep(row: dict[str, Any]) -> None:
            result["rows"].append(row)
            _common.write_json(path, result)
            say(row)

        def keep_start(row: dict[str, Any]) -> None:
            result["starts"].append({k: row[k] for k in ("set", "seed", "seconds")} if "error" not in row else row)
            say(row)

        result["rows"] = [r for r in result["rows"] if "error" not in r]
        done = {(r["set"], r["method"], r["seed"]) for r in result["rows"]}
        todo = [(n, m, s) for n in names for s in range(options.seeds) for m in methods if (n, m, s) not in done]
        with tempfile.TemporaryDirectory() as folder:
            common = {"data": options.data, "quick": options.quick, "folder": folder}
            starts = dict.fromkeys((n, s) for n, _, s in todo)
            result["starts"] = [r for r in result["starts"] if (r["set"], r["seed"]) not in starts]
            parallel(make_start, [common | {"set": n, "seed": s} for n, s in starts], options.jobs, keep_start)
            jobs = [common | {"set": n, "method": m, "seed": s} for n, m, s in todo]
            parallel(run, jobs, options.jobs, keep)
        result["seconds"] = result.get("seconds", 0.0) + time.monotonic() - began
        _common.write_json(path, result)
    table = markdown(result)
    path.with_suffix(".md").write_text(table)
    figure(result, path.with_suffix(".png"))
    print("\n" + table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
