"""How much memory a run takes, as PyTorch's allocator counts it."""

from collections.abc import Callable
from typing import Any

import torch


def peak_of(run: Callable[[], Any]) -> int:
    """The most bytes of tensors on the CPU that ``run()`` holds at once, without those that were there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
