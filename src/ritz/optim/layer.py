"""One weight matrix with its bias: its gradient as a matrix, its share of the statistics, its captured rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import OneHot, Site
from ..curvature.layers import EmbeddingRule
from ..curvature.statistics import Sums
from ..operators.structured import Diagonal, Structure
from ..operators.structured.products import empty_aligned
from .settings import Settings, choose


class MatrixLayer:
    """A weight W (d_out, d_in), with its bias as a last column where it is trained too.

    ``structures`` are those of K (d_in [+1]) and C (d_out). ``group`` is the index of its parameter group.
    """

    def __init__(self, name: str, sites: list[Site], bias: nn.Parameter | None, group: int, settings: Settings) -> None:
        self.name, self.sites, self.group, self.settings = name, sites, group, settings
        self.weight, self.bias = sites[0].weight, bias
        self.rule, self.module = sites[0].rule, sites[0].module
        matrix = self.rule.to_matrix(self.module, self.weight.detach())
        self.d_out, self.d_in = matrix.shape[0], matrix.shape[1] + (bias is not None)
        self.one_hot = isinstance(self.rule, EmbeddingRule)
        chosen = choose(settings.structures, self.d_in, self.d_out)
        # One-hot inputs have a diagonal factor; any other structure would have nothing to learn off the diagonal.
        self.structures: tuple[Structure, Structure] = (Diagonal(), chosen[1]) if self.one_hot else chosen
        self.sums = Sums()
        self.kept: list[tuple[Tensor, Tensor]] = []  # raw rows (a, g) of this step's uses, for the row form
        self.whole = True  # whether `kept` has every use
        self.cache: dict[str, Tensor] = {}  # products that can be made from the state again

    @property
    def sizes(self) -> tuple[int, int]:
        """(d_in, d_out), the bias counted."""
        return self.d_in, self.d_out

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weight and, where it is part of the matrix, the bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def forget(self) -> None:
        """Drop what this step collected."""
        self.sums, self.kept, self.whole = Sums(), [], True

    # -- between parameters and the matrix --------------------------------------------------------------------------

    def gather(self, tensors: Sequence[Any]) -> Tensor:
        """Weight and bias (or their gradients) as one matrix (d_out, d_in); a missing bias part counts as zero."""
        matrix = self.rule.to_matrix(self.module, tensors[0])
        if self.bias is None:
            return matrix
        last = tensors[1] if tensors[1] is not None else matrix.new_zeros(self.d_out)
        return _beside(matrix, last.reshape(-1, 1))

    def split(self, matrix: Tensor) -> list[Tensor]:
        """The parts of a matrix (d_out, d_in) in the shapes of weight and bias."""
        if self.bias is None:
            return [self.rule.from_matrix(self.module, matrix, self.weight.shape)]
        own = self.rule.from_matrix(self.module, matrix[:, :-1], self.weight.shape)
        return [own, matrix[:, -1].reshape(self.bias.shape)]

    # -- from a use to rows -----------------------------------------------------------------------------------------

    def rows(self, site: Site, x: Tensor, g: Tensor, y: Sequence[int], first: int) -> tuple[Tensor | OneHot, Tensor]:
        """Inputs (n, R, d) and output gradients (n, R, d_out) of one use; rows of a packed weight not used are zero."""
        a = site.rule.inputs(site.module, x, y)
        rows = site.rule.outputs(site.module, g, x)
        if rows.shape[-1] < self.d_out:
            rows = torch.nn.functional.pad(rows, (first, self.d_out - first - rows.shape[-1]))
        return a, rows

    def with_bias(self, a: Tensor) -> Tensor:
        """Input rows with the constant input that the bias meets."""
        return a if self.bias is None else _beside(a, a.new_ones(a.shape[0], 1))


def _beside(matrix: Tensor, column: Tensor) -> Tensor:
    """A matrix with one more column, in memory that products read fast."""
    out = empty_aligned(matrix, matrix.shape[0], matrix.shape[1] + 1)
    out[:, :-1], out[:, -1:] = matrix, column
    return out
