"""What every contestant shares: the problems, the clock, the memory meter, the worker protocol.

Nothing here imports torch or jax, so that both kinds of worker measure with the same code.
"""

from __future__ import annotations

import ctypes
import gc
import gzip
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROBLEMS = ("laplacian", "bloweybq", "kernel", "network")


# ---------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """A symmetric matrix, a vector and a scalar function. Sparse: COO sorted by row, every stored entry kept."""

    name: str
    title: str
    function: str  # "log" or "gauss" (f(x) = exp(-x^2))
    v: np.ndarray | None = None
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    values: np.ndarray | None = None  # the parameters of a sparse problem
    dense: np.ndarray | None = None  # the parameters of a dense problem
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.v)

    @property
    def indptr(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(np.bincount(self.rows, minlength=self.n))])

    def ell(self, max_width: int = 32) -> tuple[np.ndarray, np.ndarray] | None:
        """Rows padded to equal width: columns (n, w) and slots (n, w) into values + [0]. None if a row is too long."""
        counts = np.diff(self.indptr)
        width = int(counts.max())
        if width > max_width:
            return None
        cols = np.zeros((self.n, width), dtype=np.int64)
        slots = np.full((self.n, width), len(self.values), dtype=np.int64)
        place = np.arange(len(self.values)) - np.repeat(self.indptr[:-1], counts)
        cols[self.rows, place] = self.cols
        slots[self.rows, place] = np.arange(len(self.values))
        return cols, slots


def unit_vector(n: int) -> np.ndarray:
    v = np.random.default_rng(0).standard_normal(n)
    return v / np.linalg.norm(v)


def stencil_1d(m: int) -> np.ndarray:
    return 2.0 * np.eye(m) - np.eye(m, k=1) - np.eye(m, k=-1)


def laplacian(m: int) -> Problem:
    """3-D Laplacian on m^3 interior points, Dirichlet, stencil 6 / -1 (unscaled), f = log."""
    import scipy.sparse as sp

    one, eye = sp.csr_array(stencil_1d(m)), sp.eye_array(m)
    A = sp.kron(sp.kron(one, eye), eye) + sp.kron(sp.kron(eye, one), eye) + sp.kron(sp.kron(eye, eye), one)
    A = sp.coo_array(sp.csr_array(A))
    order = np.lexsort((A.col, A.row))
    rows, cols, values = (np.asarray(x)[order] for x in (A.row, A.col, A.data))
    return Problem(
        "laplacian", f"3-D Laplacian {m}³, log", "log", unit_vector(m**3), rows, cols, values, settings={"m": m}
    )


def find_bloweybq(data: str | None) -> Path | None:
    name = "bloweybq.mtx.gz"
    folders = [Path(p) for p in (data, os.environ.get("RITZ_DATA")) if p]
    folders += [f / "suitesparse" for f in folders] + [ROOT / "src/ritz/testing/data"]
    return next((f / name for f in folders if (f / name).is_file()), None)


def bloweybq(data: str | None) -> Problem:
    """SuiteSparse GHS_indef/bloweybq as stored, unscaled; f = exp(-x^2). Stored zeros count as parameters."""
    path = find_bloweybq(data)
    if path is None:
        raise FileNotFoundError(
            "bloweybq.mtx.gz not found; pass --data FOLDER or set RITZ_DATA to the folder that holds it"
        )
    with gzip.open(path, "rt") as stream:
        lines = [line for line in stream if not line.startswith("%")]
    n = int(lines[0].split()[0])
    i, j, x = np.loadtxt(lines[1:], unpack=True)
    i, j = i.astype(np.int64) - 1, j.astype(np.int64) - 1
    off = i != j
    rows, cols, values = np.concatenate([i, j[off]]), np.concatenate([j, i[off]]), np.concatenate([x, x[off]])
    order = np.lexsort((cols, rows))
    return Problem("bloweybq", "bloweybq, exp(−A²)", "gauss", unit_vector(n), rows[order], cols[order], values[order])


def kernel(n: int) -> Problem:
    """RBF kernel matrix of n uniform points in the unit cube, lengthscale 0.3, plus 0.1 I; f = log."""
    X = np.random.default_rng(1).random((n, 3))
    sq = (X**2).sum(1)
    r2 = np.maximum(sq[:, None] + sq[None] - 2.0 * X @ X.T, 0.0)
    K = np.exp(-r2 / (2 * 0.3**2))
    K = 0.5 * (K + K.T)
    K[np.diag_indices(n)] = 1.0 + 0.1
    return Problem(
        "kernel", f"dense RBF kernel + 0.1 I, n = {n}, log", "log", unit_vector(n), dense=K, settings={"n": n}
    )


def network(sizes: list[int], batch: int) -> Problem:
    """Gauss-Newton matrix of a small classifier + damping, as a callable (built by the torch worker); f = log."""
    n = sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))
    settings = {"sizes": sizes, "batch": batch, "damping": 0.01}
    return Problem("network", f"GGN of an MLP, {n} parameters, + 0.01 I, log", "log", unit_vector(n), settings=settings)


def make_problem(name: str, *, quick: bool = False, data: str | None = None) -> Problem:
    if name == "laplacian":
        return laplacian(8 if quick else 24)
    if name == "bloweybq":
        return bloweybq(data)
    if name == "kernel":
        return kernel(300 if quick else 4000)
    if name == "network":
        return network([16, 24, 4], 32) if quick else network([64, 128, 128, 10], 256)
    raise ValueError(f"unknown problem {name!r}; known: {', '.join(PROBLEMS)}")


# ---------------------------------------------------------------------------------------------
# Clock and memory
# ---------------------------------------------------------------------------------------------
def measure(
    call: Callable[[], Any], *, min_runs: int = 7, min_time: float = 1.0, max_time: float = 20.0
) -> list[float]:
    """Seconds per call: warm-up calls for half a second, then at least `min_runs` timed ones (3 if they are slow).

    Two warm-up calls are too few for calls of milliseconds: the first hundred take a quarter longer than the rest.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < 0.5:
        call()
    samples: list[float] = []
    gc.collect()
    gc.disable()
    try:
        while len(samples) < 100:
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
            total = sum(samples)
            if (len(samples) >= min_runs and total >= min_time) or (len(samples) >= 3 and total >= max_time):
                break
    finally:
        gc.enable()
    return samples


def _status(key: str) -> int:
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith(key))


def peak_memory(call: Callable[[], Any]) -> int:
    """Growth of the peak resident set over one call, bytes (Linux; freed heap is given back first)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc: freed heap stays in the baseline
        pass
    with open("/proc/self/clear_refs", "w") as stream:
        stream.write("5")  # resets VmHWM to the present VmRSS
    before = _status("VmRSS")
    call()
    return max(_status("VmHWM") - before, 0)


# ---------------------------------------------------------------------------------------------
# Worker protocol
# ---------------------------------------------------------------------------------------------
@dataclass
class Case:
    """One contestant at one depth. `call` runs to completion (synchronised) and returns native results."""

    call: Callable[[], Any]
    numbers: Callable[[Any], tuple[float, np.ndarray | None]]  # native results -> value, flat gradient
    count: Callable[[], tuple[int, int]]  # column products: for the value, added by the gradient
    info: dict[str, Any]
    peak: Callable[[Callable[[], Any]], int] = peak_memory


def relative_errors(problem: Problem, value: float, grad: np.ndarray | None, reference: Any) -> dict[str, float]:
    """Relative value error, and relative gradient error in the 2-norm over the parameters.

    For a matrix, `grad_error` is that of the symmetric part: the Lanczos recurrence is differentiated on symmetric
    matrices only, so the skew part of an adjoint's answer is arbitrary. `grad_error_raw`: the entries as handed out.
    """
    exact_value, exact = float(reference["value"]), reference["grad"]
    out = {"value_error": abs(value - exact_value) / abs(exact_value)}
    if grad is None:
        return out
    norm = np.linalg.norm(exact)
    error = float(np.linalg.norm(grad - exact) / norm)
    if problem.name == "network":
        return out | {"grad_error": error}
    if problem.dense is None:
        mirrored = grad[np.lexsort((problem.rows, problem.cols))]  # entry (j, i) at the place of every stored (i, j)
    else:
        mirrored = grad.reshape(problem.dense.shape).T.ravel()
    symmetric = 0.5 * (grad + mirrored)
    return out | {"grad_error": float(np.linalg.norm(symmetric - exact) / norm), "grad_error_raw": error}


def run_worker(make_cases: Callable[[str, Problem, dict], Callable[[int], Case]], spec: dict) -> list[dict]:
    """Run one worker's task: `time` (all depths, with errors and products) or `memory` (one depth, fresh process)."""
    problem = make_problem(spec["problem"], quick=spec["quick"], data=spec["data"])
    at_depth = make_cases(spec["worker"], problem, spec)
    records = []
    for k in spec["ks"]:
        case = at_depth(k)
        record = {"problem": problem.name, "contestant": spec["worker"], "k": k}
        if spec["task"] == "memory":
            record["peak_bytes"] = case.peak(case.call)
        else:
            record["samples"] = measure(case.call, **spec["measure"])
            if spec["check"]:
                with np.load(spec["reference"]) as reference:
                    record |= relative_errors(problem, *case.numbers(case.call()), reference)
                record["products_value"], record["products_grad"] = case.count()
        record |= case.info
        records.append(record)
    return records


def thread_variables(threads: int) -> dict[str, str]:
    """Set in a worker's environment before it starts, since BLAS reads them when numpy is loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "NPROC")
    return dict.fromkeys(names, str(threads))


def pin_cores(threads: int) -> None:
    """At most `threads` cores, for those who size their pools by the cores they see (XLA)."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def commit() -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def environment(threads: int, device: str) -> dict[str, Any]:
    names = ("ritz", "torch", "jax", "jaxlib", "matfree", "numpy", "scipy")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as stream:
            model = next(line.split(":", 1)[1].strip() for line in stream if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S"),
        "device": device,
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "dtype": "float64",
    }


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
