"""Any kernel by tiles: entries from ``kernel.evaluate``, gradients by autograd through one tile at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..numerics import full_precision, in_transform, is_transformed, unwrap
from ..operators.base import Gradients, LinearOperator
from .parameters import positive
from .torch_tiles import CPU_EDGE, Tiles

if TYPE_CHECKING:
    from .backends import TileBackend
    from .base import Kernel


# ``functional_call`` puts tensors into a module in place of its parameters until it returns: another Python thread
# would evaluate the same kernel with them, or restore it to them for good. One lock for all, because kernels share
# parts; a thread may enter it again, since a kernel's ``evaluate`` may use another kernel's operator.
PARAMETERS = threading.RLock()


class _Evaluate(nn.Module):
    """``evaluate`` as a forward method, so that ``functional_call`` can hand it other parameters."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, X: Tensor, Z: Tensor | None) -> Tensor:
        return self.kernel.evaluate(X, Z)


class EvaluatedOperator(LinearOperator):
    """The matrix k(x_i, z_j) (n, m) of a kernel that has no operator of its own, such as a product of kernels.

    Args:
        kernel: gives the entries.
        X, Z: points (n, d) and (m, d); Z = None for X itself, Hermitian positive semidefinite.
        raw_scales: raw factors of one element each that multiply the matrix.
        backend: the tile size; autograd keeps several tiles at a time, so the automatic one is half of the usual.

    Cost: per product n·m entries (half of them for Z = None); the pairing makes each entry once more, with its graph.
    Gradient: of X, Z, scales and the kernel's parameters; the first by tiles, further ones through the dense matrix.
    """

    def __init__(
        self,
        kernel: Kernel,
        X: Tensor,
        Z: Tensor | None,
        raw_scales: Sequence[Tensor] = (),
        *,
        backend: TileBackend = Tiles(),
    ) -> None:
        same = Z is None
        rows, columns = X.shape[0], (X if Z is None else Z).shape[0]
        super().__init__((rows, columns), X.dtype, X.device, hermitian=same or None, psd=same or None)
        self.kernel, self.X, self.Z, self.raw_scales = kernel, X, Z, tuple(raw_scales)
        with PARAMETERS:
            named = dict(kernel.named_parameters())
        self.names, self.parameters = tuple(named), tuple(named.values())
        # Entries come from torch code whatever the back end, which only says how large tiles are.
        edge = getattr(backend, "edge", None)
        self.backend = Tiles(edge or max(backend.size(self.dtype, self.device) // 2, CPU_EDGE // 2))

    @property
    def deferrable(self) -> bool:
        # The pairing differentiates tiles by autograd, which does not run inside of torch.func's transforms.
        return not in_transform()

    def _matmat(self, X: Tensor) -> Tensor:
        from ..product import product

        return product(self, X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        if self.hermitian:
            return self._matmat(X)
        assert self.Z is not None
        swapped = EvaluatedOperator(self.kernel, self.Z, self.X, self.raw_scales, backend=self.backend)
        # The module may hold other parameters by now (functional_call).
        swapped.names, swapped.parameters = self.names, self.parameters
        return swapped._matmat(X)

    # -- entries --------------------------------------------------------------------------------------------------

    def _entries(self, X: Tensor, Z: Tensor | None, rest: Sequence[Tensor]) -> Tensor:
        """Entries for points and the tensors after them in :meth:`tensors`."""
        scales, parameters = rest[: len(self.raw_scales)], rest[len(self.raw_scales) :]
        with PARAMETERS:
            own = dict(self.kernel.named_parameters())
            if all(own.get(name) is p for name, p in zip(self.names, parameters, strict=True)):
                K = self.kernel.evaluate(X, Z)
            else:
                named = {f"kernel.{name}": p for name, p in zip(self.names, parameters, strict=True)}
                K = functional_call(_Evaluate(self.kernel), named, (X, Z))
        for raw in scales:
            K = positive(raw).to(K.dtype).reshape(()) * K
        return K

    def _split(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Sequence[Tensor]]:
        return (tensors[0], None, tensors[1:]) if self.Z is None else (tensors[0], tensors[1], tensors[2:])

    def _recorded(self, X: Tensor, *tensors: Tensor) -> Tensor:
        return self._entries(*self._split(tensors)) @ X

    def _tiles(self) -> Iterator[tuple[slice, slice, bool]]:
        """(rows, columns, whether the tile is on the diagonal); the upper ones only where the points are the same."""
        n, m = self.shape
        edge, same = self.backend.size(self.dtype, self.device), self.Z is None
        for a in range(0, n, edge):
            for b in range(a if same else 0, m, edge):
                yield slice(a, min(a + edge, n)), slice(b, min(b + edge, m)), same and a == b

    @torch.no_grad()
    def _numeric(self, X: Tensor) -> Tensor:
        Y = torch.zeros(self.shape[0], X.shape[1], dtype=self.dtype, device=self.device)
        with full_precision():
            for i, j, K, mirrored in self._numbers():
                Y[i].addmm_(K, X[j])
                if mirrored:
                    Y[j].addmm_(K.mT, X[i])
        return Y

    def _numbers(self) -> Iterator[tuple[slice, slice, Tensor, bool]]:
        """(rows, columns, entries, whether the tile stands for its mirror image as well), without a graph."""
        # The parameters not detached: the kernel's own need no exchange.
        P, Z, rest = self._split([unwrap(t) for t in self.tensors()])
        for i, j, diagonal in self._tiles():
            K = self._entries(P[i], None if diagonal else (P if Z is None else Z)[j], rest)
            yield i, j, K, Z is None and not diagonal

    # -- gradients ------------------------------------------------------------------------------------------------

    def tensors(self) -> tuple[Tensor, ...]:
        second = () if self.Z is None else (self.Z,)
        return (self.X, *second, *self.raw_scales, *self.parameters)

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        tensors = self.tensors()
        if not any(t.requires_grad for t in tensors):
            return (None,) * len(tensors)
        Lam, Q = unwrap(Lam).detach(), unwrap(Q).detach()
        leaves = [unwrap(t).detach().requires_grad_(t.requires_grad) for t in tensors]
        P, Z, rest = self._split(leaves)
        grads = [torch.zeros_like(t) if t.requires_grad else None for t in leaves]
        first = grads[1] if Z is not None else grads[0]
        with full_precision():
            for i, j, diagonal in self._tiles():
                with torch.no_grad():
                    T = Lam[i] @ Q[j].mT
                    if Z is None and not diagonal:  # this tile stands for its mirror image as well
                        T += Q[i] @ Lam[j].mT
                with torch.enable_grad():
                    rows = P[i].detach().requires_grad_(P.requires_grad)
                    other = P if Z is None else Z
                    columns = None if diagonal else other[j].detach().requires_grad_(other.requires_grad)
                    K = self._entries(rows, columns, rest)
                points = [(g, s) for g, s in ((rows, i), (columns, j)) if g is not None and g.requires_grad]
                wanted = [p for p, _ in points] + [t for t in rest if t.requires_grad]
                if not K.requires_grad:
                    continue
                found: list[Any] = list(torch.autograd.grad(K, wanted, T, allow_unused=True))
                for p, s in points:
                    g, target = found.pop(0), (grads[0] if p is rows else first)
                    if g is not None and target is not None:
                        target[s] += g
                for position, t in enumerate(rest, start=len(leaves) - len(rest)):
                    if t.requires_grad:
                        g, target = found.pop(0), grads[position]
                        if g is not None and target is not None:
                            target += g
        return tuple(grads)

    # -- entries for others ---------------------------------------------------------------------------------------

    def columns(self, idx: Tensor | Sequence[int]) -> Tensor:
        """The columns K[:, idx] (n, len(idx)), from n·len(idx) entries; differentiable."""
        index = torch.as_tensor(idx, dtype=torch.long, device=self.device).reshape(-1)
        P, Z, rest = self._split(self.tensors())
        return self._entries(P, (P if Z is None else Z)[index], rest)

    def diagonal(self) -> Tensor:
        """The diagonal, from blocks on it; differentiable."""
        P, Z, rest = self._split(self.tensors())
        size, chunk = min(self.shape), 64
        blocks = [slice(a, min(a + chunk, size)) for a in range(0, size, chunk)]
        parts = [self._entries(P[b], None if Z is None else Z[b], rest).diagonal() for b in blocks]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.dtype, device=self.device)

    def to_dense(self) -> Tensor:
        """The matrix (n, m): by tiles where no graph is wanted, in differentiable operations otherwise."""
        tensors = self.tensors()
        recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if recorded or any(is_transformed(t) for t in tensors):
            return self._entries(*self._split(tensors))
        with torch.no_grad(), full_precision():
            out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            for i, j, K, mirrored in self._numbers():
                out[i, j] = K
                if mirrored:
                    out[j, i] = K.mT
            return out
