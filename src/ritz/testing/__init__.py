"""What tests need, public so that you can test your own operators: problems, dense references, naive loops."""

from ritz.testing import loops, market, matrices, oracles
from ritz.testing.checks import CheckError, check_gradient, check_operator
from ritz.testing.market import Problem, problem, problems
from ritz.testing.matrices import (
    CoraGraph,
    advection_diffusion_1d,
    cora_graph,
    graph_laplacian,
    hilbert,
    laplacian_1d,
    laplacian_2d,
    laplacian_3d,
    read_matrix_market,
    suitesparse,
)
from ritz.testing.traces import optimizer_from_trace

__all__ = [
    "CheckError",
    "CoraGraph",
    "Problem",
    "advection_diffusion_1d",
    "check_gradient",
    "check_operator",
    "cora_graph",
    "graph_laplacian",
    "hilbert",
    "laplacian_1d",
    "laplacian_2d",
    "laplacian_3d",
    "loops",
    "market",
    "matrices",
    "optimizer_from_trace",
    "oracles",
    "problem",
    "problems",
    "read_matrix_market",
    "suitesparse",
]
