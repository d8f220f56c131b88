"""Defects that a review found once: each of them has its test here."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ritz.curvature import GGN, CrossEntropy, CustomLoss, Hessian, Jacobian, data_operator, linearize
from ritz.errors import NonFiniteError, OperandError

from . import dense

DOUBLE = {"dtype": torch.float64}


def linear(d: int = 3, out: int = 4) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(d, out, **DOUBLE), torch.randn(6, d, **DOUBLE), torch.randint(0, out, (6,))


def test_targets_of_the_wrong_kind():
    model, x, y = linear()
    want = GGN(model, CrossEntropy(), None, (x, y)).to_dense()
    torch.testing.assert_close(GGN(model, CrossEntropy(), None, (x, y.int())).to_dense(), want)
    torch.testing.assert_close(GGN(model, CrossEntropy(), None, (x, F.one_hot(y, 4).float())).to_dense(), want)
    H = Hessian(model, CrossEntropy(), None, (x, y.int())).to_dense()
    torch.testing.assert_close(H, dense.hessian(model, ["weight", "bias"], x, y, F.cross_entropy))
    for wrong in (F.one_hot(y, 4), y.double()):
        with pytest.raises(OperandError, match="expected whole class numbers"):
            GGN(model, CrossEntropy(), None, (x, wrong))


def test_an_ignored_number_beyond_the_classes_with_weights():
    model, x, y = linear()
    y[2] = 255
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], **DOUBLE)
    loss = nn.CrossEntropyLoss(weight, ignore_index=255)
    want = dense.ggn(model, ["weight", "bias"], x, y, loss)
    torch.testing.assert_close(GGN(model, loss, None, (x, y)).to_dense(), want)


def test_a_subclassed_loss_is_what_it_computes():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, f, y):  # noqa: ANN001
            entropy = F.cross_entropy(f, y, reduction="none")
            return ((1 - torch.exp(-entropy)) ** 2 * entropy).mean()

    model, x, y = linear()
    want = dense.hessian(model, ["weight", "bias"], x, y, Focal())
    torch.testing.assert_close(Hessian(model, Focal(), None, (x, y)).to_dense(), want)
    with pytest.raises(OperandError, match="CustomLoss"):
        GGN(model, Focal(), None, (x, y)).to_dense()


def test_derivatives_that_torch_cannot_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(36, 3)).double()
    x, y = torch.randn(5, 2, 5, 5, **DOUBLE), torch.randint(0, 3, (5,))
    names = [n for n, _ in model.named_parameters()]
    v = torch.randn(sum(p.numel() for p in model.parameters()), 3, **DOUBLE)
    A = Hessian(model, CrossEntropy(), None, (x, y))
    flat, theta = dense.flat_function(model, names, x)
    for j in range(3):  # one column at a time is what torch can do
        _, want = torch.autograd.functional.hvp(lambda t: F.cross_entropy(flat(t), y), theta, v[:, j])
        torch.testing.assert_close((A @ v)[:, j], want)


def test_parameters_that_the_outputs_do_not_depend_on():
    model, x, y = linear()
    both = nn.ModuleDict({"used": model, "unused": nn.LayerNorm(4, **DOUBLE)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = both

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.parts["used"](z)

    assert float(GGN(Model(), CrossEntropy(), "parts.unused", (x, y)).to_dense().abs().max()) == 0.0
    whole = GGN(Model(), CrossEntropy(), None, (x, y)).to_dense()
    assert float(whole[16:].abs().max()) == 0.0 and float(whole[:16, :16].abs().max()) > 0.0


def test_parameters_that_are_replaced_are_noticed():
    for change in (
        lambda m: torch.nn.utils.vector_to_parameters(torch.ones(16, **DOUBLE), m.parameters()),
        lambda m: setattr(m, "weight", nn.Parameter(torch.ones(4, 3, **DOUBLE))),
    ):
        model, x, y = linear()
        A = GGN(model, CrossEntropy(), None, (x, y))
        A @ torch.ones(16, **DOUBLE)
        change(model)
        with pytest.raises(OperandError, match="changed in place"):
            A @ torch.ones(16, **DOUBLE)


def test_rows_of_one_output_and_batches_of_inputs():
    torch.manual_seed(0)
    w, x = torch.randn(3, **DOUBLE), torch.randn(5, 3, **DOUBLE)
    fn = lambda p, z: torch.tanh(z @ p)  # noqa: E731
    J = Jacobian(fn, None, w, x).to_dense()
    torch.testing.assert_close(Jacobian(fn, None, w, x, sum_outputs=True).to_dense(), J)
    torch.testing.assert_close(Jacobian(fn, None, w, [x[:2], x[2:]]).to_dense(), J)
    torch.testing.assert_close(Jacobian(fn, None, w, [x[:2], x[2:3], x[3:]]).to_dense(), J)
    own = Jacobian(fn, None, w, [x[:2], x[2:]], sum_outputs=True)
    torch.testing.assert_close(own.mH @ torch.eye(5, **DOUBLE), J.mT)


def test_a_loss_that_is_not_convex_is_not_called_semidefinite():
    model, x, _ = linear()
    loss = CustomLoss(lambda f, y: -f.square().sum(), lambda f, y, v: -2 * v)
    A = GGN(model, loss, None, (x, None))
    assert A.psd is None and A.hermitian
    assert float(torch.linalg.eigvalsh(A.to_dense()).max()) < 1e-12


def test_attributes_called_p_and_named_tuples():
    Pair = namedtuple("Pair", ["a", "b"])

    class Mean(nn.Module):
        """Has a p that is no probability."""

        def __init__(self) -> None:
            super().__init__()
            self.p, self.w = 3.0, nn.Parameter(torch.ones(3, 2, **DOUBLE))

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a + b) @ self.w

    _, x, y = linear()
    A = GGN(Mean().train(), CrossEntropy(), None, (Pair(x, x), y % 2), micro_batch=2)
    B = GGN(Mean(), CrossEntropy(), None, ((x, x), y % 2))
    torch.testing.assert_close(A.to_dense(), B.to_dense())


class Adapted(nn.Module):
    """A frozen layer with a low-rank update beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.out = nn.Linear(4, 4, **DOUBLE), nn.Linear(4, 3, **DOUBLE)
        self.down, self.up = nn.Linear(4, 2, bias=False, **DOUBLE), nn.Linear(2, 4, bias=False, **DOUBLE)
        for frozen in (self.base, self.out):
            frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.base(x) + self.up(self.down(x))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 3, batch_first=True, **DOUBLE), nn.Linear(3, 3, **DOUBLE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.lstm(x)[0])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True, **DOUBLE)
        self.out = nn.Linear(4, 3, **DOUBLE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layer(x))


@pytest.mark.parametrize("model", [Adapted, Recurrent, Encoder])
def test_adapters_recurrence_and_encoders(model):
    torch.manual_seed(0)
    net = model().eval()
    x, y = torch.randn(5, 2, 4, **DOUBLE), torch.randint(0, 3, (5, 2))
    names = [n for n, p in net.named_parameters() if p.requires_grad]
    A = GGN(net, CrossEntropy(), None, (x, y))
    assert list(A.network.names) == names
    loss = lambda f, t: F.cross_entropy(f.flatten(0, 1), t.flatten())  # noqa: E731
    torch.testing.assert_close(A.to_dense(), dense.ggn(net, names, x, y, loss), rtol=1e-9, atol=1e-12)


def test_a_batch_whose_outputs_are_not_finite_is_noticed_in_the_product():
    model, x, y = linear()
    G = GGN(model, CrossEntropy(), None, [(x[:3], y[:3]), (x[3:] / 0.0, y[3:])])
    with pytest.raises(NonFiniteError, match="a product with GGN has .* NaN or Inf"):
        G @ torch.ones(G.shape[0], **DOUBLE)


def test_columns_go_through_together_as_memory_allows(monkeypatch):
    model, x, y = linear()
    widths = []
    real = torch.autograd.grad

    def counting(outputs, inputs, vectors=None, **options):
        if vectors is not None and options.get("retain_graph"):
            widths.append(vectors[0].shape[0] if options.get("is_grads_batched") else 1)
        return real(outputs, inputs, vectors, **options)

    V = torch.randn(16, 6, **DOUBLE)
    want = GGN(model, CrossEntropy(), None, (x, y)) @ V
    monkeypatch.setattr(data_operator, "FEW_COLUMNS", 10**9)
    monkeypatch.setattr(torch.autograd, "grad", counting)
    for room, expected in ((1 << 30, [6]), (None, [2, 2, 2]), (1, [1] * 6)):
        G = GGN(model, CrossEntropy(), None, (x, y))
        at = G._record(G.batches[0], ())
        monkeypatch.setattr(linearize, "BLOCK_BYTES", 2 * at.bytes + 1 if room is None else room)
        widths.clear()
        torch.testing.assert_close(G @ V, want)
        assert widths == expected * 2  # J V, then Jᵀ U


def test_modules_with_attributes_of_the_same_names_as_those_of_embeddings():
    class Clip(nn.Module):
        max_norm, sparse = 1.0, True

        def forward(self, x):
            return x.clamp(-self.max_norm, self.max_norm)

    model, x, y = linear()
    clipped = nn.Sequential(model, Clip())
    assert GGN(clipped, CrossEntropy(), None, (x, y)).shape == (16, 16)
