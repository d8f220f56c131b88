"""The contestants, the ranges of their settings, one training run, its curve. torch is imported by the runs only."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# Log-uniform. Every learning rate spans two decades, so that equal numbers of trials are equally dense for everybody.
# Weight decay is decoupled (times the learning rate), but SGD's, which is part of its gradient. KFAC's `stat_decay` is
# 1 − lr_cov: both say how much of the curvature one update replaces.
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "AdamW": {"lr": (3e-4, 3e-2), "weight_decay": (1e-4, 1e-1)},
    "SGD": {"lr": (3e-3, 3e-1), "weight_decay": (1e-6, 1e-3)},
    "Muon": {"lr": (3e-4, 3e-2), "weight_decay": (1e-4, 1e-1)},
    "KFAC": {"lr": (3e-4, 3e-2), "weight_decay": (1e-4, 1e-1), "damping": (3e-4, 1e-1), "lr_cov": (2e-2, 5e-1)},
    "SINGD": {"lr": (3e-4, 3e-2), "weight_decay": (1e-4, 1e-1), "damping": (3e-4, 1e-1), "lr_cov": (2e-2, 5e-1)},
}
RANGES["IKFAC"] = RANGES["SINGD"]
DRAWN = ("lr", "weight_decay", "damping", "lr_cov")
CLIP = 1e-3  # the usual KL clip, of KFAC and SINGD
FALLBACK_LR = 3e-3  # for what has no rule: the middle of AdamW's range
MOMENTUM = 0.9  # of SGD, KFAC and SINGD; Muon keeps its default, Nesterov's 0.95
POINTS, EVALUATIONS = 100, 10  # of a stored curve; tests during a run
WINDOW = 0.1  # of the steps: losses are smoothed over it


@dataclass(frozen=True)
class Contestant:
    """A family of `RANGES` and, for the structured ones, the names of the structures of both factors."""

    family: str
    structures: str | None = None
    default: bool = True  # part of a run that names no contestants


CONTESTANTS = {
    "AdamW": Contestant("AdamW"),
    "SGD": Contestant("SGD"),
    "Muon": Contestant("Muon"),
    "KFAC": Contestant("KFAC"),
    "SINGD dense": Contestant("SINGD", "dense"),
    "SINGD hierarchical": Contestant("SINGD", "hierarchical 15"),
    "SINGD block": Contestant("SINGD", "block 30"),
    "SINGD diagonal": Contestant("SINGD", "diagonal"),
    "SINGD Toeplitz": Contestant("SINGD", "Toeplitz", default=False),
    "IKFAC": Contestant("IKFAC", "dense", default=False),
}

# The ablations: how a variant departs from the tuned settings of `BASE`. Structures are compared at three learning
# rates, since the best one need not be the same; hierarchical k and block 2k store (nearly) the same numbers.
BASE = "SINGD hierarchical"
COMPARED = (
    "hierarchical 15", "block 30", "hierarchical 5", "block 10", "diagonal", "dense", "dense, diagonal",
    "diagonal, dense",
)  # fmt: skip
VARIANTS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "structures": [(name, {"structures": name, "lr_times": f}) for name in COMPARED for f in (1 / 3, 1.0, 3.0)],
    "schedule": [("every step", {"interval": 1}), ("every 10th", {"interval": 10}), ("early dense", {})],
    "normalisation": [
        (f"{label}, lr_cov {rate:g}", {"normalize": name, "lr_cov": rate})
        for name, label in (("spectral", "spectral norm"), ("entry", "largest entry"), ("none", "plain"))
        for rate in (0.01, 0.1, 0.5)
    ],
    "start and clip": [
        (f"start {start}, {'clipped' if clip else 'free'}", {"start": value, "clip": clip})
        for start, value in (("from statistics", None), ("identity", 1.0))
        for clip in (True, False)
    ],
}


# -- search ----------------------------------------------------------------------------------------
def draws(task: str, trials: int, seed: int) -> np.ndarray:
    """Points (trials, 4) of the unit cube, one in each of `trials` layers of every axis; the same for everybody."""
    rng = np.random.default_rng([zlib.crc32(task.encode()), seed])
    layers = np.stack([rng.permutation(trials) for _ in DRAWN], 1)
    return (layers + rng.random(layers.shape)) / trials


def settings(family: str, point: Iterable[float]) -> dict[str, Any]:
    """What a point of the unit cube means in the family's ranges; three significant digits are enough."""
    found = {}
    for name, u in zip(DRAWN, point):
        if name in RANGES[family]:
            low, high = RANGES[family][name]
            found[name] = float(f"{low * (high / low) ** u:.3g}")
    return found


def score(record: dict) -> float:
    """The smoothed training loss at the end; infinite where a run was lost, cut short or failed."""
    value = record.get("final_loss")
    return math.inf if value is None else value


def tuned(rows: list[dict], task: str, name: str) -> dict | None:
    """The best trial's record, None where nobody finished."""
    found = [r for r in rows if (r["section"], r["task"], r["contestant"]) == ("search", task, name)]
    best = min(found, key=score, default=None)
    return best if best is not None and score(best) < math.inf else None


# -- optimizers ------------------------------------------------------------------------------------
def structure(name: str) -> Any:
    """The structures named, one for both factors or a pair (of the inputs, of the output gradients)."""
    from ritz.operators import structured

    kinds: dict[str, Callable[..., Any]] = {
        "dense": structured.Dense,
        "diagonal": structured.Diagonal,
        "block": structured.BlockDiagonal,
        "hierarchical": lambda k: structured.Hierarchical(k, k),
        "Toeplitz": structured.LowerToeplitz,
    }
    parts = [part.split() for part in name.split(", ")]
    found = tuple(kinds[kind](*map(int, sizes)) for kind, *sizes in parts)
    return found if len(found) > 1 else found[0]


def build(family: str, structures: str | None, task: Any, chosen: dict[str, Any]) -> list[Any]:
    """The optimizers (one, or Muon with AdamW beside it) of the task's model."""
    import torch
    from torch import nn

    model, lr, decay = task.model, chosen["lr"] * chosen.get("lr_times", 1.0), chosen["weight_decay"]
    if family == "AdamW":
        return [torch.optim.AdamW(model.parameters(), lr, weight_decay=decay, fused=True)]
    if family == "SGD":
        return [torch.optim.SGD(model.parameters(), lr, momentum=MOMENTUM, weight_decay=decay, fused=True)]
    if family == "Muon":
        # Weights of linear layers but the output's; its documentation leaves everything else to AdamW. With this
        # adjustment a step has AdamW's size, so that one learning rate serves both.
        chain = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != task.output}
        hidden = list(chain.values())
        others = [p for p in model.parameters() if not any(p is w for w in hidden)]
        torch.optim._muon._zeropower_via_newtonschulz = newton_schulz
        muon = torch.optim.Muon(hidden, lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(others, lr, weight_decay=decay, fused=True)]

    from ritz import optim
    from ritz.curvature import PerPosition

    shared = {
        "momentum": MOMENTUM, "damping": chosen["damping"], "weight_decay": decay,
        "update_interval": chosen.get("interval") or optim.EarlyDense(10),
        "num_loss_terms": PerPosition() if task.per_position else task.terms,
        "clip": optim.KLClip(CLIP) if chosen.get("clip", True) else None,
        "fallback": optim.AdamW(lr=FALLBACK_LR, weight_decay=decay),
    }  # fmt: skip
    if family == "KFAC":
        return [optim.KFAC(model, lr, stat_decay=1 - chosen["lr_cov"], inverse=optim.Inverse(), **shared)]
    kind = {"SINGD": optim.SINGD, "IKFAC": optim.IKFAC}[family]
    measures = {"spectral": optim.SpectralNorm(), "entry": optim.LargestEntry(), "none": False}
    shared |= {"lr_cov": chosen["lr_cov"], "normalize": measures[chosen.get("normalize", "spectral")]}
    shared |= {"start": chosen.get("start")}
    return [kind(model, lr, structures=structure(chosen.get("structures") or structures or "dense"), **shared)]


def newton_schulz(grad: Any, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Any:
    """torch's iteration for Muon, in float32: torch has bfloat16, whose products many CPUs do twenty times slower."""
    a, b, c = ns_coefficients
    X = grad.mT if grad.shape[0] > grad.shape[1] else grad
    X = X / X.norm().clamp(min=eps)
    for _ in range(ns_steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if grad.shape[0] > grad.shape[1] else X


def tensor_bytes(state: Any, seen: set[int]) -> int:
    """Of all tensors in nested containers, each once."""
    if isinstance(state, dict):
        return sum(tensor_bytes(v, seen) for v in state.values())
    if isinstance(state, (list, tuple)):
        return sum(tensor_bytes(v, seen) for v in state)
    if not hasattr(state, "untyped_storage") or state.data_ptr() in seen:
        return 0
    seen.add(state.data_ptr())
    return state.numel() * state.element_size()


# -- one run ---------------------------------------------------------------------------------------
def rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{v:.6g}") for v in values]


def binned(values: list[float], steps: int) -> Iterator[np.ndarray]:
    """The steps done so far in at most `POINTS` equal pieces of all steps; an unfinished piece is left out."""
    edges = np.linspace(0, steps, min(POINTS, steps) + 1).round().astype(int)
    for low, high in zip(edges, edges[1:]):
        if high <= len(values):
            yield np.asarray(values[low:high])


def train(job: dict) -> dict:
    """One run: curve, tests, times. Only the steps are timed: not the batches, not the tests.

    A loss that is not finite, or a failure after the first step, ends the run as lost.
    """
    import torch
    from _optim_tasks import evaluate, make

    torch.set_num_threads(1)
    began, cpu = time.monotonic(), 0.0
    steps = job["steps"]
    task = make(job["task"], job["data"], job["seed"], getattr(torch, job["dtype"]), job["quick"], job["few"])
    optimizers = build(job["family"], job["structures"], task, job["settings"])
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    stream = task.batches(torch.Generator().manual_seed(job["seed"] + 1))
    tests_at = {round(steps * (k + 1) / EVALUATIONS) for k in range(EVALUATIONS)}
    losses: list[float] = []
    ends: list[float] = []
    tests: list[dict] = []
    out: dict[str, Any] = {}
    for step in range(steps):
        batch = next(stream)
        factor = 0.5 * (1 + math.cos(math.pi * step / steps))  # for everybody
        start, busy = time.perf_counter(), time.process_time()
        for group, lr in groups:
            group["lr"] = lr * factor
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = task.loss(task.model, batch)
        loss.backward()
        try:
            for optimizer in optimizers:
                optimizer.step()
        except Exception as error:
            if step == 0:
                raise  # no numerical failure, then
            out |= {"lost_at": step, "message": f"{type(error).__name__}: {error}"[:300]}
            break
        value = loss.item()
        ends.append((ends[-1] if ends else 0.0) + time.perf_counter() - start)
        cpu += time.process_time() - busy
        if not math.isfinite(value):
            out["lost_at"] = step
            break
        losses.append(value)
        if step + 1 in tests_at:
            tests.append({"step": step + 1, "seconds": float(f"{ends[-1]:.5g}")} | evaluate(task))
        if ends[-1] > job["limit"]:
            out["cut_at"] = step
            break
    curve = rounded(piece.mean() for piece in binned(losses, steps))
    out |= {"loss": curve, "seconds": rounded(piece[-1] for piece in binned(ends, steps)), "tests": tests}
    done = len(losses) == steps and None not in tests[-1].values()
    if not done and "cut_at" not in out:
        out.setdefault("lost_at", steps)  # at the latest, in the last update
    out["final_loss"] = float(np.mean(curve[-window(len(curve)) :])) if done else None
    done_steps = max(len(ends), 1)
    out["step_s"] = float(f"{np.median(np.diff([0.0, *ends])) if ends else 0.0:.6g}")
    out["mean_step_s"], out["mean_step_cpu_s"] = rounded([(ends[-1] if ends else 0.0) / done_steps, cpu / done_steps])
    seen: set[int] = set()
    out["state_bytes"] = sum(
        tensor_bytes(v, seen) for o in optimizers for k, v in o.state_dict().items() if k != "param_groups"
    )
    out["cache_bytes"] = sum(o.cache_bytes() for o in optimizers if hasattr(o, "cache_bytes"))
    return out | {"process_s": round(time.monotonic() - began, 3)}


# -- curves ----------------------------------------------------------------------------------------
def window(points: int) -> int:
    """Points of a curve that are averaged: a tenth of the run."""
    return max(1, round(WINDOW * points))


def mean_curve(rows: list[dict], key: str = "loss") -> np.ndarray | None:
    """Mean over the runs; None where there is none or one did not finish, since its curve is shorter."""
    if not rows or any(r.get("final_loss") is None for r in rows):
        return None
    return np.mean([r[key] for r in rows], 0)


def smooth(curve: np.ndarray) -> np.ndarray:
    """Mean over the last tenth of the run up to each point; NaN before the first whole window."""
    w = window(len(curve))
    out = np.full(len(curve), np.nan)
    out[w - 1 :] = np.lib.stride_tricks.sliding_window_view(curve, w).mean(-1)
    return out


def reach(curve: np.ndarray | None, target: float | None) -> int | None:
    """First point whose smoothed loss is at the target (stored to six digits) or below."""
    if curve is None or target is None:
        return None
    there = smooth(curve) <= target * (1 + 1e-5)
    return int(there.argmax()) if there.any() else None
