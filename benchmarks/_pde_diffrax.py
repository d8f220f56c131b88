"""The JAX contestants: diffrax, and hand-written polynomial schemes compiled as one program. No torch here.

diffrax       Tsit5, Dopri5, Dopri8 with RecursiveCheckpointAdjoint (a checkpoint per step, up to a limit) or
              BacksolveAdjoint; equal steps, or steps by error (atol = rtol/10); Kvaerno5 with a direct solve for the
              heat equation on small grids
hand-written  taylor: Taylor polynomial of exp(τA) by Horner's rule, equal substeps; chebyshev: one Chebyshev series on
              an interval that holds the spectrum by Gershgorin (wave: of cos(t√x) in x = −c²Δ, since u'(0) = 0, which
              halves the products)

Counting: one for every product with A and one for every product with its transpose, as the compiled program executes
them (a callback rides on each); what checkpointing computes again counts again.

    python benchmarks/_pde_diffrax.py --quick
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")

import _pde_problems as pde
import diffrax
import jax.numpy as jnp
import numpy as np
from _pde_problems import Problem, Setting

CONTESTANT = "diffrax"
SOLVERS = {name: getattr(diffrax, name) for name in ("Tsit5", "Dopri5", "Dopri8", "Kvaerno5")}
STABLE = {"Tsit5": 3.5, "Dopri5": 3.3, "Dopri8": 5.0}  # about, on the negative axis
IMPLICIT = ("Kvaerno5",)
HAND_WRITTEN = ("taylor", "chebyshev")
MOST_CHECKPOINTS = 256
TRIAL_CHECKPOINTS = 32  # while tuning
MOST_STEPS = 100_000


# ---------------------------------------------------------------------------------------------
# Stencils in the form that XLA fuses best, with hand-written transposes; states are tuples of (N, N) fields
# ---------------------------------------------------------------------------------------------
def neighbours(u: Any, mode: str) -> Any:
    """The sum of the four neighbours; zeros outside ("constant") or the other side ("wrap")."""
    x, y = jnp.pad(u, ((1, 1), (0, 0)), mode=mode), jnp.pad(u, ((0, 0), (1, 1)), mode=mode)
    return x[2:] + x[:-2] + y[:, 2:] + y[:, :-2]


def differences(u: Any) -> tuple[Any, Any]:
    x, y = jnp.pad(u, ((1, 1), (0, 0))), jnp.pad(u, ((0, 0), (1, 1)))
    return x[1:] - x[:-1], y[:, 1:] - y[:, :-1]


def self_adjoint(f: Callable[[Any], Any]) -> Callable[[Any], Any]:
    out = jax.custom_vjp(f)
    out.defvjp(lambda x: (f(x), None), lambda _, g: (f(g),))
    return out


def second_order(problem: Problem, *, plain: bool = False) -> Callable[[Any, Any], Any]:
    """(coefficients, x) -> S x, S = −c²Δ, −∇·c∇ or H; `plain` (heat): derivatives are left to JAX, forward mode too."""
    dtype = problem.theta.dtype
    if problem.kind == "wave":
        degree = np.full(problem.theta.shape, 4.0, dtype=dtype)
        for edge in (degree[0], degree[-1], degree[:, 0], degree[:, -1]):
            edge -= 1.0
        laplacian = self_adjoint(lambda x: degree * x - neighbours(x, "constant"))
        return lambda a, x: a[0] * laplacian(x)
    if problem.kind == "schrodinger":
        half = np.asarray(0.5 / problem.h**2, dtype=dtype)
        kinetic = self_adjoint(lambda x: half * (4 * x - neighbours(x, "wrap")))
        return lambda a, x: a[0] * x + kinetic(x)

    def product(a: Any, x: Any) -> Any:
        dx, dy = differences(x)
        qx, qy = a[0] * dx, a[1] * dy
        return qx[:-1] - qx[1:] + qy[:, :-1] - qy[:, 1:]

    def pull(kept: Any, g: Any) -> tuple:
        a, x = kept
        return tuple(dx * dg for dx, dg in zip(differences(x), differences(g))), product(a, g)

    if plain:
        return product
    S = jax.custom_vjp(product)
    S.defvjp(lambda a, x: (product(a, x), (a, x)), pull)
    return S


def vector_field(problem: Problem, S: Callable) -> Callable[[Any, tuple], tuple]:
    """(coefficients, y) -> A y."""
    if problem.kind == "wave":
        return lambda a, y: (y[1], -S(a, y[0]))
    if problem.kind == "schrodinger":
        return lambda a, y: (S(a, y[1]), -S(a, y[0]))
    return lambda a, y: (-S(a, y[0]),)


# ---------------------------------------------------------------------------------------------
# Solvers: each gives (coefficients, y0, knob) -> the observed fields at t, the number of steps
# ---------------------------------------------------------------------------------------------
def diffrax_solver(problem: Problem, setting: Setting, S: Callable) -> Callable[[Any, Any, Any], tuple]:
    """The knob is the step size, or the tolerance."""
    field, dtype = vector_field(problem, S), problem.theta.dtype.type
    term = diffrax.ODETerm(lambda t, y, coefficients: field(coefficients, y))
    solver = SOLVERS[setting.method]()
    if setting.gradient == "backsolve":
        adjoint = diffrax.BacksolveAdjoint()
    else:
        adjoint = diffrax.RecursiveCheckpointAdjoint(checkpoints=setting.segments)

    def solve(coefficients: Any, y0: tuple, knob: Any) -> tuple[list, Any]:
        if setting.steps is None:
            control, dt0 = diffrax.PIDController(rtol=knob, atol=0.1 * knob), None
        else:
            control, dt0 = diffrax.ConstantStepSize(), knob
        options = {"stepsize_controller": control, "adjoint": adjoint, "max_steps": MOST_STEPS, "throw": False}
        y = diffrax.diffeqsolve(
            term, solver, dtype(0.0), dtype(problem.t), dt0, y0, coefficients, saveat=diffrax.SaveAt(t1=True), **options
        )
        return [field[0] for field in y.ys[: problem.observed]], y.stats["num_steps"]

    return solve


def gershgorin(problem: Problem) -> tuple[float, float]:
    """An interval that holds the spectrum of S: what someone who writes the scheme by hand would take."""
    theta, h = np.asarray(problem.theta, dtype=np.float64), problem.h
    if problem.kind == "schrodinger":
        return float(theta.min()), float(theta.max()) + 4.0 / h**2
    return 0.0, 8.0 * float((theta**2 if problem.kind == "wave" else theta).max()) / h**2


def chebyshev_coefficients(problem: Problem, degree: int) -> np.ndarray:
    """Of f on the interval above, real and imaginary parts: (degree + 1, 2)."""
    low, high = gershgorin(problem)
    functions = {"wave": lambda x: np.cos(problem.t * np.sqrt(x)), "schrodinger": lambda x: np.exp(-1j * problem.t * x)}
    f = functions.get(problem.kind, lambda x: np.exp(-problem.t * x))
    count = 2 * degree + 64
    angle = np.pi * (np.arange(count) + 0.5) / count
    values = f(0.5 * (high + low) + 0.5 * (high - low) * np.cos(angle))
    out = 2.0 / count * np.cos(np.outer(np.arange(degree + 1), angle)) @ values
    out[0] *= 0.5
    return np.stack([out.real, out.imag], axis=1).astype(problem.theta.dtype)


def chebyshev_solver(problem: Problem, S: Callable) -> Callable[[Any, Any, Any], tuple]:
    """The knob holds the coefficients."""
    low, high = gershgorin(problem)
    centre, radius = (np.asarray(x, dtype=problem.theta.dtype) for x in (0.5 * (high + low), 0.5 * (high - low)))

    def scaled(a: Any, x: Any, factor: float) -> list:
        return [(S(a, field) - centre * field) * (factor / radius) for field in x]

    def added(total: Any, c: Any, x: Any) -> list:
        if problem.kind != "schrodinger":
            return [total[0] + c[0] * x[0]]
        return [total[0] + c[0] * x[0] - c[1] * x[1], total[1] + c[1] * x[0] + c[0] * x[1]]

    def solve(a: Any, y0: tuple, knob: Any) -> tuple[list, Any]:
        x0 = list(y0[: problem.observed])
        x1 = scaled(a, x0, 1.0)
        total = added(added([jnp.zeros_like(x) for x in x0], knob[0], x0), knob[1], x1)

        def step(carry: Any, c: Any) -> Any:
            before, x, total = carry
            after = [s - b for s, b in zip(scaled(a, x, 2.0), before)]
            return (x, after, added(total, c, after)), None

        return jax.lax.scan(step, (x0, x1, total), knob[2:])[0][2], 1

    return solve


def taylor_factors(problem: Problem, setting: Setting, length: int) -> np.ndarray:
    """τ/k from k = degree down to 1, with zeros in front, which leave Horner's rule as it is."""
    factors = np.zeros(length)
    factors[length - setting.order :] = problem.t / setting.steps / np.arange(setting.order, 0, -1)
    return factors.astype(problem.theta.dtype)


def taylor_solver(problem: Problem, setting: Setting, S: Callable) -> Callable[[Any, Any, Any], tuple]:
    """The knob holds the factors."""
    field = vector_field(problem, S)

    def solve(a: Any, y0: tuple, knob: Any) -> tuple[list, Any]:
        def step(y: tuple, _: Any) -> Any:
            def horner(x: tuple, factor: Any) -> Any:
                return tuple(part + factor * slope for part, slope in zip(y, field(a, x))), None

            return jax.lax.scan(horner, y, knob)[0], None

        return list(jax.lax.scan(step, y0, None, length=setting.steps)[0][: problem.observed]), setting.steps

    return solve


# ---------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------
def knob(problem: Problem, setting: Setting, length: int | None = None) -> np.ndarray:
    """The run-time argument of a setting; `length`: padded, so that one program serves many degrees."""
    if setting.method == "chebyshev":
        out = np.zeros(((length or setting.order) + 1, 2), dtype=problem.theta.dtype)
        out[: setting.order + 1] = chebyshev_coefficients(problem, setting.order)
        return out
    if setting.method == "taylor":
        return taylor_factors(problem, setting, length or setting.order)
    value = setting.rtol if setting.steps is None else problem.t / setting.steps * (1 + 1e-6)  # no crumb at the end
    return np.asarray(value, dtype=problem.theta.dtype)


def program(problem: Problem, setting: Setting, S: Callable | None = None) -> Callable[[Any, Any], Any]:
    """(theta, knob) -> (loss, (u, steps)), gradient; not compiled."""
    S = second_order(problem, plain=setting.method in IMPLICIT) if S is None else S
    if setting.method == "chebyshev":
        solve = chebyshev_solver(problem, S)
    else:
        solve = (taylor_solver if setting.method == "taylor" else diffrax_solver)(problem, setting, S)
    y0, target = tuple(jnp.asarray(field) for field in problem.y0), jnp.asarray(problem.target)

    def loss(theta: Any, knob: Any) -> tuple[Any, Any]:
        fields, steps = solve(pde.prepare(problem, theta, jnp), y0, knob)
        u = jnp.stack(fields)
        return 0.5 * ((u - target) ** 2).sum() / problem.N**2, (u, steps)

    return jax.value_and_grad(loss, has_aux=True)


def compiled(run: Callable, problem: Problem, argument: np.ndarray) -> Callable[[np.ndarray], tuple]:
    executable, theta = jax.jit(run).lower(problem.theta, argument).compile(), jnp.asarray(problem.theta)
    return lambda argument: jax.block_until_ready(executable(theta, argument))


def make(problem: Problem, setting: Setting, *, count: bool = True) -> tuple[Callable[[], tuple], dict[str, Any]]:
    """call() -> (value, observed u(t), gradient), blocking; products, seconds of compilation, steps taken."""
    problem = pde.convert(problem, problem.dtype, "numpy")
    argument, start = knob(problem, setting), time.perf_counter()
    run = compiled(program(problem, setting), problem, argument)
    info: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    argument = jnp.asarray(argument)

    def call() -> tuple[Any, Any, Any]:
        (value, (u, _)), grad = run(argument)
        return value, u, grad

    if count:
        info |= count_products(problem, setting)
    return call, info


def count_products(problem: Problem, setting: Setting) -> dict[str, Any]:
    """Products with A and Aᵀ that the compiled program executes, by a pure callback on each product with S and Sᵀ."""
    if setting.method in IMPLICIT:  # a dense Jacobian per step and its factors: no products to speak of
        return {}
    calls, S = {"forward": 0, "backward": 0}, second_order(problem)
    fields = 2 if problem.kind == "schrodinger" else 1  # products with S in one with A

    def seen(kind: str, x: Any) -> Any:
        def tick(one: Any) -> np.ndarray:
            calls[kind] += 1
            return np.zeros_like(one)

        @jax.custom_jvp  # BacksolveAdjoint takes the transpose through forward mode, where it is linear
        def ride(x: Any) -> Any:
            # One number goes to Python, not the field: on a single core JAX waits for ever for a copy of a large array.
            one = x.reshape(-1)[0]
            zero = jax.pure_callback(tick, jax.ShapeDtypeStruct((), x.dtype), one, vmap_method="expand_dims")
            return x + zero

        ride.defjvp(lambda primals, tangents: (ride(*primals), ride(*tangents)))
        return ride(x)

    @jax.custom_vjp
    def counted(a: Any, x: Any) -> Any:
        return S(a, seen("forward", x))

    def pull(residuals: Any, cotangent: Any) -> Any:
        return jax.vjp(S, *residuals)[1](seen("backward", cotangent))

    counted.defvjp(lambda a, x: (counted(a, x), (a, x)), pull)
    argument = knob(problem, setting)
    loss = program(problem, setting, counted)
    value = jax.jit(lambda theta, argument: loss(theta, argument)[0][0])  # the gradient is dropped
    jax.block_until_ready(value(problem.theta, argument))
    forward = sum(calls.values())
    calls.update(forward=0, backward=0)
    (_, (_, steps)), _ = compiled(loss, problem, argument)(argument)
    return {
        "counted": "products with A and its transpose",
        "forward": forward // fields,
        "backward": (sum(calls.values()) - forward) // fields,
        "transposed": calls["backward"] // fields,
        "steps_taken": int(steps),
    }


# ---------------------------------------------------------------------------------------------
# Tuning
# ---------------------------------------------------------------------------------------------
def settings(problem: Problem) -> list[Setting]:
    explicit = ("Tsit5", "Dopri5", "Dopri8")
    if problem.kind == "heat":  # backsolve: the heat equation cannot be run backwards, tried once
        stiff = [Setting("Kvaerno5", "checkpoints", rtol=0.0)] if problem.N <= 32 else []
        fixed = [Setting(m, "checkpoints", steps=1) for m in explicit]
        other = [Setting("Tsit5", "checkpoints", rtol=0.0), Setting("Tsit5", "backsolve", steps=1)]
        return [Setting("chebyshev", order=2), *stiff, *fixed, *other]
    fixed = [Setting(m, g, steps=1) for m in explicit for g in ("checkpoints", "backsolve")]
    adaptive = [Setting(m, "checkpoints", rtol=0.0) for m in ("Tsit5", "Dopri8")]
    return [Setting("chebyshev", order=2), Setting("taylor", steps=1, order=2), *fixed, *adaptive]


def lowest_degree(problem: Problem, setting: Setting, length: int, reference: Any, target: float) -> tuple | None:
    """One program of padded length serves all degrees."""
    run = compiled(program(problem, setting), problem, knob(problem, replace(setting, order=length), length))
    seen: dict[int, pde.Errors] = {}

    def good(degree: int) -> bool:
        (_, (u, _)), grad = run(knob(problem, replace(setting, order=degree), length))
        seen[degree] = pde.errors(u, grad, reference)
        return max(seen[degree]) <= target

    degree = pde.fewest(good, 2, length)
    return None if degree is None else (replace(setting, order=degree), seen[degree])


def tune_hand_written(problem: Problem, start: Setting, reference: Any, target: float) -> tuple | None:
    """The lowest degree; for taylor also the number of substeps with the fewest products."""
    reach = problem.t * gershgorin(problem)[1] ** (0.5 if problem.kind == "wave" else 1.0)
    if start.method == "chebyshev":
        length = int(6 * reach**0.5) if problem.kind == "heat" else int(2 * reach)
        return lowest_degree(problem, start, max(64, length), reference, target)
    hits = []
    for steps in sorted({max(1, math.ceil(reach / z)) for z in (2, 3, 4, 5, 6, 8, 10, 12)}):
        hits.append(lowest_degree(problem, replace(start, steps=steps), 64, reference, target))
    return min((hit for hit in hits if hit), key=lambda hit: hit[0].order * hit[0].steps, default=None)


def tune_diffrax(problem: Problem, start: Setting, reference: Any, target: float) -> tuple | None:
    start = replace(start, segments=TRIAL_CHECKPOINTS if start.gradient == "checkpoints" else None)
    programs, taken = [], {}

    def measure(setting: Setting) -> pde.Errors:
        argument = knob(problem, setting)
        if not programs:  # one serves all steps and tolerances
            programs.append(compiled(program(problem, setting), problem, argument))
        (_, (u, steps)), grad = programs[0](argument)
        taken[setting] = int(steps)
        return pde.errors(u, grad, reference)

    first, limit = 1, 2000
    if problem.kind == "heat" and start.steps is not None:
        first = int(0.9 * problem.t * problem.high / STABLE[start.method])
        limit = 2 * first
    hit = pde.search(start, measure, target, first=first, limit=limit)
    if hit is None or start.segments is None:
        return hit
    enough = min(taken[hit[0]] + 1, MOST_CHECKPOINTS)  # every step is run twice, no more
    return replace(hit[0], segments=enough), hit[1]


def tune(
    problem: Problem, reference: Any, target: float = 1e-4, choices: list[Setting] | None = None, counted: int = 2
) -> list[dict[str, Any]]:
    """The cheapest accurate setting of every method, fastest first: setting, errors, ms, counts; last come failures.

    Counts are taken for what is hand-written and for the `counted` fastest of diffrax (counting compiles twice).
    """
    problem = pde.convert(problem, problem.dtype, "numpy")
    found, failed = [], []
    for start in settings(problem) if choices is None else choices:
        search = tune_hand_written if start.method in HAND_WRITTEN else tune_diffrax
        hit = search(problem, start, reference, target)
        if hit is None:
            failed.append({"setting": start, "failed": f"no errors of {target:g} in reach"})
            continue
        call, info = make(problem, hit[0], count=False)
        found.append({"setting": hit[0], "errors": hit[1], "ms": pde.best_ms(call)} | info)
    found.sort(key=lambda row: row["ms"])
    for row in found:
        hand_written = row["setting"].method in HAND_WRITTEN
        if hand_written or counted > 0:
            row |= count_products(problem, row["setting"])
            counted -= not hand_written
    return found + failed


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning, module="equinox|diffrax")
    pde.show(pde.command_line(__doc__.splitlines()[0]).parse_args(), tune, "numpy", lambda problem, row: "")
