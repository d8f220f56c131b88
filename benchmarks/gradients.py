"""Benchmark: value and gradient of vᵀ f(A) v — ritz, a plain PyTorch loop, matfree — in one run.

    python benchmarks/gradients.py [--quick] [--problem NAME ...] [--ks 10,20,50,100] [--rounds 3] [--output DIR]

Every contestant runs in processes of its own (torch and jax fight for threads); see benchmarks/README.md for what is
claimed, how products are counted and how errors are defined.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import _common
from _common import PROBLEMS, ROOT

LOOPS = ("loop forward", "loop autograd")
PEERS = ("matfree forward", "matfree adjoint")
RITZ = ("ritz forward", "ritz Frechet", "ritz Frechet, COO", "ritz Adjoint")
CONTESTANTS = (*LOOPS, *PEERS, *RITZ)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small problems, k = 10 and 20, one round, no memory runs")
    parser.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--contestant", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--ks", type=lambda text: [int(k) for k in text.split(",")], help="depths, e.g. 10,20,50,100")
    parser.add_argument(
        "--rounds", type=int, help="how often all contestants take turns; samples are pooled (default 3)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="no more samples of one configuration after that")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: torch contestants only")
    parser.add_argument("--data", help="folder that holds bloweybq.mtx.gz (or set RITZ_DATA)")
    parser.add_argument("--no-memory", action="store_true", help="skip the peak-memory runs (one fresh process each)")
    parser.add_argument("--memory-ks", type=lambda text: [int(k) for k in text.split(",")], help="depths of these runs")
    parser.add_argument(
        "--output", type=Path, default=_common.HERE / "results", help="folder for JSON, table and figure"
    )
    parser.add_argument("--cache", type=Path, default=_common.HERE / ".cache", help="folder for the exact gradients")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing: table and figure of a saved run")
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.ks = options.ks or ([10, 20] if options.quick else [10, 20, 50, 100])
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def worker(spec_path: Path) -> None:
    spec = json.loads(spec_path.read_text())
    _common.pin_cores(spec["threads"])
    if spec["worker"] in PEERS:
        from _gradients_jax import make_cases
    else:
        from _gradients_torch import make_cases
    records = _common.run_worker(make_cases, spec)
    spec_path.with_suffix(".out.json").write_text(json.dumps(records))


def launch(spec: dict, timeout: float = 3600.0) -> list[dict]:
    """Run one worker process and return its records; a failure is printed and yields none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        env = os.environ | _common.thread_variables(spec["threads"])
        if importlib.util.find_spec("ritz") is None:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), env.get("PYTHONPATH")]))
        command = [sys.executable, __file__, "--worker", spec["worker"], "--spec", str(path)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
            if done.returncode == 0:
                return json.loads(path.with_suffix(".out.json").read_text())
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"no answer within {timeout:.0f} s"
    print(f"  failed: {spec['worker']} on {spec['problem']} ({spec['task']}, k = {spec['ks']}): {reason}", flush=True)
    return []


def make_references(options: argparse.Namespace) -> tuple[dict, dict]:
    """Exact gradients (files) and a description of each problem that can run here."""
    import _reference

    files, about = {}, {}
    for name in options.problem:
        try:
            problem = _common.make_problem(name, quick=options.quick, data=options.data)
        except FileNotFoundError as error:
            print(f"  skipped: {name}: {error}")
            continue
        print(f"  exact gradient: {problem.title}", flush=True)
        path, how = _reference.reference(problem, options.cache)
        files[name] = str(path)
        if problem.values is not None:
            parameters = f"n = {problem.n}, gradient with respect to {len(problem.values)} stored entries"
        elif problem.dense is not None:
            parameters = f"n = {problem.n}, gradient with respect to all {problem.n**2} entries"
        else:
            parameters = f"gradient with respect to all {problem.n} parameters of the network"
        about[name] = {"title": problem.title, "parameters": parameters, "reference": how}
    return files, about


def contestants_for(problem: str, options: argparse.Namespace, *, turn: int = 0) -> list[str]:
    names = list(options.contestant)
    if options.device != "cpu" or problem == "network":
        names = [c for c in names if c not in PEERS]
    if problem in ("kernel", "network"):
        names = [c for c in names if c != "ritz Frechet, COO"]
    if problem == "network" and options.contestant == list(CONTESTANTS):
        names = [c for c in names if c != "loop autograd"]  # half a minute a gradient; ask for it by --contestant
    # slow, and no bar depends on it: one round will do
    return [c for c in names if turn == 0 or c != "loop autograd"]


def benchmark(options: argparse.Namespace, path: Path, environment: dict) -> dict:
    """All runs; the JSON at `path` is rewritten after every round, so that an interrupted run leaves what it has."""
    import _report

    files, about = make_references(options)
    measure = {"min_runs": 3, "min_time": 0.1, "max_time": 5.0} if options.quick else {"max_time": options.seconds}
    records: list[dict] = []
    chosen: dict[tuple[str, str], str | None] = {}
    result = {"environment": environment, "quick": options.quick, "rounds": options.rounds, "problems": about}

    def run(name: str, problem: str, task: str, ks: list[int], check: bool) -> None:
        print(f"  {task}: {problem}, {name}, k = {', '.join(map(str, ks))}", flush=True)
        spec = {"worker": name, "problem": problem, "task": task, "ks": ks, "check": check, "measure": measure}
        spec |= {"quick": options.quick, "data": options.data, "threads": options.threads, "device": options.device}
        spec |= {"reference": files[problem], "product": chosen.get((name, problem))}
        found = launch(spec)
        records.extend(found)
        if found:
            chosen.setdefault((name, problem), found[0].get("product"))

    def save() -> None:
        result["records"] = _report.merge(records)
        result["bars"] = _report.bars(result["records"])
        environment["load_average_end"] = os.getloadavg()
        _common.write_json(path, result)

    for turn in range(options.rounds):
        for problem in about:
            for name in contestants_for(problem, options, turn=turn):
                run(name, problem, "time", options.ks, turn == 0)
        result["rounds_done"] = turn + 1
        save()
    if not (options.no_memory or options.quick):
        for problem in about:
            for name in contestants_for(problem, options):
                for k in options.memory_ks or options.ks:
                    run(name, problem, "memory", [k], False)
            save()
    return result


def main() -> int:
    options = arguments()
    if options.worker:
        worker(options.spec)
        return 0
    import _report

    if options.redraw:
        path, result = options.redraw, json.loads(options.redraw.read_text())
        result["bars"] = _report.bars(result["records"])
    else:
        environment = _common.environment(options.threads, options.device)
        if environment["load_average"][0] > 0.5:
            print(f"  others are using this machine (load {environment['load_average'][0]:.1f}): times will be noisy")
        stem = f"gradients-{options.device}-{environment['date']}" + ("-quick" if options.quick else "")
        path = options.output / f"{stem}.json"
        result = benchmark(options, path, environment)
    table = _report.markdown(result)
    path.with_suffix(".md").write_text(table)
    _report.figure(result, path.with_suffix(".png"))
    print("\n" + table)
    return 0 if result["records"] else 1


if __name__ == "__main__":
    sys.exit(main())
