"""Batches, low precision, memory, function transforms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.operators.structured.table import STRUCTURES, close, member, normal, symmetric
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ritz.operators.structured import Dense, LowerTriangular, Structure, UpperTriangular, toeplitz

structures = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)


def apply_square(structure: Structure, flat: Tensor, X: Tensor) -> Tensor:
    """K Kᵀ X, by way of a stored K Kᵀ where the structure has one."""
    square = structure.square(flat, X.shape[-2])
    if square is None:
        return structure.matmul(flat, structure.rmatmul(flat, X))
    return structure.apply_square(square, X)


def functions(structure: Structure, d: int) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Every function of a structure, with operands in a batch of 3."""
    flat, other, X = member(structure, d, 3), member(structure, d, 3, seed=1), normal(3, d, 6, seed=2)
    return {
        "matmul": (structure.matmul, (flat, X)),
        "rmatmul": (structure.rmatmul, (flat, X)),
        "multiply": (lambda a, b: structure.multiply(a, b, d), (flat, other)),
        "square": (lambda a, x: apply_square(structure, a, x), (flat, X)),
        "gram": (lambda a: structure.gram(a, d), (flat,)),
        "outer": (structure.outer, (X,)),
        "project": (structure.project, (symmetric(d, 3),)),
        "from_dense": (structure.from_dense, (normal(3, d, d),)),
        "to_dense": (lambda a: structure.to_dense(a, d), (flat,)),
        "diagonal": (lambda a: structure.diagonal(a, d), (flat,)),
        "trace": (lambda a: structure.trace(a, d), (flat,)),
        "norm": (lambda a: structure.norm(a, d), (flat,)),
    }


@structures
@pytest.mark.parametrize("d", [1, 2, 5, 34])
@pytest.mark.parametrize("transforms", [False, True])
def test_a_batch_is_a_loop(structure: Structure, d: int, transforms: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if transforms:
        monkeypatch.setattr(toeplitz, "MATRIX_SIZE", 0)
    for function, operands in functions(structure, d).values():
        loop = torch.stack([function(*one) for one in zip(*operands, strict=True)])
        close(function(*operands), loop)
        two = function(*(torch.stack([t, -2 * t]) for t in operands))  # a batch of batches
        close(two[0], loop)
        with torch.no_grad():
            close(function(*(t.requires_grad_() for t in operands)), loop)


@structures
def test_one_matrix_for_a_batch_of_operands(structure: Structure) -> None:
    d = 34
    flat, X = member(structure, d), normal(4, d, 6)
    close(structure.matmul(flat, X), torch.stack([structure.matmul(flat, x) for x in X]))
    close(structure.rmatmul(flat, X), torch.stack([structure.rmatmul(flat, x) for x in X]))
    flats, x = member(structure, d, 4), normal(d, 6)
    close(structure.matmul(flats, x), torch.stack([structure.matmul(f, x) for f in flats]))
    close(structure.rmatmul(flats, x), torch.stack([structure.rmatmul(f, x) for f in flats]))


@structures
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
def test_function_transforms(structure: Structure) -> None:
    d = 11
    for function, operands in functions(structure, d).values():
        close(torch.func.vmap(function)(*operands), function(*operands))
    flat, X = member(structure, d), normal(d, 3)
    tangent = member(structure, d, seed=3)
    value, derivative = torch.func.jvp(lambda a: structure.matmul(a, X), (flat,), (tangent,))
    close(value, structure.matmul(flat, X))
    close(derivative, structure.matmul(tangent, X))  # K is linear in its stored numbers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hierarchical 15 15", "block 4", "upper of triangular and Toeplitz"])
def test_compiled_functions_are_one_graph(name: str) -> None:
    for function, operands in functions(STRUCTURES[name], 34).values():
        torch._dynamo.reset()
        with torch.no_grad():
            close(torch.compile(function, backend="eager", fullgraph=True)(*operands), function(*operands))


@structures
def test_results_stay_on_the_device_of_the_operands(structure: Structure) -> None:
    for d in (5, 34, 700):  # the meta device has shapes alone, and refuses to mix with others
        for function, operands in functions(structure, d).values():
            result = function(*(t.to("meta") for t in operands))
            assert result.device.type == "meta"
            assert d == 700 or result.shape == function(*operands).shape
        assert structure.identity(d, dtype=torch.float64, device="meta").device.type == "meta"


# Two units in the last place of bfloat16 (2⁻⁸ each); in single precision the rounding of sums of up to 200² terms.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@structures
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("d", [5, 64, 200])
def test_low_precision(structure: Structure, dtype: torch.dtype, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toeplitz, "MATRIX_SIZE", 100)  # transforms at the largest size
    for name, (function, operands) in functions(structure, d).items():
        rounded = [t.to(dtype) for t in operands]
        got, want = function(*rounded), function(*(t.double() for t in rounded))
        assert got.dtype == dtype, name
        error = float((got.double() - want).norm() / want.norm())
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.1e}"


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return result


SPARSE = {name: s for name, s in STRUCTURES.items() if not isinstance(s, (Dense, LowerTriangular, UpperTriangular))}


@pytest.mark.parametrize("structure", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("recorded", [False, True])
def test_no_square_matrix_is_formed(structure: Structure, recorded: bool) -> None:
    d, m = 2000, 4
    flat, X = member(structure, d).requires_grad_(recorded), normal(d, m)
    with Largest() as largest:
        structure.matmul(flat, X)
        structure.rmatmul(flat, X)
        structure.multiply(flat, flat, d)
        structure.gram(flat, d)
        structure.outer(X)
        structure.trace(flat, d)
        structure.norm(flat, d)
        structure.identity(d, dtype=X.dtype)
    assert d <= largest.numel < d * d / 8
    with Largest() as largest:
        structure.to_dense(flat, d)
    assert largest.numel >= d * d  # the mode sees what it is meant to see


def test_toeplitz_form_depends_on_sizes_alone() -> None:
    assert toeplitz.forms_matrix(64, 64) and toeplitz.forms_matrix(toeplitz.MATRIX_SIZE, toeplitz.MATRIX_SIZE)
    assert not toeplitz.forms_matrix(toeplitz.MATRIX_SIZE + 1, 10**6)
    assert not toeplitz.forms_matrix(toeplitz.MATRIX_SIZE, 1)
