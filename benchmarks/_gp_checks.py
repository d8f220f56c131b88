"""Is the race fair, and are the gradients right? In float64, on a subset of every set."""

from __future__ import annotations

from typing import Any

import _gp_exact
import numpy as np
import torch
from _gp_data import Split, start

import ritz

AGREE_ROWS = 400
WIDTH = 1e-4  # of central differences, in raw parameters
SEEDS = 6  # sets of probes in the comparison with Cholesky's gradient


def agreement(split: Split, spec: dict) -> dict:
    """log p of everybody's dense path at equal hyper-parameters, relative to the referee's."""
    split = _first(split, AGREE_ROWS)
    spec = spec | {"dtype": "float64"}
    points = {"start": start(split.X.shape[1]), "trained": np.array(spec["state"])}
    out: dict[str, Any] = {"rows": split.n, "errors": {}}
    for label, theta in points.items():
        theta[-1] = 0.0  # scikit-learn has no mean
        reference = float(_gp_exact.value_and_gradient(theta, split.X, split.y)[0])
        for name, value in _values(split, spec, theta).items():
            entry = out["errors"].setdefault(name, {})
            try:
                entry[label] = abs(value() - reference) / abs(reference)
            except Exception as error:  # a peer that is absent or fails is a row, not an end
                entry["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    found = [x for entry in out["errors"].values() for k, x in entry.items() if k != "error"]
    out["worst"] = max(found)
    return out


def _first(split: Split, rows: int) -> Split:
    return Split(split.name, split.X[:rows], split.y[:rows], split.Xs, split.ys, split.centre, split.unit)


def _values(split: Split, spec: dict, theta: np.ndarray) -> dict[str, Any]:
    from _gp_ours import Ours

    def ritz_dense() -> float:
        ours = Ours(split, spec, direct=True)
        ours.set(theta)
        return float(ours._likelihood(ours.y).detach())

    def ritz_products() -> float:
        """The iterative path with n probes (so that nothing is random) and converged columns."""
        ours = Ours(split, spec)
        ours.gp.solver = ritz.CG(rtol=1e-11)
        ours.gp.logdet = (ritz.Hutchinson(split.n), ritz.Lanczos(rtol=1e-9))
        ours.set(theta)
        with torch.no_grad():
            return float(ours._likelihood(ours.y))

    def gpytorch_dense() -> float:
        from _gp_gpytorch import GPyTorch

        theirs = GPyTorch(split, spec, cholesky=True)
        theirs.set(theta)
        with theirs.settings():
            return float(theirs.log_likelihood(theirs.y).detach())

    def keops_products() -> float:
        """KeOps has no dense path: its kernel times the identity, then the referee's Cholesky formula."""
        from _gp_gpytorch import GPyTorch

        theirs = GPyTorch(split, spec, keops=True, rank=0)
        theirs.set(theta)
        with theirs.settings(), torch.no_grad():
            K = theirs.likelihood(theirs.model(theirs.X)).lazy_covariance_matrix.matmul(torch.eye(split.n).double())
            r = theirs.y - theta[-1]
            normal = torch.distributions.MultivariateNormal(torch.zeros_like(r), 0.5 * (K + K.mT))
            return float(normal.log_prob(r))

    def sklearn_dense() -> float:
        from _gp_sklearn import Sklearn

        theirs = Sklearn(split, spec)
        theirs.set(theta)
        return theirs.value_and_gradient()[0]

    return {
        "ritz Cholesky": ritz_dense,
        "ritz products, n probes": ritz_products,
        "gpytorch Cholesky": gpytorch_dense,
        "gpytorch KeOps products": keops_products,
        "sklearn": sklearn_dense,
    }


def gradients(split: Split, spec: dict) -> dict:
    """The iterative gradient against differences of its own objective, and against Cholesky's.

    The depth is the one that the adaptive rule finds at these hyper-parameters, then fixed, so that the objective is
    smooth. `own`: largest |g·u − difference| / ‖g‖ over three directions u (Cholesky's gradient and two random ones).
    `cholesky`: (g − g_exact)·u over the standard error of g·u, along Cholesky's gradient, root mean square over
    SEEDS sets of probes: 1.13 is expected of an unbiased estimate whose error is judged by ten probes (Student's t).
    The standard error comes from the probes one by one, by differences of their forms.
    """
    from _gp_ours import PROBES, Ours, parameters, write

    theta = np.array(spec["state"])
    ours = Ours(split, spec | {"dtype": "float64"}, rank=0)
    ours.set(theta)
    gp, X, y, tensors = ours.gp, ours.X, ours.y, parameters(ours.gp)
    _, info = gp.log_marginal_likelihood(X, y, return_info=True)
    lanczos = ritz.Lanczos(info.depth)
    exact_value, exact = _gp_exact.value_and_gradient(theta, split.X, split.y)

    def gradient(seed: int) -> tuple[float, float, np.ndarray]:
        """Value, its standard error, gradient."""
        gp.logdet = (ritz.Hutchinson(PROBES, seed), lanczos)
        value, info = gp.log_marginal_likelihood(X, y, return_info=True)
        grads = torch.autograd.grad(value, tensors)
        return float(value.detach()), float(info.standard_error), torch.cat([g.reshape(-1) for g in grads]).numpy()

    @torch.no_grad()
    def slopes(u: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
        """Central differences along u: of the whole objective, and of −½ zᵀ log(K̂) z for every probe."""
        gp.logdet = (ritz.Hutchinson(PROBES, seed), lanczos)
        Z, found = gp.logdet[0].probes(split.n, torch.float64), []
        for sign in (1, -1):
            write(tensors, theta + sign * WIDTH * u)
            K = gp.kernel(X).shift(gp.noise)
            forms = ritz.quadratic_form(ritz.functions.log, K, Z, method=lanczos, on_failure="ignore")
            found.append((float(gp.log_marginal_likelihood(X, y, on_failure="ignore")), -0.5 * forms.numpy()))
        write(tensors, theta)
        (up, probes_up), (down, probes_down) = found
        return (up - down) / (2 * WIDTH), (probes_up - probes_down) / (2 * WIDTH)

    unit = exact / np.linalg.norm(exact)
    others = np.random.default_rng(0).standard_normal((2, len(theta)))
    own, ratios, values, relative = [], [], [], []
    for seed in range(SEEDS):
        value, spread, g = gradient(seed)
        for u in [unit, *(others if seed == 0 else [])]:
            u = u / np.linalg.norm(u)
            difference, per_probe = slopes(u, seed)
            own.append(abs(float(g @ u) - difference) / np.linalg.norm(g))
            if len(ratios) == seed:  # the first direction is Cholesky's gradient
                ratios.append(float((g - exact) @ u) / (per_probe.std(ddof=1) / PROBES**0.5))
        values.append((value - exact_value) / spread)
        relative.append(float(np.linalg.norm(g - exact) / np.linalg.norm(exact)))
    return {
        "rows": split.n,
        "depth": info.depth,
        "method": str(gp.logdet),
        "own": float(max(own)),
        "cholesky": float(np.sqrt(np.mean(np.square(ratios)))),
        "value": float(np.sqrt(np.mean(np.square(values)))),
        "relative": float(np.mean(relative)),
        "ratios": ratios,
        "value_ratios": values,
    }
