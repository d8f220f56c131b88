"""Low-precision weights keep what rounding takes from them: small steps are not lost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ritz.optim import KFAC, SINGD

BF16 = {"dtype": torch.bfloat16}


def run(optimizer: type, compensate: bool, dtype: torch.dtype, steps: int = 300) -> torch.Tensor:
    """A constant gradient with steps of 2⁻¹² of the weight, far below what bfloat16 resolves."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=dtype)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(1.0)
    tool = optimizer(model, lr=2.0**-12, momentum=0.0, damping=1.0, weight_decay=0.0, compensate=compensate)
    for _ in range(steps):
        tool.zero_grad()
        with tool.paused():
            model(torch.ones(1, 3, dtype=dtype)).sum().backward()
        tool.step()
    state = tool.state[model.weight]
    assert ("rounding" in state) == (compensate and dtype != torch.float32)
    rest = state["rounding"].float() if "rounding" in state else 0.0
    assert tool.report().state_bytes >= (2 * 8 if compensate and dtype == torch.bfloat16 else 0)
    return model.weight.detach().float() + rest


@pytest.mark.parametrize("optimizer", [SINGD, KFAC])
def test_small_steps_add_up(optimizer):
    exact = run(optimizer, True, torch.float32)
    assert float((run(optimizer, True, torch.bfloat16) - exact).abs().max()) < 2e-4
    assert float((run(optimizer, False, torch.bfloat16) - 1.0).abs().max()) == 0.0
    assert float((exact - 1.0).abs().max()) > 0.01


def test_weight_decay_that_rounding_would_swallow():
    torch.manual_seed(0)
    model = nn.Linear(4, 3, bias=False, **BF16)
    before = model.weight.detach().float().clone()
    tool = SINGD(model, lr=1.0, momentum=0.0, weight_decay=1e-3, damping=1e6)
    for _ in range(200):
        tool.zero_grad()
        with tool.paused():
            (model(torch.ones(1, 4, **BF16)).sum() * 0.0).backward()
        tool.step()
    torch.testing.assert_close(model.weight.detach().float(), before * (1 - 1e-3) ** 200, rtol=6e-3, atol=0)


def test_report_counts_the_rounding_and_a_resumed_run_goes_on_bit_by_bit():
    torch.manual_seed(0)
    x = torch.randn(8, 4, **BF16)

    def made() -> tuple[nn.Module, SINGD]:
        torch.manual_seed(1)
        model = nn.Linear(4, 3, **BF16)
        return model, SINGD(model, lr=1e-3, update_interval=2)

    def step(model: nn.Module, tool: SINGD) -> None:
        tool.zero_grad()
        model(x).square().mean().backward()
        tool.step()

    whole, tool = made()
    for _ in range(6):
        step(whole, tool)
    bytes_of_state = sum(
        t.numel() * t.element_size() for s in tool.state.values() for t in s.values() if torch.is_tensor(t)
    )
    assert tool.report().state_bytes == bytes_of_state
    part, first = made()
    for _ in range(3):
        step(part, first)
    resumed, second = made()
    resumed.load_state_dict(part.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        step(resumed, second)
    assert torch.equal(resumed.weight, whole.weight) and torch.equal(
        second.state[resumed.weight]["rounding"], tool.state[whole.weight]["rounding"]
    )
