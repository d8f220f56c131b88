"""Fitting hyper-parameters: L-BFGS on a random subset by Cholesky, then few, good steps on all points by products."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, OperandError
from ..methods import Auto
from ..result import caller_level
from ..solve import Direct, Landmarks
from . import start
from .adam import Adam, AdamState
from .checkpoint import Checkpoint, checksum, describe
from .exact import DENSE_UP_TO, ExactGP
from .lbfgs import LBFGS, LBFGSState
from .noise import FixedNoise
from .objective import LeaveOneOut, MarginalLikelihood
from .report import Fit
from .training import (
    Callback,
    Clock,
    HeldOut,
    Loss,
    Objective,
    Optimizer,
    Stage,
    Watch,
    flat,
    settings,
    told_once,
    trainable,
    write,
)

SCHEDULE = "the steps of Adam (its step sizes depend on them, unless final=1)"  # in a checkpoint's description
FINAL = ("gradient", "progress", "line search", "validation")  # a resumed stage does not go on after these
# How far the loss of one target on the iterative path is from a smooth function: a share of what the likelihood reports
# as ``rounding``, measured on 3000 rows of elevators in float32 (1e-4 plain, at rounding 1e-2; 3e-6 preconditioned, at
# 2e-4), and what an adaptive depth with rtol = 1e-3 leaves in float64.
NOISE_OF_ROUNDING, LEAST_NOISE = 2e-2, 1e-6


def fit(
    gp: ExactGP,
    X: Tensor,
    y: Tensor,
    *,
    objective: Objective = MarginalLikelihood(),
    optimizer: Optimizer | None = None,
    subset: int | None = 1000,
    subset_steps: int = 50,
    steps: int = 15,
    lr: float | None = None,
    start_noise: bool = False,
    earlier: Fit | None = None,
    validation: HeldOut | tuple[Tensor, Tensor] | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    max_seconds: float | None = None,
    callback: Callback | None = None,
    seed: int = 0,
) -> Fit:
    """Maximise objective + ``gp.log_prior()`` over the parameters of ``gp`` that require grad, in place.

    Stage "subset": L-BFGS on ``subset`` random points by Cholesky in float64. Stage "all": all points, by products;
    probes and preconditioner are fixed for its length, so that it has a function to work on. A stage that makes the
    covariance break down, or a value that is not finite, is stepped back from, never into: the parameters are always
    those of the best value seen, or of the best held-out score.

    Where Cholesky serves all points (n ≤ 2000, unless the process is told otherwise) one stage is enough: "subset" on
    all of them; or, where ``optimizer`` or ``lr`` is given, ``subset`` is left out, or ``subset_steps`` is 0, stage
    "all", by Cholesky with the optimizer asked for.

    From step to step go the preconditioner's pivots, the probes, and the curvature that L-BFGS has seen, which stage
    "all" takes over from "subset". No solution vector does: the block run solves for y and the probes at once, from the
    start that their forms need, and where CG finishes the solve, it goes on from the block's own solution.

    Args:
        gp: the process; parameters are changed in place, settings come back as they were.
        X, y: points (n, d) and targets (n,), or (n, p).
        objective: called as objective(gp, X, y) -> (value, info), the value a sum over targets; a value such as
            ``MarginalLikelihood()`` or ``LeaveOneOut()``.
        optimizer: of stage "all": ``LBFGS(steps)`` or ``Adam(steps, lr)``. None is ``LBFGS(steps)``, or
            ``Adam(steps, lr)`` where ``lr`` is given.
        subset: points of the first stage; None or 0 leaves it out.
        subset_steps: its steps; 0 leaves it out.
        steps: steps of the second stage; 0 leaves it out.
        lr: first step size of Adam, in the raw parameters (about a relative change of each).
        start_noise: before the second stage set noise and output scale to the best of a curve that one Krylov run
            without a gradient gives (see :func:`~ritz.gp.start.start_noise`). Pays where the first stage is left out or
            its subset was small; does nothing where there is no second stage.
        earlier: the report of an earlier fit of this process, on fewer points say: stage "all" begins with the
            curvature that it saw, where stage "subset" is left out.
        validation: ``HeldOut(X, y, every=, patience=, rows=)``, or its (X, y): the stage that has all points is scored
            on them every few steps, ends when the score no longer falls, and keeps the parameters of the best score.
        checkpoint: ``Checkpoint(path, every=)``, or its path: the state is written there after every step, and where
            the file exists the fit goes on from it with the numbers, bit for bit, of a run that was not interrupted.
            More steps than before may be asked for (not of Adam, whose schedule depends on them, unless its ``final``
            is 1); anything else has to be as it was.
        max_seconds: time after which no further evaluation begins, counted over both stages of this call.
        callback: called with (step, loss, info) after every step, counted through both stages; True stops the stage.
        seed: of the random subset.

    Returns:
        A :class:`Fit`.

    Raises:
        OperandError: operands or settings that do not fit; a checkpoint of another fit.

    Warns:
        ConvergenceWarning: a stage whose first value was not finite, and that left the parameters as they were;
            likelihoods that missed their tolerance, once for each kind of warning and stage.

    Cost: a first-stage evaluation is one Cholesky factorisation with its gradient, a second-stage step one likelihood
    as a rule (L-BFGS a second one where a step was too long). On 3000 rows of elevators in float32, from a subset of
    500 (one split, loss 0.5271), L-BFGS reached 0.5241 with 7 likelihoods and 0.5231 with 12; Adam 0.5244 (lr = 0.2)
    and 0.5253 (0.1) with 13.
    Deterministic for a given seed, as long as ``max_seconds`` does not decide.
    """
    X, y = gp._check(X, y)
    clock, n = Clock(max_seconds), X.shape[0]
    held_out = HeldOut(*validation) if isinstance(validation, tuple) else validation
    keeper = Checkpoint(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    chosen = _optimizer(optimizer, steps, lr)
    if held_out is not None:
        held_out = held_out.checked(gp, X, y)
    if not trainable(gp):
        return Fit()
    whole = bool(subset) and n <= max(DENSE_UP_TO, subset or 0) and not isinstance(gp.method(n), tuple)
    given = chosen.steps > 0 and (optimizer is not None or lr is not None)
    few = subset if subset and subset_steps > 0 and not (whole and given) else None
    due = chosen.steps > 0 and not (whole and few)
    pairs = _curvature(gp, earlier)
    _check_ahead(gp, X, y, objective if due else None, start_noise and due, held_out)
    run = _Run(gp, X, y, objective, clock, callback, keeper, Fit())
    if keeper is not None:
        names: dict[str, Any] = {"objective": objective, "optimizer": replace(chosen, steps=0), "subset": few}
        names |= {"seed": seed, "start_noise": start_noise, "validation": _about(held_out)}
        if isinstance(chosen, Adam) and chosen.final != 1:
            names[SCHEDULE] = chosen.steps
        run.open(describe(gp, X, y, **names))
    if few and run.saved_stage != "all":
        index = torch.arange(n) if whole else torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:few]
        pairs = run.subset(index.to(X.device), subset_steps, held_out if whole else None)
    if (due and not clock.late()) or run.saved_stage == "all":
        run.all(chosen, held_out, start_noise, pairs)
    run.report.seconds = clock.seconds()
    return run.report


class _Run:
    """What both stages share: the process, the record, the clock, the caller's callback and the file."""

    def __init__(
        self,
        gp: ExactGP,
        X: Tensor,
        y: Tensor,
        objective: Objective,
        clock: Clock,
        callback: Callback | None,
        keeper: Checkpoint | None,
        report: Fit,
    ) -> None:
        self.gp, self.X, self.y, self.objective = gp, X, y, objective
        self.clock, self.callback, self.keeper, self.report = clock, callback, keeper, report
        self.about: dict[str, str] = {}
        self.saved: dict[str, Any] | None = None

    @property
    def saved_stage(self) -> str | None:
        """The stage that a checkpoint is in."""
        return None if self.saved is None else self.saved["stage"]

    def open(self, about: dict[str, str]) -> None:
        """Take over what a checkpoint holds."""
        assert self.keeper is not None
        self.about, self.saved = about, self.keeper.load(about)
        if self.saved is not None:
            self.report = Fit.restore(self.saved["report"])
            self.clock.before = self.report.seconds

    def subset(self, index: Tensor, steps: int, held_out: HeldOut | None) -> list[Any]:
        """First stage; returns the curvature it has seen."""
        gp = self.gp.rows(index)
        loss = Loss(gp, self.objective, self.X[index].double(), self.y[index].double(), self.clock.late)
        # Held-out scores get the points as they were given: held-out points are of that dtype.
        data = (self.X[index], self.y[index])
        stage = Stage("subset", loss, LBFGS(steps, ftol=1e-7, line_steps=20), data, _watch(held_out))
        with settings(gp, solver=Direct(), logdet=Auto(), mean=_mean(gp.mean, self.X.dtype)):
            self._drive(stage)
        self.report.curvature = stage.state.pairs if stage.state is not None else []
        _warn_of_start(stage)
        return self.report.curvature

    def all(self, optimizer: Optimizer, held_out: HeldOut | None, from_curve: bool, pairs: list[Any]) -> None:
        """Second stage."""
        resumed, before = self.saved_stage == "all", flat(trainable(self.gp))
        if from_curve and not resumed:
            with told_once("all"):
                self.report.noise_start = start.start_noise(self.gp, self.X, self.y)
        self.report.optimizer = optimizer
        loss = Loss(self.gp, self.objective, self.X, self.y, self.clock.late)
        stage = Stage("all", loss, optimizer, (self.X, self.y), _watch(held_out))
        asked = self.gp.preconditioner
        kept: Any = self.saved["preconditioner"] if self.saved is not None and resumed else "as asked"
        if kept != "as asked":
            asked = None if kept is None else Landmarks(tuple(kept))
        with settings(self.gp, preconditioner=asked):
            self._drive(stage, pairs, first=True)
            self.report.preconditioner = self.gp.preconditioner
        if stage.state is None:  # no first value: the curve led where the objective is not finite, or it was so before
            write(trainable(self.gp), before)
            self.report.noise_start = None
        self.report.curvature = getattr(stage.state, "pairs", pairs)
        _warn_of_start(stage)

    def _drive(self, stage: Stage, pairs: list[Any] | None = None, *, first: bool = False) -> None:
        """Run a stage, from its checkpoint where there is one, and record it."""
        report, name = self.report, stage.name
        if self.saved is not None and self.saved_stage == name:
            self._restore(stage, self.saved)
        earlier = report.evaluations.get(name, 0)

        def after(value: float, step: bool) -> bool:
            if not step:
                self._settle(stage)
            count = len(report.history) + 1
            report.history.append((name, count, value, self.clock.seconds()))
            report.learn(stage.loss.info)
            self._record(stage, earlier)
            if self.keeper is not None and stage.state.count % self.keeper.every == 0:
                self._save(stage)
            return self.callback is not None and bool(self.callback(count, value, stage.loss.info))

        stage.run(after, pairs or [], first=first)
        report.learn(stage.loss.info)
        report.stopped[name] = stage.reason or "stopped"
        self._record(stage, earlier)
        if self.keeper is not None and stage.state is not None:
            self._save(stage)

    def _settle(self, stage: Stage) -> None:
        """Keep for the whole stage what its first likelihood chose."""
        info = stage.loss.info
        if info is not None:
            found, rounding = info.details.get("standard_errors"), info.details.get("rounding", 0.0)
            self.report.standard_errors = dict(found) if isinstance(found, dict) else {}
            if isinstance(stage.optimizer, LBFGS) and stage.optimizer.noise is None:
                noise = max(LEAST_NOISE, NOISE_OF_ROUNDING * float(rounding))  # type: ignore[arg-type]
                stage.optimizer = replace(stage.optimizer, noise=noise)
        self.gp.preconditioner = start.kept_preconditioner(self.gp.preconditioner, info)

    def _record(self, stage: Stage, earlier: int) -> None:
        report, watch = self.report, stage.watch
        report.loss = stage.value if math.isfinite(stage.value) else report.loss  # of what the parameters are
        report.trouble = stage.loss.trouble or report.trouble
        report.evaluations[stage.name] = earlier + stage.loss.evaluations
        report.seconds = self.clock.seconds()
        if watch is not None:
            report.scores = [s for s in report.scores if s[0] != stage.name]
            report.scores += [(stage.name, step, score) for step, score in watch.scores]

    def _save(self, stage: Stage) -> None:
        assert self.keeper is not None
        kept: Any = self.gp.preconditioner if stage.name == "all" else "as asked"
        if isinstance(kept, Landmarks):
            kept = list(kept.indices)
        elif kept is not None:
            kept = "as asked"
        loss, watch = stage.loss, stage.watch
        self.keeper.save(
            {
                "about": self.about,
                "stage": stage.name,
                "state": stage.state.plain(),
                "reason": stage.reason,
                "best": (loss.best, loss.best_x),
                "watch": None if watch is None else watch.plain(),
                "on_grid": None if stage.on_grid is None else stage.on_grid.plain(),
                "preconditioner": kept,
                "noise": getattr(stage.optimizer, "noise", None),
                "report": self.report.plain(),
            }
        )

    def _restore(self, stage: Stage, saved: dict[str, Any]) -> None:
        kind = AdamState if "first" in saved["state"] else LBFGSState
        stage.state = kind(**saved["state"])
        if isinstance(stage.optimizer, LBFGS):
            stage.optimizer = replace(stage.optimizer, noise=saved["noise"])
        stage.reason = saved["reason"] if saved["reason"] in FINAL else None
        stage.loss.best, stage.loss.best_x = saved["best"]
        more = stage.reason is None and stage.state.count < stage.optimizer.steps
        if stage.watch is not None and saved["watch"] is not None:
            held_out, on_grid = stage.watch.held_out, saved.get("on_grid")
            stage.watch = Watch(held_out, **saved["watch"])
            stage.on_grid = None if on_grid is None else Watch(held_out, **on_grid)
            if more and stage.on_grid is not None:
                stage.watch, stage.on_grid = stage.on_grid, None


def _watch(held_out: HeldOut | None) -> Watch | None:
    return None if held_out is None else Watch(held_out)


def _about(held_out: HeldOut | None) -> Any:
    if held_out is None:
        return None
    return checksum(held_out.X), checksum(held_out.y), held_out.every, held_out.patience, held_out.rows


def _warn_of_start(stage: Stage) -> None:
    if stage.state is None:
        warnings.warn(
            f"stage {stage.name!r} of fit changed nothing: its first value is not finite, and the parameters are as "
            f"they were; start from others ({stage.loss.trouble})",
            ConvergenceWarning,
            stacklevel=caller_level(),
        )


def _mean(mean: Any, dtype: torch.dtype) -> Any:
    """A mean for points in float64: a plain function gets them in the dtype of the data, which it was written for."""
    return mean if isinstance(mean, torch.nn.Module) else lambda X: mean(X.to(dtype))


def _curvature(gp: ExactGP, earlier: Fit | None) -> list[Any]:
    pairs = [] if earlier is None else earlier.curvature
    size = flat(trainable(gp)).numel()
    if any(s.numel() != size for s, _ in pairs):
        raise OperandError(
            f"earlier is the report of a fit of {pairs[0][0].numel()} parameters and this process trains {size}; give "
            "that of a fit of the same ones, or leave it out"
        )
    return pairs


def _check_ahead(gp: ExactGP, X: Tensor, y: Tensor, objective: Any, from_curve: bool, held_out: HeldOut | None) -> None:
    """Refuse before any work what only stage "all" (its ``objective``, ``from_curve``) or a score would refuse."""
    if isinstance(objective, LeaveOneOut) and not isinstance(gp.solver, Direct):
        with torch.no_grad():
            size = gp.residual(X, y).shape[0]
        if size > DENSE_UP_TO:
            raise OperandError(
                f"LeaveOneOut() of a covariance of size {size} needs Cholesky in stage 'all', which solver=Auto() does "
                f"up to {DENSE_UP_TO}: give the process solver=Direct(), or leave that stage out with steps=0"
            )
    if from_curve:
        start.check_noise(gp)
    noise = gp.noise_model
    if held_out is not None and isinstance(noise, FixedNoise) and noise.value.ndim and noise.new_value is None:
        raise OperandError(
            "validation scores new observations, and FixedNoise with one variance per observation knows none for "
            "them: give FixedNoise(value, new=...), or leave validation out"
        )


def _optimizer(optimizer: Optimizer | None, steps: int, lr: float | None) -> Optimizer:
    if optimizer is None:
        return LBFGS(steps) if lr is None else Adam(steps, lr)
    if not isinstance(optimizer, (Adam, LBFGS)):
        raise OperandError(f"optimizer={optimizer!r}; expected LBFGS(steps), Adam(steps, lr), or None")
    if lr is not None:
        raise OperandError(f"lr={lr} came with optimizer={optimizer}; give the step size to the optimizer")
    return optimizer


__all__ = ["Fit", "fit"]
