"""Positive hyper-parameters: raw values on the whole line, mapped by softplus plus a small floor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import OperandError

FLOOR = 1e-8  # of length-scales and output scales: keeps 1/ℓ finite wherever an optimiser goes


def positive(raw: Tensor, floor: float = FLOOR) -> Tensor:
    """log(1 + exp(raw)) + floor."""
    return functional.softplus(raw) + floor


def raw_of(value: Any, like: Tensor, name: str, floor: float = FLOOR) -> Tensor:
    """The raw tensor, with the shape, dtype and device of ``like``, that :func:`positive` maps to ``value``.

    Raises:
        OperandError: where the value is not finite and above the floor, or does not broadcast to ``like``.
    """
    v = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach() - floor
    if not bool(torch.isfinite(v).all()) or bool((v <= 0).any()):
        raise OperandError(f"{name} was set to {value}; expected finite numbers above {floor:g}")
    raw = v + torch.log(-torch.expm1(-v))  # the inverse of softplus, without overflow
    try:
        raw = raw.expand(like.shape)
    except RuntimeError:
        raise OperandError(f"{name} was given with shape {tuple(v.shape)}; expected {tuple(like.shape)}") from None
    return raw.to(like.dtype).to(like.device).clone()


def assign(parameter: Tensor, value: Any, name: str, floor: float = FLOOR) -> None:
    """Set a raw parameter in place so that :func:`positive` gives ``value``."""
    raw = raw_of(value, parameter, name, floor)
    with torch.no_grad():
        parameter.copy_(raw)
