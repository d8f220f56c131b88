"""What a fit did, as a record that prints as a few lines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..result import Info
from . import likelihood
from .start import NoiseStart

PLAIN = ("history", "loss", "stopped", "seconds", "evaluations", "scores", "accuracy", "trouble")


@dataclass
class Fit:
    """What :func:`~ritz.gp.fit` did; ``print(report)`` is a summary.

    Attributes:
        history: (stage, step, loss, seconds) per step, the loss being −(objective + log prior)/n of the stage's
            targets; an infinite loss is a breakdown that was stepped back from. Stage "all" begins with its start.
        loss: that of the parameters that were kept, on the points of the last stage that found a finite one.
        stopped: why each stage ended: "steps", "gradient" (no entry above gtol), "progress" (a step brings less than
            ftol), "line search" (no better point within rounding), "validation" (no better held-out score for a
            while), "stopped" (by the callback, or time), "start is not finite".
        seconds: wall time, that of interrupted runs included.
        evaluations: of the objective with its gradient, by stage.
        scores: (stage, step, mean negative log predictive density) of held-out points.
        optimizer: what worked on all points, where that stage ran.
        noise_start: the :class:`~ritz.gp.start.NoiseStart`, where one was asked for.
        preconditioner: the setting that stage "all" kept: pivots, or None for the plain estimate.
        standard_errors: of the log-determinant, "plain" and "preconditioned", where ``Auto()`` chose by them.
        accuracy: figures of the last likelihood: ``standard_error``, ``residual`` (the true one of the solve, relative,
            the largest over outputs), ``depth``, ``num_matvecs``, ``rounding`` and more, as it reports them.
        curvature: differences of parameters and gradients that L-BFGS saw last, for ``fit(..., earlier=report)``.
        trouble: what the last breakdown said; empty where there was none.
        info: the :class:`~ritz.result.Info` of the last likelihood of this call.
    """

    history: list[tuple[str, int, float, float]] = field(default_factory=list)
    loss: float = math.inf
    stopped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    evaluations: dict[str, int] = field(default_factory=dict)
    scores: list[tuple[str, int, float]] = field(default_factory=list)
    optimizer: Any = None
    noise_start: NoiseStart | None = None
    preconditioner: Any = None
    standard_errors: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    curvature: list[Any] = field(default_factory=list, repr=False)
    trouble: str = ""
    info: Info | None = None

    def learn(self, info: Info | None) -> None:
        """Take over a likelihood's report."""
        if info is None:
            return
        self.info, self.accuracy = info, likelihood.parts(info)
        residual = self.accuracy.pop("quadratic_residual", None)
        if residual is not None:
            self.accuracy["residual"] = residual

    def plain(self) -> dict[str, Any]:
        """What a checkpoint keeps: tuples, lists, dictionaries, numbers and strings."""
        out = {name: getattr(self, name) for name in (*PLAIN, "standard_errors")}
        start = self.noise_start
        out["noise_start"] = None if start is None else dict(vars(start))
        return out

    @classmethod
    def restore(cls, plain: dict[str, Any]) -> Fit:
        """The inverse of :meth:`plain`."""
        start = plain["noise_start"]
        return cls(**{**plain, "noise_start": None if start is None else NoiseStart(**start)})

    def __str__(self) -> str:
        lines = [f"Fit: loss {self.loss:.6g} per target after {self.seconds:.1f} s"]
        for stage, reason in self.stopped.items():
            losses = [loss for name, _, loss, _ in self.history if name == stage and math.isfinite(loss)]
            change = f", loss {losses[0]:.6g} to {min(losses):.6g}" if losses else ""
            how = f" by {self.optimizer}" if stage == "all" and self.optimizer is not None else ""
            lines.append(f"  {stage}: {self.evaluations.get(stage, 0)} evaluations{how}{change}; ended by: {reason}")
        if self.noise_start is not None:
            s = self.noise_start
            lines.append(
                f"  noise from the curve: {s.before:.4g} to {s.after:.4g}, output scale times {s.scale:.4g}, "
                f"log p + {s.gain:.4g}"
            )
        if self.standard_errors:
            pair = ", ".join(f"{name} {value:.3g}" for name, value in self.standard_errors.items())
            chosen = "plain" if self.preconditioner is None else "preconditioned"
            lines.append(f"  standard errors of the log-determinant: {pair}; kept: {chosen}")
        if self.scores:
            stage, step, score = min(self.scores, key=lambda s: s[2])
            lines.append(f"  held-out score: best {score:.6g} at step {step} of {stage!r}, {len(self.scores)} scores")
        names = ("standard_error", "residual", "depth", "num_matvecs", "rounding")
        found = [f"{n} {self.accuracy[n]:.3g}" if n in self.accuracy else "" for n in names]
        if any(found):
            lines.append(f"  last likelihood: {', '.join(f for f in found if f)}")
        if self.trouble:
            lines.append(f"  last breakdown: {self.trouble}")
        return "\n".join(lines)
