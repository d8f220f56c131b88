"""A call whose gradient may still come: its input, kept as autograd keeps its own, and which batch it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .discover import Site

# Which backward pass runs in this thread; -1 outside of any.
backward_pass: Callable[[], int] = torch._C._current_graph_task_id
# Where torch does not tell, inputs stay as long as the graph.
_graph_is_kept: Callable[[], bool] = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class Pending:
    """A forward call of a site: input x, output of that shape.

    ``arrange`` puts the examples of x and of the output first (None: they are). ``first_row`` is where the used rows of
    a packed weight begin.
    """

    def __init__(
        self,
        site: Site,
        x: Tensor,
        shape: Sequence[int],
        arrange: Callable[[Tensor], Tensor] | None = None,
        first_row: int = 0,
    ) -> None:
        self.site, self.shape, self.first_row = site, shape, first_row
        self._arrange = arrange
        # A reentrant checkpoint computes its part of the forward pass anew inside of the backward pass, and sends a
        # backward pass of its own through it; all such parts are one batch.
        self._around = backward_pass()
        # The (empty) result owns the node with the saved input; a reference to the node alone would not.
        self._kept: Tensor | None = _Keep.apply(torch.empty(0, requires_grad=True), x.detach())

    def pair(self, g: Tensor) -> tuple[Tensor, Tensor] | None:
        """Input and output gradient, examples first; None where the input is gone with its graph."""
        if self._kept is None:
            return None
        (x,) = self._kept.grad_fn.saved_tensors
        g = g.detach().reshape(self.shape)
        return (x, g) if self._arrange is None else (self._arrange(x), self._arrange(g))

    def batch(self) -> int:
        """A number that all uses of one backward pass share."""
        return self._around if self._around >= 0 else backward_pass()

    def release(self) -> None:
        """Let the input go, unless the running backward pass keeps its graph for another one."""
        if not _graph_is_kept():
            self._kept = None


class _Keep(torch.autograd.Function):
    """Saves a tensor the way autograd saves its own, so that checkpointing and offloading apply to it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def before_views(y: Tensor) -> Tensor:
    """The tensor that holds y's numbers in y's order and was there before it.

    A module's output may be a view (a linear layer computes 3-d inputs as 2-d ones). A change of a view in place
    rewrites the history of its base, and leaves a hook on the view behind; a hook on the base stays in the graph.
    """
    base = y._base
    if base is None or not base.requires_grad or base.numel() != y.numel():
        return y
    return base if base.is_contiguous() and y.is_contiguous() else y
