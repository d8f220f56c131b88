"""What runs inside a contestant's own process: timed steps, training, own predictions, scaling, scores."""

from __future__ import annotations

import gc
import importlib
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import _common
import numpy as np
from _gp_data import Split, describe, load, many_rows, scores, start

WARM = 2100  # rows of the step that warms up a scaling run: enough for Auto() to compile what larger ones use
FIRST = 100  # test points whose variances every contestant also predicts by its own means

# name: (module, class, arguments); "same accuracy" is --rtol for everybody's stopping rule
CONTESTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ritz": ("_gp_ours", "Ours", {}),
    "ritz Stored": ("_gp_ours", "Ours", {"where": "Stored"}),
    "ritz NumbaTiles": ("_gp_ours", "Ours", {"where": "NumbaTiles"}),
    "ritz Tiles": ("_gp_ours", "Ours", {"where": "Tiles"}),
    "ritz, no P": ("_gp_ours", "Ours", {"rank": 0}),
    "ritz, P100": ("_gp_ours", "Ours", {"rank": 100}),
    "ritz Stored, no P": ("_gp_ours", "Ours", {"where": "Stored", "rank": 0}),
    "ritz NumbaTiles, no P": ("_gp_ours", "Ours", {"where": "NumbaTiles", "rank": 0}),
    "ritz Adjoint, no P": ("_gp_ours", "Ours", {"rank": 0, "adjoint": True}),
    "ritz Cholesky": ("_gp_ours", "Ours", {"direct": True}),
    "gpytorch, rank 15": ("_gp_gpytorch", "GPyTorch", {"tolerance": "rtol", "rank": 15}),
    "gpytorch, rank 100": ("_gp_gpytorch", "GPyTorch", {"tolerance": "rtol", "rank": 100}),
    "gpytorch, tolerance 1": ("_gp_gpytorch", "GPyTorch", {"rank": 15}),
    "gpytorch Cholesky": ("_gp_gpytorch", "GPyTorch", {"cholesky": True}),
    "gpytorch KeOps": ("_gp_gpytorch", "GPyTorch", {"tolerance": "rtol", "rank": 0, "keops": True}),
    "gpytorch KeOps, rank 15": ("_gp_gpytorch", "GPyTorch", {"tolerance": "rtol", "rank": 15, "keops": True}),
    "sklearn": ("_gp_sklearn", "Sklearn", {}),
    "sklearn, own L-BFGS": ("_gp_sklearn", "Sklearn", {"own": True}),
}
SLOW = 60.0  # seconds of a step that is not repeated, nor followed by a solve for its residual
Save = Callable[[dict], None]


def first_rows(split: Split, rows: int) -> Split:
    return replace(split, X=split.X[:rows], y=split.y[:rows])


def make(name: str, split: Split, spec: dict) -> Any:
    module, cls, arguments = CONTESTANTS[name]
    arguments = {k: spec["rtol"] if v == "rtol" else v for k, v in arguments.items()}
    if spec.get("depth"):
        arguments["depth"] = spec["depth"]
    return getattr(importlib.import_module(module), cls)(split, spec, **arguments)


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB on Linux


def texts(caught: list[warnings.WarningMessage]) -> dict[str, int]:
    """Distinct warnings by their beginnings, and how often each came."""
    return dict(Counter(f"{w.category.__name__}: {str(w.message)[:160]}" for w in caught))


def race(spec: dict, save: Save) -> dict:
    """Steps at the common hyper-parameters, then (where asked) training from the common start."""
    split = load(spec["set"], spec["data"], spec["rows"])
    importlib.import_module(CONTESTANTS[spec["contestant"]][0])
    state = np.array(spec["state"])
    record: dict[str, Any] = {"n": split.n, "d": split.X.shape[1], "baseline_bytes": peak_rss()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        contestant = make(spec["contestant"], split, spec)
        if not one_fit(spec["contestant"]):
            if "keops" in CONTESTANTS[spec["contestant"]][2]:  # minutes of compiling, which do not depend on n
                began = time.perf_counter()
                few = make(spec["contestant"], first_rows(split, 200), spec)
                few.step()
                record["compile_s"] = time.perf_counter() - began
            record |= timed_steps(contestant, state, spec, caught)
            record["peak_bytes"] = peak_rss()
            record["report"] = dict(contestant.report)
            save(record)
        if spec["first_round"] and record.get("samples") and not record.get("slow"):
            contestant.set(state)
            record["residual"] = true_residual(contestant, split)
            save(record)
        del caught[:]
        if spec["train"]:
            record["training"] = training(contestant, split, spec, save, record)
            record["training"]["warnings"] = texts(caught)
            save(record)
            states = record["training"]["states"]
            contestant.set(np.array(states[min(record["training"]["asked"], len(states) - 1)]))
            try:
                record["own"] = own_predictions(contestant, split)
            except Exception as error:  # steps and training stand; this is one more thing to report
                record["own"] = {"error": f"{type(error).__name__}: {error}"}
    return record


def one_fit(name: str) -> bool:
    """Whether its step is a whole optimisation, which is run once and not timed as a step."""
    return "own" in CONTESTANTS[name][2]


def timed_steps(contestant: Any, state: np.ndarray, spec: dict, caught: list) -> dict:
    """Seconds of steps that each begin at the same hyper-parameters, after one to warm up; or of that one if slow."""

    def once() -> float:
        contestant.set(state)
        began = time.perf_counter()
        losses.append(contestant.step())
        return time.perf_counter() - began

    losses: list[float] = []
    del caught[:]
    gc.collect()
    first, samples = once(), []
    if first > SLOW:
        return {"samples": [first], "slow": True, "loss_at_state": losses[-1], "warnings": texts(caught)}
    del caught[:]
    while len(samples) < spec["timed"] and sum(samples) < spec["timed_seconds"]:
        samples.append(once())
    return {"warm_step_s": first, "samples": samples, "loss_at_state": losses[-1], "warnings": texts(caught)}


def true_residual(contestant: Any, split: Split) -> float:
    import _gp_exact

    return _gp_exact.residual(contestant.get(), split.X, split.y, contestant.solution())


def training(contestant: Any, split: Split, spec: dict, save: Save, record: dict) -> dict:
    """Adam from the common start: `steps` steps and, where there is one, at least the wall-clock budget.

    Seconds count the steps alone; hyper-parameters before the first and after every step are kept, so that any step
    and any moment can be scored later.
    """
    contestant.set(start(split.X.shape[1]))
    contestant.restart(spec["lr"])
    one = one_fit(spec["contestant"])
    steps, limit = (1 if one else spec["steps"]), spec["limit"] or float("inf")
    budget = min(spec["budget"] or 0.0, limit)
    out: dict[str, Any] = {"seconds": [0.0], "losses": [], "states": [contestant.get().tolist()]}
    while (len(out["losses"]) < steps and out["seconds"][-1] < limit) or (not one and out["seconds"][-1] < budget):
        began = time.perf_counter()
        loss = contestant.step()
        seconds = time.perf_counter() - began
        if not np.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss} at step {len(out['losses']) + 1}")
        out["losses"].append(loss)
        out["seconds"].append(out["seconds"][-1] + seconds)
        out["states"].append(contestant.get().tolist())
        if len(out["losses"]) % 10 == 0:
            save(record | {"training": out})
    out["steps"] = len(out["losses"])
    out["asked"] = steps
    out["report"] = dict(contestant.report)
    out["final"] = describe(np.array(out["states"][min(steps, out["steps"])]))
    return out


def own_predictions(contestant: Any, split: Split) -> dict:
    """RMSE on all test rows, and NLL on the first few, by the contestant's own posterior after `asked` steps."""
    began = time.perf_counter()
    mean, variance = contestant.predict(split.Xs, FIRST)
    out = {"seconds": time.perf_counter() - began, "rmse": scores(split, mean, np.ones_like(mean))["rmse"]}
    out["nll_first"] = scores(split, mean[:FIRST], variance)["nll"]
    return out


def scaling(spec: dict, save: Save) -> dict:
    """Likelihood and gradient at a fixed number of products on n rows: time, and growth of the peak memory."""
    split = many_rows(spec["n"], spec["data"])
    record: dict[str, Any] = {"n": split.n, "d": split.X.shape[1]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warm = make(
            spec["contestant"], first_rows(split, WARM), spec
        )  # compiles, and lets every library start its threads
        warm.set(np.array(spec["state"]))
        warm.step()
        contestant = make(spec["contestant"], split, spec)
        samples: list[float] = []

        def once() -> None:
            contestant.set(np.array(spec["state"]))
            began = time.perf_counter()
            contestant.step()
            samples.append(time.perf_counter() - began)

        record["growth_bytes"] = _common.peak_memory(once)
        while len(samples) < 5 and sum(samples) < 4.0:
            once()
        record |= {"samples": samples, "peak_bytes": peak_rss()}
    record["report"], record["warnings"] = dict(contestant.report), texts(caught)
    return record


def state(spec: dict, save: Save) -> dict:
    """The hyper-parameters at which everybody's steps are timed."""
    import _gp_exact

    split = load(spec["set"], spec["data"], spec["rows"])
    rows = min(spec["state_rows"], split.n)
    theta = _gp_exact.trained_state(split, rows, spec["state_steps"], spec["lr"])
    return {"state": theta.tolist(), "about": split.about | {"state_rows": rows} | describe(theta)}


def score(spec: dict, save: Save) -> dict:
    """Exact predictions at several vectors of hyper-parameters, one after the other."""
    import _gp_exact

    split = load(spec["set"], spec["data"], spec["rows"])
    if split.n > _gp_exact.SCORE_UP_TO:
        raise RuntimeError(f"{split.n} training rows are more than the exact scorer takes ({_gp_exact.SCORE_UP_TO})")
    found: list[dict] = []
    for theta in spec["thetas"]:
        try:
            found.append(_gp_exact.score(np.array(theta), split, FIRST))
        except ArithmeticError as error:
            found.append({"error": str(error)})
        save({"scores": found})
    return {"scores": found}


def checks(spec: dict, save: Save) -> dict:
    import _gp_checks

    split = load(spec["set"], spec["data"], spec["check_rows"])
    return getattr(_gp_checks, spec["check"])(split, spec)


TASKS: dict[str, Callable[[dict, Save], dict]] = {
    "race": race, "scaling": scaling, "state": state, "score": score, "checks": checks
}  # fmt: skip
