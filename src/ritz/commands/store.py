"""A fitted model on disk: numbers as safetensors, everything else as JSON. Nothing in it can run code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ritz

from ..gp import ExactGP
from .dataset import Columns, Scaling
from .failure import CommandError, one_line, optional, reason
from .model import Spec, build

TENSORS, FACTS = "model.safetensors", "model.json"
_FORMAT, _VERSION = "ritz-gp", 1


@dataclass(frozen=True)
class Saved:
    """What a model directory holds.

    Attributes:
        spec: which kernel, in which dtype.
        gp: the Gaussian process with its fitted hyper-parameters.
        X: standardised training inputs (n, d); y: standardised training targets (n,).
        columns, scaling: how a table becomes inputs, and predictions become the target's units.
    """

    spec: Spec
    gp: ExactGP
    X: Tensor
    y: Tensor
    columns: Columns
    scaling: Scaling


def save(directory: Path, saved: Saved) -> None:
    """Write model.safetensors and model.json; the second holds a digest of the first."""
    safetensors = optional("safetensors.torch", "saving a model")
    tensors = {f"gp.{name}": value.detach().cpu().contiguous() for name, value in saved.gp.state_dict().items()}
    tensors["train.inputs"] = saved.X.contiguous()
    tensors["train.targets"] = saved.y.contiguous()
    tensors["scaling.x_mean"] = torch.from_numpy(saved.scaling.x_mean)
    tensors["scaling.x_scale"] = torch.from_numpy(saved.scaling.x_scale)
    data = safetensors.save({name: value.clone() for name, value in tensors.items()})
    facts = {
        "format": _FORMAT,
        "version": _VERSION,
        "ritz": ritz.__version__,
        "spec": saved.spec.to_json(),
        "columns": saved.columns.to_json(),
        "y_mean": saved.scaling.y_mean,
        "y_scale": saved.scaling.y_scale,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (directory / TENSORS).write_bytes(data)
    write_json(directory / FACTS, facts)


def load(directory: str | Path) -> Saved:
    """Read what :func:`save` wrote.

    Raises:
        CommandError: the directory is missing, incomplete, damaged or of another version.
    """
    safetensors = optional("safetensors.torch", "loading a model")
    directory = Path(directory)
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "there is no such directory"
        raise CommandError(f"{directory}: {what}; give the directory that `ritz gp fit --out` wrote")
    facts, data = _facts(directory), _read(directory, TENSORS)
    if facts.get("sha256") != hashlib.sha256(data).hexdigest():
        raise CommandError(f"{directory / TENSORS}: is damaged, or belongs to another {FACTS}; fit the model again")
    try:
        tensors = safetensors.load(data)
        spec = Spec(**facts["spec"])
        X, y = tensors["train.inputs"], tensors["train.targets"]
        gp = build(spec, X.shape[1])
        gp.load_state_dict({name[3:]: value for name, value in tensors.items() if name.startswith("gp.")})
        mean, scale = (tensors[f"scaling.{name}"].numpy().astype(np.float64) for name in ("x_mean", "x_scale"))
        scaling = Scaling(mean, scale, float(facts["y_mean"]), float(facts["y_scale"]))
        return Saved(spec, gp, X, y, Columns(**facts["columns"]), scaling)
    except Exception as error:
        raise CommandError(
            f"{directory}: is not a model that this ritz can read ({one_line(error)[:120]}); fit it again"
        ) from error


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Strict JSON: a NaN becomes null, so that every reader accepts it."""
    path.write_text(to_json(data) + "\n", encoding="utf-8")


def to_json(data: Any) -> str:
    """Strict, indented JSON text."""
    return json.dumps(_strict(data), indent=2, allow_nan=False, ensure_ascii=False)


def _strict(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _strict(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_strict(value) for value in data]
    if isinstance(data, float) and not np.isfinite(data):
        return None
    return data


def _facts(directory: Path) -> dict[str, Any]:
    path = directory / FACTS
    try:
        facts = json.loads(_read(directory, FACTS))
    except ValueError:
        raise CommandError(f"{path}: is not JSON; the model is damaged, fit it again") from None
    if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
        raise CommandError(f"{path}: does not describe a ritz Gaussian process")
    if facts.get("version") != _VERSION:
        raise CommandError(f"{path}: has format version {facts.get('version')}, and this ritz reads {_VERSION}")
    return facts


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except FileNotFoundError:
        raise CommandError(f"{directory}: is not a complete model: {name} is missing") from None
    except OSError as error:
        raise CommandError(f"{directory / name}: cannot be read: {reason(error)}") from None
