"""ravel and unravel are inverse, keep structure and order, and carry gradients."""

from typing import NamedTuple

import pytest
import torch

from ritz import OperandError, ravel


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def test_round_trip_keeps_structure_and_values():
    tree = {"b": [torch.randn(2, 3), (torch.randn(4),)], "a": Pair(torch.randn(()), torch.randn(1, 1, 2))}
    vector, unravel = ravel(tree)
    assert vector.shape == (6 + 4 + 1 + 2,)
    back = unravel(3 * vector)
    assert list(back) == ["b", "a"] and isinstance(back["a"], Pair) and isinstance(back["b"][1], tuple)
    torch.testing.assert_close(back["b"][0], 3 * tree["b"][0])
    torch.testing.assert_close(back["b"][1][0], 3 * tree["b"][1][0])
    torch.testing.assert_close(back["a"].left, 3 * tree["a"].left)
    torch.testing.assert_close(back["a"].right, 3 * tree["a"].right)


def test_a_network_s_parameters_become_the_operand_of_a_hessian():
    model = torch.nn.Linear(3, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    vector, unravel = ravel(dict(model.named_parameters()))

    def loss(p):
        return torch.func.functional_call(model, unravel(p), x).square().sum()

    hessian = torch.autograd.functional.hessian(loss, vector.detach())
    assert hessian.shape == (8, 8)
    torch.testing.assert_close(hessian[:3, :3], 2 * x.T @ x)


@pytest.mark.parametrize(
    "tree", [{}, 3, [torch.ones(1), "x"], [torch.ones(1), torch.ones(1, dtype=torch.float64)]], ids=str
)
def test_bad_trees_are_refused(tree):
    with pytest.raises(OperandError):
        ravel(tree)


def test_a_vector_of_another_length_is_refused():
    _, unravel = ravel([torch.ones(2)])
    with pytest.raises(OperandError, match=r"\(3,\)"):
        unravel(torch.ones(3))
