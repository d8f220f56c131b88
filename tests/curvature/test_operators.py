"""Jacobian, GGN, Fisher, Hessian and NTK against dense references, over models, losses, subsets and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ritz
from ritz.curvature import (
    GGN,
    NTK,
    BinaryCrossEntropy,
    CrossEntropy,
    CustomLoss,
    EmpiricalFisher,
    Fisher,
    Hessian,
    Jacobian,
    MonteCarloFisher,
    Poisson,
    SquaredError,
)
from ritz.testing import check_operator

from . import dense

DOUBLE = {"dtype": torch.float64}


class Tokens(nn.Module):
    """Embedding, attention, a layer norm, and a decoder that is tied to the embedding: outputs (n, T, V)."""

    def __init__(self, second: bool = False) -> None:
        super().__init__()
        self.second = second  # whether classes are on axis 1, as torch's losses take them
        self.embed = nn.Embedding(5, 4, **DOUBLE)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **DOUBLE)
        self.norm = nn.LayerNorm(4, **DOUBLE)
        self.decode = nn.Linear(4, 5, **DOUBLE)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        f = self.decode(h)
        return f.mT if self.second else f


def mlp(out: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, **DOUBLE), nn.Tanh(), nn.Linear(4, out, **DOUBLE))


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(2, 3, 3, padding=1, **DOUBLE), nn.BatchNorm2d(3, **DOUBLE), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3, **DOUBLE))
    model(torch.randn(8, 2, 4, 4, **DOUBLE))  # running statistics that are not 0 and 1
    return model.eval()


class Case(NamedTuple):
    model: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    y: Callable[[], Tensor]
    loss: Any  # what ritz gets
    reference: Callable[[Tensor, Tensor], Tensor]  # torch's, with the same reduction


def rows(n: int = 6) -> Tensor:
    return torch.randn(n, 3, **DOUBLE)


def images() -> Tensor:
    return torch.randn(6, 2, 4, 4, **DOUBLE)


def labels(*shape: int, classes: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, classes, shape)


def by_class(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """torch's cross-entropy for outputs with classes last."""
    return lambda f, y: F.cross_entropy(f.flatten(0, -2), y.flatten(), **options)


def transposed(f: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(f, y)


def some_ignored() -> Tensor:
    return torch.tensor([[0, -9, 4, 1], [-9, -9, 2, 3], [1, 1, 0, -9]])


WEIGHTS, FIVE = torch.tensor([0.5, 1.0, 3.0], **DOUBLE), torch.tensor([0.5, 1.0, 3.0, 2.0, 0.1], **DOUBLE)
ce = nn.CrossEntropyLoss
CASES = {
    "mlp, cross-entropy module": Case(mlp, rows, labels(6), nn.CrossEntropyLoss(), F.cross_entropy),
    "mlp, cross-entropy sum": Case(mlp, rows, labels(6), ce(reduction="sum"), by_class(reduction="sum")),
    "mlp, smoothed labels": Case(
        mlp, rows, labels(6), nn.CrossEntropyLoss(label_smoothing=0.2), by_class(label_smoothing=0.2)
    ),
    "mlp, class weights and smoothing": Case(
        mlp, rows, labels(6), ce(WEIGHTS, label_smoothing=0.2), by_class(weight=WEIGHTS, label_smoothing=0.2)
    ),
    "mlp, ignored rows": Case(
        mlp, rows, lambda: torch.tensor([0, 1, -7, 2, -7, 1]), CrossEntropy(ignore_index=-7), by_class(ignore_index=-7)
    ),
    "mlp, probabilities": Case(
        mlp, rows, lambda: torch.rand(6, 3, **DOUBLE), ce(WEIGHTS), lambda f, y: F.cross_entropy(f, y, WEIGHTS)
    ),
    "mlp, mse": Case(mlp, rows, rows, nn.MSELoss(), F.mse_loss),
    "mlp, half squares a row": Case(
        mlp, rows, rows, SquaredError(3.0), lambda f, y: 1.5 * (f - y).square().sum(-1).mean()
    ),
    "mlp, logits": Case(
        mlp, rows, lambda: torch.rand(6, 3, **DOUBLE), nn.BCEWithLogitsLoss(), F.binary_cross_entropy_with_logits
    ),
    "mlp, weighted logits": Case(
        mlp, rows, lambda: torch.randint(0, 2, (6, 3)).double(), nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, pos_weight=WEIGHTS),
    ),
    "mlp, counts": Case(
        mlp, rows, lambda: torch.poisson(torch.ones(6, 3, **DOUBLE)), nn.PoissonNLLLoss(), F.poisson_nll_loss
    ),
    "mlp, a loss of one's own": Case(
        mlp, rows, rows,
        CustomLoss(lambda f, y: (f - y).cosh().sum(), lambda f, y, v: (f - y).cosh() * v),
        lambda f, y: (f - y).cosh().sum() / f.shape[0],
    ),
    "mlp, mse sum": Case(mlp, rows, rows, nn.MSELoss(reduction="sum"), lambda f, y: F.mse_loss(f, y, reduction="sum")),
    "mlp, logits sum": Case(
        mlp, rows, lambda: torch.rand(6, 3, **DOUBLE), nn.BCEWithLogitsLoss(reduction="sum"),
        lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum"),
    ),
    "mlp, counts sum": Case(
        mlp, rows, lambda: torch.poisson(torch.ones(6, 3, **DOUBLE)), nn.PoissonNLLLoss(reduction="sum"),
        lambda f, y: F.poisson_nll_loss(f, y, reduction="sum"),
    ),
    "sequences, smoothed, weighted and ignored": Case(
        Tokens, labels(3, 4, classes=5), some_ignored, CrossEntropy(0.3, -9, tuple(FIVE.tolist())),
        by_class(weight=FIVE, label_smoothing=0.3, ignore_index=-9),
    ),
    "sequences, smoothed, weighted and ignored, sum": Case(
        lambda: Tokens(second=True), labels(3, 4, classes=5), some_ignored,
        ce(FIVE, label_smoothing=0.3, ignore_index=-9, reduction="sum"),
        lambda f, y: F.cross_entropy(f, y, FIVE, label_smoothing=0.3, ignore_index=-9, reduction="sum"),
    ),
    "convolutions": Case(convolutions, images, labels(6), CrossEntropy(), F.cross_entropy),
    "sequences, classes last": Case(
        Tokens, labels(3, 4, classes=5), labels(3, 4, classes=5), CrossEntropy(), by_class()
    ),
    "sequences, classes second": Case(
        lambda: nn.Conv1d(2, 3, 1, **DOUBLE), lambda: torch.randn(4, 2, 5, **DOUBLE), labels(4, 5),
        nn.CrossEntropyLoss(), transposed,
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, list[str], Tensor, Tensor, Case]:
    torch.manual_seed(3)
    case = CASES[name]
    model = case.model().eval()
    return model, [n for n, _ in model.named_parameters()], case.x(), case.y(), case


def agrees(A: ritz.LinearOperator, M: Tensor, tol: float = 1e-10) -> None:
    assert A.shape == tuple(M.shape)
    scale = M.abs().max()
    assert float((A.to_dense() - M).abs().max() / scale) < tol
    v = torch.randn(M.shape[1], 2, **DOUBLE)
    for X in (v, v[:, 0]):
        assert float((A @ X - M @ X).abs().max() / (M @ X).abs().max()) < tol


@pytest.mark.parametrize("name", CASES)
def test_matrices_are_the_dense_ones(name):
    model, names, x, y, case = made(name)
    agrees(GGN(model, case.loss, None, (x, y)), dense.ggn(model, names, x, y, case.reference))
    agrees(Hessian(model, case.loss, None, (x, y)), dense.hessian(model, names, x, y, case.reference))
    J, f = dense.jacobian(model, names, x)
    agrees(Jacobian(model, case.loss, None, (x, y)), J)
    agrees(Jacobian(model, None, None, x).mH, J.mT)
    agrees(NTK(model, None, None, x), J @ J.mT)
    S = J.reshape(-1, f.shape[-1], J.shape[1]).sum(1)
    agrees(NTK(model, None, None, x, sum_outputs=True), S @ S.mT)


@pytest.mark.parametrize(
    "name", ["mlp, class weights and smoothing", "mlp, ignored rows", "sequences, classes last", "mlp, mse"]
)
@pytest.mark.parametrize("operator", [GGN, Hessian])
def test_batches_and_micro_batches_do_not_matter(name, operator):
    model, _, x, y, case = made(name)
    whole = operator(model, case.loss, None, (x, y)).to_dense()
    cut = [(x[:1], y[:1]), (x[1:], y[1:])]
    for data, options in [
        (cut, {}),
        ((x, y), {"micro_batch": 2}),
        ((x, y), {"micro_batch": 1, "keep_bytes": 0}),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2), {}),
        (iter(cut), {}),
    ]:
        torch.testing.assert_close(operator(model, case.loss, None, data, **options).to_dense(), whole)
    J = Jacobian(model, None, None, x).to_dense()
    torch.testing.assert_close(Jacobian(model, None, None, cut, micro_batch=1).to_dense(), J)


def test_scaling_is_what_is_asked_for():
    model, _, x, y, _ = made("mlp, ignored rows")
    loss = CrossEntropy(ignore_index=-7)
    total = GGN(model, loss, None, (x, y), reduction="sum").to_dense()
    torch.testing.assert_close(4 * GGN(model, loss, None, (x, y), reduction="mean").to_dense(), total)
    torch.testing.assert_close(10 * GGN(model, loss, None, (x, y), num_loss_terms=10).to_dense(), total)
    stands_for = GGN(model, loss, None, (x, y), reduction="sum", num_data=60)
    torch.testing.assert_close(stands_for.to_dense(), 10 * total)


def test_subsets_are_blocks_of_the_whole():
    model, names, x, y, case = made("sequences, classes last")
    whole = GGN(model, case.loss, None, (x, y))
    G, start = whole.to_dense(), {}
    for name, p in model.named_parameters():
        start[name] = (sum(model.get_parameter(n).numel() for n in start), p.numel())
    index = {n: torch.arange(a, a + size) for n, (a, size) in start.items()}
    for params, inside in [
        ("attention", [n for n in names if n.startswith("attention")]),
        (["norm.bias", "embed"], ["embed.weight", "norm.bias"]),
        ([model.norm.weight, model.decode.weight], ["embed.weight", "norm.weight"]),
    ]:
        keep = torch.cat([index[n] for n in inside])
        part = GGN(model, case.loss, params, (x, y))
        assert part.network.names == tuple(inside)
        torch.testing.assert_close(part.to_dense(), G[keep][:, keep])
    model.embed.requires_grad_(False)  # frozen, as all but the adapters of a fine-tuned model are
    free = torch.cat([index[n] for n in names if n != "embed.weight"])
    torch.testing.assert_close(GGN(model, case.loss, None, (x, y)).to_dense(), G[free][:, free])
    v = whole.unravel(torch.arange(G.shape[0], **DOUBLE))
    assert v["attention.in_proj_weight"].shape == (12, 4) and list(v) == names


@pytest.mark.parametrize("kind", ["tensor", "list", "dict"])
def test_functions_of_parameters(kind):
    torch.manual_seed(0)
    W, b, x, y = torch.randn(3, 2, **DOUBLE), torch.randn(3, **DOUBLE), torch.randn(5, 2, **DOUBLE), labels(5)()
    calls: dict[str, tuple[Any, Any]] = {
        "tensor": (W, lambda p, z: z @ p.mT + b),
        "list": ([W, b], lambda p, z: z @ p[0].mT + p[1]),
        "dict": ({"W": W, "b": b}, lambda p, z: z @ p["W"].mT + p["b"]),
    }
    params, fn = calls[kind]
    G = GGN(fn, CrossEntropy(), params, (x, y)).to_dense()
    model = nn.Linear(2, 3, **DOUBLE)
    model.load_state_dict({"weight": W, "bias": b})
    expected = dense.ggn(model, ["weight", "bias"] if kind != "tensor" else ["weight"], x, y, F.cross_entropy)
    torch.testing.assert_close(G, expected)


def test_scalar_outputs_and_nested_inputs():
    torch.manual_seed(0)
    w, x, y = torch.randn(4, **DOUBLE), torch.randn(6, 4, **DOUBLE), torch.randint(0, 2, (6,)).double()
    data = [{"features": x[:2], "scale": 2.0}, {"features": x[2:], "scale": 2.0}]
    fn = lambda p, batch: batch["scale"] * (batch["features"] @ p)  # noqa: E731
    A = GGN(fn, BinaryCrossEntropy(), w, list(zip(data, (y[:2], y[2:]))), reduction="sum")
    p = torch.sigmoid(2 * x @ w)
    torch.testing.assert_close(A.to_dense(), 4 * x.mT @ ((p * (1 - p)).unsqueeze(1) * x))
    check_operator(A)
    E = Fisher(fn, BinaryCrossEntropy(), w, list(zip(data, (y[:2], y[2:]))), reduction="sum", kind=EmpiricalFisher())
    torch.testing.assert_close(E.to_dense(), 4 * x.mT @ ((p - y).square().unsqueeze(1) * x))
    NTK(fn, None, w, data).to_dense()


@pytest.mark.parametrize(
    "name", ["mlp, cross-entropy module", "mlp, weighted logits", "mlp, counts", "mlp, mse", "sequences, classes last"]
)
def test_fisher_matrices(name):
    model, names, x, y, case = made(name)
    settings = {"reduction": "sum"} if isinstance(case.loss, CrossEntropy) else {}
    G = GGN(model, case.loss, None, (x, y), **settings).to_dense()
    torch.testing.assert_close(Fisher(model, case.loss, None, (x, y), **settings).to_dense(), G)
    # The empirical one: outer products of the gradients of loss terms, one a row of outputs.
    J, f = dense.jacobian(model, names, x)
    E = Fisher(model, case.loss, None, (x, y), kind=EmpiricalFisher(), **settings)
    loss, scale = E.loss, E.scale
    g = loss.gradient(f, y).reshape(-1, f.shape[-1])
    per_term = torch.einsum("nc,ncp->np", g, J.reshape(*g.shape, -1))
    torch.testing.assert_close(E.to_dense(), scale * per_term.mT @ per_term)
    check_operator(E)
    if "weighted" in name:  # whose drawn labels have no weight
        return
    drawn = Fisher(model, case.loss, None, (x, y), kind=MonteCarloFisher(4000), **settings)
    F_hat = drawn.to_dense()
    assert float((F_hat - G).norm() / G.norm()) < 0.1
    torch.testing.assert_close(drawn.to_dense(), F_hat)  # drawn once
    check_operator(Fisher(model, case.loss, None, (x, y), kind=MonteCarloFisher(2), **settings))


def test_hessian_of_any_callable():
    model, names, x, _, _ = made("mlp, mse")
    y = rows(6)
    by_mean = lambda f, t: (f - t).pow(4).sum(-1).mean()  # noqa: E731
    want = dense.hessian(model, names, x, y, by_mean)
    agrees(Hessian(model, by_mean, None, [(x[:2], y[:2]), (x[2:], y[2:])]), want)
    by_sum = lambda f, t: (f - t).pow(4).sum()  # noqa: E731
    agrees(Hessian(model, by_sum, None, (x, y), reduction="sum"), 6 * want)
    check_operator(Hessian(model, by_mean, None, (x, y)))


@pytest.mark.parametrize("name", ["mlp, smoothed labels", "convolutions", "sequences, classes last"])
def test_operators_keep_the_contract(name):
    model, _, x, y, case = made(name)
    small = "0" if name.startswith("mlp") else ("5" if name == "convolutions" else "norm")
    for A in (
        GGN(model, case.loss, small, (x, y)),
        Hessian(model, case.loss, small, (x, y), micro_batch=2),
        Jacobian(model, None, small, x, micro_batch=2),
        NTK(model, None, small, x),
    ):
        check_operator(A)


class Cube(torch.autograd.Function):
    """x³, differentiable twice, without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


def test_operations_without_a_batching_rule_go_column_by_column():
    torch.manual_seed(0)
    W, x, y = torch.randn(3, 2, **DOUBLE), torch.randn(5, 2, **DOUBLE), labels(5)()
    A = GGN(lambda p, z: Cube.apply(z @ p.mT), CrossEntropy(), W, (x, y))
    B = GGN(lambda p, z: (z @ p.mT) ** 3, CrossEntropy(), W, (x, y))
    torch.testing.assert_close(A.to_dense(), B.to_dense())


def test_float32_and_poisson_values():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x, y = torch.randn(4, 3), torch.poisson(torch.ones(4, 2))
    A = GGN(model, Poisson(), None, (x, y), reduction="sum")
    assert A.dtype == torch.float32
    check_operator(A)
