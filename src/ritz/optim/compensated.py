"""Weights in low precision that do not lose small steps: what rounding took away is kept, and added again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOW = (torch.bfloat16, torch.float16)


def compensated_step(p: Tensor, state: dict[str, Any], N: Tensor, lr: float, kept: float) -> None:
    """p ← kept · p − lr · N for the sum of p and its rounding error, which the state holds in p's own dtype.

    Two numbers of 8 bits carry what one of 16 does. Reference: Kahan, "Further remarks on reducing truncation errors"
    (1965).
    """
    if "rounding" not in state:
        state["rounding"] = torch.zeros_like(p)
    whole = p.float().add_(state["rounding"])
    if kept != 1.0:
        whole.mul_(kept)
    whole.add_(N, alpha=-lr)
    p.copy_(whole)
    state["rounding"].copy_(whole.sub_(p))


def rounding_bytes(p: Tensor, compensate: bool) -> int:
    """Bytes of the state for it."""
    return p.numel() * p.element_size() if compensate and p.dtype in LOW else 0
