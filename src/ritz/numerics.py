"""The state in which ritz's own numerics run, and the checks at its borders.

Own numerics: no graph, autocast off, float32 products in full precision (TF32 and bfloat16 shortcuts off whatever
the global flags say). A user's callable runs inside them under the autocast state of the code that called ritz.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from .errors import NonFiniteError, OperandError, TransformError

_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", None) or (
    lambda: torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
)
_innermost_transform = torch._C._functorch.peek_interpreter_stack

Autocast = tuple[bool, torch.dtype]
_outer_autocast: contextvars.ContextVar[dict[str, Autocast] | None] = contextvars.ContextVar("autocast", default=None)

VMAP_REFUSED = (
    "{name} is batched by torch.func.vmap (hessian, jacrev, jacfwd and is_grads_batched use it too), which this "
    "primitive does not serve; give several vectors as the columns of a block (n, m), or loop"
)
FORWARD_REFUSED = (
    "{name} carries a forward-mode tangent, which this primitive does not serve; use reverse mode (backward, "
    "torch.autograd.grad, torch.func.grad), or gradient=ritz.Unrolled()"
)


def _autocast_state() -> dict[str, Autocast]:
    return {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")}


def user_autocast() -> dict[str, Autocast]:
    """Autocast state of the code outside of ritz's numerics (per device type)."""
    return _outer_autocast.get() or _autocast_state()


@contextlib.contextmanager
def under_autocast(state: dict[str, Autocast], device: torch.device) -> Iterator[None]:
    """Run a user's callable under the autocast state recorded by :func:`user_autocast`."""
    # Inside, the callable's own state is the user's: it may open an autocast region and use ritz in there.
    token = _outer_autocast.set(None)
    try:
        enabled, dtype = state.get(device.type, (False, torch.float32))
        if not enabled and not (device.type in state and torch.is_autocast_enabled(device.type)):
            yield
            return
        with torch.autocast(device.type, dtype=dtype, enabled=enabled):
            yield
    finally:
        _outer_autocast.reset(token)


@contextlib.contextmanager
def without_cast_cache() -> Iterator[None]:
    """Autocast casts parameters anew, instead of finding what an earlier product left: a cast hides its parameter."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


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
            stack.enter_context(_ieee)
            yield
    finally:
        if token is not None:
            _outer_autocast.reset(token)


def autocast_is_on() -> bool:
    """Whether the caller is inside an autocast region, on whatever device."""
    return _any_autocast()


class _Ieee:
    """IEEE precision for float32 products while anybody is inside.

    The flags belong to the process: the first thread in saves and sets them, the last one out restores them, so that
    no thread takes another one's setting for the user's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[tuple[Any, str]] | str | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = self._set()
            self._inside += 1

    def __exit__(self, *exc: Any) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._restore()

    @staticmethod
    def _set() -> list[tuple[Any, str]] | str | None:
        found: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
        backends = [b for b in found if hasattr(b, "fp32_precision")]
        if len(backends) < 2:  # torch < 2.9 knows only this one flag
            before_legacy = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            return before_legacy
        before = [(b, b.fp32_precision) for b in backends]
        changed = [(b, p) for b, p in before if p not in ("ieee", "none")]
        if not changed and getattr(torch.backends, "fp32_precision", "none") in ("ieee", "none"):
            return None
        for b in backends:
            b.fp32_precision = "ieee"
        return before

    def _restore(self) -> None:
        if isinstance(self._before, str):
            torch.set_float32_matmul_precision(self._before)
        elif self._before is not None:
            for b, p in self._before:
                b.fp32_precision = p
        self._before = None


_ieee = _Ieee()


def check_finite(x: Tensor, name: str) -> None:
    """Raise :class:`NonFiniteError` naming ``name`` when ``x`` holds NaN or Inf."""
    refuse_vmap(x, name)
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


# -- function transforms ----------------------------------------------------------------------------------------------


def in_transform() -> bool:
    """Whether a torch.func transform is active."""
    return _innermost_transform() is not None


def refuse_transforms(x: Tensor, name: str) -> None:
    """Raise by name under vmap and forward mode, which the rules do not serve (they would be silently wrong)."""
    refuse_vmap(x, name)
    functorch = torch._C._functorch
    inner = x
    while True:
        if has_tangent(inner):
            raise TransformError(FORWARD_REFUSED.format(name=name))
        if not functorch.is_gradtrackingtensor(inner):
            return
        inner = functorch.get_unwrapped(inner)


def refuse_vmap(x: Tensor, name: str) -> None:
    """Raise :class:`TransformError` where ``x`` stands for a batch of tensors."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    if functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x):
        raise TransformError(VMAP_REFUSED.format(name=name))


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of the tensors is a dual number of forward mode."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def is_transformed(x: Tensor) -> bool:
    """Whether ``x`` stands for a batch of tensors or has a tangent, under whatever wrappers of torch.func.grad."""
    functorch = torch._C._functorch
    while not has_tangent(x):
        if not functorch.is_gradtrackingtensor(x):
            return bool(functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x))
        x = functorch.get_unwrapped(x)
    return True


def unwrap(x: Tensor) -> Tensor:
    """The tensor under the wrappers of torch.func.grad and vjp."""
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return x


@contextlib.contextmanager
def untransformed() -> Iterator[None]:
    """No torch.func transform inside, for code whose tensors went through :func:`unwrap`.

    Under a transform even new tensors are wrappers, which have no memory that compiled code or a thread could use. What
    is made in here must not be changed in place under the transform afterwards: hand out a clone.
    """
    if not in_transform():
        yield
        return
    with temporarily_clear_interpreter_stack():
        yield


def version(x: Tensor) -> int:
    """The count of in-place changes of ``x``; 0 where nobody keeps one (inference mode)."""
    return 0 if x.is_inference() else x._version
