"""The dual of a Gauss–Newton matrix has its nonzero eigenvalues, kept rows or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ritz.curvature import GGN, BinaryCrossEntropy, CrossEntropy, CustomLoss, DualGGN, Fisher, SquaredError
from ritz.errors import OperandError
from ritz.testing import check_operator

from .layered import CASES, made

DOUBLE = {"dtype": torch.float64}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("keep", [0, 1 << 20])
def test_nonzero_eigenvalues(name, keep):
    model, x, y = made(name)
    for loss, targets, options in (
        (CrossEntropy(ignore_index=1), y, {}),
        (SquaredError(2.0), None, {"reduction": "sum", "num_data": 50}),
        (BinaryCrossEntropy(), None, {"reduction": "sum", "micro_batch": 2}),
    ):
        f = model(x)
        t = torch.rand_like(f).detach() if targets is None else targets
        G = GGN(model, loss, None, (x, t), keep_bytes=keep, **options)
        K = DualGGN(G)
        assert K.shape[0] == f.numel()
        values = [torch.linalg.eigvalsh(M.to_dense()).flip(0) for M in (G, K)]
        shared = min(len(v) for v in values)
        torch.testing.assert_close(values[0][:shared], values[1][:shared], rtol=1e-9, atol=1e-12)
        assert float(values[0][shared:].abs().sum() + values[1][shared:].abs().sum()) < 1e-10
    check_operator(K)


def test_what_has_no_root_is_refused():
    x = torch.randn(3, 2, **DOUBLE)
    model = nn.Linear(2, 2, **DOUBLE)
    own = CustomLoss(lambda f, y: f.square().sum(), lambda f, y, v: 2 * v)
    for A in (GGN(model, own, None, (x, x)), Fisher(model, SquaredError(), None, (x, x))):
        with pytest.raises(OperandError, match="the dual needs a GGN of a loss whose Hessian has a root"):
            DualGGN(A)
