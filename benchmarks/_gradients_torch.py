"""The torch contestants: ritz under two gradient rules, and the plain loop a careful user would write without it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _common import Case, Problem
from torch import Tensor

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"log": torch.log, "gauss": lambda x: torch.exp(-x * x)}


# ---------------------------------------------------------------------------------------------
# Plain eager Lanczos
# ---------------------------------------------------------------------------------------------
def form_from_tridiagonal(f: Callable, alpha: Tensor, beta: Tensor, norm: Tensor) -> Tensor:
    lam, U = torch.linalg.eigh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
    return norm**2 * (U[0] ** 2 @ f(lam))


def lanczos_form(matvec: Callable, v: Tensor, f: Callable, k: int) -> Tensor:
    """vᵀ f(A) v; classical Gram-Schmidt against the whole basis, twice a step, as matrix-vector products. No graph."""
    Q = v.new_empty(k, len(v))
    alpha, beta = v.new_empty(k), v.new_empty(k - 1)
    norm = v.norm()
    q = v / norm
    for j in range(k):
        Q[j] = q
        w = matvec(q)
        alpha[j] = w @ q
        if j == k - 1:
            break
        basis = Q[: j + 1]
        w = w - basis.T @ (basis @ w)
        w = w - basis.T @ (basis @ w)
        beta[j] = w.norm()
        q = w / beta[j]
    return form_from_tridiagonal(f, alpha, beta, norm)


def lanczos_form_autograd(matvec: Callable, v: Tensor, f: Callable, k: int) -> Tensor:
    """The same iteration without in-place writes, for autograd through every step."""
    alpha, beta = [], []
    norm = v.norm()
    q = v / norm
    columns = []
    for j in range(k):
        columns.append(q)
        w = matvec(q)
        alpha.append(w @ q)
        if j == k - 1:
            break
        basis = torch.stack(columns)
        w = w - basis.T @ (basis @ w)
        w = w - basis.T @ (basis @ w)
        beta.append(w.norm())
        q = w / beta[-1]
    return form_from_tridiagonal(f, torch.stack(alpha), torch.stack(beta), norm)


def sparse_products(problem: Problem, device: str) -> dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]]:
    """Products whose gradient with respect to the stored values is not a dense matrix: values -> (x -> A x)."""
    rows, cols = torch.from_numpy(problem.rows).to(device), torch.from_numpy(problem.cols).to(device)
    indptr = torch.from_numpy(problem.indptr).to(device)
    products = {
        "index_add": lambda a: lambda x: torch.zeros_like(x).index_add(0, rows, a * x[cols]),
        "segment_reduce": lambda a: lambda x: torch.segment_reduce(a * x[cols], "sum", offsets=indptr),
    }
    padded = problem.ell()
    if padded is not None:
        ell_cols, slots = (torch.from_numpy(x).to(device) for x in padded)

        def ell(a: Tensor) -> Callable[[Tensor], Tensor]:
            entries = torch.cat([a, a.new_zeros(1)])[slots]
            return lambda x: (entries * x[ell_cols]).sum(1)

        products["padded rows"] = ell
    return products


def csr(problem: Problem, values: Tensor) -> Tensor:
    device = values.device
    indptr, cols = torch.from_numpy(problem.indptr).to(device), torch.from_numpy(problem.cols).to(device)
    return torch.sparse_csr_tensor(indptr, cols, values, (problem.n, problem.n))


# ---------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------
class Setup:
    """Tensors of a problem on a device; `params` are the leaves the gradient is taken with respect to."""

    def __init__(self, problem: Problem, device: str) -> None:
        self.problem, self.device = problem, device
        self.f = FUNCTIONS[problem.function]
        self.v = torch.from_numpy(problem.v).to(device)
        self.product: Callable | None = None
        if problem.name == "network":
            from _network import build_network

            self.params, self.product, _ = build_network(problem.settings, device)
        else:
            array = problem.values if problem.dense is None else problem.dense
            self.params = [torch.from_numpy(array).to(device).requires_grad_()]

    def numbers(self, result: Any) -> tuple[float, np.ndarray | None]:
        value, grads = result if isinstance(result, tuple) else (result, None)
        if grads is None:
            return float(value), None
        strided = [g.values() if g.layout == torch.sparse_csr else g for g in grads]
        return float(value), torch.cat([g.reshape(-1) for g in strided]).cpu().numpy()

    def case(self, call: Callable, count: Callable, info: dict[str, Any]) -> Case:
        if self.device == "cpu":
            return Case(call, self.numbers, count, info)

        def synchronised() -> Any:
            result = call()
            torch.cuda.synchronize()
            return result

        def peak(run: Callable) -> int:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            return torch.cuda.max_memory_allocated() - before

        return Case(synchronised, self.numbers, count, info, peak)


def make_cases(worker: str, problem: Problem, spec: dict) -> Callable[[int], Case]:
    torch.set_num_threads(spec["threads"])
    warnings.filterwarnings("ignore", message=".*[Ss]parse.*beta state.*")
    if spec["device"] == "cpu" and spec["task"] == "memory":  # thread pools and LAPACK workspaces are not the method's
        torch.linalg.eigh(torch.eye(64, dtype=torch.float64) @ torch.ones(64, 64, dtype=torch.float64))
    setup = Setup(problem, spec["device"])
    return (ritz_cases if worker.startswith("ritz") else loop_cases)(worker, setup, spec)


def loop_cases(worker: str, setup: Setup, spec: dict) -> Callable[[int], Case]:
    problem, backward = setup.problem, worker == "loop autograd"
    info: dict[str, Any] = {}
    if problem.name == "network":

        def bind() -> Callable:
            return setup.product

    elif problem.dense is not None:

        def bind() -> Callable:
            return setup.params[0].mv

    elif backward:
        products = sparse_products(problem, setup.device)
        chosen = spec["product"]
        if chosen is None:
            info["candidates_s"] = {name: _trial(setup, make) for name, make in products.items()}
            chosen = min(info["candidates_s"], key=info["candidates_s"].get)
        info["product"] = chosen

        def bind() -> Callable:
            return products[chosen](setup.params[0])

    else:
        S = csr(problem, setup.params[0].detach())
        info["product"] = "torch CSR mv"

        def bind() -> Callable:
            return S.mv

    def at_depth(k: int) -> Case:
        def call() -> Any:
            if not backward:
                with torch.no_grad():
                    return lanczos_form(bind(), setup.v, setup.f, k)
            value = lanczos_form_autograd(bind(), setup.v, setup.f, k)
            return value.detach(), torch.autograd.grad(value, setup.params)

        def count() -> tuple[int, int]:
            return _count_loop(bind(), setup, k, backward)

        return setup.case(call, count, dict(info))

    return at_depth


def _trial(setup: Setup, make: Callable) -> float:
    """Seconds for value and gradient at depth 10, the best of five."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        value = lanczos_form_autograd(make(setup.params[0]), setup.v, setup.f, 10)
        torch.autograd.grad(value, setup.params)
        best = min(best, time.perf_counter() - start)
    return best


def _count_loop(matvec: Callable, setup: Setup, k: int, backward: bool) -> tuple[int, int]:
    forward = adjoint = 0

    def counting(x: Tensor) -> Tensor:
        nonlocal forward
        forward += 1

        def seen(_: Tensor) -> None:
            nonlocal adjoint
            adjoint += 1

        if x.requires_grad:  # then the backward pass forms Aᵀ times the cotangent of this product
            x = x * 1
            x.register_hook(seen)
        return matvec(x)

    if backward:
        torch.autograd.grad(lanczos_form_autograd(counting, setup.v, setup.f, k), setup.params)
    else:
        with torch.no_grad():
            lanczos_form(counting, setup.v, setup.f, k)
    return forward, adjoint


def ritz_cases(worker: str, setup: Setup, spec: dict) -> Callable[[int], Case]:
    import ritz

    problem, n = setup.problem, setup.problem.n
    rule = ritz.Adjoint if worker == "ritz Adjoint" else ritz.Frechet
    backward = worker != "ritz forward"
    warnings.filterwarnings("ignore", category=ritz.ConvergenceWarning)
    f = ritz.functions.log if problem.function == "log" else setup.f
    if problem.name == "network":
        options = {"shape": (n, n), "dtype": torch.float64, "device": setup.device, "block": True}
        A = ritz.aslinearoperator(setup.product, hermitian=True, psd=True, **options)
    else:
        # built once: what is timed is the value and its gradient, as for the peers
        matrix = setup.params[0].detach()
        if problem.dense is None and worker == "ritz Frechet, COO":
            indices = torch.from_numpy(np.stack([problem.rows, problem.cols])).to(setup.device)
            matrix = torch.sparse_coo_tensor(indices, setup.params[0], (n, n), is_coalesced=True)
        else:  # the matrix is the leaf: torch differentiates its CSR constructor through a dense n × n mask
            matrix = csr(problem, matrix) if problem.dense is None else matrix
            setup.params = [matrix.requires_grad_(backward)]
        A = ritz.aslinearoperator(matrix, hermitian=True, psd=problem.function == "log")

    def at_depth(k: int) -> Case:
        def value_and_grad(operator: Any) -> Any:
            options = {"method": ritz.Lanczos(k), "gradient": rule()}
            if not backward:
                with torch.no_grad():
                    return ritz.quadratic_form(f, operator, setup.v, **options)
            value = ritz.quadratic_form(f, operator, setup.v, **options)
            grads = torch.autograd.grad(value, setup.params, retain_graph=True)
            return value.detach(), grads

        def count() -> tuple[int, int]:
            counting = ritz.Counting(A)
            with torch.no_grad():
                ritz.quadratic_form(f, counting, setup.v, method=ritz.Lanczos(k), gradient=rule())
            forward = counting.num_matvecs
            counting = ritz.Counting(A)
            value_and_grad(counting)
            return forward, counting.num_matvecs - forward

        return setup.case(lambda: value_and_grad(A), count, {})

    return at_depth
