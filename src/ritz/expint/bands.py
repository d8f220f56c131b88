"""Operators that couple a node of a grid with its neighbours: products by diagonals, without index arrays.

On the flattened grid a neighbour sits at a fixed distance, so a product is one multiply–add of shifted vectors for
every direction. That reads three arrays of coefficients for a symmetric five-point stencil where CSR reads ten, and
takes 55 % (float32) to 80 % (float64) of its time at n = 16 384. Pairs at the end of a row that are no neighbours have
the coefficient zero; those that are joined by a periodic border are few, and go by their indices.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..numerics import in_transform, unwrap, version
from ..operators import LinearOperator, Sparse
from ..operators.base import Gradients
from ..product import product
from .compiled import compiled_form, is_plain
from .grid import Grid

Region = tuple[slice, ...]
Key = tuple[tuple[int, bool], ...]  # per axis: the step from tail to head, and whether it wraps


class Link(NamedTuple):
    """All pairs (tail, head) of nodes that lie in the same direction from each other."""

    tail: Region
    head: Region
    offset: int | None  # head − tail on the flattened grid; None for pairs across a periodic border


class Entries(NamedTuple):
    """A matrix by its diagonal and, for every link, the entries A[tail, head] and A[head, tail]; real."""

    diagonal: Tensor  # of the grid's shape
    upper: list[Tensor]  # of the shapes of the links' regions
    lower: list[Tensor]  # the list ``upper`` itself where the matrix is symmetric


def make_link(grid: Grid, key: Key) -> Link:
    """The link of a key whose first step that is not zero goes upwards."""
    tail, head, offset = [], [], 0
    for axis, (move, wraps) in enumerate(key):
        n = grid.shape[axis]
        offset = offset * n + move
        if move == 0:
            ends = slice(0, n), slice(0, n)
        elif wraps:
            ends = slice(n - 1, n), slice(0, 1)
        else:
            ends = slice(0, n - 1), slice(1, n)
        tail.append(ends[0] if move >= 0 else ends[1])
        head.append(ends[1] if move >= 0 else ends[0])
    return Link(tuple(tail), tuple(head), None if any(wraps for _, wraps in key) else offset)


def axis_key(grid: Grid, axis: int, wraps: bool = False) -> Key:
    """The key of the neighbours along one axis."""
    return tuple((1, wraps) if a == axis else (0, False) for a in range(grid.ndim))


def axis_keys(grid: Grid) -> list[Key]:
    """The keys of all axes, each followed by the one across its border where that is periodic."""
    keys = []
    for axis in range(grid.ndim):
        keys += [axis_key(grid, axis, wraps) for wraps in (False, True)[: 2 if grid.border[axis] == "periodic" else 1]]
    return keys


class _Scratch(NamedTuple):
    """A vector between two runs of zeros, and its shifts, one for every term."""

    vector: Tensor
    shifted: list[Tensor]


class _Kernel:
    """The entries as a product reads them: flattened, real.

    Row i has ``diagonal[i]`` and, for every term (start, offset), ``memory[start + i]`` at column i + offset. A matrix
    that is symmetric has one stretch of memory for both sides. Complex vectors are read as real ones of twice the
    length, for which every entry stands there ``twice``: half the multiplications of complex entries.
    """

    def __init__(
        self,
        diagonal: Tensor,
        memory: Tensor,
        terms: list[tuple[int, int]],
        border: tuple[Tensor, Tensor, Tensor] | None,
        twice: bool,
    ) -> None:
        if twice:
            diagonal, memory = diagonal.repeat_interleave(2), memory.repeat_interleave(2)
            terms = [(2 * start, 2 * offset) for start, offset in terms]
            if border is not None:
                rows, columns, values = border
                both = [torch.cat([2 * index, 2 * index + 1]) for index in (rows, columns)]
                border = both[0], both[1], values.repeat(2)
        self.diagonal, self.memory, self.terms = diagonal, memory, terms
        self.border = border  # rows, columns, values of the entries across periodic borders
        self._coefficients = [memory[start : start + len(diagonal)] for start, _ in terms]
        self._free: list[_Scratch] = []
        self._compiled = compiled_form(self)

    def apply(self, X: Tensor) -> Tensor:
        """Product with (n, k); works on rows, where neighbours in memory are neighbours on the grid."""
        single = X.shape[1] == 1 and X.device.type == "cpu"
        x = X.mT.contiguous()
        real = torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x
        if self._compiled is not None and self._compiled.serves(real):
            out = self._compiled.product(real)
        else:
            out = self._vector(real[0]).unsqueeze(0) if single else self._rows(real)
            if self.border is not None:
                rows, columns, values = self.border
                out.index_add_(-1, rows, real.index_select(-1, columns).mul_(values))
        if x.is_complex():
            out = torch.view_as_complex(out.unflatten(-1, (-1, 2)))
        return out.mT

    def _vector(self, x: Tensor) -> Tensor:
        # A view of an operand costs half as much as a multiply–add of 16 000 entries, so that the operand is copied to
        # where its views exist. Threads take different copies: list.pop is atomic.
        try:
            scratch = self._free.pop()
        except IndexError:
            scratch = self._make_scratch()
        scratch.vector.copy_(x)
        out = self.diagonal * scratch.vector
        for coefficient, shifted in zip(self._coefficients, scratch.shifted):
            out.addcmul_(coefficient, shifted)
        self._free.append(scratch)
        return out

    def _make_scratch(self) -> _Scratch:
        n, reach = self.diagonal.shape[0], max((abs(offset) for _, offset in self.terms), default=0)
        with torch.inference_mode(False):
            memory = torch.zeros(n + 2 * reach, dtype=self.diagonal.dtype)
            starts = [reach + offset for _, offset in self.terms]
            return _Scratch(memory[reach : reach + n], [memory[start : start + n] for start in starts])

    def _rows(self, x: Tensor) -> Tensor:
        out, n = self.diagonal * x, x.shape[1]
        for coefficient, (_, offset) in zip(self._coefficients, self.terms):
            low, high = max(0, -offset), min(n, n - offset)
            out[:, low:high].addcmul_(coefficient[low:high], x[:, low + offset : high + offset])
        return out

    def lanczos_loop(self) -> Any:
        """See :meth:`ritz.operators.LinearOperator.lanczos_loop`."""
        compiled = self._compiled
        return compiled.lanczos if compiled is not None and compiled.serves(self.diagonal) else None


class StencilOperator(LinearOperator):
    """A sparse matrix on a grid, given by its entries as functions of the tensors that it depends on.

    A subclass sets ``_tensors``, gives ``_entries`` in differentiable operations, its ``pair``, and where not every
    value is allowed ``_check``. An in-place change of the tensors is noticed, and checked, at the next product.
    """

    def __init__(
        self,
        grid: Grid,
        keys: Sequence[Key],
        tensors: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
        *,
        hermitian: bool | None = None,
        psd: bool | None = None,
    ) -> None:
        super().__init__((grid.size, grid.size), dtype, device, hermitian=hermitian, psd=psd)
        self.grid = grid
        self._tensors = tuple(tensors)
        self._links = [make_link(grid, key) for key in keys]
        self._versions = self._now()
        self._cached: dict[bool, _Kernel] = {}  # by whether it is of the adjoint
        self._cached_pattern: tuple[Tensor, Tensor] | None = None
        self._check(*self._tensors)

    @abstractmethod
    def _entries(self, *tensors: Tensor) -> Entries:
        """The matrix from the tensors, in differentiable operations."""

    def _check(self, *tensors: Tensor) -> None:
        """Raise where a tensor has values that it must not have."""

    def tensors(self) -> tuple[Tensor, ...]:
        return self._tensors

    # -- products -------------------------------------------------------------------------------------------------

    def _matmat(self, X: Tensor) -> Tensor:
        if in_transform():
            return self._recorded(X, *self._tensors)
        return product(self, X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        if self.hermitian:
            return self._matmat(X)
        adjoint = _AdjointProduct(self)
        return adjoint._recorded(X, *self._tensors) if in_transform() else product(adjoint, X)

    def _numeric(self, X: Tensor) -> Tensor:
        return self._kernel().apply(X)

    def lanczos_loop(self) -> Any:
        # Not past a subclass that has a product of its own.
        own = (type(self)._matmat, type(self)._numeric) == (StencilOperator._matmat, StencilOperator._numeric)
        return self._kernel().lanczos_loop() if self.hermitian and own else None

    def _now(self) -> tuple[int, ...]:
        return tuple([version(t) for t in self._tensors])

    def _kernel(self, adjoint: bool = False) -> _Kernel:
        now = self._now()
        if now != self._versions:
            self._check(*self._tensors)
            self._cached, self._versions = {}, now
        kernel = self._cached.get(adjoint)
        if kernel is None:
            kernel = self._make_kernel(adjoint)
            if is_plain(kernel.diagonal):
                self._cached[adjoint] = kernel
        return kernel

    @torch.no_grad()
    def _make_kernel(self, adjoint: bool = False) -> _Kernel:
        diagonal, upper, lower = self._entries(*(t.detach() for t in self._tensors))
        if adjoint:
            upper, lower = lower, upper
        terms, rows, columns, values = [], [], [], []
        stretches: list[Tensor] = []
        index, n, end = self._index(), self.grid.size, 0
        for link, up, low in zip(self._links, upper, lower, strict=True):
            if not up.numel():
                continue
            if link.offset is None:
                tail, head = index[link.tail].reshape(-1), index[link.head].reshape(-1)
                rows += [tail, head]
                columns += [head, tail]
                values += [up.reshape(-1), low.reshape(-1)]
            else:
                # Values by tails lie behind as many zeros as the offset: a shift by it makes them values by heads.
                stretches.append(self._flat(low, link))
                terms.append((end, -link.offset))
                if low is not up:
                    end += link.offset + n
                    stretches.append(self._flat(up, link))
                terms.append((end + link.offset, link.offset))
                end += link.offset + n
        diagonal = diagonal.reshape(-1)
        border = (torch.cat(rows), torch.cat(columns), torch.cat(values).to(diagonal.dtype)) if rows else None
        memory = torch.cat(stretches) if stretches else diagonal[:0]
        return _Kernel(diagonal, memory, terms, border, self.dtype.is_complex)

    def _flat(self, values: Tensor, link: Link) -> Tensor:
        """Values by their tails, after as many zeros as the offset: a shift by it makes them values by their heads."""
        assert link.offset is not None
        memory = torch.zeros(link.offset + self.grid.size, dtype=values.dtype, device=self.device)
        memory[link.offset :].view(self.grid.shape)[link.tail] = values
        return memory

    def _index(self) -> Tensor:
        return torch.arange(self.grid.size, device=self.device).reshape(self.grid.shape)

    # -- the matrix by its entries: for graphs, and for everything that wants a matrix ----------------------------

    def _pattern(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of what :meth:`_values` returns."""
        if self._cached_pattern is None:
            index = self._index()
            tails = [index[link.tail].reshape(-1) for link in self._links]
            heads = [index[link.head].reshape(-1) for link in self._links]
            diagonal = [index.reshape(-1)]
            pattern = unwrap(torch.cat(diagonal + tails + heads)), unwrap(torch.cat(diagonal + heads + tails))
            if not is_plain(pattern[0]):  # made under a tracer, or with tensors that are none
                return pattern
            self._cached_pattern = pattern
        return self._cached_pattern

    def _values(self, *tensors: Tensor) -> Tensor:
        diagonal, upper, lower = self._entries(*tensors)
        return torch.cat([x.reshape(-1) for x in (diagonal, *upper, *lower)]).to(self.dtype)

    def _recorded(self, X: Tensor, *tensors: Tensor, adjoint: bool = False) -> Tensor:
        rows, columns = self._pattern()[:: -1 if adjoint else 1]
        terms = self._values(*tensors).unsqueeze(1) * X.index_select(0, columns)
        return torch.zeros_like(X).index_add(0, rows, terms)

    def diagonal(self) -> Tensor:
        rows, columns = self._pattern()
        values, n = self._values(*self._tensors), self.shape[0]
        own = rows[n:] == columns[n:]  # a periodic axis of one node links it with itself
        return values[:n].index_add(0, rows[n:][own], values[n:][own])

    def assemble(self) -> Sparse:
        """The same matrix as a sparse operator in CSR, whose values are differentiable in the operator's tensors.

        For solvers that factorise, and for SciPy. Cost: a sort of the entries, O(n log n); products of the result
        are slower than those of this operator.
        """
        rows, columns = self._pattern()
        n = self.shape[0]
        places, position = torch.unique(rows * n + columns, return_inverse=True)
        values = self._values(*self._tensors)
        merged = torch.zeros(places.shape[0], dtype=self.dtype, device=self.device).index_add(0, position, values)
        row = torch.div(places, n, rounding_mode="floor")
        crow = torch.zeros(n + 1, dtype=torch.long, device=self.device)
        crow[1:] = torch.bincount(row, minlength=n).cumsum(0)
        return Sparse(crow, places % n, merged, self.shape, hermitian=self.hermitian, psd=self.psd)


class _AdjointProduct:
    """What :func:`ritz.product.product` needs of Aᴴ."""

    def __init__(self, operator: StencilOperator) -> None:
        self._operator = operator

    def tensors(self) -> tuple[Tensor, ...]:
        return self._operator.tensors()

    def _numeric(self, X: Tensor) -> Tensor:
        return self._operator._kernel(adjoint=True).apply(X)

    def _recorded(self, X: Tensor, *tensors: Tensor) -> Tensor:
        return self._operator._recorded(X, *tensors, adjoint=True)

    def _rmatmat(self, X: Tensor) -> Tensor:
        return self._operator._matmat(X)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return self._operator.pair(Q, Lam)


def as_fields(X: Tensor, grid: Grid) -> list[Tensor]:
    """A block (n, k) as k real fields of the grid's shape, or as 2k where it is complex."""
    rows = X.mT
    parts = (*rows.real, *rows.imag) if X.is_complex() else rows
    return [x.reshape(grid.shape) for x in parts]


def dots(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Σ a b of two lists of fields, node by node; field by field, which stays in the cache."""
    total = torch.zeros_like(a[0])
    for x, y in zip(a, b, strict=True):
        total.addcmul_(x, y)
    return total


def slopes(a: list[Tensor], b: list[Tensor], links: Sequence[Link]) -> list[Tensor]:
    """Σ (a[head] − a[tail]) (b[head] − b[tail]) for every link."""
    totals = [torch.zeros_like(a[0][link.tail]) for link in links]
    for x, y in zip(a, b, strict=True):
        for total, link in zip(totals, links):
            total.addcmul_(x[link.head] - x[link.tail], y[link.head] - y[link.tail])
    return totals


def pull_back(
    function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Gradients:
    """Gradients in ``tensors`` of a function with several outputs, from the cotangents of those."""
    with torch.enable_grad():
        # Aliases: one of the tensors may be computed from another, and its gradient must stay partial.
        aliases = [t.clone() for t in tensors]
        outputs = function(*aliases)
    wanted = [a for a in aliases if a.requires_grad]
    kept = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not wanted or not kept:
        return (None,) * len(tensors)
    grads = torch.autograd.grad([y for y, _ in kept], wanted, [g for _, g in kept], allow_unused=True)
    found = iter(grads)
    return tuple(next(found) if a.requires_grad else None for a in aliases)
