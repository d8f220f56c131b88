"""Settings of the optimizers that are values: schedules, clipping, the choice of structures, the fallback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..curvature import EmpiricalFisher, Expand, PerExample
from ..curvature.sharing import LossTerms, WeightSharing
from ..curvature.statistics import Statistics
from ..errors import OperandError
from ..operators.structured import Dense, Hierarchical, Structure
from .inverse_free import LargestEntry, SpectralNorm


@dataclass(frozen=True)
class Every:
    """Update the factors every ``interval`` steps, the first one included."""

    interval: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.interval, int) or self.interval < 1:
            raise OperandError(f"Every({self.interval!r}); expected a whole number of steps, at least 1")

    def __call__(self, step: int) -> bool:
        """Whether the step (counted from 0) is an update step."""
        return step % self.interval == 0


@dataclass(frozen=True)
class EarlyDense:
    """Update every step at first, then less and less often, up to every ``maximum`` steps.

    The gap after step t is min(max(⌊log₄(t + 1)⌋, 1), maximum): every step to about 15, every second to about 63. The
    factors start at the identity, and training is slow until they have adapted; this shortens that time at a cost that
    vanishes. Used by Lin et al. 2024 (inverse-free Shampoo).
    """

    maximum: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.maximum, int) or self.maximum < 1:
            raise OperandError(f"EarlyDense({self.maximum!r}); expected a whole number of steps, at least 1")

    def gap(self, step: int) -> int:
        """Steps from the update at ``step`` to the next one."""
        return min(max(_power(step), 1), self.maximum)

    def __call__(self, step: int) -> bool:
        """Whether the step (counted from 0) is an update step; a pure function, so that a resumed run agrees."""
        # The gap is constant between powers of four: step back to the update that opened this range.
        due = 0
        for k in range(_power(step) + 1):
            end, gap = 4 ** (k + 1) - 1, min(max(k, 1), self.maximum)
            if step < end:
                return (step - due) % gap == 0
            due += -(-(end - due) // gap) * gap  # the first update at or after `end`
            if due > step:
                return False
        return due == step


def _power(step: int) -> int:
    """⌊log₄(step + 1)⌋, in whole numbers."""
    return ((step + 1).bit_length() - 1) // 2


Schedule = Callable[[int], bool]


def schedule(given: int | Schedule) -> Schedule:
    """The rule behind ``update_interval``."""
    if isinstance(given, int) and not isinstance(given, bool):
        return Every(given)
    if callable(given):
        return given
    raise OperandError(f"update_interval={given!r}; expected an int, EarlyDense(...) or a callable step -> bool")


@dataclass(frozen=True)
class NormClip:
    """Scale the natural gradient down to this norm, over all layers together."""

    maximum: float

    def __call__(self, squared_norm: float, inner: float, lr: float) -> float:
        """The factor, from ‖N‖², ⟨N, G⟩ and the learning rate."""
        return min(1.0, self.maximum / (squared_norm**0.5 + 1e-30))


@dataclass(frozen=True)
class KLClip:
    """Scale the natural gradient so that lr²⟨N, G⟩, twice the predicted KL divergence, is at most ``maximum``."""

    maximum: float = 1e-3

    def __call__(self, squared_norm: float, inner: float, lr: float) -> float:
        """The factor, from ‖N‖², ⟨N, G⟩ and the learning rate."""
        return min(1.0, (self.maximum / max(lr * lr * inner, 1e-30)) ** 0.5)


@dataclass(frozen=True)
class AdamW:
    """Who trains the parameters that no rule covers: ``torch.optim``'s AdamW, with a learning rate of its own.

    They are a parameter group of their own, so that learning-rate schedules scale both.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass(frozen=True)
class DenseBelow:
    """Dense factors up to a size, another structure above: what a d×d factor costs is d³ per update."""

    size: int = 512
    otherwise: Structure = field(default_factory=lambda: Hierarchical(15, 15))

    def __call__(self, d: int) -> Structure:
        """The structure of a factor of size d."""
        return Dense() if d <= self.size else self.otherwise


Choice = Structure | Callable[[int], Structure]
Structures = Choice | tuple[Choice, Choice]


def _of_size(choice: Any, d: int) -> Any:
    # A class of structures is callable too, and no rule.
    by_size = callable(choice) and not isinstance(choice, (Structure, type))
    return choice(d) if by_size else choice


def choose(structures: Structures, d_in: int, d_out: int) -> tuple[Structure, Structure]:
    """The structures of the input factor and the output factor of a layer."""
    pair = structures if isinstance(structures, (tuple, list)) else (structures, structures)
    if len(pair) != 2:
        raise OperandError(
            f"structures has {len(pair)} entries; expected one structure for both factors, or a pair "
            "(input factor, output factor)"
        )
    chosen = tuple(_of_size(c, d) for c, d in zip(pair, (d_in, d_out)))
    for c in chosen:
        if not isinstance(c, Structure):
            raise OperandError(
                f"structures names {c!r}; expected values such as Dense(), Diagonal(), Hierarchical(15, 15), or a "
                "rule from a factor's size to one of them"
            )
    return chosen  # type: ignore[return-value]


@dataclass(frozen=True)
class Settings:
    """The settings of one parameter group that are not plain numbers; those are in the group itself."""

    structures: Structures = field(default_factory=DenseBelow)
    update_interval: Schedule = field(default_factory=Every)
    weight_sharing: WeightSharing = field(default_factory=Expand)
    loss_terms: LossTerms = field(default_factory=PerExample)
    statistics: Statistics = field(default_factory=EmpiricalFisher)
    lr_cov: Callable[[int], float] | None = None
    curvature_dtype: torch.dtype | None = None
    clip: NormClip | KLClip | None = None
    size: LargestEntry | SpectralNorm = field(default_factory=LargestEntry)
    fallback: AdamW = field(default_factory=AdamW)
    row_form: bool | None = None
    compensate: bool = True
    sum_per_term: bool = False  # for sum losses, divide the output factor by the number of loss terms (Lin et al. 2023)
    rule: Any = None  # what an optimizer keeps for itself, such as the form of KFAC's inverse
