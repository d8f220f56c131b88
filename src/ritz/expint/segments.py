"""The memory mode: some states are kept, and backward makes the steps between two of them anew.

One node of the graph stands for the whole solution. Its forward pass runs without a graph and notes the steps that were
accepted and the tensors that func, linear and jacobian were seen to depend on; its backward goes through the segments
from the last to the first, repeats the steps of each with a graph, and differentiates that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError, TransformError
from ..numerics import Autocast, in_transform, under_autocast, user_autocast
from ..operators.capture import nested
from ..pairing import _Refuse
from .interpolate import Piece
from .march import Clock, Outputs, replay
from .steppers import Fixed
from .system import System
from .watch import Found, refuse_hidden


@dataclass(frozen=True)
class Checkpoints:
    """How many states the memory mode keeps; the graph of the steps between two of them is made anew in backward.

    Args:
        number: at most that many states; None keeps about the square root of the number of steps, between 0.7 and 1.5
            times it, which holds for the steps of a segment too.
        memory_budget: bytes for these states instead, at least one of them; the steps of one segment come on top.

    Every step is made twice, so that forward and backward together cost about a third more. The gradient is the same to
    rounding. Raises in backward where the steps come out differently the second time, as with dropout.
    """

    number: int | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("checkpoints", self.number), ("memory_budget", self.memory_budget)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise OperandError(f"{name}={value!r}; expected a whole number of states (of bytes), at least 1")
        if self.number is not None and self.memory_budget is not None:
            raise OperandError(f"{self!r} has both a number and a budget; expected one of them")

    def full(self, states: Sequence[Tensor], stride: int) -> bool:
        """Whether every other one of the states, kept every ``stride`` steps, is to be dropped."""
        most = self.number if self.number is not None else 2 * stride
        if self.memory_budget is not None:
            most = self.memory_budget // max(1, states[0].numel() * states[0].element_size())
        return len(states) > most


@dataclass
class Kept:
    """States at multiples of a stride that doubles whenever there are too many: their number need not be foreseen."""

    checkpoints: Checkpoints
    states: list[Tensor] = field(default_factory=list)
    stride: int = 1
    count: int = 0

    def offer(self, y: Tensor) -> None:
        """The state after ``count`` steps."""
        if self.count % self.stride == 0:
            self.states.append(y)
            while len(self.states) > 1 and self.checkpoints.full(self.states, self.stride):
                self.states, self.stride = self.states[::2], 2 * self.stride
        self.count += 1


@dataclass
class Plan:
    """What backward needs beside the tensors that the graph saves."""

    system: System
    method: Fixed
    numbers: list[float]
    steps: list[tuple[float, float]]
    kept: Kept
    found: Found
    values: dict[int, Tensor]
    last: Tensor
    autocast: dict[str, Autocast] = field(default_factory=user_autocast)  # of the forward pass: backward has another


def run(
    system: System,
    method: Fixed,
    pieces: Iterator[Piece],
    t: Tensor,
    numbers: list[float],
    checkpoints: Checkpoints,
) -> tuple[dict[int, Tensor], list[tuple[float, float]]]:
    """The solution at the output times along ``pieces`` (not yet begun), with the graph of one node.

    Returns:
        Values by index of the output time, without index 0, and the steps.
    """
    if in_transform():
        raise TransformError(
            "checkpoints= inside of a torch.func transform is not served; use torch.autograd.grad or backward, or "
            "checkpoints=None"
        )
    wanted = torch.is_grad_enabled()
    system.watched = Found() if wanted else None
    outputs = Outputs(system, Clock(t[0].detach(), numbers[0]), t.detach(), numbers)
    kept, steps, last = Kept(checkpoints), [], system.y0.detach()
    try:
        with torch.no_grad():
            for piece in pieces:
                if wanted:
                    kept.offer(last)
                outputs.take(piece)
                steps.append((piece.start, piece.end))
                last = piece.value
    finally:
        found, system.watched = system.watched, None
    if found is None or not steps:
        return outputs.found, steps
    if system.linear is not None:
        zero = torch.zeros(system.n, 1, dtype=system.dtype, device=system.device)
        _, bound = system.linear.capture(zero)
        if not bound.deferrable:
            found.hidden = True
        found.tensors |= {id(x): x for x in bound.tensors() if x.requires_grad}
    refuse_hidden(found)
    tensors = tuple(found.tensors.values())
    if not any(x.requires_grad for x in (system.y0, t, *tensors)):
        return outputs.found, steps
    plan = Plan(system, method, numbers, steps, kept, found, outputs.found, last)
    order = sorted(outputs.found)
    values = _Segments.apply(plan, order, system.y0, t, *tensors)
    return dict(zip(order, values, strict=True)), steps


class _Segments(torch.autograd.Function):
    """Finished values; backward repeats the steps from the kept states."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, order: list[int], y0: Tensor, t: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        values = tuple(plan.values[i].clone() for i in order)
        plan.values = {}
        ctx.plan, ctx.order = plan, order
        ctx.save_for_backward(y0, t, *tensors)
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        y0, t, *tensors = ctx.saved_tensors  # raises if one of them was changed in place
        plan.found.check_unchanged()
        given = {i: g for i, g in zip(ctx.order, cotangents, strict=True) if g is not None}
        needs = ctx.needs_input_grad[2:]
        with torch.enable_grad(), under_autocast(plan.autocast, y0.device):
            grads = _backward(plan, t, [x for x, need in zip(tensors, needs[2:]) if need], given, needs[1])
        y_bar, t_bar, rest = grads
        found = iter(rest)
        out = [y_bar if needs[0] else None, t_bar, *(next(found) if need else None for need in needs[2:])]
        if torch.is_grad_enabled():
            others = (y0, t, *tensors, *cotangents)
            out = [None if g is None else _Refuse.apply("odeint", g, *others) for g in out]
        return (None, None, *out)


def _backward(
    plan: Plan, t: Tensor, tensors: Sequence[Tensor], given: dict[int, Tensor], with_time: bool
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Cotangents of y0, t and the captured tensors, from the last segment to the first."""
    kept, stride = plan.kept, plan.kept.stride
    total: list[Tensor | None] = [None] * (1 + len(tensors))
    y_bar: Tensor | None = None
    after = plan.last
    for k in reversed(range(len(kept.states))):
        steps = plan.steps[k * stride : (k + 1) * stride]
        y = kept.states[k].detach().requires_grad_()
        time = t.detach().requires_grad_(with_time)
        outputs = Outputs(plan.system, Clock(time[0], plan.numbers[0]), time, plan.numbers)
        outputs.skip(*steps[0])
        end = y
        for piece in replay(plan.system, plan.method, Clock(time[0], plan.numbers[0]), y, steps):
            outputs.take(piece)
            end = piece.value
        _check_same(end.detach(), after)
        pairs = [(value, given[i]) for i, value in outputs.found.items() if i in given]
        if y_bar is not None:
            pairs.append((end, y_bar))
        pairs = [(value, g) for value, g in pairs if value.requires_grad]
        wanted = [time, *tensors] if with_time else list(tensors)
        y_bar, *found = _differentiate(pairs, [y, *wanted], tensors)
        if not with_time:
            found = [None, *found]
        total = [b if a is None else (a if b is None else a + b) for a, b in zip(total, found, strict=True)]
        after = kept.states[k]
    return y_bar, total[0], total[1:]


def _differentiate(
    pairs: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor | None]:
    """Partial derivatives with respect to ``wanted``, also where some of ``tensors`` are computed from others.

    The engine would go on from a tensor to those that it was computed from, and count their part twice: the graph
    around this node adds it. So such a tensor takes its cotangent and hands on a zero.
    """
    if not pairs:
        return [None] * len(wanted)
    values, cotangents = zip(*pairs, strict=True)
    inner = [x for x in tensors if not x.is_leaf] if nested(tuple(tensors)) else []
    caught: dict[int, Tensor] = {}

    def stop(x: Tensor) -> Any:
        def hook(g: Tensor) -> Tensor:
            caught[id(x)] = g
            return torch.zeros_like(g)

        return x.register_hook(hook)

    handles = [stop(x) for x in inner]
    try:
        grads = torch.autograd.grad(values, wanted, cotangents, allow_unused=True, retain_graph=bool(inner))
    finally:
        for handle in handles:
            handle.remove()
    return [caught.get(id(x), g) for x, g in zip(wanted, grads, strict=True)]


def _check_same(end: Tensor, before: Tensor) -> None:
    gap, size = float((end - before).norm()), float(before.norm())
    if gap > torch.finfo(end.dtype).eps ** 0.5 * size:
        raise RuntimeError(
            f"odeint: the steps that backward made anew end {gap / size:.1e} away from those of the forward pass; func "
            "is not a function of t and y (dropout, a generator, a state that it changes): leave checkpoints=None"
        )
