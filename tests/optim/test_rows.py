"""The row form N = (P_C gᵀ)(P_K aᵀ)ᵀ gives what the ordinary form gives, and knows when rows are not the gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.operators.structured.table import STRUCTURES
from tests.optim.problems import batch, distance, loss_of, normal, perceptron
from torch import Tensor, nn

from ritz.operators.structured import Dense, Diagonal, Hierarchical, LowerToeplitz, Structure
from ritz.optim import KFAC, SINGD, Eigen, Inverse, base

TOLERANCE = 1e-12
STEPS = 5


class Counted:
    """Counts how often the row form was used, and how often it was refused although rows had been kept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used = self.refused = 0
        original = base.from_rows

        def counting(optimizer: object, layer: object, G: Tensor) -> Tensor | None:
            N = original(optimizer, layer, G)
            self.used += N is not None
            self.refused += N is None and bool(layer.kept)
            return N

        monkeypatch.setattr(base, "from_rows", counting)


@pytest.fixture
def counted(monkeypatch):
    return Counted(monkeypatch)


class Twice(nn.Module):
    """A layer that is called twice in a pass, between two that are called once."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = (perceptron(a, b, seed=a * b)[0] for a, b in ((5, 6), (6, 6), (6, 3)))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(h)))))


def plain(model: nn.Module, step: int) -> None:
    X, Y = batch(step)
    loss_of(model(X), Y).backward()


def clipped(model: nn.Module, step: int) -> None:
    plain(model, step)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def two_micro_batches(model: nn.Module, step: int) -> None:
    X, Y = batch(step)
    for part, share in ((slice(0, 3), 3 / 8), (slice(3, 8), 5 / 8)):
        (share * loss_of(model(X[part]), Y[part])).backward()


def with_penalty(model: nn.Module, step: int) -> None:
    X, Y = batch(step)
    (loss_of(model(X), Y) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()


def with_noise(model: nn.Module, step: int) -> None:
    plain(model, step)
    for i, p in enumerate(model.parameters()):
        p.grad.add_(1e-6 * normal(*p.shape, seed=100 * step + i))


Passes = Callable[[nn.Module, int], None]


def train(model: nn.Module, passes: Passes, row_form: bool | None, **settings: object) -> None:
    make = settings.pop("make", SINGD)
    optimizer = make(model, 0.05, row_form=row_form, update_interval=2, **settings)
    for step in range(STEPS):
        optimizer.zero_grad()
        passes(model, step)
        optimizer.step()


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_structure(name, counted):
    structure = STRUCTURES[name]
    model, other = perceptron(5, 6, 3, seed=1), perceptron(5, 6, 3, seed=1)
    train(model, plain, True, structures=structure)
    assert counted.used == 2 * STEPS
    train(other, plain, False, structures=structure)
    assert counted.used == 2 * STEPS
    assert distance(model, other) <= TOLERANCE


@pytest.mark.parametrize("passes", [plain, clipped, two_micro_batches], ids=lambda f: f.__name__)
@pytest.mark.parametrize("structure", [Dense(), Hierarchical(2, 1), LowerToeplitz()], ids=lambda s: s.describe(6))
@pytest.mark.parametrize("build", [lambda: perceptron(5, 6, 6, 3, seed=1), Twice], ids=["once", "twice"])
def test_gradients_that_the_rows_make(build, structure, passes, counted):
    """Clipped gradients are a multiple of it; several uses and several passes are more rows."""
    torch.manual_seed(0)
    model, other = build(), build()
    train(model, passes, True, structures=structure)
    assert (counted.used, counted.refused) == (3 * STEPS, 0)
    train(other, passes, False, structures=structure)
    assert distance(model, other) <= TOLERANCE


@pytest.mark.parametrize("passes", [with_penalty, with_noise], ids=lambda f: f.__name__)
def test_gradients_that_the_rows_do_not_make(passes, counted):
    model, other = perceptron(5, 6, 3, seed=1), perceptron(5, 6, 3, seed=1)
    train(model, passes, True, structures=Dense())
    assert (counted.used, counted.refused) == (0, 2 * STEPS)
    train(other, passes, False, structures=Dense())
    assert distance(model, other) <= TOLERANCE


def test_kfac_with_inverses_has_it_and_with_eigenvalues_has_not(counted):
    for inverse, used in ((Inverse(), 2 * STEPS), (Eigen(), 0)):
        counted.used = 0
        model, other = perceptron(5, 6, 3, seed=1), perceptron(5, 6, 3, seed=1)
        settings = {"make": KFAC, "inverse": inverse, "damping": 0.1}
        train(model, plain, True, **settings)
        train(other, plain, False, **settings)
        assert counted.used == used
        assert distance(model, other) <= TOLERANCE


def test_a_paused_pass_adds_to_the_gradient_and_not_to_the_rows(counted):
    models = [perceptron(5, 6, 3, seed=1), perceptron(5, 6, 3, seed=1)]
    for model, row_form in zip(models, (True, False)):
        optimizer = SINGD(model, 0.05, row_form=row_form)
        plain(model, 0)
        with optimizer.paused():
            plain(model, 1)
        optimizer.step()
    assert (counted.used, counted.refused) == (0, 2)
    assert distance(*models) <= TOLERANCE


def test_a_zero_gradient_is_no_multiple_of_anything(counted):
    model = perceptron(5, 6, 3, seed=1)
    optimizer = SINGD(model, 0.05, row_form=True)
    (0.0 * model(batch(0)[0]).sum()).backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert counted.used == 0
    assert distance(model, before) == 0.0


@pytest.mark.parametrize(
    "rows, structure, kept",
    [(4, Dense(), True), (200, Dense(), False), (200, Diagonal(), False), (4, LowerToeplitz(), True)],
    ids=["few rows", "many rows", "many rows, diagonal", "few rows, Toeplitz"],
)
def test_chosen_by_cost(rows: int, structure: Structure, kept: bool, counted):
    """m(d_K² + d_C²) + m d_K d_C multiplications against d_C² d_K + d_C d_K²; less still for other factors."""
    model = perceptron(64, 64, seed=1)
    optimizer = SINGD(model, 0.01, structures=structure, row_form=None)
    model(normal(rows, 64, seed=1)).square().mean().backward()
    assert bool(optimizer._layers[0].kept) is kept
    optimizer.step()
    assert counted.used == kept
    assert not optimizer._layers[0].kept


def test_between_updates_rows_are_kept_where_they_pay(counted):
    """The hooks look at the size of the output before they keep anything."""
    model = perceptron(64, 64, seed=1)
    optimizer = SINGD(model, 0.01, structures=Dense(), update_interval=10)
    for step, rows in enumerate((4, 4, 200, 4)):
        optimizer.zero_grad()
        model(normal(rows, 64, seed=step)).square().mean().backward()
        optimizer.step()
    assert counted.used == 3


def test_low_precision_goes_the_ordinary_way(counted):
    model = perceptron(5, 3, seed=1, dtype=torch.bfloat16)
    train(model, lambda model, step: model(batch(step)[0].bfloat16()).square().mean().backward(), True)
    assert (counted.used, counted.refused) == (0, 0)
