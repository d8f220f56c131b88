"""``ritz gp fit``: a table in; a fitted Gaussian process, its scores on held-out rows and a figure out."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import plot
from ..gp import Fit
from . import model, scores
from .console import Console, Phase
from .dataset import Problem, Scaling, make_problem
from .failure import CommandError, Exit, optional
from .model import Recipe
from .output import staged_directory
from .store import FACTS, TENSORS, Saved, save, to_json, write_json
from .table import Table, read_table

METRICS, FIGURE = "metrics.json", "figure.png"
SCORED = 500  # test rows at most where standard deviations need conjugate gradients


@dataclass(frozen=True)
class FitOptions:
    """What to fit, where to, and how.

    Attributes:
        data, header, target, drop: the table and its columns; header None: found out.
        out, force: the directory of results, and whether results there may be replaced.
        as_json: print one JSON object, and nothing else.
        test_fraction, seed: the share of rows held out; the seed of split, subset and probes.
        recipe: the model and how it is fitted.
    """

    data: Path
    out: Path
    target: str = "-1"
    header: bool | None = None
    drop: list[str] = field(default_factory=list)
    force: bool = False
    as_json: bool = False
    test_fraction: float = 0.2
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True)
class Fitted:
    """What a fit gave: the model, its length-scales by input, the history of each phase, scores by name, coverage of
    intervals, rows scored.
    """

    saved: Saved
    lengthscales: dict[str, float]
    phases: list[dict[str, Any]]
    results: dict[str, dict[str, float]]
    coverage: dict[str, list[float]]
    scored: int


def run_fit(options: FitOptions) -> dict[str, Any]:
    """Fit, score, save and report; nothing is written unless all of it went well. The report, as plain data."""
    if not options.recipe.subset and not options.recipe.steps:
        raise CommandError("--no-subset with --steps 0 leaves nothing to fit", Exit.USAGE)
    optional("pandas", "reading tables")
    optional("safetensors", "saving a model")
    optional("matplotlib", "the figure")
    began = time.perf_counter()
    console = Console(quiet=options.as_json)
    table = read_table(options.data, options.header)
    problem = make_problem(table, options.target, options.drop, options.test_fraction, options.seed)
    with staged_directory(options.out, options.force) as stage:
        _describe(console, table, problem, options.seed)
        fitted = _fit(problem, options, console)
        n = len(problem.train)
        scored = fitted.results["model"]
        title = f"{table.path.name}: {options.recipe.kernel} kernel, {n} rows; "
        title += f"held out: RMSE {scored['rmse']:.4g}, NLL {scored['nll']:.3f}"
        figure = plot.fit_figure(
            fitted.phases, fitted.coverage, rows=fitted.scored, title=title, scales=fitted.lengthscales
        )
        figure.savefig(stage / FIGURE)
        save(stage, fitted.saved)
        report = {
            "data": _facts(table, problem),
            "seed": options.seed,
            "recipe": asdict(options.recipe),
            "dtype": fitted.saved.spec.dtype,
            "results": fitted.results,
            "scored_rows": fitted.scored,
            "coverage": fitted.coverage,
            "lengthscales": fitted.lengthscales,
            "training": fitted.phases,
            "seconds": round(time.perf_counter() - began, 2),
        }
        write_json(stage / METRICS, report)
    _report(console, fitted.results, min(options.recipe.subset, n), n)
    console.fact("wrote", f"{options.out}: {TENSORS}, {FACTS}, {METRICS}, {FIGURE} ({report['seconds']:.0f} s in all)")
    if options.as_json:
        print(to_json({"out": str(options.out), **report}))
    return report


def _fit(problem: Problem, options: FitOptions, console: Console) -> Fitted:
    """Both phases, and the scores of what each of them gave."""
    recipe, n = options.recipe, len(problem.train)
    scaling = Scaling.of(problem.X[problem.train], problem.y[problem.train])
    spec = model.Spec(recipe.kernel, recipe.ard, recipe.dtype or model.default_dtype(n))
    X, X_test = (spec.tensor(scaling.inputs(problem.X[rows])) for rows in (problem.train, problem.test))
    y, y_test = spec.tensor(scaling.targets(problem.y[problem.train])), problem.y[problem.test]
    if n > model.FACTOR_UP_TO and len(y_test) > SCORED:
        scored = np.sort(np.random.default_rng(options.seed).permutation(len(y_test))[:SCORED])
        X_test, y_test = X_test[scored], y_test[scored]
        console.fact(
            "", f"scored on {SCORED} of the test rows: standard deviations are costly above {model.FACTOR_UP_TO} rows"
        )
    gp = model.build(spec, X.shape[1])
    reserve = 0.0 if recipe.budget is None else model.prediction_seconds(n, len(y_test))
    clock = model.Clock(recipe.budget, reserve)
    results = {"constant": scores.score(y_test, np.array(scaling.y_mean), scaling.y_scale)}
    phases: list[dict[str, Any]] = []
    first: Fit | None = None

    rows = np.sort(np.random.default_rng(options.seed).permutation(n)[: recipe.subset])
    if recipe.subset:
        with console.phase("subset", recipe.subset_steps) as phase:
            first = model.fit_subset(gp, X[rows], y[rows], recipe, phase, clock)
        phases.append(_history("subset", f"{len(rows)} rows: Cholesky, L-BFGS", len(rows), phase))
        console.fact("subset", _spent(phases[-1]))
    if 0 < len(rows) < n:
        mean, std = model.predict(gp, X[rows], y[rows], X_test)
        results["subset"] = scores.score(y_test, *scaling.outputs(mean, std))
    if recipe.steps and len(rows) < n:
        with console.phase("all rows", recipe.steps + 1) as phase:
            model.fit_all(gp, X, y, recipe, options.seed, phase, clock, first)
        how = "L-BFGS" if recipe.lr is None else "Adam"
        phases.append(_history("all", f"{n} rows: Krylov, {how}", n, phase))
        console.fact("all", _spent(phases[-1]))
    mean, std = scaling.outputs(*model.predict(gp, X, y, X_test))
    results["model"] = scores.score(y_test, mean, std)
    saved = Saved(spec, gp, X, y, problem.columns, scaling)
    lengthscales = model.lengthscales(gp, problem.columns.features)
    return Fitted(saved, lengthscales, phases, results, scores.coverage(y_test, mean, std), len(y_test))


def _history(name: str, title: str, points: int, phase: Phase) -> dict[str, Any]:
    return {
        "phase": name,
        "title": title,
        "points": points,
        "steps": phase.steps,
        "loss": phase.loss,
        "elapsed": [round(seconds, 3) for seconds in phase.seconds],
        "seconds": round(phase.elapsed, 2),
        "stopped": phase.stopped,
    }


def _spent(history: dict[str, Any]) -> str:
    loss = f", loss {history['loss'][0]:.4f} to {history['loss'][-1]:.4f}" if history["loss"] else ""
    count = len(history["steps"])
    text = f"{history['title']}: {count} step{'' if count == 1 else 's'} in {history['seconds']:.1f} s{loss}"
    return f"{text} ({history['stopped']})" if history["stopped"] else text


def _describe(console: Console, table: Table, problem: Problem, seed: int) -> None:
    """What was read and how it is used."""
    columns = problem.columns
    header = "the first row holds names" if table.header else "no header"
    console.fact("data", f"{table.path.name}: {len(table)} rows, {len(table.names)} columns, {header}")
    console.fact("target", f"{table.describe(columns.target)}, from {len(columns.features)} inputs")
    if columns.dropped:
        console.fact("", f"left out as asked: {', '.join(columns.dropped)}")
    if columns.constant:
        console.fact("", f"left out because constant: {', '.join(columns.constant)}")
    if problem.repeated:
        console.fact(
            "", f"{problem.repeated} rows repeat the inputs of another; kept, on one side of the split together"
        )
    console.fact("split", f"{len(problem.train)} rows to train, {len(problem.test)} to test, seed {seed}")


def _report(console: Console, results: dict[str, dict[str, float]], subset: int, n: int) -> None:
    """The scores as a small table."""
    names = {
        "constant": "constant predictor",
        "subset": f"exact GP on the subset, {subset} rows",
        "model": f"this model, {n} rows",
    }
    console.line()
    console.line(f"{'held-out rows, in units of the target':<42}{'RMSE':>12}{'NLL':>12}")
    for key, numbers in results.items():
        console.line(f"  {names[key]:<40}{numbers['rmse']:>12.5g}{numbers['nll']:>12.4f}")
    console.line()


def _facts(table: Table, problem: Problem) -> dict[str, Any]:
    return {
        "file": table.path.name,
        "rows": len(table),
        "train": len(problem.train),
        "test": len(problem.test),
        "repeated_inputs": problem.repeated,
        "columns": problem.columns.to_json(),
    }
