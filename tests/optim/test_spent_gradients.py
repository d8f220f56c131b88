"""The step overwrites copies of gradients, never `.grad` itself, and not where clipping reads them afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ritz.operators.structured import Dense, Diagonal, Hierarchical, LowerToeplitz
from ritz.optim import KFAC, SINGD, KLClip, NormClip

X = torch.randn(16, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def trained(clip, foreach, optimizer=SINGD, **settings) -> tuple[nn.Module, list]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(300, 40), nn.Tanh(), nn.Linear(40, 40, bias=False), nn.Tanh(), nn.Linear(40, 40))
    model.double()
    tool = optimizer(model, lr=0.05, update_interval=1, clip=clip, foreach=foreach, row_form=False, **settings)
    gradients = []
    for _ in range(3):
        tool.zero_grad()
        model(X).square().mean().backward()
        before = [p.grad.clone() for p in model.parameters()]
        tool.step()
        gradients += [(g, p.grad) for g, p in zip(before, model.parameters())]
        assert all(torch.equal(g, p.grad) for g, p in zip(before, model.parameters()))
    return model, gradients


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("structure", [Dense(), Diagonal(), Hierarchical(4, 3), LowerToeplitz()], ids=str)
def test_gradients_stay_and_a_loose_clip_changes_nothing(structure, foreach):
    free, _ = trained(None, foreach, structures=structure)
    clipped, _ = trained(NormClip(1e9), foreach, structures=structure)  # reads gradients after the products
    for p, q in zip(free.parameters(), clipped.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("structure", [Diagonal(), Hierarchical(4, 3)], ids=str)
def test_a_tight_clip_reads_the_gradient(structure):
    """The factor is sqrt(κ / (lr² ⟨N, G⟩)), with ⟨N, G⟩ read off a step without clipping."""
    moved = {}
    for clip in (None, KLClip(1e-6)):
        torch.manual_seed(1)
        layer = nn.Linear(300, 40).double()
        before = [p.detach().clone() for p in layer.parameters()]
        settings = {"momentum": 0.0, "row_form": False, "structures": structure, "lr_cov": 0.3}
        optimizer = SINGD(layer, lr=0.05, clip=clip, **settings)
        layer(X).square().mean().backward()
        optimizer.step()
        moved[clip] = [b - p.detach() for b, p in zip(before, layer.parameters())]
        gradients = [p.grad for p in layer.parameters()]
    inner = sum(float((d * g).sum()) for d, g in zip(moved[None], gradients)) / 0.05
    factor = (1e-6 / (0.05**2 * inner)) ** 0.5
    assert factor < 0.5
    for free, clipped in zip(moved[None], moved[KLClip(1e-6)]):
        torch.testing.assert_close(clipped, factor * free, rtol=1e-9, atol=1e-14)


def test_kfac_leaves_gradients_alone():
    trained(None, None, KFAC)
