"""Sums of statistics over the processes of a data-parallel run: one bucket per dtype, once per update step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import OperandError
from .layer import MatrixLayer


class Reduction:
    """Who takes part in a run whose gradients a wrapper averages over processes."""

    def __init__(self, group: Any, world: int) -> None:
        self.group, self.world = group, world

    @classmethod
    def of(cls, model: nn.Module | None, process_group: Any) -> Reduction:
        """From the wrapper, or from what the user says; refuses to guess, since ranks would drift apart silently."""
        if process_group is False or not (dist.is_available() and dist.is_initialized()):
            return cls(None, 1)
        if process_group is None and isinstance(model, DistributedDataParallel):
            process_group = model.process_group
        if process_group is None:
            world = dist.get_world_size()
            if world > 1:
                raise OperandError(
                    f"torch.distributed runs with {world} processes, and the model is not wrapped; give the optimizer "
                    "the DistributedDataParallel model, process_group=torch.distributed.group.WORLD to reduce "
                    "statistics over it, or process_group=False where every process trains a model of its own"
                )
            return cls(None, 1)
        return cls(process_group, dist.get_world_size(process_group))

    def __deepcopy__(self, memo: dict) -> Reduction:
        return self  # process groups cannot be copied

    def reduce(self, layers: list[MatrixLayer]) -> int:
        """Sum what the layers collected over all processes, in place; returns the number of processes.

        Every layer takes part on every process, used there or not, so that all processes issue the same collectives.
        """
        for layer in layers:
            sums = layer.sums
            sums.terms = layer.settings.loss_terms(sums.examples, sums.positions) if sums.rows else 0.0
        if self.world == 1:
            return 1
        buckets: dict[Any, list[tuple[MatrixLayer, str, Tensor]]] = {}
        for layer in layers:
            for side, name in enumerate(("inputs", "outputs")):
                found = getattr(layer.sums, name)
                if found is None:
                    dtype = torch.promote_types(layer.settings.curvature_dtype or layer.weight.dtype, torch.float32)
                    size = layer.structures[side].numel(layer.sizes[side])
                    found = torch.zeros(size, dtype=dtype, device=layer.weight.device)
                buckets.setdefault((found.dtype, found.device), []).append((layer, name, found))
        for parts in buckets.values():
            flat = torch.cat([t for _, _, t in parts])
            dist.all_reduce(flat, group=self.group)
            for (layer, name, _), piece in zip(parts, flat.split([t.numel() for _, _, t in parts])):
                setattr(layer.sums, name, piece)
        counts = torch.tensor(
            [[s.rows, s.examples, s.positions, s.terms] for s in (layer.sums for layer in layers)],
            dtype=torch.float64,
            device=layers[0].weight.device,
        )
        dist.all_reduce(counts, group=self.group)
        for layer, row in zip(layers, counts.tolist()):
            layer.sums.rows, layer.sums.examples, layer.sums.positions, layer.sums.terms = row
        return self.world
