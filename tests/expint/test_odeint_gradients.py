import weakref

import pytest
import torch
from tests.memory import peak_of
from torch import Tensor, nn

import ritz
from ritz import Arnoldi, OperandError, Unrolled
from ritz.errors import SecondDerivativeError, TransformError
from ritz.expint import Diffusion, Grid
from ritz.expint.odeint import odeint
from ritz.expint.segments import Checkpoints, Kept
from ritz.expint.steppers import ETDRK4, EXPRB43, EXPRB53, ExponentialEuler
from ritz.operators import Diagonal
from ritz.testing import check_gradient

from .systems import FORCE, Y0, A, D, N, by_rk4, relative, with_linear

T = torch.tensor([0.1, 0.35, 0.6], dtype=D)
WEIGHTS = torch.randn(3, N, generator=torch.Generator().manual_seed(3), dtype=D)
KAPPA = torch.tensor(0.8, dtype=D)


def leaves() -> list[Tensor]:
    return [x.clone().requires_grad_() for x in (Y0, FORCE, KAPPA, T)]


def forced(force: Tensor):
    return lambda t, y: torch.sin(3 * t) * force + torch.exp(-t) * torch.sin(y) * torch.roll(y, 1)


@pytest.fixture(scope="module")
def truth() -> list[Tensor]:
    """Of autograd through small steps of RK4: gradients in y0, the force, κ in κA, and the times."""
    y, force, kappa, t = leaves()
    Y = by_rk4(with_linear(forced(force), kappa * A), y, t)
    return [Y.detach(), *torch.autograd.grad((WEIGHTS * Y).sum(), [y, force, kappa, t])]


def solved(linear: bool = True, **options) -> list[Tensor]:
    y, force, kappa, t = leaves()
    B = kappa * A
    f = forced(force)
    form = (lambda x: B @ x) if options.pop("callable", False) else B
    Y = odeint(f, y, t, linear=form, **options) if linear else odeint(with_linear(f, B), y, t, **options)
    return [Y.detach(), *torch.autograd.grad((WEIGHTS * Y).sum(), [y, force, kappa, t])]


CASES = [
    (EXPRB43(), True, {"num_steps": 12}, 1e-5),
    (EXPRB53(), False, {"num_steps": 8}, 1e-6),
    (EXPRB53(), True, {"rtol": 1e-6, "atol": 1e-8}, 1e-6),
    (EXPRB43(), False, {"rtol": 1e-5, "atol": 1e-7}, 1e-5),
    (ETDRK4(), True, {"num_steps": 12}, 1e-6),
    (ExponentialEuler(), False, {"num_steps": 20}, 3e-3),
    (ExponentialEuler(), True, {"num_steps": 20}, 4e-2),
    (EXPRB53(), True, {"num_steps": 4, "krylov": Arnoldi(rtol=1e-12)}, 1e-5),
    (EXPRB53(), False, {"num_steps": 4, "krylov": Arnoldi(rtol=1e-12)}, 1e-5),
]


@pytest.mark.parametrize("method, linear, options, rtol", CASES)
def test_gradients_are_those_of_the_flow(truth, method, linear, options, rtol):
    """In the start, all captured tensors, the operator, and the times (initial and output)."""
    for found, true in zip(solved(linear, method=method, **options), truth, strict=True):
        assert relative(found, true) < rtol


@pytest.mark.parametrize("method", [EXPRB43(), EXPRB53(), ETDRK4()], ids=repr)
@pytest.mark.parametrize("krylov", [ritz.Auto(), Arnoldi(rtol=1e-13)], ids=["matrix", "krylov"])
def test_gradients_are_those_of_the_computed_values(method, krylov):
    """Against finite differences of the same coarse steps: exact, whatever the error of the solution."""

    def value(y: Tensor, force: Tensor, kappa: Tensor) -> Tensor:
        return odeint(forced(force), y, T, linear=kappa * A, method=method, num_steps=1, krylov=krylov)

    check_gradient(value, Y0, FORCE, KAPPA, directions=1)


def test_gradients_with_a_jacobian_that_is_given():
    """diag(1 − 3 a y²) reaches y and a through the operator's own tensor; a symmetric sum goes by Lanczos."""

    def value(y: Tensor, a: Tensor, L: Tensor, krylov: ritz.Lanczos | ritz.Auto) -> Tensor:
        return odeint(
            lambda t, u: u - a * u**3, y, [0.0, 1.0], linear=ritz.aslinearoperator(L, hermitian=True), num_steps=1,
            jacobian=lambda t, u: Diagonal(1 - 3 * a * u**2), krylov=krylov,
        )  # fmt: skip

    def without(y: Tensor, a: Tensor, L: Tensor) -> Tensor:
        return odeint(lambda t, u: u - a * u**3, y, [0.0, 1.0], linear=L, num_steps=1)

    a = torch.tensor(0.7, dtype=D)
    for krylov in (ritz.Auto(), ritz.Lanczos(rtol=1e-13)):
        y, c, L = (x.clone().requires_grad_() for x in (Y0, a, A))
        got = torch.autograd.grad(value(y, c, L, krylov).square().sum(), [y, c, L])
        want = torch.autograd.grad(without(y, c, L).square().sum(), [y, c, L])
        symmetric = (want[2] + want[2].mT) / 2
        assert relative(got[0], want[0]) < 1e-10 and relative(got[1], want[1]) < 1e-10
        assert relative((got[2] + got[2].mT) / 2, symmetric) < 1e-10


def test_gradients_of_linear_systems():
    check_gradient(lambda B, y, t: odeint(None, y, t, linear=B), A, Y0, T, directions=2)


def test_states_that_do_not_matter_get_no_gradient():
    y = Y0.clone().requires_grad_()
    out = odeint(lambda t, s: torch.ones_like(s) * t, y, [0.0, 1.0], num_steps=1)
    (g,) = torch.autograd.grad(out[-1].sum(), y)
    assert torch.equal(g, torch.ones_like(y))  # y(1) = y0 + 1/2


# -- first order, by name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoints", [None, 2])
@pytest.mark.parametrize("krylov", [ritz.Auto(), Arnoldi()], ids=["matrix", "krylov"])
@pytest.mark.parametrize("first, second", [(0, 0), (0, 1), (1, 2), (3, 3), (3, 1), (2, 3)])
def test_a_second_differentiation_raises_by_name(checkpoints, krylov, first, second):
    y, force, kappa, t = x = leaves()
    Y = odeint(forced(force), y, t, linear=kappa * A, num_steps=1, krylov=krylov, checkpoints=checkpoints)
    (g,) = torch.autograd.grad(Y.square().sum(), x[first], create_graph=True)
    with pytest.raises(SecondDerivativeError, match="differentiated twice"):
        torch.autograd.grad(g.sum(), x[second])


@pytest.mark.parametrize("options", [{"num_steps": 1}, {"num_steps": 2, "checkpoints": 1}], ids=str)
def test_the_second_derivative_in_an_output_time_is_refused(options):
    """Nothing but the time asks for a gradient, and y' has none: it would come out as zero."""
    t = T.clone().requires_grad_()
    (g,) = torch.autograd.grad(odeint(lambda t, y: -y, Y0, t, **options)[1].sum(), t, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="odeint"):
        torch.autograd.grad(g.sum(), t)


@pytest.mark.parametrize("krylov", [ritz.Auto(), Arnoldi()], ids=["matrix", "krylov"])
def test_unrolled_gives_second_derivatives(krylov):
    def first(y: Tensor, force: Tensor, create: bool = False) -> Tensor:
        Y = odeint(with_linear(forced(force)), y, [0.1, 0.5], num_steps=1, gradient=Unrolled(), krylov=krylov)
        return torch.autograd.grad(Y[-1].square().sum(), y, create_graph=create)[0]

    y, force = Y0.clone().requires_grad_(), FORCE.clone().requires_grad_()
    got = torch.autograd.grad(first(y, force, create=True).sum(), force)[0]
    e = 1e-5
    want = [(first(y, FORCE + e * d).sum() - first(y, FORCE - e * d).sum()) / (2 * e) for d in torch.eye(N, dtype=D)]
    assert relative(got, torch.stack(want)) < 1e-7


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp's own
def test_transforms():
    def loss(force: Tensor) -> Tensor:
        return odeint(with_linear(forced(force)), Y0, T, num_steps=1).square().sum()

    force = FORCE.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(force), force)
    assert relative(torch.func.grad(loss)(FORCE), want) < 1e-12
    with pytest.raises(TransformError):
        torch.func.vmap(lambda y: odeint(forced(FORCE), y, T, num_steps=1))(torch.stack([Y0, Y0]))
    with pytest.raises(TransformError):
        torch.func.jvp(lambda y: odeint(forced(FORCE), y, T, num_steps=1), (Y0,), (Y0,))
    with pytest.raises(TransformError):
        torch.func.jvp(loss, (FORCE,), (FORCE,))
    with pytest.raises(TransformError, match="checkpoints"):
        torch.func.grad(lambda y: odeint(forced(FORCE), y, T, num_steps=1, checkpoints=1).sum())(Y0)


# -- the memory mode --------------------------------------------------------------------------------------------------


SAME = [
    (EXPRB43(), True, {"rtol": 1e-3, "atol": 1e-3}),
    (EXPRB53(), False, {"rtol": 1e-3, "atol": 1e-3}),
    (EXPRB43(), False, {"num_steps": 2, "krylov": Arnoldi()}),
    (ETDRK4(), True, {"num_steps": 4}),
    (ExponentialEuler(), False, {"num_steps": 4}),
    (EXPRB43(), True, {"num_steps": 2, "callable": True}),
    (ETDRK4(), True, {"num_steps": 2, "callable": True}),
]


@pytest.mark.parametrize("method, linear, options", SAME)
def test_checkpoints_give_the_same_gradient(method, linear, options):
    kept = solved(linear, method=method, **options)
    for checkpoints in (2, Checkpoints(), Checkpoints(memory_budget=200)):
        again = solved(linear, method=method, checkpoints=checkpoints, **options)
        assert torch.equal(kept[0], again[0])
        assert all(relative(g, w) < 1e-12 for g, w in zip(again[1:], kept[1:], strict=True))


def test_checkpoints_with_tensors_computed_from_each_other():
    """The operator, a factor in func and its parameter: each counts its own part, and once."""

    def gradients(checkpoints, krylov):
        w, a = torch.ones(N, dtype=D).requires_grad_(), FORCE.clone().requires_grad_()
        product = w * a
        B = torch.diag(0.1 * w) + A
        f = lambda t, y: torch.sin(2 * t) * a - product * y**3 * w.sum()
        Y = odeint(f, Y0, T, linear=B, num_steps=3, checkpoints=checkpoints, krylov=krylov)
        return torch.autograd.grad(Y.square().sum(), [w, a, product, B])

    for krylov in (ritz.Auto(), Arnoldi()):
        for got, want in zip(gradients(2, krylov), gradients(None, krylov), strict=True):
            assert relative(got, want) < 1e-12
    # ... and without checkpoints it is right: against finite differences.
    f = lambda w, a: odeint(lambda t, y: torch.sin(2 * t) * a - (w * a) * y**3 * w.sum(), Y0, T, linear=A, num_steps=1)
    check_gradient(f, torch.ones(N, dtype=D), FORCE, directions=1)


def test_checkpoints_find_what_only_a_later_step_uses():
    early, late = (torch.ones(N, dtype=D, requires_grad=True) for _ in range(2))
    f = lambda t, y: -y * (early if float(t.detach()) < 0.5 else late) ** 2
    Y = odeint(f, Y0, [0.0, 0.5, 1.0], num_steps=4, checkpoints=2, method=EXPRB53())  # no stage at the end
    got = torch.autograd.grad(Y[-1].sum(), [early, late])
    assert all(relative(g, -Y0 * torch.exp(torch.tensor(-1.0, dtype=D))) < 1e-4 for g in got)


def test_checkpoints_with_modules_and_tuples():
    torch.manual_seed(0)
    net = nn.Linear(2, 2).double()
    s0 = (torch.tensor([0.4, -0.2], dtype=D), torch.zeros(2, dtype=D))
    grads = []
    for checkpoints in (None, 2):
        q, p = odeint(lambda t, s: (s[1], -torch.tanh(net(s[0]))), s0, T, num_steps=3, checkpoints=checkpoints)
        grads.append(torch.autograd.grad((q**2 + p).sum(), list(net.parameters())))
    assert all(relative(g, w) < 1e-12 for g, w in zip(*grads, strict=True))


@pytest.mark.parametrize("krylov", [ritz.Auto(), Arnoldi()], ids=["matrix", "krylov"])
def test_autocast_of_the_forward_pass_holds_in_backward(krylov):
    torch.manual_seed(0)
    net, y0 = nn.Sequential(nn.Linear(N, 16), nn.Tanh(), nn.Linear(16, N)), Y0.float()
    found, state = [], []

    def f(t: Tensor, y: Tensor) -> Tensor:
        state.append(torch.is_autocast_enabled("cpu"))
        return net(y) * t

    for checkpoints in (None, 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            Y = odeint(f, y0, T, num_steps=3, checkpoints=checkpoints, krylov=krylov)
        assert Y.dtype == torch.float32
        found.append([Y.detach(), *torch.autograd.grad(Y.square().sum(), list(net.parameters()))])
    assert torch.equal(found[0][0], found[1][0]) and all(state)
    assert all(relative(g, w) < 2e-2 for g, w in zip(*found, strict=True))  # weights sum their cotangents in bfloat16
    plain = odeint(f, y0, T, num_steps=3, krylov=krylov)
    assert 1e-6 < relative(found[0][0], plain) < 1e-2  # the network did run in bfloat16


@pytest.mark.parametrize("krylov", [ritz.Auto(), Arnoldi()], ids=["matrix", "krylov"])
def test_modes_without_gradients(krylov):
    """∂f/∂y comes from autograd whatever the caller's mode."""
    want = odeint(forced(FORCE), Y0, T, num_steps=2, krylov=krylov)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = odeint(forced(FORCE), 1.0 * Y0, T, num_steps=2, krylov=krylov)
            assert torch.equal(got, want) and not got.requires_grad


def test_without_gradients_checkpoints_cost_nothing():
    calls = []
    f = lambda t, y: (calls.append(1), -y)[1]
    Y = odeint(f, Y0, T, num_steps=3, checkpoints=2)
    number = len(calls)
    assert not Y.requires_grad
    odeint(f, Y0, T, num_steps=3)
    assert len(calls) - number >= number


def test_memory_of_checkpoints_grows_like_the_square_root():
    a = torch.ones((), dtype=D, requires_grad=True)
    y0 = torch.linspace(-1, 1, 4000, dtype=D)
    method = {"linear": Diagonal(-50 * y0.abs()), "method": ExponentialEuler(), "krylov": Arnoldi(6)}

    def peak(steps: int, checkpoints: Checkpoints | None) -> int:
        def run() -> None:
            Y = odeint(lambda t, u: a * u, y0, [0.0, 1.0], num_steps=steps, checkpoints=checkpoints, **method)
            Y[-1].square().sum().backward()

        return peak_of(run)

    peak(2, Checkpoints(1))  # what is allocated once
    everything, some = peak(12, None), peak(12, Checkpoints())
    assert some < 0.55 * everything
    assert some < 2.2 * peak(3, Checkpoints())


def test_number_of_states_kept():
    budget = Checkpoints(memory_budget=5 * 8 + 7)  # of integers of 8 bytes: five
    cases = ((Checkpoints(4), 37), (Checkpoints(1), 9), (Checkpoints(), 100), (Checkpoints(), 3), (budget, 50))
    for checkpoints, steps in cases:
        kept = Kept(checkpoints)
        for k in range(steps):
            kept.offer(torch.tensor(k))
        assert [int(s) for s in kept.states] == list(range(0, steps, kept.stride))
        if checkpoints.number is not None or checkpoints is budget:
            assert 1 <= len(kept.states) <= (checkpoints.number or 5) < 2 * len(kept.states) + 2
        else:
            assert all(0.7 * steps**0.5 <= k <= 1.5 * steps**0.5 + 1 for k in (len(kept.states), kept.stride))


def test_changes_in_place_are_noticed():
    """As autograd does; also of a tensor without gradient, and of what backward makes anew."""
    rate, force = torch.ones(N, dtype=D, requires_grad=True), FORCE.clone()
    f = lambda t, y: -rate * y**2 + force * t
    for changed in (force, rate):
        for checkpoints in (None, 2):
            for krylov in (ritz.Auto(), Arnoldi()):
                Y = odeint(f, Y0, T, num_steps=2, checkpoints=checkpoints, krylov=krylov)
                with torch.no_grad():
                    changed.mul_(1.5)
                with pytest.raises(RuntimeError, match="in place|inplace"):
                    Y.sum().backward()


def test_random_functions_are_noticed_when_they_are_made_anew():
    rate = torch.ones(N, dtype=D, requires_grad=True)
    Y = odeint(
        lambda t, y: -rate * y + torch.rand(N, dtype=D), Y0, T, linear=A, method=ETDRK4(), num_steps=2, checkpoints=2
    )
    with pytest.raises(RuntimeError, match="not a function of t and y"):
        Y.sum().backward()


def test_nothing_is_held_after_backward():
    rate = torch.ones(N, dtype=D, requires_grad=True)
    state = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        state.append(weakref.ref(y))
        return -rate * y**3

    for checkpoints in (None, 2):
        Y = odeint(f, Y0, T, num_steps=2, checkpoints=checkpoints)
        loss = Y.square().sum()
        del Y
        loss.backward()
        assert sum(r() is not None for r in state) == 0


def test_refusals_of_the_memory_mode():
    with pytest.raises(OperandError, match="dense=True"):
        odeint(forced(FORCE), Y0, T, checkpoints=2, dense=True)
    with pytest.raises(OperandError, match="Unrolled"):
        odeint(forced(FORCE), Y0, T, checkpoints=2, gradient=Unrolled())
    for wrong in (0, 2.5):
        with pytest.raises(OperandError, match="checkpoints="):
            odeint(forced(FORCE), Y0, T, checkpoints=wrong)


def reaction(y0: Tensor, rate: Tensor, c: Tensor, t: Tensor, **options) -> Tensor:
    """Allen–Cahn on a line of 64: beyond the size up to which matrices are formed."""
    L = Diffusion(c, Grid(64, border="neumann", spacing=0.2))
    return odeint(lambda t, y: rate * (y - y**3) + torch.cos(t), y0, t, linear=L, **options)


@pytest.mark.parametrize("gradient", [ritz.Frechet(), ritz.Adjoint()], ids=["Frechet", "Adjoint"])
@pytest.mark.parametrize("method", [EXPRB43(), EXPRB53(), ETDRK4(), ExponentialEuler()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("checkpoints", [None, 3])
def test_gradients_through_truncated_spaces(method, gradient, checkpoints):
    x = torch.arange(64, dtype=D)
    given = [0.4 * torch.cos(0.3 * x), torch.tensor(0.9, dtype=D), 1 + 0.2 * torch.sin(x), T[:2]]
    w = torch.randn(2, 64, dtype=D, generator=torch.Generator().manual_seed(1))

    def solve(*inputs: Tensor, **options) -> list[Tensor]:
        Y = reaction(*inputs, **options)
        return [Y.detach(), *torch.autograd.grad((w * Y).sum(), inputs)]

    inputs = [g.clone().requires_grad_() for g in given]
    krylov = Arnoldi(rtol=1e-13) if isinstance(gradient, ritz.Adjoint) else ritz.Auto()
    first_order = isinstance(method, ExponentialEuler)
    number = 60 if first_order else 6
    got = solve(*inputs, method=method, num_steps=number, gradient=gradient, krylov=krylov, checkpoints=checkpoints)
    inputs = [g.clone().requires_grad_() for g in given]
    L = Diffusion(inputs[2], Grid(64, border="neumann", spacing=0.2)).assemble().to_dense()
    field = lambda t, y: L @ y + inputs[1] * (y - y**3) + torch.cos(t)  # noqa: E731
    Y = by_rk4(field, inputs[0], inputs[3])
    wanted = [Y.detach(), *torch.autograd.grad((w * Y).sum(), inputs)]
    rtol = 4e-2 if first_order else 1e-5  # of the method
    for a, b in zip(got, wanted):
        assert relative(a, b) < rtol
