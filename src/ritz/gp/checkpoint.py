"""Checkpoints of a fit: plain tensors and numbers in one file, written in one move, tied to data and model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from ..errors import OperandError

VERSION = 1
SETTINGS = ("solver", "logdet", "preconditioner", "backend", "priors", "mean")  # of a process, named one by one
PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class Checkpoint:
    """Where :func:`~ritz.gp.fit` keeps its state, and how often it writes it.

    Args:
        path: a file; its directory must exist. Where the file exists, the fit goes on from it.
        every: steps between two writes. The end of a stage is always written, and the start of stage "all", which has
            chosen a preconditioner; a fit that is interrupted before the first write starts anew.
    """

    path: str | os.PathLike[str]
    every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise OperandError(f"Checkpoint(every={self.every!r}); expected a whole number of steps, at least 1")
        if not Path(self.path).absolute().parent.is_dir():
            raise OperandError(f"the checkpoint {self.path} is to be in a directory that does not exist; make it first")

    def save(self, content: Mapping[str, Any]) -> None:
        """Write tensors, numbers, strings, and lists, tuples and dictionaries of them.

        Into a file of its own that then takes the old one's place, so that there is a whole one at any time.
        """
        path = Path(self.path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                torch.save({"version": VERSION, **content}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def load(self, about: Mapping[str, str]) -> dict[str, Any] | None:
        """What was saved, or None where there is no file.

        Args:
            about: as :func:`describe` gives it; it must be that of the saved run.

        Raises:
            OperandError: a file that is not a checkpoint, or one of another run, with what is different.
        """
        path = Path(self.path)
        if not path.exists():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            version, saved = content["version"], content["about"]
        except Exception as error:  # whatever unpickling of a foreign file may raise
            raise OperandError(f"{path} is not a checkpoint of ritz.gp.fit; remove it or name another file") from error
        if version != VERSION:
            raise OperandError(f"{path} has version {version} and this is version {VERSION}; remove it to start anew")
        other = [name for name in {**saved, **about} if saved.get(name) != about.get(name)]
        if other:
            raise OperandError(
                f"{path} belongs to another fit, different in {', '.join(other)}; give what it was made with, remove "
                "it to start anew, or name another file"
            )
        return content  # type: ignore[no-any-return]


def describe(gp: nn.Module, X: Tensor, y: Tensor, **settings: Any) -> dict[str, str]:
    """What the numbers of a fit depend on, by name: checksums of the data and of what is not trained, settings.

    The values of trained parameters are not in it: they come from the checkpoint.
    """
    parameters = {name: p for name, p in gp.named_parameters() if p.requires_grad}
    rest = {name: t for name, t in [*gp.named_parameters(), *gp.named_buffers()] if name not in parameters}
    modules = [f"{name} {type(m).__name__} {_attributes(m)}" for name, m in gp.named_modules()]
    out = {
        "X": checksum(X),
        "y": checksum(y),
        "parameters": str([(name, tuple(p.shape), str(p.dtype)) for name, p in parameters.items()]),
        "constants": str([(name, checksum(t)) for name, t in rest.items()]),
        "model": "\n".join(modules),
    }
    for name in SETTINGS:
        if not isinstance(value := getattr(gp, name, None), nn.Module):
            out[name] = _text(_values(value) if name == "priors" else value)
    return out | {name: _text(value) for name, value in settings.items()}


def checksum(x: Tensor) -> str:
    """Shape, dtype and a hash of the bytes."""
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tuple(x.shape)} {x.dtype} {hashlib.sha256(data.tobytes()).hexdigest()}"


def _attributes(module: nn.Module) -> dict[str, str]:
    """Settings that a module keeps beside its tensors, such as a smoothness."""
    own = ((k, v) for k, v in sorted(vars(module).items()) if k[0] != "_" and k not in SETTINGS)
    return {k: _text(v) for k, v in own if isinstance(v, PLAIN)}


def _values(value: Any, top: bool = True) -> Any:
    """Class and values of priors, all the way down: ``repr(LogNormal(0.0, 1.0))`` says neither number.

    Of other objects than distributions only what a dictionary of priors holds itself is taken apart.
    """
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _values(v, top) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_values(v, top) for v in value]
    if not isinstance(value, (Distribution, Transform, nn.Module)) and not (top and hasattr(value, "__dict__")):
        return _text(value)
    inside = {**vars(value), **(value.state_dict() if isinstance(value, nn.Module) else {})}
    # A mixture keeps its parts in private attributes; other private ones are caches and checks.
    own = {k: v for k, v in sorted(inside.items()) if k[0] != "_" or isinstance(v, Distribution)}
    return type(value).__qualname__, {k: _values(v, False) for k, v in own.items()}


def _text(value: Any) -> str:
    """A representation that is the same in another process, and short."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return text if len(text) <= 500 else hashlib.sha256(text.encode()).hexdigest()
