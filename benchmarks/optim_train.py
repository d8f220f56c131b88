"""Benchmark: training to a target with AdamW, SGD, Muon, KFAC and SINGD, everybody tuned by the same search.

    python benchmarks/optim_train.py --data DIR                       # the race, and runs of 60 % of its steps
    python benchmarks/optim_train.py --data DIR --resume JSON --only bf16 ablation     # more, at the settings found
    python benchmarks/optim_train.py --data DIR --quick

`--jobs` runs go on at a time, one thread each. Finished runs are saved at once; `--resume` also goes on with a run
that was cut off. See benchmarks/README.md for what is claimed and how it is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import _common
from _common import ROOT
from _optim_search import BASE, CONTESTANTS, RANGES, VARIANTS, draws, settings, train, tuned

SECTIONS = ("race", "short", "bf16", "ablation")
DEFAULT = ("race", "short")  # the others by --only
SHORT = 0.6  # of the steps, under a schedule that ends there
BF16 = ("SINGD dense", "SINGD hierarchical", "KFAC")
ABLATED = ("mlp", "char")
QUICK_STEPS = 5
SEARCH_SEED = 1000  # of the model and the batches of every trial; the final runs have seeds 0, 1, 2
RECORDED = ("trials", "seeds", "scale", "bf16_steps", "search_seed", "quick")  # a resumed run must have the same


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help=f"sections ({', '.join(SECTIONS)}; without one: {', '.join(DEFAULT)}), tasks and contestants; words of "
        "different kinds narrow down. 'SINGD Toeplitz' and 'IKFAC' run only when they are named",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: a few steps a run")
    parser.add_argument("--trials", type=int, default=6, help="settings tried per optimizer and task")
    parser.add_argument("--seeds", type=int, default=3, help="final runs of the best settings")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of steps of every task")
    parser.add_argument("--bf16-steps", type=int, default=2000)
    parser.add_argument("--search-seed", type=int, default=0, help="of the random settings")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds of training after which a run is cut")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--data", help="folder that holds mnist10k/, text/ and citation/ (or set RITZ_DATA)")
    parser.add_argument("--output", type=Path, default=_common.HERE / "results")
    parser.add_argument("--name", help="stem of the result files (default optim-train-cpu-DATE)")
    parser.add_argument("--resume", type=Path, metavar="JSON", help="go on with this file; failed runs are repeated")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="train nothing: table and figures of a saved run")
    options = parser.parse_args()
    from _optim_tasks import ABOUT

    known = {*SECTIONS, *ABOUT, *CONTESTANTS}
    for word in options.only:
        if word not in known:
            parser.error(f"--only {word!r} is no section, task or contestant; known: {', '.join(sorted(known))}")
    for name in ("trials", "seeds", "jobs", "bf16_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(options, name)}; expected at least 1")
    if options.quick:
        options.trials, options.seeds, options.bf16_steps = 2, 1, QUICK_STEPS
        options.name = options.name or "optim-train-cpu-quick"
    return options


class Store:
    """The result and its file: a line a run, so that saving stays cheap while others are being timed."""

    def __init__(self, path: Path, result: dict[str, Any]) -> None:
        self.path, self.result = path, result
        self.lines = [json.dumps(row) for row in result["rows"]]

    def add(self, row: dict) -> None:
        self.result["rows"].append(row)
        self.lines.append(json.dumps(row))
        self.save()

    def save(self) -> None:
        head = {k: v for k, v in self.result.items() if k != "rows"}
        text = json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(self.lines) + "\n]}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(text)  # never half a file where a whole one was
        part.replace(self.path)


class Plan:
    """Which runs are wanted, in order; a run whose settings are still being searched comes up once they are known."""

    def __init__(self, options: argparse.Namespace, tasks: dict[str, dict[str, Any]], rows: list[dict]) -> None:
        self.options, self.tasks, self.rows = options, tasks, rows
        chosen = [word for word in options.only if word in CONTESTANTS]
        self.contestants = chosen or [name for name, c in CONTESTANTS.items() if c.default]
        asked = [word for word in options.only if word in SECTIONS]
        self.sections = asked or list(SECTIONS if options.quick else DEFAULT)

    def job(self, section: str, task: str, name: str, seed: int, chosen: dict, **tags: Any) -> dict:
        options, contestant = self.options, CONTESTANTS[name]
        tags = {"trial": None, "variant": None, "dtype": "float32"} | tags
        job = {"section": section, "task": task, "contestant": name, "seed": seed, "settings": chosen, **tags}
        steps = {"bf16": options.bf16_steps, "short": round(SHORT * self.tasks[task]["steps"])}
        job |= {"family": contestant.family, "structures": contestant.structures}
        job["steps"] = steps.get(section, self.tasks[task]["steps"])
        # Products in bfloat16 take long where the processor has none: a 1433 × 1433 factor needs ten seconds an update.
        few = options.quick or section == "bf16"
        return job | {"few": few, "data": options.data, "quick": options.quick, "limit": options.limit}

    def search(self, task: str, name: str) -> Iterator[dict]:
        points = draws(task, self.options.trials, self.options.search_seed)
        for trial, point in enumerate(points):
            chosen = settings(CONTESTANTS[name].family, point)
            yield self.job("search", task, name, SEARCH_SEED, chosen, trial=trial)

    def best(self, task: str, name: str) -> dict | None:
        """The best settings, once every trial is there."""
        done = sum((r["section"], r["task"], r["contestant"]) == ("search", task, name) for r in self.rows)
        found = tuned(self.rows, task, name) if done >= self.options.trials else None
        return None if found is None else found["settings"]

    def race(self, section: str = "final") -> Iterator[dict]:
        for task in self.tasks:
            for name in self.contestants:
                yield from self.search(task, name)
                if (chosen := self.best(task, name)) is not None:
                    for seed in range(self.options.seeds):
                        yield self.job(section, task, name, seed, chosen)

    def short(self) -> Iterator[dict]:
        return self.race("short")

    def bf16(self) -> Iterator[dict]:
        for task in self.tasks:
            for name in [n for n in BF16 if n in self.contestants]:
                yield from self.search(task, name)
                if (chosen := self.best(task, name)) is not None:
                    for dtype in ("float32", "bfloat16"):
                        yield self.job("bf16", task, name, 0, chosen, dtype=dtype)

    def ablation(self) -> Iterator[dict]:
        for task in [t for t in ABLATED if t in self.tasks][: 1 if self.options.quick else None]:
            yield from self.search(task, BASE)
            if (chosen := self.best(task, BASE)) is not None:
                for group, variants in VARIANTS.items():
                    for label, change in variants:
                        for seed in range(min(2, self.options.seeds)):
                            tags = {"variant": label, "group": group}
                            yield self.job("ablation", task, BASE, seed, chosen | change, **tags)

    def __iter__(self) -> Iterator[dict]:
        for section in self.sections:
            yield from getattr(self, section)()


def key(row: dict) -> tuple:
    """What makes a run that run."""
    names = ("section", "task", "contestant", "seed", "trial", "variant", "dtype")
    return tuple(row[k] for k in names) + (row["settings"].get("lr_times"),)


def say(began: float, row: dict) -> None:
    what = [row["section"], row["task"], row["variant"] or row["contestant"]]
    what += [f"trial {row['trial']}" if row["section"] == "search" else f"seed {row['seed']}"]
    what += [row["dtype"]] if row["section"] == "bf16" else []
    if "error" in row:
        done = f"FAILED: {row['error'][:160]}"
    elif row["final_loss"] is None:
        done = f"cut at step {row['cut_at']}" if "cut_at" in row else f"lost at step {row['lost_at']}"
    else:
        test = row["tests"][-1]
        done = f"loss {row['final_loss']:.4g}, test {test['loss']:.4g} / {test['error']:.4g}, "
        done += f"{1e3 * row['mean_step_s']:.2f} ms a step, {row['process_s']:.1f} s"
    print(f"{time.monotonic() - began:6.0f} s  {', '.join(what)}: {done}", flush=True)


def run(plan: Plan, store: Store, jobs: int) -> None:
    began, before = time.monotonic(), store.result["seconds"]
    done = {key(row) for row in plan.rows}
    running: dict[Any, dict] = {}
    os.environ.update(_common.thread_variables(1))  # read by the workers when they start
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        while True:
            for job in plan:
                if len(running) >= jobs:
                    break
                if key(job) not in done:
                    done.add(key(job))
                    running[pool.submit(train, job)] = job
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                row = {k: v for k, v in job.items() if k not in ("data", "quick", "limit")}
                error = future.exception()
                row |= future.result() if error is None else {"error": f"{type(error).__name__}: {error}"[:600]}
                store.result["seconds"] = before + time.monotonic() - began
                store.result["environment"]["load_average_end"] = os.getloadavg()
                store.add(row)
                say(began, row)


def start(options: argparse.Namespace) -> Store | None:
    """The result to fill, a new one or that of `--resume`; None where no task has its data."""
    import torch
    from _gp_data import DataMissing
    from _optim_tasks import ABOUT, make

    asked = [word for word in options.only if word in ABOUT] or list(ABOUT)
    tasks: dict[str, dict[str, Any]] = {}
    for name in asked:
        try:
            make(name, options.data, 0, torch.float32, options.quick)
        except DataMissing as error:
            print(f"  skipped: {name}: {error}", flush=True)
            continue
        steps = QUICK_STEPS if options.quick else max(10, round(options.scale * ABOUT[name]["steps"]))
        tasks[name] = ABOUT[name] | {"steps": steps}
    if not tasks:
        return None
    recorded = {k: getattr(options, k) for k in RECORDED}
    if options.resume:
        result = json.loads(options.resume.read_text())
        if result["settings"] != recorded:
            raise SystemExit(f"{options.resume.name} was run with {result['settings']}, now asked: {recorded}")
        # A search with a failed trial may now choose other settings, so that what was run with its choice goes as well.
        failed = [row for row in result["rows"] if "error" in row]
        again = {(row["task"], row["contestant"]) for row in failed if row["section"] == "search"}
        result["rows"] = [
            row for row in result["rows"]
            if "error" not in row and (row["section"] == "search" or (row["task"], row["contestant"]) not in again)
        ]  # fmt: skip
        result["tasks"] = tasks | result["tasks"]  # its numbers of steps
        result["environment"].setdefault("resumed", []).append(time.strftime("%Y-%m-%d %H:%M:%S"))
        return Store(options.resume, result)
    environment = _common.environment(1, "cpu") | {"dtype": "float32", "jobs": options.jobs}
    for name in ("jax", "jaxlib", "matfree", "scipy"):
        environment["versions"].pop(name)
    path = options.output / f"{options.name or 'optim-train-cpu-' + environment['date']}.json"
    ranges = {k: {n: list(r) for n, r in v.items()} for k, v in RANGES.items()}
    head = {"environment": environment, "settings": recorded, "ranges": ranges, "tasks": tasks, "seconds": 0.0}
    return Store(path, head | {"rows": []})


def main() -> int:
    options = arguments()
    if importlib.util.find_spec("ritz") is None:
        sys.path.insert(0, str(ROOT / "src"))  # the workers inherit it
    import _optim_train_report

    if options.redraw:
        path, result = options.redraw, json.loads(options.redraw.read_text())
    else:
        store = start(options)
        if store is None:
            return 1
        path, result = store.path, store.result
        load = os.getloadavg()[0]
        if load > 0.5:
            print(f"  others are using this machine (load {load:.1f}): times will be noisy", flush=True)
        named = [k for k in result["tasks"] if k in options.only] or list(result["tasks"])
        tasks = {k: result["tasks"][k] for k in named}
        run(Plan(options, tasks, result["rows"]), store, options.jobs)
    table = _optim_train_report.markdown(result)
    path.with_suffix(".md").write_text(table)
    _optim_train_report.figures(result, path)
    print("\n" + table)
    return 0 if result["rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
