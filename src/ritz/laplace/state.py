"""A fitted posterior as plain tensors and numbers, and back: what ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..curvature.eigenblocks import EigenBlock, EigenBlocks
from ..curvature.uses import watch
from ..errors import OperandError
from ..result import Info
from ..stochastic import SpectralMeasure
from .posterior import Blocks, Full, LowRank, Posterior

if TYPE_CHECKING:
    from .laplace import Laplace

VERSION = 1
NUMBERS = ("likelihood", "structure", "prior_mean", "num_data", "num_outputs", "rank")


def state_of(laplace: Laplace) -> dict[str, Any]:
    """The state of a fitted posterior; "full" makes its spectral measure and eigenpairs first."""
    posterior = laplace._fitted()
    state: dict[str, Any] = {"version": VERSION, "names": list(laplace.network.names), "loss": laplace._loss}
    state |= {name: getattr(laplace, name) for name in NUMBERS}
    state["squares"] = laplace._squares
    state["sigma_noise"] = float(laplace.sigma_noise)
    prior = laplace.prior_precision
    state["prior_precision"] = {k: float(v) for k, v in prior.items()} if isinstance(prior, dict) else float(prior)
    state["posterior"] = _posterior_state(posterior)
    return state


def _posterior_state(posterior: Posterior) -> dict[str, Any]:
    if isinstance(posterior, Blocks):
        fields = ("name", "indices", "eigenvalues", "Q_in", "Q_out")
        blocks = [{f: getattr(b, f) for f in fields} | {"layer": b.site is not None} for b in posterior.G.blocks]
        return {"blocks": [b | {"indices": list(b["indices"])} for b in blocks]}
    if isinstance(posterior, LowRank):
        return {"values": posterior.values, "vectors": posterior.V}
    assert isinstance(posterior, Full)
    measure = posterior._measured(posterior.floor)
    fields = ("known", "known_weights", "nodes", "weights", "exact")
    found = {f: getattr(measure, f) for f in fields} | {"floor": posterior.floor}
    if posterior.rank is None:  # variances by solves, which a state without data has none of
        return found
    values, vectors = posterior._leading()
    return found | {"values": values, "vectors": vectors}


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
    squares = laplace.squares(state["prior_mean"])
    if squares.shape != state["squares"].shape or not torch.allclose(squares, state["squares"].to(squares), rtol=1e-5):
        raise OperandError(
            f"the state belongs to other weights ({state['squares'].numel()} of them) than the {squares.numel()} of "
            "this model; load the weights that the posterior was fitted at first"
        )
    posterior = _posterior_of(laplace, state["posterior"])
    for name in (*NUMBERS, "sigma_noise", "prior_precision"):
        setattr(laplace, name, state[name])
    laplace._loss, laplace._squares, laplace.posterior = state["loss"], state["squares"], posterior


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
    info = Info("loaded", 0, 0)
    rank = state["values"].numel() if "values" in state else None
    full = Full(None, rank=rank, floor=state["floor"], **laplace.settings)
    full.measure = SpectralMeasure(
        state["known"], state["known_weights"], state["nodes"], state["weights"], state["exact"], info
    )
    full.pairs = (state["values"], state["vectors"]) if rank is not None else None
    return full
