"""What every curvature optimizer shares: groups, hooks, statistics, the step, the state.

A rule (one file each) says how a factor is whitened before its outer product is taken, how the factors are updated,
and how they are applied to a gradient: the four abstract methods of :class:`CurvatureOptimizer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..curvature import Capture, OneHot
from ..curvature.losses import Loss
from ..curvature.statistics import EmpiricalFisher
from ..errors import OperandError
from ..numerics import full_precision
from ..uncompiled import uncompiled
from .batching import Move, batches, clip
from .collect import Collector, normalised
from .compensated import LOW, compensated_step
from .fallback import adamw_step
from .groups import Plan, plan_groups
from .layer import MatrixLayer
from .reduction import Reduction
from .report import Report, describe
from .rows import from_rows
from .scaling import LossScale
from .settings import Settings
from .state import Stateful


class CurvatureOptimizer(Stateful, torch.optim.Optimizer, ABC):
    """Base of the optimizers that precondition with Kronecker factors; not used by itself.

    A subclass gives ``whiten`` (what is collected of a use), ``update`` (factors from normalised statistics),
    ``apply_factor`` (one side of the preconditioner) and ``vector_step`` (the diagonal rule).
    """

    # GradScaler then tells the loss scale at the step instead of unscaling `.grad` itself.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        defaults: dict[str, Any],
        settings: Settings,
        *,
        model: nn.Module | None,
        strict: bool,
        grad_scale: Any,
        process_group: Any,
        foreach: bool | None,
    ) -> None:
        given = model_or_params if model is None and isinstance(model_or_params, nn.Module) else model
        if isinstance(model_or_params, nn.Module):
            groups: list[Any] = [{"params": list(model_or_params.parameters())}]
        else:
            groups = list(model_or_params)
            if groups and not isinstance(groups[0], dict):
                groups = [{"params": groups}]
        self._reduction = Reduction.of(given, process_group)
        self._model = given.module if isinstance(given, DistributedDataParallel) else given
        self._strict, self._foreach = strict, foreach
        self._scale = LossScale(grad_scale)
        self._settings: list[Settings | None] = []  # None for a fallback group
        self._layers: list[MatrixLayer] = []
        self._vectors: list[list[nn.Parameter]] = []
        self._names: dict[nn.Parameter, tuple[str, str]] = {}
        self._base, self._deferred = settings, not isinstance(settings.statistics, EmpiricalFisher)
        self._where: dict[nn.Parameter, tuple[torch.device, torch.dtype]] = {}
        self._capture: Capture | None = None
        plans = [plan for g in groups for plan in self._plan(g)]
        super().__init__([plan.group for plan in plans], {**defaults, "step": 0, "terms": 1.0})
        for plan in plans:
            self._enter(plan)
        self._attach()

    # -- what a rule gives --------------------------------------------------------------------------------------------

    @abstractmethod
    def whiten(self, layer: MatrixLayer, side: int, rows: Tensor | OneHot) -> Tensor:
        """Π(U Uᵀ) in flat storage; U (d, m) holds the whitened rows of inputs (side 0) or output gradients (side 1)."""

    @abstractmethod
    def update(self, layers: list[MatrixLayer], statistics: list[tuple[Tensor, Tensor]], group: dict) -> None:
        """Update the factors of layers of equal shape and structure from their normalised statistics (H_K, H_C)."""

    @abstractmethod
    def apply_factor(self, layers: list[MatrixLayer], side: int, X: Tensor, overwrite: bool = False) -> Tensor:
        """P_K X (side 0) or P_C X (side 1) for X (d, m), or (L, d, m) for L layers of equal shape.

        With ``overwrite`` the result may be written over X.
        """

    @abstractmethod
    def vector_step(
        self,
        vectors: list[nn.Parameter],
        gradients: list[Tensor],
        group: dict,
        settings: Settings,
        terms: float,
        due: bool,
    ) -> list[Tensor]:
        """Natural gradients of parameters with a diagonal factor each; ``terms`` scales g² to a sum over loss terms."""

    @abstractmethod
    def apply_cost(self, layer: MatrixLayer, side: int, width: int) -> float:
        """Multiplications of one side of the preconditioner times a block of that width."""

    @abstractmethod
    def factor_bytes(self, layer: MatrixLayer) -> int:
        """Bytes of a layer's factors in the state, without the momentum of its weight."""

    @abstractmethod
    def vector_copies(self, group: dict) -> int:
        """How many tensors of its shape a vector's factor has in the state."""

    def precondition(self, layers: list[MatrixLayer], G: Tensor, overwrite: bool = False) -> Tensor:
        """The natural gradient P_C G P_K of G (d_out, d_in), or (L, d_out, d_in), which may be written over G."""
        return self.apply_factor(layers, 0, self.apply_factor(layers, 1, G, overwrite).mT, True).mT

    def two_sided(self, layer: MatrixLayer) -> bool:
        """Whether the preconditioner is a product of two sides, so that captured rows can replace the gradient."""
        return True

    # -- groups -------------------------------------------------------------------------------------------------------

    def _plan(self, group: dict[str, Any]) -> list[Plan]:
        return plan_groups(group, self._base, self._model, strict=self._strict)

    def _enter(self, plan: Plan) -> None:
        index = len(self._settings)
        self._settings.append(plan.settings)
        self._vectors.append(plan.vectors)
        self._names.update(plan.names)
        for found in plan.matrices:
            assert plan.settings is not None
            self._layers.append(MatrixLayer(found.name, found.sites, plan.bias_of(found), index, plan.settings))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own; those without a rule go to a fallback group beside it."""
        if self._capture is None:  # inside torch's constructor, which gets groups that are planned already
            super().add_param_group(param_group)
            return
        plans = self._plan(param_group)
        for plan in plans:
            plan.group.setdefault("step", max(g["step"] for g in self.param_groups))
            plan.group.setdefault("terms", self.param_groups[0]["terms"])
            super().add_param_group(plan.group)
            self._enter(plan)
        self._attach()

    def _attach(self) -> None:
        """(Re)place the hooks."""
        if self._capture is not None:
            self._capture.remove()
        self._collector = Collector(self, self._layers)
        sites = [site for layer in self._layers for site in layer.sites]
        self._capture = Capture(sites, self._collector, deferred=self._deferred)

    def remove_hooks(self) -> None:
        """Take all hooks off the model; the optimizer collects no statistics from then on."""
        if self._capture is not None:
            self._capture.remove()

    def paused(self) -> Any:
        """Context in which passes through the model are not training and are not collected."""
        assert self._capture is not None
        return self._capture.paused()

    def report(self) -> Report:
        """One row per parameter: layer, rule, structures, shapes, bytes of state; prints as a table."""
        return describe(self)

    def cache_bytes(self) -> int:
        """Bytes of products of factors that are kept between updates and not part of the state."""
        return sum(t.numel() * t.element_size() for layer in self._layers for t in layer.cache.values())

    # -- statistics ---------------------------------------------------------------------------------------------------

    def due(self, group: int) -> bool:
        """Whether the step to come updates the factors of a group."""
        settings = self._settings[group]
        return settings is not None and settings.update_interval(self.param_groups[group]["step"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset gradients and, with them, the statistics that were collected beside them.

        Forward passes whose backward pass is still to come are kept: some training loops call this between the two.
        """
        super().zero_grad(set_to_none)
        for layer in self._layers:
            layer.forget()

    def accumulate_curvature(self, outputs: Tensor, loss: Loss) -> int:
        """Collect Monte-Carlo or Gauss–Newton statistics from outputs (..., C) of a forward pass; ``.grad`` stays.

        Needed once per forward pass where ``statistics`` is not EmpiricalFisher(), before ``backward``. Outside of
        update steps it returns at once. Returns the number of layer uses that were reached.
        """
        assert self._capture is not None
        statistics = self._base.statistics
        if isinstance(statistics, EmpiricalFisher):
            raise OperandError("statistics=EmpiricalFisher() is collected by backward itself; accumulate_curvature is "
                               "for MonteCarloFisher() and GaussNewton()")  # fmt: skip
        if not self._capture.pending:
            return 0
        with self._collector.unscaled():
            return self._capture.backward(outputs, statistics.vectors(outputs.detach(), loss))

    def _forget(self) -> None:
        for layer in self._layers:
            layer.forget()
        if self._capture is not None:
            self._capture.pending = []

    # -- the step -----------------------------------------------------------------------------------------------------

    @uncompiled  # its branches depend on what the hooks collected; a compiled caller runs it as it is
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; ``closure`` evaluates the loss again and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._scale.found_inf(self):
            with full_precision():
                self._step(self._scale.unscale(self))
        self._forget()
        return loss

    def _step(self, scale: float | None) -> None:
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                self.settle(p, index)
        terms = self._update_factors(scale)
        for index, (settings, group) in enumerate(zip(self._settings, self.param_groups)):
            if settings is None:
                adamw_step(self, group)
                continue
            moves: Iterable[Move] = chain(
                self._matrix_moves(index, group), self._vector_moves(index, group, settings, terms)
            )
            if settings.clip is not None:  # looks at all of them together
                moves = list(moves)
                clip(moves, settings.clip, float(group["lr"]))
            for move in moves:
                self._move(move, group, settings.compensate)
                del move  # its memory serves the next one
        for group in self.param_groups:
            group["step"] += 1

    def _update_factors(self, scale: float | None) -> float:
        """Normalise, reduce and use what was collected; returns the number of loss terms (1 where nobody counted).

        It is kept in the groups, so that a resumed run knows it on a step that does not count anew.
        """
        due = [self.due(i) for i in range(len(self._settings))]
        layers = [layer for layer in self._layers if due[layer.group]]
        if not layers:
            return self.param_groups[0]["terms"]
        statistics = normalised(self, layers, scale)
        if self._deferred and not statistics.of and self._capture is not None and self._capture.pending:
            raise OperandError(
                f"this is an update step, and statistics={self._base.statistics} got no outputs; call "
                "optimizer.accumulate_curvature(outputs, loss) after the forward pass"
            )
        for group in self.param_groups:
            group["terms"] = statistics.terms
        for batch in batches([layer for layer in layers if id(layer) in statistics.of], self._foreach):
            self.update(batch, [statistics.of[id(layer)] for layer in batch], self.param_groups[batch[0].group])
            for layer in batch:
                layer.cache.clear()
        return statistics.terms

    def _matrix_moves(self, index: int, group: dict[str, Any]) -> Iterator[Move]:
        """Natural gradients of the matrices of a group, one after the other, so that the next can have its memory."""
        ready = [layer for layer in self._layers if layer.group == index and layer.weight.grad is not None]
        for batch in batches(ready, self._foreach):
            if len(batch) == 1:
                yield self._matrix_move(batch[0])
                continue
            gradients = [layer.gather([p.grad for p in layer.parameters]) for layer in batch]
            found = [from_rows(self, layer, G) for layer, G in zip(batch, gradients)]
            rest = [i for i, N in enumerate(found) if N is None]
            if rest:
                G = torch.stack([gradients[i] for i in rest])
                for i, N in zip(rest, self.precondition([batch[i] for i in rest], G, True).unbind()):
                    found[i] = N
            for layer, N, G in zip(batch, found, gradients):
                assert N is not None
                yield Move(layer, N, G)

    def _matrix_move(self, layer: MatrixLayer) -> Move:
        G = layer.gather([p.grad for p in layer.parameters])
        N = from_rows(self, layer, G)
        if N is None:
            # Weight and bias were copied into one matrix, which may go unless clipping reads it afterwards.
            N = self.precondition([layer], G, layer.bias is not None and layer.settings.clip is None)
        return Move(layer, N, G)

    def _vector_moves(self, index: int, group: dict[str, Any], settings: Settings, terms: float) -> list[Move]:
        """Natural gradients of the vectors of a group."""
        ready = [p for p in self._vectors[index] if p.grad is not None]
        if not ready:
            return []
        gradients: list[Any] = [p.grad for p in ready]
        terms = terms if group["mean_loss"] else 1.0
        found = self.vector_step(ready, gradients, group, settings, terms, self.due(index))
        return [Move(*item) for item in zip(ready, found, gradients)]

    def _move(self, move: Move, group: dict[str, Any], compensate: bool) -> None:
        """Weight decay, momentum and the step itself."""
        target, N, lr, decay = move.target, move.natural, float(group["lr"]), group["weight_decay"]
        parameters = target.parameters if isinstance(target, MatrixLayer) else [target]
        if decay and not group["decoupled_weight_decay"]:  # the authors' form: through momentum and learning rate
            own = target.gather(parameters) if isinstance(target, MatrixLayer) else target
            N = N + decay * own
        if group["momentum"]:
            state = self.state[parameters[0]]
            if "momentum_buffer" in state:
                buffer = state["momentum_buffer"]  # one pass over memory: buffer ← N + momentum · buffer
                N = torch.add(N, buffer, alpha=group["momentum"], out=buffer)
            else:
                state["momentum_buffer"] = N = N.to(parameters[0].dtype).clone(memory_format=torch.contiguous_format)
        parts = target.split(N) if isinstance(target, MatrixLayer) else [N]
        kept = 1.0 - lr * decay if decay and group["decoupled_weight_decay"] else 1.0
        for p, part in zip(parameters, parts):
            if compensate and p.dtype in LOW:
                compensated_step(p, self.state[p], part, lr, kept)
                continue
            if kept != 1.0:
                p.mul_(kept)
            p.add_(part, alpha=-lr)
