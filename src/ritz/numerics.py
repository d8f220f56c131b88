"""The state in which ritz's own numerics run, and the checks at its borders.

Own numerics: no graph, autocast off, float32 products in full precision (TF32 and bfloat16 shortcuts off whatever
the global flags say). A user's callable runs inside them under the autocast state of the code that called ritz.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import NonFiniteError, OperandError

Autocast = tuple[bool, torch.dtype]
_outer_autocast: contextvars.ContextVar[dict[str, Autocast] | None] = contextvars.ContextVar("autocast", default=None)


def _autocast_state() -> dict[str, Autocast]:
    return {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")}


def user_autocast() -> dict[str, Autocast]:
    """Autocast state of the code outside of ritz's numerics (per device type)."""
    return _outer_autocast.get() or _autocast_state()


@contextlib.contextmanager
def under_autocast(state: dict[str, Autocast], device: torch.device) -> Iterator[None]:
    """Run a user's callable under the autocast state recorded by :func:`user_autocast`."""
    enabled, dtype = state.get(device.type, (False, torch.float32))
    if enabled == torch.is_autocast_enabled(device.type) if device.type in state else True:
        yield
        return
    with torch.autocast(device.type, dtype=dtype, enabled=enabled):
        yield


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Autocast off and float32 matrix products in IEEE precision, restored on exit."""
    state = _autocast_state()
    token = _outer_autocast.set(state) if _outer_autocast.get() is None else None
    try:
        with contextlib.ExitStack() as stack:
            for device, (enabled, dtype) in state.items():
                if enabled:
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=False))
            stack.enter_context(_ieee())
            yield
    finally:
        if token is not None:
            _outer_autocast.reset(token)


@contextlib.contextmanager
def _ieee() -> Iterator[None]:
    backends = [b for b in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if hasattr(b, "fp32_precision")]
    if len(backends) == 2:
        before = [b.fp32_precision for b in backends]
        changed = [(b, p) for b, p in zip(backends, before, strict=True) if p not in ("ieee", "none")]
        parent = torch.backends.fp32_precision
        if not changed and parent in ("ieee", "none"):
            yield
            return
        try:
            for b in backends:
                b.fp32_precision = "ieee"
            yield
        finally:
            for b, p in zip(backends, before, strict=True):
                b.fp32_precision = p
        return
    before_legacy = torch.get_float32_matmul_precision()  # torch < 2.9 knows only this one flag
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before_legacy)


def check_finite(x: Tensor, name: str) -> None:
    """Raise :class:`NonFiniteError` naming ``name`` when ``x`` holds NaN or Inf."""
    # One reduction instead of isfinite().all(): a sum is finite unless an entry is not, or it overflows.
    with torch.no_grad():
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise NonFiniteError(
                f"{name} has {bad} NaN or Inf among {x.numel()} entries; expected finite numbers: check the data or "
                f"the step that made {name}"
            )


def as_block(x: Tensor, rows: int, name: str, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``x`` of shape (rows,) or (rows, m) as a block (rows, m) after checking shape, dtype and device."""
    if not isinstance(x, Tensor):
        raise OperandError(f"{name} is a {type(x).__name__}; expected a torch.Tensor of shape ({rows},) or ({rows}, m)")
    if x.ndim not in (1, 2) or x.shape[0] != rows:
        raise OperandError(
            f"{name} has shape {tuple(x.shape)}; expected ({rows},) or ({rows}, m): one column per vector"
        )
    if x.dtype != dtype or x.device != device:
        raise OperandError(
            f"{name} is {x.dtype} on {x.device}; the operator is {dtype} on {device}: convert one of them with .to(...)"
        )
    return x.unsqueeze(1) if x.ndim == 1 else x
