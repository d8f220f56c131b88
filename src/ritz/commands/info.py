"""``ritz info``: what is installed, what it runs on, and what that leaves out; ``ritz bench``: a benchmark by name."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import ritz
from ritz.kernels import NumbaTiles

from .failure import CommandError

_EXTRAS = {
    "numba": "numba",
    "scipy": "scipy",
    "scikit-learn": "sklearn",
    "pandas": "cli",
    "safetensors": "cli",
    "matplotlib": "cli",
}


def collect() -> dict[str, Any]:
    """Versions, devices, threads and kernel back ends, as plain data."""
    devices: list[dict[str, Any]] = [
        {"name": "cpu", "what": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    ]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        devices.append({"name": f"cuda:{i}", "what": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)})
    backends = {
        "tiles": "available",
        "numba": _numba(),
        "triton": _triton(),
    }
    return {
        "ritz": ritz.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in ("torch", "numpy", "tqdm", *_EXTRAS)},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "kernel_backends": backends,
    }


def run_info(as_json: bool) -> None:
    """Print :func:`collect`."""
    facts = collect()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    rows = [("ritz", facts["ritz"]), ("python", f"{facts['python']} on {facts['platform']}")]
    for name, version in facts["packages"].items():
        rows.append((name, version or f"missing: pip install ritz[{_EXTRAS.get(name, '')}]".replace("[]", "")))
    for device in facts["devices"]:
        size = f"{device['cores']} cores" if "cores" in device else f"{device['memory_gib']} GiB"
        rows.append((device["name"], f"{device['what']}, {size}"))
    rows.append(("threads", str(facts["threads"])))
    rows += [(f"kernels: {name}", found) for name, found in facts["kernel_backends"].items()]
    for label, value in rows:
        print(f"{label:<16} {value}")


def run_bench(name: str, arguments: list[str]) -> int:
    """Run benchmarks/NAME.py of the source checkout with the rest of the command line; its exit code."""
    folder = Path(ritz.__file__).resolve().parents[2] / "benchmarks"
    scripts = sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_"))
    if not scripts:
        raise CommandError("the benchmarks are part of the source checkout, and this ritz is installed without one")
    if name not in scripts:
        raise CommandError(f"there is no benchmark {name!r}; there is: {', '.join(scripts)}")
    code = subprocess.run([sys.executable, str(folder / f"{name}.py"), *arguments], check=False).returncode
    return code if code >= 0 else 128 - code  # killed by a signal: as a shell reports it


def _found(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numba() -> str:
    return "available" if NumbaTiles.available(torch.device("cpu")) else "missing: pip install ritz[numba]"


def _triton() -> str:
    if not torch.cuda.is_available():
        return "not used: no CUDA device"
    return "available" if _found("triton") else "missing: it comes with CUDA builds of torch"
