"""AdamW for the parameters that no rule covers, by torch's own function on this optimizer's state."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw


def adamw_step(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """One AdamW step of a group with ``betas``, ``eps``, ``weight_decay`` and ``lr``."""
    ready = [p for p in group["params"] if p.grad is not None]
    if not ready:
        return
    for p in ready:
        state = optimizer.state[p]
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    states = [optimizer.state[p] for p in ready]
    adamw(
        ready,
        [p.grad for p in ready],
        [s["exp_avg"] for s in states],
        [s["exp_avg_sq"] for s in states],
        [],
        [s["step"] for s in states],
        foreach=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
