import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ritz
from ritz import Arnoldi, Lanczos, OperandError
from ritz.expint.march import _Controller
from ritz.expint.odeint import odeint
from ritz.expint.products import Settings
from ritz.expint.steppers import ETDRK4, EXPRB43, EXPRB53, ExponentialEuler, Fixed, error_vector
from ritz.expint.system import System
from ritz.operators import Diagonal

from .systems import Y0, A, AllenCahn, D, N, autonomous, by_scipy, driven, reference, relative, with_linear

TIGHT = Arnoldi(rtol=1e-14)  # so that the Krylov error is not seen


def slope(steps: list[int], errors: list[float]) -> float:
    """The order that errors show over numbers of steps."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


ORDERS = [
    (ExponentialEuler(), True, 1, [10, 20, 40]),
    (ExponentialEuler(), False, 2, [8, 16, 32]),
    (ETDRK4(), True, 4, [8, 12, 16]),
    (EXPRB43(), False, 4, [16, 24, 32]),
    (EXPRB43(), True, 4, [16, 24, 32]),
    (EXPRB53(), False, 5, [8, 12, 16]),
    (EXPRB53(), True, 5, [8, 12, 16]),
]


CASES = [(f, *case) for f in (autonomous, driven) for case in ORDERS]


@pytest.mark.parametrize(
    "f, method, linear, order, steps", CASES, ids=[f"{c[0].__name__}-{c[1]}-{c[2]}" for c in CASES]
)
def test_order(f, method: Fixed, linear: bool, order: int, steps: list[int]):
    func, given = (f, A) if linear else (with_linear(f), None)
    errors = []
    for number in steps:
        y = odeint(func, Y0, [0.0, 0.5], linear=given, method=method, num_steps=number)
        errors.append(relative(y[-1], reference(f, 0.0, 0.5)[-1]))
    assert abs(slope(steps, errors) - order) < 0.2, errors


def phis(Z: Tensor) -> list[Tensor]:
    """φ_0(Z) … φ_4(Z): the first row of blocks of one exponential."""
    n, big = Z.shape[0], torch.zeros(5 * Z.shape[0], 5 * Z.shape[0], dtype=D)
    big[:n, :n] = Z
    for j in range(4):
        big[j * n : (j + 1) * n, (j + 1) * n : (j + 2) * n] += torch.eye(n, dtype=D)
    return list(torch.matrix_exp(big)[:n].split(n, 1))


def step_by_tableau(method: Fixed, h: float, t: float) -> tuple[Tensor, Tensor | None]:
    """One step of y' = A y + driven, and of the embedded method, from the coefficients as published.

    The Rosenbrock methods are applied to the autonomous system of (y, t), with its whole Jacobian.
    """
    if isinstance(method, ETDRK4):
        half, full = phis(h / 2 * A), phis(h * A)
        f = lambda c, u: driven(torch.tensor(t + c * h, dtype=D), u)
        n1 = f(0, Y0)
        n2 = f(0.5, half[0] @ Y0 + h / 2 * half[1] @ n1)
        n3 = f(0.5, half[0] @ Y0 + h * ((half[1] / 2 - half[2]) @ n1 + half[2] @ n2))
        n4 = f(1, full[0] @ Y0 + h * ((full[1] - 2 * full[2]) @ n1 + 2 * full[2] @ n3))
        outer = (full[1] - 3 * full[2] + 4 * full[3]) @ n1 + (4 * full[3] - full[2]) @ n4
        return full[0] @ Y0 + h * (outer + (2 * full[2] - 4 * full[3]) @ (n2 + n3)), None

    def rate(Y: Tensor) -> Tensor:
        return torch.cat([with_linear(driven)(Y[-1], Y[:-1]), torch.ones(1, dtype=D)])

    Y = torch.cat([Y0, torch.tensor([t], dtype=D)])
    J, F = torch.autograd.functional.jacobian(rate, Y), rate(Y)
    rest = lambda U: rate(U) - F - J @ (U - Y)
    p1, p3, p4 = (phis(h * J)[k] for k in (1, 3, 4))
    half = phis(h / 2 * J)
    D2 = rest(Y + h / 2 * half[1] @ F)
    if isinstance(method, EXPRB43):
        D3 = rest(Y + h * p1 @ (F + D2))
        b2, b3 = 16 * p3 - 48 * p4, 12 * p4 - 2 * p3
        embedded = 16 * p3 @ D2 - 2 * p3 @ D3
    else:
        most = phis(0.9 * h * J)
        D3 = rest(Y + 0.9 * h * most[1] @ F + h * (27 / 25 * half[3] + 729 / 125 * most[3]) @ D2)
        b2, b3 = 18 * p3 - 60 * p4, 500 / 27 * p4 - 250 / 81 * p3
        embedded = 8 * p3 @ D2
    base = Y + h * p1 @ F
    return (base + h * (b2 @ D2 + b3 @ D3))[:-1], (base + h * embedded)[:-1]


@pytest.mark.parametrize("method", [ETDRK4(), EXPRB43(), EXPRB53()], ids=repr)
def test_steps_are_those_of_the_published_coefficients(method):
    h, t = 0.2, 0.3
    want, embedded = step_by_tableau(method, h, t)
    system = System(driven, ritz.aslinearoperator(A), None, Y0, Settings(ritz.Auto(), ritz.Frechet(), None, "warn"))
    at = method.point(system, torch.tensor(t, dtype=D), Y0)
    vectors, wrong = method.vectors(system, at, h)
    got = Y0 + system.phi(at.J, h, vectors)
    assert relative(got, want) < 1e-14
    if embedded is not None:
        assert relative(error_vector(system, at, h, wrong), want - embedded) < 1e-9


@pytest.mark.parametrize("method", [EXPRB43(), EXPRB53()], ids=repr)
def test_error_estimate_has_order_three(method):
    """One step of the embedded method errs by O(h⁴)."""
    system = System(with_linear(driven), None, None, Y0, Settings(ritz.Auto(), ritz.Frechet(), None, "warn"))
    at = system.linearize(torch.tensor(0.1, dtype=D), Y0)
    sizes = [float(error_vector(system, at, h, method.vectors(system, at, h)[1]).norm()) for h in (0.1, 0.05, 0.025)]
    assert abs(slope([10, 20, 40], sizes) - 4) < 0.2, sizes


def test_etdrk4_is_the_classical_method_without_a():
    """φ_j(0) = 1/j!: the coefficients become those of Runge and Kutta."""
    y = odeint(driven, Y0, [0.0, 0.2], linear=torch.zeros(N, N, dtype=D), method=ETDRK4(), num_steps=1, krylov=TIGHT)
    h, t = 0.2, torch.tensor(0.0, dtype=D)
    k1 = driven(t, Y0)
    k2 = driven(t + h / 2, Y0 + h / 2 * k1)
    k3 = driven(t + h / 2, Y0 + h / 2 * k2)
    k4 = driven(t + h, Y0 + h * k3)
    assert relative(y[-1], Y0 + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)) < 1e-14


STIFF = [
    (EXPRB43(), {"rtol": 1e-5, "atol": 1e-7}, {}),
    (EXPRB43(), {"rtol": 1e-5, "atol": 1e-7}, {"linear": True, "jacobian": True}),
    (EXPRB53(), {"rtol": 1e-5, "atol": 1e-7}, {"linear": True}),
    (ETDRK4(), {"num_steps": 10}, {"linear": True}),
]


@pytest.mark.parametrize(
    "method, control, form", STIFF, ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else repr(x)
)
def test_allen_cahn(method, control, form):
    f, L = AllenCahn.reaction, AllenCahn.laplacian
    more = {}
    if "jacobian" in form:
        more["jacobian"] = lambda t, u: Diagonal(1 - 3 * u**2)
    if "linear" in form:
        more["linear"] = L
    func = f if "linear" in form else with_linear(f, L)
    y, info = odeint(func, AllenCahn.start(), AllenCahn.times, method=method, return_info=True, **control, **more)
    assert relative(y, AllenCahn.solution()) < 1e-6  # ten times better than asked for: the estimate is of order three
    # An explicit method of order 4 needs h‖A‖ < 2.8, some 30 steps for stability alone.
    assert info.accepted <= 30 and info.status.success


@pytest.mark.parametrize("times", [[0.0, 0.7, 2.0], [5.0, 4.0, 3.9, 1.0], [-1.0, 0.0]], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_steps, krylov", [(None, ritz.Auto()), (2, ritz.Auto()), (None, TIGHT), (2, TIGHT)])
def test_linear_systems_are_solved_exactly(times, symmetric, num_steps, krylov):
    B = A if symmetric else A + torch.tensor([[0.0, 1, 2, 0], [-1, 0, 3, 1], [0, 0, 0, 2], [1, 0, -1, 0]], dtype=D)
    y = odeint(None, Y0, times, linear=B, num_steps=num_steps, krylov=krylov)
    truth = torch.stack([torch.matrix_exp((t - times[0]) * B) @ Y0 for t in times])
    assert torch.equal(y[0], Y0)
    assert relative(y, truth) < 1e-12


@pytest.mark.parametrize("method", [EXPRB43(), EXPRB53(), ExponentialEuler()], ids=repr)
def test_affine_systems_take_one_step(method):
    """y' = B y + c + d t is its own linearisation: exact for Rosenbrock methods, ∂f/∂t included."""
    c, d = torch.tensor([1.0, 0, -2, 0.5], dtype=D), torch.tensor([0.0, 3, 1, -1], dtype=D)
    y = odeint(lambda t, y: A @ y + c + d * t, Y0, [0.5, 2.0], method=method, num_steps=1, krylov=TIGHT)
    big = torch.zeros(N + 2, N + 2, dtype=D)
    big[:N, :N], big[:N, N], big[:N, N + 1], big[N + 1, N] = A, c, d, 1.0
    start = torch.cat([Y0, torch.tensor([1.0, 0.5], dtype=D)])
    assert relative(y[-1], (torch.matrix_exp(1.5 * big) @ start)[:N]) < 1e-12


@pytest.mark.parametrize("method", [EXPRB43(), EXPRB53()], ids=repr)
@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-7])
def test_tolerance_is_kept(method, rtol):
    y, info = odeint(with_linear(driven), Y0, [0.0, 0.5], method=method, rtol=rtol, atol=rtol, return_info=True)
    assert relative(y[-1], reference(driven, 0.0, 0.5)[-1]) < 10 * rtol
    assert info.accepted == len(info.times) and info.times[-1] == 0.5 and info.status.success
    assert info.num_evaluations >= 3 * info.accepted and info.num_matvecs > 0


EVERY = [(m, k) for m in (ExponentialEuler(), ETDRK4(), EXPRB43(), EXPRB53()) for k in (True, False)]


@pytest.mark.parametrize("method, linear", [c for c in EVERY if c != (ETDRK4(), False)], ids=repr)
def test_krylov_spaces_and_matrices_agree(method, linear):
    """Auto() forms the matrix of so small a system; asked for, the Krylov spaces give the same."""
    func, given = (driven, A) if linear else (with_linear(driven), None)
    times = [0.1, 0.4, 0.6]
    dense, krylov = (
        odeint(func, Y0, times, linear=given, method=method, num_steps=2, krylov=k) for k in (ritz.Auto(), TIGHT)
    )
    assert relative(krylov, dense) < 1e-12


def test_tighter_tolerances_cost_steps_by_the_order_of_the_estimate():
    steps = []
    for rtol in (1e-4, 1e-8):
        _, info = odeint(autonomous, Y0, [0.0, 3.0], linear=A, rtol=rtol, atol=rtol, return_info=True)
        steps.append(info.accepted)
    assert 4 < steps[1] / steps[0] < 20  # h⁴ for the estimate: a factor of 10


def test_a_step_that_is_too_large_is_rejected():
    """Starts at rest, then a sharp pulse at t = 1: the error estimate must see it, whatever the step had grown to."""
    f = lambda t, y: 5 * torch.exp(-(((t - 1) / 0.05) ** 2)) * torch.cos(y) - y
    y0 = torch.tensor([0.3, -0.1], dtype=D)
    y, info = odeint(f, y0, [0.0, 2.0], rtol=1e-6, atol=1e-8, return_info=True)
    assert relative(y[-1], by_scipy(f, y0, (0.0, 2.0), max_step=0.01)[-1]) < 1e-5
    assert info.rejected > 0


def test_controller():
    """h e^(−0.7/4) e_before^(0.4/4), within bounds, and no growth after a rejection."""
    c = _Controller(0.25)
    assert c.after_success(0.1) == pytest.approx(0.9 * 0.1**-0.175)
    assert c.after_success(0.5) == pytest.approx(0.9 * 0.5**-0.175 * 0.1**0.1)
    assert c.after_success(1e-12) == 5  # no longer at the start, where a hundred is allowed
    assert c.after_rejection(16.0) == pytest.approx(0.45) and c.after_success(1e-3) == 1
    assert c.after_rejection(1e9) == 0.2
    assert _Controller(0.25).after_success(0.0) == 100


def test_backwards_in_time():
    times = (0.0, 0.2, 0.5)
    there = reference(driven, *times)
    back = odeint(with_linear(driven), there[-1], [0.5, 0.2, 0.0], rtol=1e-8, atol=1e-10)
    assert relative(back, there.flip(0)) < 1e-6


def test_linear_invariants_are_kept_to_rounding():
    """Mass in a reaction a → b → c, a ← b + c of quadratic rates: 1ᵀ f = 0, so 1ᵀ J = 0, whatever the step."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        r1, r2, r3 = 0.5 * y[0], 3 * y[1] ** 2, 2 * y[1] * y[2]
        return torch.stack([-r1 + r3, r1 - r2 - r3, r2])

    y = odeint(f, torch.tensor([1.0, 0.2, 0.1], dtype=D), torch.linspace(0, 2, 5, dtype=D), num_steps=1)
    assert float((y.sum(1) - 1.3).abs().max()) < 1e-13
    assert float((y[-1] - y[0]).norm()) > 0.1


def test_norm_is_kept_by_a_skew_symmetric_system():
    S = torch.triu(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=D), 1)
    y = odeint(None, torch.ones(6, dtype=D), [0.0, 1.0, 30.0], linear=S - S.mT, krylov=Arnoldi())
    assert float((y.norm(dim=1) - math.sqrt(6)).abs().max()) < 1e-10


# -- calling habits ---------------------------------------------------------------------------------------------------


def test_shapes_follow_y0():
    y0 = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    y = odeint(lambda t, y: -(y**2), y0, torch.tensor([0.0, 1.0, 3.0], dtype=D), rtol=1e-5)
    assert y.shape == (3, 2, 3, 2) and torch.equal(y[0], y0)
    assert relative(y[-1], y0 / (1 + 3 * y0)) < 1e-5


def test_one_time_is_the_start():
    assert torch.equal(odeint(autonomous, Y0, [0.3]), Y0.unsqueeze(0))


def test_tuples():
    """A pendulum: energy as the oracle."""
    q, p = torch.tensor([[0.3, 1.2]], dtype=D), torch.zeros(1, 2, dtype=D)
    Q, P = odeint(lambda t, s: (s[1], -torch.sin(s[0])), (q, p), [0.0, 1.0, 2.0], rtol=1e-5)
    assert Q.shape == P.shape == (3, 1, 2)
    energy = P**2 / 2 - torch.cos(Q)
    assert float((energy - energy[0]).abs().max()) < 1e-5 and float((Q[-1] - Q[0]).abs().min()) > 0.1


def test_dictionaries_belong_together_by_key():
    """Whatever the order in which f names them."""
    start = {"a": torch.ones(1, dtype=D), "b": (torch.ones(2, dtype=D),)}
    y = odeint(lambda t, y: {"b": (-2 * y["b"][0],), "a": -y["a"]}, start, [0.0, 1.0])
    torch.testing.assert_close(y["a"][-1], torch.full((1,), math.exp(-1), dtype=D), rtol=1e-5, atol=0)
    torch.testing.assert_close(y["b"][0][-1], torch.full((2,), math.exp(-2), dtype=D), rtol=1e-5, atol=0)


def test_modules_in_float32():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            assert t.dtype == torch.float32 and t.ndim == 0
            return self.net(y) * torch.cos(t)

    field, y0 = Field(), torch.randn(2, 3)
    y = odeint(field, y0, torch.tensor([0.0, 1.0]))
    assert y.dtype == torch.float32
    y.square().sum().backward()
    got = [p.grad.clone() for p in net.parameters()]
    exact = net.double()
    t = torch.tensor([0.0, 1.0], dtype=D)
    truth = odeint(lambda t, y: exact(y) * torch.cos(t), y0.double(), t, rtol=1e-8, atol=1e-9)
    assert relative(y.double(), truth) < 1e-4
    want = torch.autograd.grad(truth.square().sum(), list(exact.parameters()))
    assert all(relative(g.double(), w) < 1e-3 for g, w in zip(got, want, strict=True))


def test_complex_states_with_a_linear_part():
    """A cubic Schrödinger equation on four points; written in real numbers it is a system like any other."""
    H = 1j * A.to(torch.complex128)
    y = odeint(lambda t, y: -1j * y.abs() ** 2 * y, Y0 + 0j, [0.0, 1.0], linear=H, method=ETDRK4(), num_steps=60)

    def real(t: Tensor, s: Tensor) -> Tensor:
        u, v = s.split(N)
        density = u**2 + v**2
        return torch.cat([-(A @ v) + density * v, A @ u - density * u])

    u, v = by_scipy(real, torch.cat([Y0, 0 * Y0]), (0.0, 1.0))[-1].split(N)
    assert relative(y[-1].real, u) < 1e-6 and relative(y[-1].imag, v) < 1e-6


def test_linear_takes_operators_callables_and_krylov_methods():
    given = [ritz.aslinearoperator(A), lambda x: A @ x, A]
    runs = [odeint(driven, Y0, [0.0, 0.5], linear=B, method=ETDRK4(), num_steps=4) for B in given]
    runs.append(odeint(driven, Y0, [0.0, 0.5], linear=A, method=ETDRK4(), num_steps=4, krylov=Lanczos()))
    runs.append(odeint(driven, Y0, [0.0, 0.5], linear=A, method=ETDRK4(), num_steps=4, krylov=Arnoldi(7)))
    assert all(relative(y, runs[0]) < 1e-9 for y in runs[1:])


def test_a_jacobian_that_is_given_is_used():
    calls = []

    def jacobian(t: Tensor, y: Tensor) -> Tensor:
        calls.append(float(t))
        return torch.diag(1 - 3 * y**2)

    f = lambda t, y: y - y**3
    y = odeint(f, Y0, [0.0, 1.0], linear=A, jacobian=jacobian, num_steps=3)
    assert calls == pytest.approx([0, 1 / 3, 2 / 3])
    assert relative(y, odeint(f, Y0, [0.0, 1.0], linear=A, num_steps=3)) < 1e-8


def test_settings_of_the_steps():
    _, info = odeint(
        autonomous, Y0, [0.0, 1.0], method=EXPRB43(first_step=0.25, max_step=0.26), rtol=0.1, return_info=True
    )
    gaps = np.diff([0.0, *info.times])
    assert gaps[0] == 0.25 and gaps.max() <= 0.26 and info.last_step == pytest.approx(gaps[-1])


def test_looser_krylov_tolerances_follow_rtol():
    counts = []
    for krylov in (ritz.Auto(), Arnoldi(rtol=1e-14)):
        f, L = AllenCahn.reaction, AllenCahn.laplacian
        y, info = odeint(
            f, AllenCahn.start(), [0.0, 0.1], linear=L, krylov=krylov, rtol=1e-3, atol=1e-5, return_info=True
        )
        counts.append(info.num_matvecs)
    assert counts[0] < 0.8 * counts[1]


def test_methods_are_values():
    assert EXPRB43() == EXPRB43(max_steps=10_000) and "EXPRB43" in repr(EXPRB43()) and hash(ETDRK4()) == hash(ETDRK4())
    with pytest.raises(OperandError, match="max_steps=0"):
        EXPRB43(max_steps=0)
