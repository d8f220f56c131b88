"""What an optimizer does to every parameter, as rows and as a printed table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .compensated import rounding_bytes

if TYPE_CHECKING:
    from .base import CurvatureOptimizer


@dataclass(frozen=True)
class Row:
    """One parameter, or one weight with its bias."""

    name: str
    rule: str
    structures: str
    shape: str
    state_bytes: int


@dataclass(frozen=True)
class Report:
    """The rows, and a table when printed."""

    rows: tuple[Row, ...]

    @property
    def state_bytes(self) -> int:
        """Bytes of all factors and momenta, by their formulas."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        head = ("parameter", "rule", "structures (K; C)", "matrix", "state")
        body = [(r.name, r.rule, r.structures, r.shape, _bytes(r.state_bytes)) for r in self.rows]
        body.append(("total", "", "", "", _bytes(self.state_bytes)))
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in (head, *body)]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def describe(optimizer: CurvatureOptimizer) -> Report:
    """The report of an optimizer."""
    rows = []
    for layer in optimizer._layers:
        name, rule = optimizer._names[layer.weight]
        name += " + bias" if layer.bias is not None else ""
        pair = "; ".join(s.describe(d) for s, d in zip(layer.structures, layer.sizes))
        momentum = layer.d_in * layer.d_out * bool(optimizer.param_groups[layer.group]["momentum"])
        size = optimizer.factor_bytes(layer) + momentum * layer.weight.element_size()
        size += sum(rounding_bytes(p, layer.settings.compensate) for p in layer.parameters)
        rows.append(Row(name, rule, pair, f"{layer.d_out} × {layer.d_in}", size))
    for index, (settings, group) in enumerate(zip(optimizer._settings, optimizer.param_groups)):
        for p in group["params"] if settings is None else optimizer._vectors[index]:
            name, rule = optimizer._names[p]
            size = p.numel() * p.element_size()
            if settings is None:
                size = 2 * size + 4  # and the step counter
            else:
                factor = optimizer.vector_copies(group) * (settings.curvature_dtype or p.dtype).itemsize
                size = p.numel() * factor + size * bool(group["momentum"]) + rounding_bytes(p, settings.compensate)
            shape = " × ".join(str(s) for s in p.shape) or "scalar"
            rows.append(Row(name, rule, "—", shape, size))
    return Report(tuple(rows))


def _bytes(count: int) -> str:
    return (
        f"{count} B"
        if count < 10_000
        else f"{count / 1024:.1f} KiB"
        if count < 10_000_000
        else f"{count / 2**20:.1f} MiB"
    )
