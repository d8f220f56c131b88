"""Gradients in what a callable f closes over, such as the exponent of a fractional power.

A value is linear in what f returns at the Ritz values, whose derivative autograd knows: a copy of the value is formed
from it on a graph, with the space held fixed, and becomes one more input of the computation, whose gradient is the
cotangent of the value. It is the derivative of the computed value, which converges as fast as the value does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..errors import OperandError
from ..pairing import Cotangents, Rule, Run
from .scalar import Custom, ScalarFunction

PROBES = (0.7, 1.0, 1.9)  # where f is looked at; at 1 alone every power is the same


def is_foreign(f: ScalarFunction) -> bool:
    """Whether f runs code that is not ritz's, which may read anything."""
    inner = getattr(f, "f", None)  # of functions made of others
    if isinstance(inner, ScalarFunction):
        return is_foreign(inner)
    return isinstance(f, Custom) or type(f).__module__.split(".")[0] != "ritz"


def closes_over(f: ScalarFunction, device: torch.device) -> bool:
    """Whether f reads tensors that require grad, as far as a few values tell."""
    if not is_foreign(f):
        return False
    with torch.enable_grad():
        return f(torch.tensor(PROBES, dtype=torch.float64, device=device)).requires_grad


def refuse_closures(functions: Iterable[ScalarFunction], device: torch.device, method: object) -> None:
    """Raise where a method would leave out the gradients in what f closes over."""
    if torch.is_grad_enabled() and any(closes_over(f, device) for f in functions):
        raise OperandError(
            f"f reads tensors that require grad, to which gradients by {method!r} do not go; expected Lanczos with a "
            "basis, Arnoldi or Auto(), or an f that reads detached tensors"
        )


def no_rule(run: Run) -> Rule:
    """The rule of a run without gradients in its operator and its inputs so far."""
    none: list[Tensor | None] = [None] * len(run.inputs)
    return lambda *_: Cotangents([], none)


def bind(
    run: Run, functions: Sequence[ScalarFunction], copy: Callable[[int], Tensor], points: Tensor | None = None
) -> Callable[[Rule], Rule]:
    """Make copies of the values inputs of the run where f closes over tensors that require grad.

    Args:
        copy: the value of a function as a tensor operation on what the function returns, with its number.
        points: where the functions have been evaluated; None takes a few of no importance.

    Returns:
        What makes of the rule of the run one that serves these inputs too, and refuses an f that has changed since.
    """
    if not run.records or not any(map(is_foreign, functions)):
        return lambda rule: rule
    device = run.A.device
    where = torch.tensor(PROBES, dtype=torch.float64, device=device) if points is None else points
    seen = [(f, f(where).detach().clone()) for f in functions if is_foreign(f)]
    index = [i for i, f in enumerate(functions) if closes_over(f, device)]
    with torch.enable_grad():
        run.inputs = (*run.inputs, *(copy(i) for i in index))

    def extend(rule: Rule) -> Rule:
        def extended(*cotangents: Tensor | None) -> Cotangents:
            for f, before in seen:
                if not torch.allclose(f(where), before, rtol=1e-8, atol=0.0, equal_nan=True):
                    raise RuntimeError(
                        "f has changed between the forward pass and backward (a tensor or number that it reads was "
                        "changed in place?): change a copy, or call backward first"
                    )
            found = rule(*cotangents)
            return Cotangents(found.pairs, [*found.inputs, *(cotangents[i] for i in index)])

        return extended

    return extend
