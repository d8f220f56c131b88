"""KFAC against its formulas with torch.linalg, and what it does where a factor has no inverse."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tests.optim.oracle import Setting, matrices, passes, scaled_rows
from tests.optim.problems import batch, loss_of, normal, perceptron, train
from torch import Tensor, nn

from ritz.curvature import Expand, Reduce
from ritz.errors import ConvergenceWarning, OperandError
from ritz.operators.structured import Dense, Diagonal, Hierarchical
from ritz.optim import KFAC, Eigen, Inverse
from ritz.optim.inverses import damped_inverse

STEPS = 7
SIZES = (5, 6, 6, 3)


@dataclass(frozen=True)
class Case:
    inverse: Inverse | Eigen = Inverse()
    pi: bool = False
    rho: float = 0.9
    start: float = 0.0
    interval: int = 1
    diagonal: tuple[bool, bool] = (False, False)
    damping: float = 0.05
    reduce: bool = False


CASES: dict[str, Case] = {
    "inverse": Case(),
    "inverse, pi": Case(pi=True),
    "inverse, start": Case(start=1.0),
    "inverse, interval": Case(interval=3, pi=True),
    "inverse, no memory": Case(rho=0.0),
    "inverse, diagonal inputs": Case(diagonal=(True, False)),
    "inverse, diagonal outputs, pi": Case(diagonal=(False, True), pi=True),
    "inverse, diagonal": Case(diagonal=(True, True), pi=True, interval=2),
    "inverse, reduce": Case(reduce=True),
    "eigen": Case(Eigen()),
    "eigen ignores pi": Case(Eigen(), pi=True),
    "eigen, start": Case(Eigen(), start=1.0),
    "eigen, interval": Case(Eigen(), interval=3),
    "eigen, diagonal inputs": Case(Eigen(), diagonal=(True, False)),
    "eigen, diagonal outputs": Case(Eigen(), diagonal=(False, True)),
    "eigen, diagonal": Case(Eigen(), diagonal=(True, True)),
}


def natural(case: Case, S_A: Tensor, S_B: Tensor, G: Tensor) -> Tensor:
    """The natural gradient, from the running factors, by inverses or as one Kronecker product."""
    I_A, I_B = torch.eye(len(S_A), dtype=G.dtype), torch.eye(len(S_B), dtype=G.dtype)
    if isinstance(case.inverse, Eigen):  # (S_B ⊗ S_A + λI)⁻¹ vec(G), rows first
        product = torch.kron(S_B, S_A) + case.damping * torch.kron(I_B, I_A)
        return torch.linalg.solve(product, G.flatten()).reshape(G.shape)
    lam_A = lam_B = case.damping
    if case.pi:
        pi = ((torch.trace(S_A) / len(S_A)) / (torch.trace(S_B) / len(S_B))).sqrt()
        lam_A, lam_B = pi * case.damping**0.5, case.damping**0.5 / pi
    return torch.linalg.inv(S_B + lam_B * I_B) @ G @ torch.linalg.inv(S_A + lam_A * I_A)


def oracle(weights: list[Tensor], case: Case, positions: int) -> list[Tensor]:
    W = [w.clone() for w in weights]
    S = [[case.start * torch.eye(d, dtype=w.dtype) for d in (w.shape[1], w.shape[0])] for w in W]
    buffers, updates = [torch.zeros_like(w) for w in W], 0
    setting = Setting(reduce=case.reduce)
    for step in range(STEPS):
        updates += step % case.interval == 0
        correction = 1.0 if case.start else 1 - case.rho**updates
        for i, seen in enumerate(passes(W, data(step, positions), setting)):
            if step % case.interval == 0:
                for side, rows in enumerate(scaled_rows(seen, setting)):
                    moment = rows.mT @ rows
                    moment = moment.diag().diag() if case.diagonal[side] else moment
                    S[i][side] = case.rho * S[i][side] + (1 - case.rho) * moment
            buffers[i] = 0.9 * buffers[i] + natural(case, S[i][0] / correction, S[i][1] / correction, seen.G)
            W[i] = W[i] - 0.01 * buffers[i]
    return W


def data(step: int, positions: int) -> tuple[Tensor, Tensor]:
    return normal(8, positions, 5, seed=10 + step), normal(8, positions, 3, seed=60 + step)


@pytest.mark.parametrize("name", CASES)
def test_formulas(name):
    case = CASES[name]
    positions = 4 if case.reduce else 1
    model = perceptron(*SIZES, seed=1)
    want = oracle(matrices(model), case, positions)
    structures = tuple(Diagonal() if d else Dense() for d in case.diagonal)
    optimizer = KFAC(
        model, 0.01, damping=case.damping, stat_decay=case.rho, start=case.start, inverse=case.inverse,
        structures=structures, pi_damping=case.pi, update_interval=case.interval,
        weight_sharing=Reduce() if case.reduce else Expand(),
    )  # fmt: skip
    for step in range(STEPS):
        X, Y = data(step, positions)
        X, Y = (X.squeeze(1), Y.squeeze(1)) if positions == 1 else (X, Y)
        optimizer.zero_grad()
        (0.5 * (model(X) - Y).square().sum() / 8).backward()
        optimizer.step()
    for got, wanted in zip(matrices(model), want):
        assert bool((got - wanted).abs().max() <= 1e-10)


@pytest.mark.parametrize("inverse", [Inverse(), Eigen()], ids=["inverse", "eigen"])
def test_embedding_has_the_diagonal_of_token_counts(inverse):
    """One step on a table of five tokens, one of them never seen."""
    table = nn.Embedding(5, 3).double()
    with torch.no_grad():
        table.weight.copy_(normal(5, 3, seed=1))
    tokens, targets = torch.tensor([[0, 1, 1], [3, 1, 4]]), normal(2, 3, 3, seed=2)
    before = table.weight.detach().clone()
    optimizer = KFAC(table, 0.1, damping=0.05, inverse=inverse, momentum=0.0, pi_damping=False)
    loss_of(table(tokens).flatten(1), targets.flatten(1)).backward()
    g = (before[tokens] - targets).flatten(0, 1) / 2
    one_hot = torch.nn.functional.one_hot(tokens.flatten(), 5).double()
    A, B = one_hot.mT @ one_hot / 6, 2 * g.mT @ g
    optimizer.step()
    want = before - 0.1 * natural(Case(inverse), A, B, g.mT @ one_hot).mT
    assert bool((table.weight - want).abs().max() <= 1e-12)
    assert torch.equal(table.weight[2], before[2])


@pytest.mark.parametrize("structures", [Dense(), Diagonal()], ids=["dense", "diagonal"])
@pytest.mark.parametrize("inverse", [Inverse(), Eigen()], ids=["inverse", "eigen"])
def test_a_singular_factor_warns_and_leaves_finite_parameters(structures, inverse):
    model = perceptron(5, 4, 3, seed=1)
    optimizer = KFAC(model, 0.01, damping=0.0, structures=structures, inverse=inverse, update_interval=1)
    X, Y = batch(0)
    X[:, 2] = 0.0  # an input that is always off: a zero row and column of A
    loss_of(model(X), Y).backward()
    with pytest.warns(ConvergenceWarning, match=r"input factor of 0\.weight .*raise damping"):
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("rows", [3, 5], ids=["fewer rows than columns", "one row less"])
@pytest.mark.parametrize("inverse", [Inverse(), Eigen()], ids=["inverse", "eigen"])
def test_a_factor_of_few_rows_warns_too(rows, inverse):
    """Rounding makes the zero eigenvalues of such a factor positive or negative at random."""
    model = perceptron(5, 3, seed=1)  # with the bias, A is 6×6
    optimizer = KFAC(model, 0.01, damping=0.0, inverse=inverse, update_interval=1)
    X, Y = batch(0, n=rows)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model(X), Y).backward()
    with pytest.warns(ConvergenceWarning, match=r"factor of 0\.weight"):
        optimizer.step()
    for p, old in zip(model.parameters(), before):
        assert bool((p - old).norm() < 10.0)


def test_float64_saves_a_factor_that_float32_cannot_invert():
    """A float32 factor that is definite, by less than a factorization in float32 can tell."""
    Q = torch.linalg.qr(normal(6, 6, seed=23)).Q
    S = ((Q * torch.tensor([1.0, 1, 1, 1, 1, 5e-8], dtype=torch.float64)) @ Q.mT).float()
    S = 0.5 * (S + S.mT)
    assert int(torch.linalg.cholesky_ex(S).info) > 0 and float(torch.linalg.eigvalsh(S.double())[0]) > 1e-8
    found = damped_inverse(Dense(), S.flatten(), 6, 0.0)
    assert found is not None and found.dtype == torch.float32
    want = torch.linalg.inv(S.double())
    assert float((found.reshape(6, 6).double() - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_factors(dtype):
    """Factors and inverses are stored in the dtype asked for, and the step is finite."""
    model = perceptron(5, 6, 3, seed=1, dtype=torch.bfloat16)
    optimizer = KFAC(model, 0.01, damping=0.01, curvature_dtype=dtype, update_interval=2)
    train(model, optimizer, 6)
    for layer in optimizer._layers:
        assert optimizer.state[layer.weight]["S_A"].dtype == dtype
        assert layer.cache["A⁻¹"].dtype == dtype
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_before_the_first_update_the_factors_are_the_identity():
    model, same = perceptron(5, 6, 3, seed=1), perceptron(5, 6, 3, seed=1)
    optimizer = KFAC(model, 0.1, damping=0.5, pi_damping=False, momentum=0.0, update_interval=lambda step: step == 3)
    plain = torch.optim.SGD(same.parameters(), 0.1 / 1.5**2)
    train(model, optimizer, 2)
    train(same, plain, 2)
    for p, q in zip(model.parameters(), same.parameters()):
        assert bool((p - q).abs().max() <= 1e-13)


def test_vectors_before_the_first_update_and_after():
    """A norm layer whose first gradient comes on a step without an update."""
    model = nn.Sequential(perceptron(5, 6, seed=1)[0], nn.LayerNorm(6).double(), perceptron(6, 3, seed=2)[0])
    optimizer = KFAC(model, 0.1, damping=0.5, momentum=0.0, stat_decay=0.9, update_interval=lambda step: step == 1)
    S = torch.ones(6, dtype=torch.float64)
    for step in range(3):
        before = model[1].weight.detach().clone()
        X, Y = batch(step)
        optimizer.zero_grad()
        loss_of(model(X), Y).backward()
        optimizer.step()
        g = model[1].weight.grad
        S = 8 * g.square() if step == 1 else S
        assert bool((model[1].weight - (before - 0.1 * g / (S + 0.5))).abs().max() <= 1e-13)


def test_the_form_of_the_inverse_can_be_set_by_group():
    """One group inverts, the other decomposes; each equals an optimizer that does so for everything."""
    finals = []
    for which in ("both", "inverse", "eigen"):
        model = perceptron(5, 6, 3, seed=1)
        groups = [{"params": list(model[0].parameters()), "inverse": Eigen()}, {"params": list(model[2].parameters())}]
        given = groups if which == "both" else model
        optimizer = KFAC(given, 0.1, model=model, damping=0.1, inverse=Eigen() if which == "eigen" else Inverse())
        train(model, optimizer, 1)
        assert "inverse" not in optimizer.param_groups[0]
        finals.append([m.weight.detach() for m in (model[0], model[2])])
    assert torch.equal(finals[0][0], finals[2][0]) and not torch.equal(finals[0][0], finals[1][0])
    assert torch.equal(finals[0][1], finals[1][1])


def test_structures_without_an_inverse_are_refused():
    model = perceptron(5, 6, 3)
    with pytest.raises(OperandError, match="use SINGD for the other structures"):
        KFAC(model, 0.1, structures=Hierarchical(2, 1))
    optimizer = KFAC(list(model[0].parameters()), 0.1, model=model)
    with pytest.raises(OperandError, match="use SINGD for the other structures"):
        optimizer.add_param_group({"params": list(model[2].parameters()), "structures": Hierarchical(2, 1)})
    assert len(optimizer.param_groups) == 1
