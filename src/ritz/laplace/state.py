"""A fitted posterior as plain tensors and numbers, and back: what ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..curvature.eigenblocks import EigenBlock, EigenBlocks
from ..curvature.uses import watch
from ..errors import OperandError
from ..result import Info, Status
from ..stochastic import SpectralMeasure
from .posterior import Blocks, Full, LowRank, Posterior

if TYPE_CHECKING:
    from .laplace import Laplace

VERSION = 2
NUMBERS = ("likelihood", "structure", "prior_mean", "num_data", "num_outputs", "rank")


def state_of(laplace: Laplace) -> dict[str, Any]:
    """The state of a fitted posterior; "full" makes its spectral measure and eigenpairs first."""
    posterior = laplace._fitted()
    state: dict[str, Any] = {"version": VERSION, "names": list(laplace.network.names), "loss": laplace._loss}
    state |= {name: getattr(laplace, name) for name in NUMBERS}
    state["theta"] = laplace._theta
    state["sigma_noise"] = float(laplace.sigma_noise)
    prior = laplace.prior_precision
    state["prior_precision"] = {k: float(v) for k, v in prior.items()} if isinstance(prior, dict) else float(prior)
    state["hyperparameters"] = [t.detach().clone() for t in laplace.hyperparameters]
    given = state["prior_precision"]
    lowest = min(given.values()) if isinstance(given, dict) else given
    state["posterior"] = _posterior_state(posterior, state["sigma_noise"] ** 2 * lowest)
    return state


def _posterior_state(posterior: Posterior, smallest: float) -> dict[str, Any]:
    if isinstance(posterior, Blocks):
        fields = ("name", "indices", "eigenvalues", "Q_in", "Q_out")
        blocks = [{f: getattr(b, f) for f in fields} | {"layer": b.site is not None} for b in posterior.G.blocks]
        return {"blocks": [b | {"indices": list(b["indices"])} for b in blocks]}
    if isinstance(posterior, LowRank):
        return {"values": posterior.values, "vectors": posterior.V}
    assert isinstance(posterior, Full)
    measure = posterior._measured(smallest)
    fields = ("known", "known_weights", "nodes", "weights", "exact")
    found = {f: getattr(measure, f) for f in fields}
    found |= {"floor": posterior.floor, "left_out": 0.0, "status": measure.info.status.name}
    if posterior.rank is None:  # variances by solves, which a state without data has none of
        return found
    values, vectors = posterior._leading()
    return found | {"values": values, "vectors": vectors, "left_out": posterior.left_out}


def restore(laplace: Laplace, state: dict[str, Any]) -> None:
    """Put a state into a Laplace of the same model and settings.

    Raises:
        OperandError: a state of another version, structure, likelihood or model, or of other weights; nothing is
            changed then.
    """
    if state.get("version") != VERSION:
        raise OperandError(f"the state has version {state.get('version')!r}; expected {VERSION}")
    for name in ("likelihood", "structure"):
        if state[name] != getattr(laplace, name):
            raise OperandError(f"the state is of {name}={state[name]!r}; this Laplace has {getattr(laplace, name)!r}")
    if list(laplace.network.names) != state["names"]:
        raise OperandError(f"the state is of the parameters {state['names']}; this model has {laplace.network.names}")
    theta, saved = laplace._weights(), state["theta"].to(laplace.network.device)
    if theta.shape != saved.shape or bool(((theta - saved).abs() > 1e-6 * saved.abs().max()).any()):
        raise OperandError(
            f"the state belongs to other weights ({saved.numel()} of them) than the {theta.numel()} of this model; "
            "load the weights that the posterior was fitted at first"
        )
    inside, values = laplace.hyperparameters, state["hyperparameters"]
    if len(inside) != len(values) or not all(map(_equal, inside, values)):
        here, there = [t.detach().tolist() for t in inside], [t.tolist() for t in values]
        raise OperandError(f"the state was fitted at hyperparameters {there}; they are {here} here")
    posterior = _posterior_of(laplace, state["posterior"])
    for name in (*NUMBERS, "sigma_noise", "prior_precision"):
        setattr(laplace, name, state[name])
    laplace._loss, laplace._theta, laplace.posterior = state["loss"], saved, posterior


def _equal(t: Tensor, saved: Tensor) -> bool:
    return t.shape == saved.shape and torch.equal(t.detach(), saved.to(t))


def _posterior_of(laplace: Laplace, state: dict[str, Any]) -> Posterior:
    network = laplace.network
    if "blocks" in state:
        watched = watch(network, groups=True)
        sites = {at[0]: site for at, site in zip(watched.where, watched.sites) if at[0] is not None}
        blocks = []
        for b in state["blocks"]:
            site = sites[b["indices"][0]] if b["layer"] else None
            blocks.append(EigenBlock(b["name"], tuple(b["indices"]), b["eigenvalues"], b["Q_in"], b["Q_out"], site))
        return Blocks(EigenBlocks(network, blocks))
    if "nodes" not in state:
        return LowRank(state["values"], state["vectors"])
    info = Info("loaded", 0, 0, status=Status[state["status"]])
    rank = state["values"].numel() if "values" in state else None
    settings = {k: v for k, v in laplace.settings.items() if k != "floor"}
    full = Full(None, rank=rank, floor=state["floor"], left_out=state["left_out"], **settings)
    full.measure = SpectralMeasure(
        state["known"], state["known_weights"], state["nodes"], state["weights"], state["exact"], info
    )
    full.pairs = (state["values"], state["vectors"]) if rank is not None else None
    return full
