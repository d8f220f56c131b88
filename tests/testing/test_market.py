"""The market's problems have the properties that they are named for."""

import gzip
import math

import numpy as np
import pytest
import torch

from ritz.testing import market, matrices

SMALL = market.names()
LARGE = tuple(name for name in market.names(large=True) if name not in SMALL)


def close(actual, expected, tol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def randint(n):
    """Integers, so that products with dyadic matrices are exact."""
    return torch.randint(-8, 9, (n,), generator=torch.Generator().manual_seed(0)).to(torch.float64)


def commutator(A):
    return torch.linalg.norm(A @ A.mH - A.mH @ A) / torch.linalg.norm(A) ** 2


@pytest.mark.parametrize("name", SMALL)
def test_flags_agree_with_the_matrix(name):
    p = market.problem(name)
    A = p.dense
    assert A.dtype in (torch.float64, torch.complex128) and A.shape == (p.n, p.n)
    assert torch.isfinite(torch.linalg.norm(A))
    assert torch.equal(A, A.mH) == p.hermitian
    if p.hermitian:
        smallest = torch.linalg.eigvalsh(A)[0]
        assert (smallest >= -1e-14 * max(1.0, torch.linalg.norm(A).item())).item() == p.psd
    else:
        assert not p.psd


@pytest.mark.parametrize("name", SMALL)
def test_two_calls_are_equal_and_share_nothing(name):
    first, second = market.problem(name), market.problem(name)
    assert torch.equal(first.dense, second.dense)
    if first.matrix.layout == torch.strided:
        assert first.matrix.data_ptr() != second.matrix.data_ptr()


def test_seeds_differ_and_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    a, b = (market.problem("spd_well", seed=seed).matrix for seed in (0, 1))
    assert not torch.allclose(a, b)
    assert torch.equal(before, torch.get_rng_state())


def test_selection():
    assert {p.name for p in market.problems()} == set(SMALL)
    positive = market.problems(psd=True, complex=False, sparse=False)
    assert {"spd_ill", "zero"} <= {p.name for p in positive}
    assert not {"complex_positive", "laplacian_1d", "indefinite"} & {p.name for p in positive}
    assert all(p.matrix.is_complex() for p in market.problems(complex=True)) and market.problems(complex=True)
    assert {p.matrix.layout for p in market.problems(sparse=True)} == {torch.sparse_csr, torch.sparse_coo}


def test_unknown_names_and_parameters_are_refused():
    with pytest.raises(ValueError, match="no problem is called 'spd'.*spd_well"):
        market.problem("spd")
    with pytest.raises(TypeError, match="colour"):
        market.problem("spd_well", colour=1)


@pytest.mark.parametrize("condition", [1e2, 1e10])
@pytest.mark.parametrize("name", ["spd_well", "spd_ill", "complex_positive"])
def test_condition(name, condition):
    eigenvalues = torch.linalg.eigvalsh(market.problem(name, n=9, condition=condition).matrix)
    assert (eigenvalues[-1] / eigenvalues[0]).item() == pytest.approx(condition, rel=1e-4)


def test_multiplicities():
    expected = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64).repeat_interleave(3)
    close(torch.linalg.eigvalsh(market.problem("repeated").matrix), expected)
    clustered = torch.linalg.eigvalsh(market.problem("clustered", width=1e-6).matrix).reshape(3, 5)
    spread = clustered[:, -1] - clustered[:, 0]
    assert (spread > 1e-7).all() and (spread < 2e-6).all()
    assert torch.linalg.matrix_rank(market.problem("rank_deficient", n=12, rank=4).matrix) == 4
    assert torch.count_nonzero(market.problem("zero").matrix) == 0
    close(market.problem("identity_multiple", n=3).matrix, 2.5 * torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["indefinite", "complex_indefinite"])
def test_indefinite_stays_away_from_zero(name):
    eigenvalues = torch.linalg.eigvalsh(market.problem(name).matrix)
    assert eigenvalues[0] < -0.2 and eigenvalues[-1] > 0.2 and eigenvalues.abs().min() > 0.19


def test_normality():
    assert commutator(market.problem("nonsymmetric_normal").matrix) < 1e-14
    assert commutator(market.problem("skew").matrix) < 1e-14
    for name in ("nonsymmetric_nonnormal", "nonsymmetric", "complex_general", "advection_diffusion", "defective"):
        assert commutator(market.problem(name).dense) > 1e-2, name
    spectrum = torch.linalg.eigvals(market.problem("nonsymmetric_nonnormal").matrix)
    close(spectrum.real.sort().values, torch.linspace(1, 2, 16, dtype=torch.float64), 1e-2)
    assert (torch.linalg.eigvals(market.problem("nonsymmetric_normal").matrix).imag.abs() > 0.4).all()
    assert torch.linalg.eigvals(market.problem("skew").matrix).real.abs().max() < 1e-13
    A = market.problem("complex_symmetric").matrix
    assert torch.equal(A, A.mT) and not torch.allclose(A, A.mH)


@pytest.mark.parametrize("name", ["nonsymmetric", "complex_general", "complex_symmetric", "nonsymmetric_normal"])
def test_spectrum_in_the_right_half_plane(name):
    assert torch.linalg.eigvals(market.problem(name).matrix).real.min() > 0.1


@pytest.mark.parametrize("n", [5, 8, 11])
def test_defective_has_its_jordan_blocks(n):
    A = market.problem("defective", n=n).matrix
    assert torch.equal(A, A.round())

    def rank(eigenvalue, power):
        shifted = A - eigenvalue * torch.eye(n, dtype=A.dtype)
        return torch.linalg.matrix_rank(torch.linalg.matrix_power(shifted, power)).item()

    # One eigenvector, and a chain of length 3 for eigenvalue 1, of length 2 for eigenvalue 2.
    assert [rank(1.0, p) for p in (1, 2, 3, 4)] == [n - 1, n - 2, n - 3, n - 3]
    assert [rank(2.0, p) for p in (1, 2, 3)] == [n - 1, n - 2, n - 2]
    assert torch.trace(A) == 3 + 4 + sum(range(3, 3 + n - 5))
    with pytest.raises(ValueError, match="n >= 5"):
        market.problem("defective", n=4)


def test_jordan_block_is_nilpotent_after_the_shift():
    N = market.problem("jordan", n=4, eigenvalue=3.0).matrix - 3 * torch.eye(4, dtype=torch.float64)
    assert torch.count_nonzero(torch.linalg.matrix_power(N, 3)) == 1
    assert torch.count_nonzero(torch.linalg.matrix_power(N, 4)) == 0


def test_hilbert_determinant():
    close(torch.linalg.det(matrices.hilbert(3)), torch.tensor(1 / 2160, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_laplacian_eigenvalues(n, dimension):
    build = (matrices.laplacian_1d, matrices.laplacian_2d, matrices.laplacian_3d)[dimension - 1]
    h = 0.5
    axis = (2 - 2 * torch.cos(math.pi * torch.arange(1, n + 1, dtype=torch.float64) / (n + 1))) / h**2
    expected = sum(torch.meshgrid(*[axis] * dimension, indexing="ij")).flatten().sort().values
    L = build(n, spacing=h)
    assert L.layout == torch.sparse_csr and L.values().numel() == n**dimension + 2 * dimension * n ** (
        dimension - 1
    ) * (n - 1)
    close(torch.linalg.eigvalsh(L.to_dense()), expected)


def test_advection_diffusion_eigenvalues():
    n, c = 6, 0.7
    expected = (
        2 + c - 2 * math.sqrt(1 + c) * torch.cos(math.pi * torch.arange(1.0, n + 1, dtype=torch.float64) / (n + 1))
    )
    actual = torch.linalg.eigvals(matrices.advection_diffusion_1d(n, velocity=c).to_dense())
    close(actual.real.sort().values, expected)
    with pytest.raises(ValueError, match="nonnegative"):
        matrices.advection_diffusion_1d(3, velocity=-1.0)


@pytest.mark.parametrize("build", [matrices.laplacian_1d, matrices.hilbert])
def test_sizes_below_one_are_refused(build):
    with pytest.raises(ValueError, match="at least 1"):
        build(0)


def test_graph_laplacian_of_a_path_with_an_isolated_node():
    edges = torch.tensor([[0, 1], [1, 2]])
    L = matrices.graph_laplacian(edges, 4).to_dense()
    close(L, torch.tensor([[1, -1, 0, 0], [-1, 2, -1, 0], [0, -1, 1, 0], [0, 0, 0, 0]], dtype=torch.float64))
    close(
        torch.linalg.eigvalsh(matrices.graph_laplacian(edges, 4, normalised=True).to_dense()),
        torch.tensor([0.0, 0.0, 1.0, 2.0], dtype=torch.float64),
    )
    with pytest.raises(ValueError, match="loops"):
        matrices.graph_laplacian(torch.tensor([[1, 1]]), 2)


def test_cora():
    graph = matrices.cora_graph()
    assert graph.edges.shape == (5278, 2) and (graph.edges[:, 0] < graph.edges[:, 1]).all()
    assert graph.features.shape == (2708, 1433) and graph.features.values().unique().tolist() == [1.0]
    assert torch.bincount(graph.labels).numel() == 7 and len(graph.labels) == 2708
    splits = [graph.train, graph.val, graph.test]
    assert [len(s) for s in splits] == [140, 500, 1000] and torch.cat(splits).unique().numel() == 1640
    # Papers cite papers of their own class: 81 % of the edges.
    same = (graph.labels[graph.edges[:, 0]] == graph.labels[graph.edges[:, 1]]).double().mean()
    assert same.item() == pytest.approx(0.81, abs=0.01)


@pytest.mark.parametrize("name", LARGE)
def test_large_problems_are_symmetric(name):
    p = market.problem(name)
    A = p.matrix.to_sparse_coo().coalesce()
    transposed = A.transpose(0, 1).coalesce()
    assert torch.equal(A.indices(), transposed.indices()) and torch.equal(A.values(), transposed.values())


def test_large_sizes_and_definiteness():
    bus, blowey = market.problem("1138_bus"), market.problem("bloweybq")
    assert bus.n == 1138 and bus.matrix.values().numel() == 4054
    eigenvalues = torch.linalg.eigvalsh(bus.dense)
    assert 1e6 < (eigenvalues[-1] / eigenvalues[0]).item() < 1e8
    assert blowey.n == 10001 and blowey.matrix.values().numel() == 69991


def test_bloweybq_is_positive_definite():
    """The collection files it under indefinite matrices; the numbers that it stores say otherwise.

    Exactly, A = [[a, (Lg)ᵀ], [Lg, L²/2 + D]]: L the Laplacian of a path, g = −(e₁ + eₙ)/4, D three symmetric pairs of
    entries among nodes 3 to 6. So for x = (s, y), xᵀAx is the sum of
    a s² + 2 s gᵀLy + 0.01 ‖Ly‖², nonnegative because 0.01 a > ‖g‖², and
    0.49 ‖Ly‖² + yᵀDy, nonnegative because it is so with only the rows of L that touch the first eight nodes.
    """
    n, a = 10000, 4999.75
    nodes = torch.arange(n)
    L = matrices.graph_laplacian(torch.stack([nodes[:-1], nodes[1:]], 1), n)
    g = torch.zeros(n, dtype=torch.float64)
    g[0] = g[-1] = -0.25
    D = torch.zeros(8, 8, dtype=torch.float64)
    D[2, 4], D[3, 4], D[3, 5] = -0.5, 2.5, -0.5
    D = D + D.T
    x = randint(n + 1)
    s, y = x[0], x[1:]
    lower = (L @ g) * s + L @ (L @ y) / 2
    lower[:8] += D @ y[:8]
    assert torch.equal(market.problem("bloweybq").matrix @ x, torch.cat([(a * s + (L @ g) @ y)[None], lower]))

    assert 0.01 * a > torch.dot(g, g)
    rows = torch.stack([(L @ torch.eye(n, 8, dtype=torch.float64)[:, j])[:7] for j in range(8)], 1)
    assert torch.linalg.eigvalsh(0.49 * rows.T @ rows + D)[0] > 1e-3


@pytest.mark.parametrize("normalised", [False, True])
def test_cora_laplacian_null_vector(normalised):
    p = market.problem("cora_normalised" if normalised else "cora_combinatorial")
    degree = torch.bincount(matrices.cora_graph().edges.flatten(), minlength=p.n).double()
    null = degree.sqrt() if normalised else torch.ones_like(degree)
    assert torch.linalg.norm(p.matrix @ null) < 1e-10
    # psd, because it is weakly diagonally dominant (after the similarity by the degrees in the normalised case).
    dense = p.dense
    if normalised:
        assert torch.equal(dense.diagonal(), torch.ones(p.n, dtype=torch.float64))
    else:
        assert torch.equal(dense.diagonal(), degree)


def write(path, text):
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)
    return path


@pytest.mark.parametrize("suffix", ["a.mtx", "a.mtx.gz"])
def test_matrix_market_forms(tmp_path, suffix):
    path = tmp_path / suffix
    body = "% comment\n%\n\n3 3 3\n1 1 2.5\n3 1 -1\n3 2 1e-3\n"
    lower = torch.tensor([[2.5, 0, 0], [0, 0, 0], [-1, 1e-3, 0]], dtype=torch.float64)
    strict = torch.tril(lower, -1)
    for kind, expected in [("general", lower), ("symmetric", lower + strict.T), ("skew-symmetric", lower - strict.T)]:
        write(path, f"%%MatrixMarket matrix coordinate real {kind}\n{body}")
        assert torch.equal(matrices.read_matrix_market(path).to_dense(), expected)
    write(path, "%%MatrixMarket matrix coordinate pattern general\n2 3 2\n1 3\n2 1\n")
    assert torch.equal(
        matrices.read_matrix_market(path).to_dense().to(torch.int), torch.tensor([[0, 0, 1], [1, 0, 0]]).int()
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("%%MatrixMarket matrix array real general\n1 1\n1\n", "header"),
        ("%%MatrixMarket matrix coordinate complex general\n1 1 1\n1 1 1 0\n", "header"),
        ("%%MatrixMarket matrix coordinate real general\n2 2 2\n1 1 1\n", "announces 2 entries but has 1"),
    ],
)
def test_matrix_market_refuses(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        matrices.read_matrix_market(write(tmp_path / "a.mtx", text))


def test_reader_agrees_with_scipy():
    scipy_io = pytest.importorskip("scipy.io")
    path = matrices.files("ritz.testing").joinpath("data", "1138_bus.mtx.gz")
    expected = scipy_io.mmread(str(path)).toarray()
    np.testing.assert_array_equal(matrices.read_matrix_market(path).to_dense().numpy(), expected)
    with pytest.raises(ValueError, match="1138_bus"):
        matrices.suitesparse("494_bus")
