"""The matfree contestants (JAX, x64, jitted): Lanczos fully reorthogonalised, forward and with its custom adjoint.

Called as matfree's documentation shows: decomp.tridiag_sym(k, reortho="full", custom_vjp=True) inside
funm.monte_carlo_funm_sym. The gradient is taken with respect to the parameters of the product, passed as a pytree.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")

import jax.numpy as jnp
import numpy as np
from _common import Case, Problem
from jax.experimental import sparse as jsparse
from matfree import decomp, funm

FUNCTIONS = {"log": jnp.log, "gauss": lambda x: jnp.exp(-x * x)}


def products(problem: Problem) -> dict[str, Callable]:
    """Candidate products (x, parameters) -> A x; the fastest in a trial is used, so that the peer runs at its best."""
    n = problem.n
    if problem.dense is not None:
        return {
            "A @ x": lambda x, A: A @ x,
            "x @ A": lambda x, A: x @ A,  # legitimate: A is symmetric
            "A @ x[:, None]": lambda x, A: (A @ x[:, None])[:, 0],
        }
    rows, cols = jnp.asarray(problem.rows), jnp.asarray(problem.cols)
    pairs = jnp.stack([rows, cols], axis=1)

    def bcoo(x, a):
        return jsparse.BCOO((a, pairs), shape=(n, n), indices_sorted=True, unique_indices=True) @ x

    def segment_sum(x, a):
        return jax.ops.segment_sum(a * x[cols], rows, num_segments=n, indices_are_sorted=True)

    out = {"BCOO": bcoo, "segment_sum": segment_sum}
    padded = problem.ell()
    if padded is not None:
        ell_cols, slots = (jnp.asarray(x) for x in padded)

        def ell(x, a):
            return (jnp.append(a, 0.0)[slots] * x[ell_cols]).sum(1)

        out["padded rows"] = ell
    return out


def quadratic_form(problem: Problem, product: Callable, k: int) -> Callable:
    tridiag = decomp.tridiag_sym(k, reortho="full", custom_vjp=True)
    dense = funm.dense_funm_sym_eigh(FUNCTIONS[problem.function])
    form = funm.monte_carlo_funm_sym(dense, tridiag)
    return lambda params, v: form(product, v, params)


def compiled(problem: Problem, product: Callable, k: int, backward: bool) -> tuple[Callable, float]:
    """The compiled function and the seconds it took to trace and compile."""
    form = quadratic_form(problem, product, k)
    run = jax.jit(jax.value_and_grad(form) if backward else form)
    params = problem.values if problem.dense is None else problem.dense
    start = time.perf_counter()
    shapes = [jax.ShapeDtypeStruct(np.shape(x), jnp.float64) for x in (params, problem.v)]
    executable = run.lower(*shapes).compile()
    return executable, time.perf_counter() - start


def make_cases(worker: str, problem: Problem, spec: dict) -> Callable[[int], Case]:
    backward = worker == "matfree adjoint"
    params = jnp.asarray(problem.values if problem.dense is None else problem.dense)
    v = jnp.asarray(problem.v)
    candidates = products(problem)
    info: dict[str, Any] = {}
    chosen = spec["product"]
    if chosen is None:
        info["candidates_s"] = {}
        for name, product in candidates.items():
            run, _ = compiled(problem, product, 10, backward)
            info["candidates_s"][name] = _trial(run, params, v)
        chosen = min(info["candidates_s"], key=info["candidates_s"].get)
    info["product"] = chosen

    def at_depth(k: int) -> Case:
        run, seconds = compiled(problem, candidates[chosen], k, backward)

        def call() -> Any:
            return jax.block_until_ready(run(params, v))

        def numbers(result: Any) -> tuple[float, np.ndarray | None]:
            value, grad = result if backward else (result, None)
            return float(value), None if grad is None else np.asarray(grad).ravel()

        def count() -> tuple[int, int]:
            return count_products(problem, candidates[chosen], k, backward)

        extra = {"compile_s": seconds}
        if spec["task"] == "time" and spec["check"]:
            extra["orthogonality"] = orthogonality(candidates[chosen], params, v, k)
        return Case(call, numbers, count, info | extra)

    return at_depth


def _trial(run: Callable, *args: Any) -> float:
    """Seconds a call, the best of five after a warm-up."""
    jax.block_until_ready(run(*args))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        best = min(best, time.perf_counter() - start)
    return best


def orthogonality(product: Callable, params: Any, v: Any, k: int) -> float:
    """max |QᵀQ − I|: shows that the reorthogonalisation asked for is the one that ran."""
    tridiag = decomp.tridiag_sym(k, reortho="full", custom_vjp=True)
    Q, *_ = jax.jit(lambda x, params: tridiag(product, x, params))(v, params)
    Q = Q if Q.shape[0] == k else Q.T  # handed out as rows or as columns, depending on the version
    return float(jnp.abs(Q @ Q.T - jnp.eye(k)).max())


def count_products(problem: Problem, product: Callable, k: int, backward: bool) -> tuple[int, int]:
    """Column products that the *compiled* program executes: a pure callback rides on every product and its transpose.

    XLA may merge or drop a pure callback exactly where it may merge or drop the product itself.
    """
    calls = {"forward": 0, "adjoint": 0}

    def seen(kind: str, x: Any) -> Any:
        def count(y: Any) -> np.ndarray:
            calls[kind] += 1
            return np.asarray(y)

        return jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    @jax.custom_vjp
    def counted(x: Any, params: Any) -> Any:
        return product(seen("forward", x), params)

    def pull(residuals: Any, cotangent: Any) -> Any:
        return jax.vjp(product, *residuals)[1](seen("adjoint", cotangent))

    counted.defvjp(lambda x, params: (counted(x, params), (x, params)), pull)
    args = jnp.asarray(problem.values if problem.dense is None else problem.dense), jnp.asarray(problem.v)
    totals = []
    for with_grad in (False, True) if backward else (False,):
        calls.update(forward=0, adjoint=0)
        run, _ = compiled(problem, counted, k, with_grad)
        jax.block_until_ready(run(*args))
        totals.append(sum(calls.values()))
    return totals[0], totals[-1] - totals[0]
