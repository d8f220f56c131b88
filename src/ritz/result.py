"""What a computation reports beside its value: products spent, accuracy reached, status with advice."""

from __future__ import annotations

import enum
import sys
import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .errors import ConvergenceError, ConvergenceWarning, OperandError

OnFailure = Literal["warn", "raise", "ignore"]


class Status(enum.Enum):
    """Outcome of an iteration. ``status.advice`` says what to do when it is not what was hoped for."""

    CONVERGED = "converged"
    FIXED = "fixed depth"
    EXHAUSTED = "Krylov space exhausted"
    MAX_STEPS = "step limit reached"
    STAGNATED = "stagnated"
    NOT_POSITIVE = "not positive definite"

    @property
    def success(self) -> bool:
        """Whether the value may be used as converged (a fixed depth is the caller's own promise)."""
        return self in (Status.CONVERGED, Status.FIXED, Status.EXHAUSTED)

    @property
    def advice(self) -> str:
        """Two next steps for the reader of a warning; empty for the successful outcomes."""
        return _ADVICE.get(self, "")


_ADVICE = {
    Status.MAX_STEPS: "allow more steps, or improve the conditioning (a preconditioner, a larger shift or noise)",
    Status.STAGNATED: "work in float64, or loosen rtol: rounding keeps the residual from falling further",
    Status.NOT_POSITIVE: "add a shift, or drop psd=True and use a method for indefinite operators (MINRES, direct)",
}


@dataclass
class Info:
    """Report that comes with a value when ``return_info=True``.

    Attributes:
        method: the method that ran, as a value that could be passed back in.
        num_matvecs: columns that went through the product, forward and adjoint together.
        depth: effective Krylov depth or iterations, the largest over columns.
        residual: error estimate per column (what it estimates is stated by the function), or None.
        standard_error: standard error of a stochastic estimate, or None where nothing was random.
        status: outcome with advice.
        backward: the report of the backward pass, filled in while it runs; None before.
        details: further figures, named in the function's docstring.
    """

    method: object
    num_matvecs: int
    depth: int
    residual: Tensor | None = None
    standard_error: Tensor | None = None
    status: Status = Status.FIXED
    backward: Info | None = None
    details: dict[str, object] = field(default_factory=dict)


class Joined(Info):
    """The report of several substeps; its ``backward`` is the sum of theirs, once they have run."""

    def __init__(self, parts: list[Info]) -> None:
        self.parts = parts
        each = [p.residual for p in parts if p.residual is not None]
        m = min((r.numel() for r in each), default=0)
        residual = torch.stack([r.reshape(-1, m).amax(0) for r in each]).sum(0) if m else parts[0].residual
        super().__init__(
            parts[0].method,
            sum(p.num_matvecs for p in parts),
            max(p.depth for p in parts),
            residual,
            status=next((p.status for p in parts if not p.status.success), parts[-1].status),
            details={"substeps": len(parts)},
        )

    @property
    def backward(self) -> Info | None:  # type: ignore[override]
        behind = [p.backward for p in self.parts if p.backward is not None]
        return Joined(behind) if behind else None

    @backward.setter
    def backward(self, _: Info | None) -> None:
        """Set by the base class to None; what the substeps say counts."""


def report(info: Info, *, what: str, target: float, on_failure: OnFailure) -> None:
    """Warn or raise when ``info.status`` is a failure; say the figures and two next steps."""
    if on_failure not in ("warn", "raise", "ignore"):
        raise OperandError(f"on_failure={on_failure!r} is not known; give 'warn', 'raise' or 'ignore'")
    if info.status.success or on_failure == "ignore":
        return
    worst = float(info.residual.max()) if info.residual is not None else float("nan")
    column = int(info.residual.argmax()) if info.residual is not None and info.residual.numel() > 1 else 0
    text = (
        f"{what}: {info.status.value} after {info.depth} steps ({info.num_matvecs} products); worst residual "
        f"{worst:.3g} (column {column}) against a target of {target:.3g}; {info.status.advice}"
    )
    if on_failure == "raise":
        raise ConvergenceError(text)
    warnings.warn(text, ConvergenceWarning, stacklevel=caller_level())


def caller_level() -> int:
    """``stacklevel`` of a warning raised in the calling function that points at the first line outside of ritz."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "ritz":
        level, frame = level + 1, frame.f_back
    return level
