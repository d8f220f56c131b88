"""The Triton back end: tiles that never leave the registers of a GPU. Triton itself is imported at the first use."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OperandError
from .distances import Coordinates
from .profiles import Profile
from .torch_tiles import Contraction, Tiles
from .triton_operands import Operands, operands, pad, with_ones
from .triton_plan import (
    SPLIT,
    VECTORS,
    Blocks,
    Recipe,
    contract_blocks,
    distance,
    padded,
    product_blocks,
    reach,
    recipe,
    width,
)


@dataclass(frozen=True)
class TritonTiles:
    """Products and gradients by fused kernels on a CUDA device, in the manner of flash attention.

    A program owns a block of rows, goes over the columns, and keeps the tile, its profile and the sums in registers. In
    float32 the products run on tensor cores in three TF32 parts, which keeps float32's accuracy. Distances come from a
    tensor-core product, from differences where there are at most 4 coordinates, and from differences of coordinates in
    two float32 parts where float64 coordinates are called for (``distances.prepare``). Blocks depend on dtype and shape
    only (``triton_plan``), and nothing is added atomically: the same call gives the same bits.

    K(X, X) is not halved by symmetry: the mirror image of a tile belongs to other rows, so its product would have to be
    added to theirs in memory, by atomics, which costs more than to make the tile a second time.

    Profiles without device code, other dtypes than float32 and float64, and empty matrices go to :class:`Tiles`.

    Args:
        rows: rows of a tile, a power of two from 16; None for the table of ``triton_plan``, as with the others.
        columns: columns of a tile, a power of two from 16.
        warps: groups of 32 threads that share a tile, a power of two.

    Raises:
        OperandError: at the first product, where triton is not installed or the tensors are not on a CUDA device.
            (With TRITON_INTERPRET=1 in the environment from the start, Triton runs the kernels on the CPU, slowly.)

    Memory: n·(2q + k) numbers for padded copies, and at most 1024 blocks of partial sums where n is small.
    """

    rows: int | None = None
    columns: int | None = None
    warps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("rows", 16), ("columns", 16), ("warps", 1)):
            value = getattr(self, name)
            if value is not None and (value < least or value & (value - 1)):
                raise OperandError(f"TritonTiles({name}={value}); expected a power of two, at least {least}, or None")

    @staticmethod
    def available(device: torch.device) -> bool:
        """Whether tensors on ``device`` can be served: a CUDA device, and triton installed."""
        return device.type == "cuda" and importlib.util.find_spec("triton") is not None

    def size(self, dtype: torch.dtype, device: torch.device) -> int:
        """Rows and columns of a tile where one is made by torch operations, for kernels without device code."""
        return Tiles().size(dtype, device)

    def product(self, profile: Profile, points: Coordinates, X: Tensor) -> Tensor:
        """k(U, V) X for a block X (m, k), in its dtype; no graph."""
        known = _recipe(profile, points, X)
        if known is None:
            return Tiles().product(profile, points, X)
        code, (n, k) = _code(X.device), (points.U.shape[0], X.shape[1])
        vectors = 1 if k == 1 else width(k, VECTORS)
        blocks = self._blocks(product_blocks(X.dtype, vectors, *_how(points, X.dtype)))
        args = operands(known, points, X.dtype, max(blocks.rows, blocks.columns))
        N, M, all_vectors = _length(args.U, args), _length(args.V, args), padded(k, vectors)
        grid = (N // blocks.rows, all_vectors // vectors)
        span = reach(M, blocks.columns, grid[0] * grid[1])
        parts = -(-M // span)
        Y = torch.empty(parts, all_vectors, N, dtype=X.dtype, device=X.device)
        with _on(X.device):
            code.product_kernel[(*grid, parts)](
                *args[:4], pad(X.mT, all_vectors, M), Y, _alpha(known, X), args.stride_u, args.stride_v,
                N, M, all_vectors, span,
                VECTORS=vectors, **_constants(known, points, args, blocks, X),
            )  # fmt: skip
        return _sum(Y)[:k, :n].mT

    def fill(self, profile: Profile, points: Coordinates, out: Tensor) -> None:
        """Write k(U, V) into ``out`` (n, m)."""
        known = _recipe(profile, points, out)
        if known is None or out.stride(1) != 1:
            Tiles().fill(profile, points, out)
            return
        code, (n, m) = _code(out.device), out.shape
        blocks = self._blocks(product_blocks(out.dtype, 1, *_how(points, out.dtype)))
        args = operands(known, points, out.dtype, max(blocks.rows, blocks.columns))
        grid = (padded(n, blocks.rows) // blocks.rows, padded(m, blocks.columns) // blocks.columns)
        with _on(out.device):
            code.fill_kernel[grid](
                *args[:4], out, _alpha(known, out), args.stride_u, args.stride_v, out.stride(0), n, m,
                **_constants(known, points, args, blocks, out),
            )  # fmt: skip

    def contract(
        self, profile: Profile, points: Coordinates, Lam: Tensor, Q: Tensor, *, moves: bool, sums: bool
    ) -> Contraction:
        """Derivatives of ⟨Λ, k(U, V) Q⟩ for Λ (n, k), Q (m, k); see :meth:`Tiles.contract`.

        One pass over all tiles for the same points, with T + Tᵀ in place of T; two for others, one a side.
        """
        known = _recipe(profile, points, Q)
        if known is None:
            return Tiles().contract(profile, points, Lam, Q, moves=moves, sums=sums)
        blocks = self._blocks(contract_blocks(Q.dtype, points.U.shape[1]))
        args = operands(known, points, Q.dtype, max(blocks.rows, blocks.columns))
        twice = points.same and moves  # ⟨Λ, dK Q⟩ with dK symmetric: row i of T + Tᵀ holds all that moves u_i
        left, right = (torch.cat([Lam, Q], 1), torch.cat([Q, Lam], 1)) if twice else (Lam, Q)
        run = _Contraction(known, points, blocks, moves)
        grad_U, found = run.side(args, points.U, points.V, left, right, sums)
        grad_V = None
        if moves and not points.same:
            grad_V, _ = run.side(args.swapped(), points.V, points.U, right, left, False)
        if twice:
            found = found / 2
        return Contraction(grad_U, grad_V, found[0], found[1 : 1 + profile.num_shapes])

    def _blocks(self, table: Blocks) -> Blocks:
        return Blocks(self.rows or table.rows, self.columns or table.columns, self.warps or table.warps, table.stages)


@dataclass(frozen=True)
class _Contraction:
    """What both sides of a contraction share."""

    recipe: Recipe
    points: Coordinates
    blocks: Blocks
    moves: bool

    def side(
        self, args: Operands, U: Tensor, V: Tensor, left: Tensor, right: Tensor, sums: bool
    ) -> tuple[Tensor | None, Tensor]:
        """The gradient in U (None where nothing moves), and (Σ T∘k, Σ T∘∂k/∂α) in float64 (0 unless ``sums``)."""
        code, blocks, factor = _code(left.device), self.blocks, self.recipe.factor
        (n, q), device, dtype = U.shape, left.device, left.dtype
        N, M = _length(args.U, args), _length(args.V, args)
        depth = width(left.shape[1])
        across = padded(left.shape[1], depth)
        differences = args.distance == SPLIT
        count = q if differences else q + 1
        step = width(count) if self.moves else 16
        columns = padded(count, step) if self.moves else step
        grid = (N // blocks.rows, columns // step)
        span = reach(M, blocks.columns, grid[0] * grid[1])
        parts = -(-M // span)
        G = torch.empty(parts, N, columns, dtype=dtype, device=device) if self.moves else left
        W = with_ones(V, factor, dtype, columns, M) if self.moves and not differences else left
        found = torch.zeros(2, parts * grid[0], dtype=torch.float64, device=device)
        if self.moves or sums:
            with _on(device):
                code.contract_kernel[(*grid, parts)](
                    *args[:4], W, pad(left, N, across), pad(right, M, across), G, found, _alpha(self.recipe, left),
                    args.stride_u, args.stride_v, N, M, across, span,
                    DEPTH=depth, WIDTH=step, MOVES=self.moves, SUMS=sums,
                    **_constants(self.recipe, self.points, args, blocks, left),
                )  # fmt: skip
        if not self.moves:
            return None, found.sum(1)
        total = _sum(G)[:n]
        if differences:
            total = total[:, :q]
        else:
            total = total[:, q:count] * (U * factor).to(dtype) - total[:, :q]
        return total.mul(2 * factor).to(U.dtype), found.sum(1)


def _recipe(profile: Profile, points: Coordinates, like: Tensor) -> Recipe | None:
    """The profile's recipe; None for what torch tiles have to do."""
    sizes = (*points.U.shape, points.V.shape[0], *like.shape)
    return recipe(profile) if like.dtype in (torch.float32, torch.float64) and min(sizes) > 0 else None


def _how(points: Coordinates, dtype: torch.dtype) -> tuple[int, int]:
    """How distances are made, and the number of coordinates."""
    q = points.U.shape[1]
    return distance(points.U.dtype != dtype, dtype, q), q


def _code(device: torch.device) -> Any:
    """The module of kernels, imported where it can run."""
    try:
        import triton

        from . import triton_code
    except ImportError as error:
        raise OperandError(
            f"TritonTiles() needs the package triton, which cannot be imported ({error}); "
            "install it (pip install triton), or use backend=Tiles()"
        ) from error
    if device.type != "cuda" and isinstance(triton_code.product_kernel, triton.JITFunction):
        raise OperandError(
            f"TritonTiles() was given tensors on {device}; expected a CUDA device, or backend=Tiles() for this one"
        )
    return triton_code


def _constants(recipe: Recipe, points: Coordinates, args: Operands, blocks: Blocks, like: Tensor) -> dict[str, Any]:
    """Compile-time arguments that all kernels share."""
    return {
        "PROFILE": recipe.number, "SAME": points.same, "DISTANCE": args.distance, "Q": args.Q, "CHUNK": args.chunk,
        "ROWS": blocks.rows, "COLUMNS": blocks.columns, "PRECISION": _precision(like),
        "num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _precision(like: Tensor) -> str:
    """How tensor cores multiply float32: in three TF32 parts where the device has them, exactly elsewhere."""
    if like.dtype != torch.float32 or like.device.type != "cuda" or torch.version.hip is not None:
        return "ieee"
    return "tf32x3" if torch.cuda.get_device_capability(like.device)[0] >= 8 else "ieee"


def _alpha(recipe: Recipe, like: Tensor) -> Tensor:
    """The shape parameter on the device: Triton passes Python's numbers in float32."""
    return torch.full((1,), recipe.alpha, dtype=like.dtype, device=like.device)


def _length(P: Tensor, args: Operands) -> int:
    """Padded number of points."""
    return P.shape[0] if args.chunk else P.shape[1]


def _sum(parts: Tensor) -> Tensor:
    """The sum over parts of the columns."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _on(device: torch.device) -> Any:
    """Launches go to the current device, which is made that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
