"""Hooks that see, in every backward pass, the input and the output gradient of each linear layer.

A forward hook keeps the input where autograd keeps its own saved tensors, and puts a hook on the *output tensor* (a
full backward hook breaks when the next operation works in place). When its gradient arrives, a ``sink`` gets both.
So the hooks follow the computation and not the module: a module called twice reports twice, one that got no gradient
reports nothing, and under activation checkpointing the input is dropped and recomputed like all others.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..errors import OperandError
from ..numerics import in_transform
from ..uncompiled import uncompiled
from .attention import Projections
from .discover import Site
from .pending import Pending, backward_pass, before_views


class Sink(Protocol):
    """What takes the captured pairs."""

    def wanted(self, site: Site, entries: int | None) -> bool:
        """Whether to capture this call, whose output has that many entries (None: not known yet)."""

    def used(self, site: Site, x: Tensor, g: Tensor, y: Sequence[int], first_row: int, again: bool, batch: int) -> None:
        """One use of a site: input x, gradient g of its output of shape y, examples first.

        ``first_row``: where the used rows of a packed weight begin. ``again``: a further gradient of a use whose
        input was counted already. ``batch``: equal for uses that belong to one backward pass.
        """


class Capture:
    """The hooks on a set of sites.

    Args:
        sites: modules to watch.
        sink: gets every pair (input, output gradient) of a backward pass.
        deferred: True leaves the gradients to :meth:`backward`, which takes the vectors to propagate (Monte-Carlo and
            Gauss–Newton statistics); the ordinary backward pass then reports nothing.

    The hooks do nothing under ``no_grad``, in :meth:`paused`, inside a torch.func transform, in calls with another
    weight than the site's (``torch.func.functional_call``) and where the sink does not want a site. They are removed by
    :meth:`remove`, are not copied or pickled with the model, and keep neither the sink nor, after the backward pass,
    an input alive. With ``deferred``, the graph of a forward pass lives until its :meth:`backward`.
    """

    def __init__(self, sites: Sequence[Site], sink: Sink, *, deferred: bool = False) -> None:
        self.sink, self.deferred = sink, deferred
        self.pending: list[GradientEdge] = []
        self._paused = 0
        self._vector: int | None = None  # which vector `backward` propagates now
        self._handles: list[Any] = []
        attention: dict[int, list[Site]] = {}
        for site in sites:
            if isinstance(site.module, nn.MultiheadAttention):
                attention.setdefault(id(site.module), []).append(site)
            else:
                hook = _Hook(self, [site], "called")
                self._handles.append(site.module.register_forward_hook(hook, with_kwargs=True))
        for own in attention.values():
            before, after = _Hook(self, own, "enter"), _Hook(self, own, "leave")
            after.partner = before
            self._handles.append(own[0].module.register_forward_pre_hook(before))
            self._handles.append(own[0].module.register_forward_hook(after, always_call=True))

    def remove(self) -> None:
        """Take all hooks off the modules; what is on its way in a graph is not reported any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.pending = []
        self._paused += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No capture inside, of forward and of backward passes: for what is not training, such as input gradients."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def active(self, site: Site, entries: int | None) -> bool:
        """Whether a call of this site is captured now."""
        return not self._paused and torch.is_grad_enabled() and not in_transform() and self.sink.wanted(site, entries)

    @property
    def listening(self) -> bool:
        """Whether gradients that arrive now are reported."""
        return not self._paused and (not self.deferred or self._vector is not None)

    def tap(
        self, site: Site, x: Tensor, y: Tensor, arrange: Callable[[Tensor], Tensor] | None = None, first_row: int = 0
    ) -> None:
        """Watch one product: its input x and its output y."""
        if not y.requires_grad:
            return
        call, own = Pending(site, x, y.shape, arrange, first_row), weakref.ref(self)
        # The hook knows neither y, which would live as long as itself, nor the capture, which is the optimizer's.
        whole = before_views(y)
        whole.register_hook(lambda g: _arrived(own(), call, g))
        if self.deferred and backward_pass() < 0:  # a part that a checkpoint computes anew is known already
            self.pending.append(get_gradient_edge(whole))

    def report(self, call: Pending, g: Tensor) -> None:
        """Hand a pair to the sink."""
        found = call.pair(g)
        if found is not None:
            again = bool(self._vector)
            with torch.no_grad():
                self.sink.used(call.site, *found, call.shape, call.first_row, again, call.batch())

    def backward(self, outputs: Tensor, vectors: Iterator[Tensor]) -> int:
        """Propagate every vector from ``outputs`` to the captured calls and report them; returns how many there were.

        ``.grad`` is not touched and the graph is kept.
        """
        edges, self.pending = self.pending, []
        reached: set[int] = set()
        for i, vector in enumerate(vectors if edges else ()):
            self._vector = i
            try:
                found = torch.autograd.grad(outputs, edges, vector, retain_graph=True, allow_unused=True)
            finally:
                self._vector = None
            reached.update(j for j, g in enumerate(found) if g is not None)
        return len(reached)


def _arrived(capture: Capture | None, call: Pending, g: Tensor) -> None:
    """The gradient of a call: report it, and let the input go with the graph's own saved tensors."""
    try:
        if capture is not None and capture.listening:
            capture.report(call, g)
    finally:
        call.release()


class _Hook:
    """A forward hook that does not keep its capture alive, and whose copies (with a copied model) do nothing."""

    def __init__(self, capture: Capture | None, sites: list[Site], role: str) -> None:
        self._capture = weakref.ref(capture) if capture is not None else _nobody
        self._sites, self._role = sites, role
        self.modes: list[Projections] = []
        self.partner: _Hook | None = None

    def __deepcopy__(self, memo: dict) -> _Hook:
        return _Hook(None, [], self._role)

    def __reduce__(self) -> tuple:
        return _Hook, (None, [], self._role)

    @uncompiled
    def __call__(self, *args: Any) -> None:
        capture = self._capture()
        if self._role == "leave":
            if self.partner is not None and self.partner.modes:
                self.partner.modes.pop().__exit__(None, None, None)
            return
        if capture is None:
            return
        entries = args[-1].numel() if self._role == "called" and isinstance(args[-1], Tensor) else None
        active = [site for site in self._sites if capture.active(site, entries)]
        if self._role == "called" and active and active[0].module.weight is active[0].weight:
            _, inputs, kwargs, output = args
            x = inputs[0] if inputs else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                name = type(active[0].module).__name__
                raise OperandError(
                    f"{name} was called with {type(x).__name__} and gave {type(output).__name__}; its curvature rule "
                    "expects one tensor to one tensor: leave its weight out of the optimizer's parameters"
                )
            capture.tap(active[0], x, output)
        elif self._role == "enter" and active:
            by_weight = {id(site.weight): site for site in active}

            def report(weight: nn.Parameter, x: Tensor, y: Tensor, arrange: Any, first_row: int) -> None:
                if id(weight) in by_weight:
                    capture.tap(by_weight[id(weight)], x, y, arrange, first_row)

            attention: Any = active[0].module
            mode = Projections(attention, report)
            mode.__enter__()
            self.modes.append(mode)


def _nobody() -> None:
    return None
