"""What a stage of training is made of: the loss as a function of one flat vector, and the loop that lowers it."""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import BreakdownError, ConvergenceError, ConvergenceWarning, DomainError, NonFiniteError, OperandError
from ..result import Info, caller_level
from .adam import Adam
from .lbfgs import LBFGS

Optimizer = Adam | LBFGS
Callback = Callable[[int, float, Any], Any]
FIGURE = re.compile(r"\b(?:nan|inf)\b|\d+(?:\.\d*)?(?:e[-+]?\d+)?")  # what differs between warnings of one kind
NUMERICAL = (DomainError, NonFiniteError, BreakdownError, ConvergenceError, torch.linalg.LinAlgError)


class Objective(Protocol):
    """What is to be made large: (process, X, y) -> (value, report), the value a sum over targets."""

    def __call__(self, gp: Any, X: Tensor, y: Tensor) -> tuple[Tensor, Info]: ...


class OutOfTime(Exception):
    """The time is up before the next evaluation."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out points whose score says when to stop, and which parameters to keep.

    The score is the mean negative log predictive density of their targets given the training points, noise included:
    a posterior is made for each, which is one factorisation, or one solve and a block of solves for the variances.

    Args:
        X, y: points (n*, d) and targets as in training, in the same units.
        every: steps between two scores.
        patience: scores in a row that are no better than the best before training stops.
        rows: points to score at most, evenly spaced over those given.
    """

    X: Tensor
    y: Tensor
    every: int = 5
    patience: int = 3
    rows: int = 1000

    def __post_init__(self) -> None:
        for name in ("every", "patience", "rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OperandError(f"HeldOut({name}={value!r}); expected a whole number, at least 1")

    def checked(self, gp: Any, X: Tensor, y: Tensor) -> HeldOut:
        """The same with points (n*, d), for a process trained on (X, y) as its ``_check`` gives them.

        Raises:
            OperandError: inputs, outputs, dtype or device that are not those of the training data: targets (n*, 1)
                would be subtracted from means (n*,) without an error, and give a wrong score.
        """
        Xv, yv = gp._check(self.X, self.y)
        if (Xv.shape[1:], yv.shape[1:], Xv.dtype, Xv.device) != (X.shape[1:], y.shape[1:], X.dtype, X.device):
            raise OperandError(
                f"validation has X {tuple(Xv.shape)}, y {tuple(yv.shape)} in {Xv.dtype} on {Xv.device} and training X "
                f"{tuple(X.shape)}, y {tuple(y.shape)} in {X.dtype} on {X.device}; expected the same but for the "
                "number of points"
            )
        return replace(self, X=Xv, y=yv)

    def score(self, gp: Any, X: Tensor, y: Tensor) -> float:
        """Mean negative log predictive density of the held-out targets given (X, y); infinity at a breakdown."""
        n = self.X.shape[0]
        index = torch.linspace(0, n - 1, min(n, self.rows), dtype=torch.float64).round().long().to(self.X.device)
        try:
            with torch.no_grad():
                mean, variance = gp.condition(X, y).predict(self.X[index], noise=True)
        except NUMERICAL:
            return math.inf
        m, v, t = mean.double(), variance.double(), self.y[index].double()
        v = v.unsqueeze(1) if v.ndim < m.ndim else v  # independent outputs share their variance
        score = float((0.5 * (2 * math.pi * v).log() + (t - m).square() / (2 * v)).mean())
        return score if math.isfinite(score) else math.inf


class Loss:
    """−(objective + log prior)/n as a function of the trainable parameters in one vector, n the number of targets.

    Attributes:
        evaluations: how many there were.
        best, best_x: the lowest value seen, and where (None before there was one).
        info: the report of the last evaluation that did not break down.
        trouble: what the last breakdown said.
    """

    def __init__(self, gp: Any, objective: Objective, X: Tensor, y: Tensor, late: Callable[[], bool]) -> None:
        self.gp, self.objective, self.X, self.y, self.late = gp, objective, X, y, late
        self.parameters: list[Tensor] = trainable(gp)
        self.evaluations, self.best = 0, math.inf
        self.best_x: Tensor | None = None
        self.info: Info | None = None
        self.trouble = ""

    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        """The value at x (p,) and its gradient; (infinity, empty) at a breakdown.

        Raises:
            OutOfTime: instead of any evaluation but the first, where it is late.
        """
        if self.evaluations and self.late():
            raise OutOfTime
        self.evaluations += 1
        write(self.parameters, x)
        try:
            with torch.enable_grad():
                value, info = self.objective(self.gp, self.X, self.y)
                loss = -(value.sum() + self.gp.log_prior().to(value)) / self.y.numel()
            grads = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        except NUMERICAL as error:
            self.trouble = str(error)
            return math.inf, torch.zeros(0)
        full = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, self.parameters, strict=True)]
        self.info, number, gradient = info, float(loss.detach()), flat(full)
        if not (math.isfinite(number) and bool(torch.isfinite(gradient).all())):
            self.trouble = f"the loss came out as {number}, its gradient's norm as {float(gradient.norm())}"
            return math.inf, torch.zeros(0)
        if number < self.best:
            self.best, self.best_x = number, x
        return number, gradient


@dataclass
class Watch:
    """Held-out scores of one stage: the best, where it was, and how many in a row were no better."""

    held_out: HeldOut
    best: float = math.inf
    best_x: Tensor | None = None
    best_loss: float = math.inf
    worse: int = 0
    scores: list[tuple[int, float]] = field(default_factory=list)

    def look(self, loss: Loss, x: Tensor, value: float, step: int, X: Tensor, y: Tensor) -> bool:
        """Score the parameters x; whether patience has run out."""
        write(loss.parameters, x)
        score = self.held_out.score(loss.gp, X, y)
        self.scores.append((step, score))
        if score < self.best:
            self.best, self.best_x, self.best_loss, self.worse = score, x, value, 0
        else:
            self.worse += 1
        return self.worse >= self.held_out.patience

    def plain(self) -> dict[str, Any]:
        """Everything but the held-out points, as plain tensors and numbers."""
        return {name: value for name, value in vars(self).items() if name != "held_out"}


@dataclass
class Stage:
    """One optimizer at work on one loss.

    Attributes:
        name: "subset" or "all".
        loss, optimizer: what is lowered, and how.
        data: the points and targets that held-out scores are given.
        watch: held-out scores, or None.
        state: where the optimizer is; None before the first evaluation.
        reason: why the stage ended; None while it runs.
        on_grid: ``watch`` before a look that only the step limit asked for; None where there was none. With more steps
            there would have been no such look.
    """

    name: str
    loss: Loss
    optimizer: Any
    data: tuple[Tensor, Tensor]
    watch: Watch | None = None
    state: Any = None
    reason: str | None = None
    on_grid: Watch | None = None

    def run(self, after: Callable[[float, bool], bool], pairs: Sequence[Any] = (), *, first: bool) -> None:
        """Step until there is a reason to stop, then write the best parameters into the process.

        Args:
            after: called with (loss, whether this was a step) after the start, where ``first`` asks for it, and after
                every step; True stops.
            pairs: curvature that an earlier stage has found.
        """
        try:
            with told_once(self.name), self._in_time():
                if self.state is None:
                    start = self._begin(pairs)
                    if start is not None and first and after(start, False):
                        self.reason = "stopped"
                while self.reason is None:
                    if self.state.count >= self.optimizer.steps:
                        self.reason = "steps"
                        break
                    before = self.state.count
                    self.state, self.reason = self.optimizer.step(self.state, self.loss)
                    if self.state.count > before:
                        late = self._watched()
                        asked = after(self.state.seen, True)
                        self.reason = self.reason or ("validation" if late else "stopped" if asked else None)
        finally:
            if self.found is not None:  # at a start that breaks down nothing was changed
                write(self.loss.parameters, self.found)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        try:
            yield
        except OutOfTime:
            self.reason = "stopped"

    def _begin(self, pairs: Sequence[Any]) -> float | None:
        """The first evaluation; its value, or None at a breakdown."""
        x = flat(self.loss.parameters)
        value, gradient = self.loss(x)
        if not math.isfinite(value):
            self.reason = "start is not finite"
            return None
        self.state = self.optimizer.begin(x, value, gradient, pairs)
        if self.watch is not None:
            self.watch.look(self.loss, x, value, 0, *self.data)
        return value

    def _watched(self) -> bool:
        """Score where a score is due; whether patience has run out."""
        watch, count = self.watch, self.state.count
        if watch is None:
            return False
        due = count % watch.held_out.every == 0 or self.reason is not None
        if not due and count < self.optimizer.steps:
            return False
        if not due:
            self.on_grid = replace(watch, scores=list(watch.scores))
        return watch.look(self.loss, self.state.x, self.state.value, count, *self.data) and due

    @property
    def found(self) -> Tensor | None:
        """The best parameters (p,), by held-out score where there is one, otherwise by loss; None before any."""
        if self.watch is not None and self.watch.best_x is not None:
            return self.watch.best_x
        return self.loss.best_x

    @property
    def value(self) -> float:
        """The loss at :attr:`found`."""
        return self.loss.best if self.watch is None or self.watch.best_x is None else self.watch.best_loss


class Clock:
    """Time since a run began (an interrupted run's time included), and whether this call's share of it is over."""

    def __init__(self, max_seconds: float | None) -> None:
        self._start, self.max_seconds, self.before = time.monotonic(), max_seconds, 0.0

    def seconds(self) -> float:
        """Since the run began."""
        return self.before + time.monotonic() - self._start

    def late(self) -> bool:
        """Whether this call has had its time."""
        return self.max_seconds is not None and time.monotonic() - self._start >= self.max_seconds


def trainable(gp: torch.nn.Module) -> list[Tensor]:
    """The parameters that require grad."""
    return [p for p in gp.parameters() if p.requires_grad]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one vector (p,), in float64 on the CPU."""
    return torch.cat([t.detach().reshape(-1).double().cpu() for t in tensors])


@torch.no_grad()
def write(parameters: Sequence[Tensor], x: Tensor) -> None:
    """The inverse of :func:`flat`, into the parameters."""
    position = 0
    for p in parameters:
        p.copy_(x[position : position + p.numel()].reshape(p.shape))
        position += p.numel()


@contextmanager
def settings(gp: Any, **values: Any) -> Iterator[None]:
    """Settings of a process for the length of a stage; what was there before comes back whatever happens."""
    before = {name: getattr(gp, name) for name in values}
    try:
        for name, value in values.items():
            setattr(gp, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(gp, name, value)


class told_once:
    """Convergence warnings of a stage that differ in nothing but figures become one, the first, with their number.

    They would come at every step.
    """

    def __init__(self, stage: str) -> None:
        self.stage, self._catch = stage, warnings.catch_warnings(record=True)

    def __enter__(self) -> None:
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always", ConvergenceWarning)

    def __exit__(self, *exc: Any) -> None:
        self._catch.__exit__(*exc)
        ours = [w for w in self._caught or [] if issubclass(w.category, ConvergenceWarning)]
        for w in self._caught or []:
            if not issubclass(w.category, ConvergenceWarning):
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        kinds: dict[str, list[str]] = {}
        for text in (str(w.message) for w in ours):
            kinds.setdefault(FIGURE.sub("#", text), []).append(text)
        for texts in kinds.values():
            more = f" ({len(texts)} warnings of this kind in stage {self.stage!r} of fit)" if len(texts) > 1 else ""
            warnings.warn(f"{texts[0]}{more}", ConvergenceWarning, stacklevel=caller_level())
