"""Benchmark: exact Gaussian processes on equal terms — ritz, GPyTorch (dense, KeOps), scikit-learn — in one run.

    python benchmarks/gp.py [--only WORD ...] [--steps 75] [--rounds 1] [--sizes 1000,2000,...] [--data DIR]

Every contestant runs in a process of its own, on the same rows, from the same start, with the same optimiser and the
same stopping tolerance; see benchmarks/README.md for what is claimed and how it is measured.
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
from importlib import metadata
from pathlib import Path
from typing import Any

import _common
from _common import ROOT
from _gp_data import SETS, DataMissing, find
from _gp_worker import CONTESTANTS, TASKS

SECTIONS = ("agreement", "gradients", "race", "scaling")
MAIN = "elevators"
# Who takes part on a large set, on a small one, and who is trained and not only timed.
LARGE = [
    "ritz", "ritz Stored", "ritz NumbaTiles", "ritz Tiles", "ritz, no P", "ritz, P100", "ritz Adjoint, no P",
    "gpytorch, rank 100", "gpytorch, rank 15", "gpytorch, tolerance 1", "gpytorch KeOps", "gpytorch KeOps, rank 15",
]  # fmt: skip
SUBSET = ["ritz", "ritz, no P", "ritz Adjoint, no P", "gpytorch, rank 100", "gpytorch, tolerance 1", "gpytorch KeOps"]
SMALL = [
    "ritz", "ritz, no P", "ritz Adjoint, no P", "ritz Cholesky", "gpytorch, rank 100", "gpytorch, tolerance 1",
    "gpytorch Cholesky", "gpytorch KeOps", "sklearn", "sklearn, own L-BFGS",
]  # fmt: skip
TRAINED = {
    MAIN: ["ritz", "gpytorch, rank 100", "gpytorch, tolerance 1"],
    "large": ["ritz", "gpytorch, rank 100", "gpytorch, tolerance 1"],
    "small": ["ritz", "ritz Cholesky", "gpytorch, rank 100", "gpytorch, tolerance 1", "gpytorch Cholesky",
              "gpytorch KeOps", "sklearn", "sklearn, own L-BFGS"],
}  # fmt: skip
SCALING = {"ritz NumbaTiles, no P": None, "gpytorch, rank 15": 10_000}  # and up to which n


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    whole = lambda text: [int(k) for k in text.split(",")]  # noqa: E731
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help=f"sections ({', '.join(SECTIONS)}), sets and contestants to run; words of different kinds narrow down",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: few rows, few steps, in a few minutes")
    parser.add_argument("--steps", type=int, default=75, help=f"training steps on {MAIN}")
    parser.add_argument("--subset-steps", type=int, default=40, help="training steps on the other sets")
    parser.add_argument("--timed", type=int, default=5, help="measured steps per process, after one to warm up")
    parser.add_argument("--timed-seconds", type=float, default=20.0, help="no further measured step after that")
    parser.add_argument("--rounds", type=int, default=1, help="how often all contestants take turns at measured steps")
    parser.add_argument("--rows", type=int, help="training rows of the large sets (0: all; default 4000)")
    parser.add_argument("--main-rows", type=int, help=f"training rows of {MAIN} (default: all 13 279)")
    parser.add_argument("--check-rows", type=int, default=1500, help="rows of the gradient checks")
    parser.add_argument("--sizes", type=whole, help="n of the scaling runs (default 1000 … 50 000)")
    parser.add_argument("--long", action="store_true", help="scaling to n = 100 000")
    parser.add_argument("--depth", type=int, default=20, help="products per vector in the scaling runs")
    parser.add_argument("--rtol", type=float, default=1e-3, help="stopping tolerance of everybody's solves")
    parser.add_argument("--check-rtol", type=float, default=1e-4, help="the same in the gradient checks")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--limit", type=float, default=300.0, help=f"seconds of training per row on {MAIN} (0: none)")
    parser.add_argument("--peer-limit", type=float, help="the same for the peers' rows (default: --limit)")
    parser.add_argument("--subset-limit", type=float, default=45.0, help="the same on the other sets")
    parser.add_argument("--budget", type=float, default=100.0, help=f"wall-clock budget compared on {MAIN}, seconds")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds a process may take")
    parser.add_argument("--keops-timeout", type=float, default=300.0, help="the same for the KeOps rows")
    parser.add_argument("--data", help="folder that holds uci/NAME/data.csv.gz (or set RITZ_DATA)")
    parser.add_argument("--output", type=Path, default=_common.HERE / "results")
    parser.add_argument("--name", help="stem of the result files (default gp-cpu-DATE)")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing: table and figures of a saved run")
    parser.add_argument("--worker", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = {*SECTIONS, *SETS, *CONTESTANTS}
    for word in options.only:
        if word not in known:
            parser.error(f"--only {word!r} is no section, set or contestant; known: {', '.join(sorted(known))}")
    if options.quick:
        options.rows = options.main_rows = options.check_rows = 400
        options.steps = options.subset_steps = 6
        options.timed, options.limit, options.subset_limit, options.budget = 2, 10.0, 10.0, 2.0
        options.sizes = options.sizes or [500, 1000, 2000]
        options.name = options.name or "gp-cpu-quick"
    options.sizes = options.sizes or [1000, 2000, 5000, 10_000, 20_000, 50_000] + [100_000] * options.long
    return options


def worker(task: str, spec_path: Path) -> None:
    spec, out = json.loads(spec_path.read_text()), spec_path.with_suffix(".out.json")
    _common.pin_cores(spec["threads"])
    import torch

    torch.set_num_threads(spec["threads"])
    record = TASKS[task](spec, lambda partial: _common.write_json(out, partial | {"unfinished": True}))
    _common.write_json(out, record)


def launch(task: str, spec: dict, timeout: float) -> dict:
    """One worker process; its record, or what it had saved with the reason of its failure under `error`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        out = path.with_suffix(".out.json")
        env = os.environ | _common.thread_variables(spec["threads"])
        if importlib.util.find_spec("ritz") is None:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), env.get("PYTHONPATH")]))
        command = [sys.executable, __file__, "--worker", task, "--spec", str(path)]
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
            reason = None
            if done.returncode != 0:
                said = [line for line in done.stderr.splitlines() if line and not line[0].isspace()]
                reason = said[-1] if said else f"exit status {done.returncode} without a message"
        except subprocess.TimeoutExpired:
            reason = f"no answer within {timeout:.0f} s"
        record: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    record.pop("unfinished", None)
    if reason is not None:
        record["error"] = reason[:600]
    return record


class Run:
    """A run in progress: what it has goes to the JSON after every row."""

    def __init__(self, options: argparse.Namespace, path: Path, environment: dict) -> None:
        self.options, self.path = options, path
        settings = {k: v for k, v in vars(options).items() if isinstance(v, (int, float, str, list)) and k != "data"}
        self.result: dict[str, Any] = {"environment": environment, "settings": settings, "sets": {}, "rows": []}
        self.began = time.monotonic()
        self.common = {k: getattr(options, k) for k in ("data", "threads", "rtol", "lr", "dtype")}

    def wanted(self, section: str, name: str | None = None, contestant: str | None = None) -> bool:
        for kind, value in ((SECTIONS, section), (SETS, name), (CONTESTANTS, contestant)):
            asked = [word for word in self.options.only if word in kind]
            if asked and value is not None and value not in asked:
                return False
        # a set or contestant asked for says nothing about scaling
        return section != "scaling" or not self.options.only or "scaling" in self.options.only

    def row(self, task: str, section: str, spec: dict, **tags: Any) -> dict:
        began = time.monotonic()
        slow = "KeOps" in spec.get("contestant", "")
        timeout = min(self.options.timeout, self.options.keops_timeout) if slow else self.options.timeout
        record = launch(task, self.common | spec, timeout)
        record = {"section": section, **tags, **record, "process_s": time.monotonic() - began}
        self.result["rows"].append(record)
        self.save()
        self.say(section, tags, record)
        return record

    def say(self, section: str, tags: dict, record: dict) -> None:
        what = ", ".join(f"{v:.0f} s" if isinstance(v, float) else str(v) for v in tags.values())
        parts = []
        if record.get("samples"):
            parts.append(f"{sorted(record['samples'])[len(record['samples']) // 2]:.3f} s a step")
        if record.get("peak_bytes"):
            parts.append(f"{record['peak_bytes'] / 2**20:.0f} MiB")
        if record.get("residual") is not None:
            parts.append(f"residual {record['residual']:.1e}")
        if "training" in record and "steps" in record["training"]:
            training = record["training"]
            parts.append(f"{training['steps']} steps in {training['seconds'][-1]:.0f} s")
        for key in ("rmse", "nll", "worst", "own", "cholesky"):
            if isinstance(record.get(key), float):
                parts.append(f"{key} {record[key]:.3g}")
        if "error" in record:
            parts.append(f"FAILED: {record['error'][:140]}")
        print(f"{time.monotonic() - self.began:6.0f} s  {section}: {what}: {', '.join(parts) or 'done'}", flush=True)

    def save(self) -> None:
        self.result["environment"]["load_average_end"] = os.getloadavg()
        self.result["seconds"] = time.monotonic() - self.began
        _common.write_json(self.path, self.result)

    # -- sections ---------------------------------------------------------------------------------
    def rows_of(self, name: str) -> int | None:
        if name == MAIN:
            return self.options.main_rows
        if SETS[name] is None:
            return None
        return SETS[name] if self.options.rows is None else (self.options.rows or None)

    def prepare(self) -> None:
        """The rows and the timing hyper-parameters of every set that is there."""
        for name in SETS:
            asked = any(self.wanted(section, name) for section in SECTIONS[:3])
            if not asked and not (name == "kin40k" and self.wanted("scaling")):
                continue
            try:
                find(name, self.options.data)
            except DataMissing as error:
                print(f"  skipped: {error}", flush=True)
                self.result["sets"][name] = {"error": str(error)}
                continue
            spec = {"set": name, "rows": self.rows_of(name), "state_rows": 1000, "state_steps": self.options.steps}
            record = launch("state", self.common | spec, self.options.timeout)
            self.result["sets"][name] = record
            self.save()
            done = record.get("error") or f"{record['about']['train']} rows, noise {record['about']['noise']:.2g}"
            print(f"{time.monotonic() - self.began:6.0f} s  {name}: {done}", flush=True)

    def available(self, section: str) -> list[str]:
        """The sets of this section, the main one first."""
        found = [n for n, s in self.result["sets"].items() if "state" in s and self.wanted(section, n)]
        return sorted(found, key=lambda name: name != MAIN)

    def check(self) -> None:
        for section in ("agreement", "gradients"):
            for name in self.available(section):
                if self.wanted(section):
                    spec = {"set": name, "check_rows": self.options.check_rows, "check": section}
                    spec |= {"state": self.result["sets"][name]["state"], "rtol": self.options.check_rtol}
                    self.row("checks", section, spec, set=name)

    def race(self) -> None:
        if not self.wanted("race"):
            return
        for turn in range(self.options.rounds):
            for name in self.available("race"):
                small = SETS[name] is None and name != MAIN
                entrants = LARGE if name == MAIN else SMALL if small else SUBSET
                trained = TRAINED[name if name == MAIN else "small" if small else "large"]
                asked = [word for word in self.options.only if word in CONTESTANTS]
                for contestant in asked or entrants:
                    self.enter(name, contestant, turn, not asked and contestant not in trained)
                if turn == 0:
                    self.score(name)

    def enter(self, name: str, contestant: str, turn: int, timed_only: bool) -> None:
        options = self.options
        if turn > 0 and contestant == "sklearn, own L-BFGS":
            return
        spec = {"set": name, "rows": self.rows_of(name), "contestant": contestant}
        spec |= {"state": self.result["sets"][name]["state"], "first_round": turn == 0}
        spec |= {"timed": options.timed, "timed_seconds": options.timed_seconds}
        spec |= {"train": turn == 0 and not timed_only}
        spec |= {"steps": options.steps if name == MAIN else options.subset_steps}
        ours_or_all = contestant.startswith("ritz") or options.peer_limit is None
        main_limit = options.limit if ours_or_all else options.peer_limit
        spec |= {"limit": main_limit if name == MAIN else options.subset_limit}
        spec |= {"budget": options.budget if name == MAIN else None}
        self.row("race", "race", spec, set=name, contestant=contestant, turn=turn)

    def score(self, name: str) -> None:
        """Exact scores of everybody after equal steps, and on the main set also after equal seconds."""
        rows = [r for r in self.result["rows"] if r["section"] == "race" and r["set"] == name]
        trained = [r for r in rows if r.get("training", {}).get("steps")]
        if not trained:
            return
        asked = self.options.steps if name == MAIN else self.options.subset_steps
        together = [r["training"]["steps"] for r in trained if r["training"]["asked"] > 1]
        equal = min([asked, *together])
        entries, thetas = [], []
        for r in trained:
            training = r["training"]
            chosen = {"equal steps": min(equal, training["steps"]), "all steps": min(asked, training["steps"])}
            if name == MAIN and self.options.budget:
                chosen["equal seconds"] = sum(s <= self.options.budget for s in training["seconds"]) - 1
            for label, step in chosen.items():
                theta = training["states"][step]
                if theta not in thetas:
                    thetas.append(theta)
                tags = {"set": name, "contestant": r["contestant"], "at": label, "step": step}
                entries.append((tags | {"train_s": training["seconds"][step]}, thetas.index(theta)))
        spec = {"set": name, "rows": self.rows_of(name), "thetas": thetas}
        found = launch("score", self.common | spec, self.options.timeout)
        scored = found.get("scores", [])
        for tags, i in entries:
            record = scored[i] if i < len(scored) else {"error": found.get("error", "not scored")}
            self.result["rows"].append({"section": "score", **tags, **record})
            self.say("score", tags, record)
        self.save()

    def scale(self) -> None:
        state = self.result["sets"].get("kin40k", {}).get("state")
        if not self.wanted("scaling") or state is None:
            return
        for contestant, largest in SCALING.items():
            for n in self.options.sizes:
                if largest is None or n <= largest:
                    spec = {"n": n, "contestant": contestant, "state": state, "depth": self.options.depth}
                    self.row("scaling", "scaling", spec, contestant=contestant, size=n)


def about_here(options: argparse.Namespace) -> dict:
    environment = _common.environment(options.threads, "cpu")
    environment["dtype"] = options.dtype
    for name in ("jax", "jaxlib", "matfree"):
        environment["versions"].pop(name)
    for name in ("gpytorch", "linear_operator", "pykeops", "scikit-learn", "numba"):
        try:
            environment["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            environment["versions"][name] = None
    return environment


def main() -> int:
    options = arguments()
    if options.worker:
        worker(options.worker, options.spec)
        return 0
    import _gp_report

    if options.redraw:
        path, result = options.redraw, json.loads(options.redraw.read_text())
    else:
        environment = about_here(options)
        if environment["load_average"][0] > 0.5:
            print(f"  others are using this machine (load {environment['load_average'][0]:.1f}): times will be noisy")
        path = options.output / f"{options.name or 'gp-cpu-' + environment['date']}.json"
        run = Run(options, path, environment)
        for part in (run.prepare, run.check, run.race, run.scale):
            part()
        run.save()
        result = run.result
    table = _gp_report.markdown(result)
    path.with_suffix(".md").write_text(table)
    _gp_report.figures(result, path)
    print("\n" + table)
    return 0 if result["rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
