"""Functions that torch.compile leaves alone, without loading the compiler where nobody compiles."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def uncompiled(fn: F) -> F:
    """``fn`` run as it is, also when its caller is compiled.

    ``torch._disable_dynamo`` does the same, and loads the compiler at the first call: seconds, for nothing, in a
    program that never compiles. One that does has loaded it before a frame of it is compiled.
    """
    guarded = torch._disable_dynamo(fn)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return guarded(*args, **kwargs) if "torch._dynamo" in sys.modules else fn(*args, **kwargs)

    return call  # type: ignore[return-value]
