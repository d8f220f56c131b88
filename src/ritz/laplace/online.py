"""Online marginal likelihood: network and hyper-parameters trained together, the evidence as the referee."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import CrossEntropy, SquaredError
from ..curvature.network import Network
from ..errors import OperandError
from .laplace import Laplace


@dataclass(frozen=True)
class Training:
    """What :func:`marglik_training` returns: the posterior, and the course of the training."""

    laplace: Laplace
    losses: list[float]
    evidence: list[float]
    epochs: list[int]


def marglik_training(
    model: nn.Module,
    train_loader: Iterable[tuple[Tensor, Tensor]],
    likelihood: str = "classification",
    *,
    structure: str = "kron",
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = torch.optim.Adam,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    n_epochs: int = 300,
    n_epochs_burnin: int = 0,
    marglik_frequency: int = 1,
    n_hypersteps: int = 10,
    lr_hyp: float = 0.1,
    prior_structure: str = "layerwise",
    prior_prec_init: float = 1.0,
    sigma_noise_init: float = 1.0,
    keep_best: bool = False,
    hyperparameters: Iterable[Tensor] = (),
    **settings: Any,
) -> Training:
    """Train a network and its prior precision (and noise) together, by turns.

    Every epoch minimises the negative log-posterior of the parameters at the current hyper-parameters. Every
    ``marglik_frequency`` epochs after the burn-in a Laplace approximation is made at the current parameters, and
    ``n_hypersteps`` of Adam on the logarithms of prior precisions and noise climb its evidence. The posterior is that
    of the last epoch. This is *not* :meth:`Laplace.optimize_prior_precision`, which holds the trained parameters fixed.

    Args:
        train_loader: iterated anew every epoch, and once before to count its examples.
        structure: as in :class:`Laplace`; the evidence of "full" costs a Krylov run a hyper step where
            ``prior_structure`` is "layerwise", and one run an evaluation where it is "scalar".
        optimizer: a callable on parameters, such as ``functools.partial(torch.optim.Adam, lr=1e-3)``.
        prior_structure: "layerwise", one precision for each module with parameters, or "scalar".
        keep_best: return the evaluated epoch of the highest evidence. A Laplace evidence leaves out the slope of the
            log-posterior, so that weights far from a minimum may seem better than what they are trained to.
        hyperparameters: tensors inside of the model or of an augmentation in it, leaves that require a gradient and are
            none of its parameters, which climb the evidence too, by the same Adam ("full" only; a fit a hyper step).
        settings: further arguments of :class:`Laplace`.

    Raises:
        OperandError: an empty loader, unknown structures, an evidence that is not finite, hyperparameters that are
            parameters of the model or no leaves.

    Reference: Immer, Bauer, Fortuin, Rätsch, Khan, "Scalable marginal likelihood estimation for model selection in deep
    learning" (2021); the argument names are those of laplace-torch.
    """
    if prior_structure not in ("layerwise", "scalar"):
        raise OperandError(f"prior_structure={prior_structure!r}; expected 'layerwise' or 'scalar'")
    loss = CrossEntropy() if likelihood == "classification" else SquaredError()
    groups = _groups(model, prior_structure)
    start = math.log(prior_prec_init)
    logs = {g: torch.tensor(start, dtype=torch.float64, requires_grad=True) for g in groups}
    log_sigma = torch.tensor(math.log(sigma_noise_init), dtype=torch.float64)
    learned = [*logs.values()]
    if likelihood == "regression":
        learned.append(log_sigma.requires_grad_())
    if taken := {"prior_precision", "sigma_noise", "subset"} & set(settings):
        raise OperandError(
            f"marglik_training came with {', '.join(sorted(taken))}, which it chooses itself for all parameters; give "
            "prior_prec_init= and sigma_noise_init=, and train a part by requires_grad_(False) on the others"
        )
    inside = _check_hyperparameters(model, hyperparameters)
    learned += inside
    if inside:
        settings["hyperparameters"] = inside
    hyper = torch.optim.Adam(learned, lr=lr_hyp)
    steps = optimizer([p for p in model.parameters() if p.requires_grad])
    plan = None if scheduler is None else scheduler(steps)
    size = sum(len(x) for x, _ in train_loader)
    if not size:
        raise OperandError("train_loader is empty; expected batches (x, y)")
    fitted = lambda: Laplace(model, likelihood, structure=structure, **settings).fit(train_loader)  # noqa: E731
    losses: list[float] = []
    values: list[float] = []
    epochs: list[int] = []
    best, kept = -math.inf, None
    for epoch in range(n_epochs):
        model.train()
        factor = float(torch.exp(-2 * log_sigma.detach()))
        deltas = {g: float(v.detach().exp()) for g, v in logs.items()}
        total = 0.0
        for x, y in train_loader:
            steps.zero_grad()
            f = model(x)
            terms = f.shape[0]
            value = factor * loss.value(f, y) / terms + _penalty(groups, deltas, settings.get("prior_mean", 0.0)) / size
            value.backward()
            steps.step()
            total += float(value.detach()) * terms
        losses.append(total / size)
        if plan is not None:
            plan.step()
        if epoch < n_epochs_burnin or (epoch + 1) % marglik_frequency:
            continue
        model.eval()
        laplace = fitted()
        for step in range(n_hypersteps):
            if step and inside:
                laplace = fitted()
            hyper.zero_grad()
            evidence = laplace.log_marginal_likelihood(_prior(logs, prior_structure), log_sigma.exp())
            (-evidence).backward()
            hyper.step()
        if inside:
            laplace = fitted()
        with torch.no_grad():
            evidence = laplace.log_marginal_likelihood(_prior(logs, prior_structure), log_sigma.exp())
        values.append(float(evidence))
        epochs.append(epoch)
        if keep_best and float(evidence) > best:
            best = float(evidence)
            kept = copy.deepcopy(model.state_dict()), [v.detach().clone() for v in (*logs.values(), log_sigma, *inside)]
    if not values:
        raise OperandError(
            f"no evidence was computed in {n_epochs} epochs; expected n_epochs_burnin={n_epochs_burnin} and "
            f"marglik_frequency={marglik_frequency} to leave at least one"
        )
    last = [v.detach() for v in (*logs.values(), log_sigma)]
    if kept is not None:
        model.load_state_dict(kept[0])
        last = kept[1][: len(logs) + 1]
        with torch.no_grad():
            for t, value in zip(inside, kept[1][len(last) :]):
                t.copy_(value)
    model.eval()
    found = {g: math.exp(float(v)) for g, v in zip(groups, last)}
    laplace = Laplace(
        model, likelihood, structure=structure, sigma_noise=math.exp(float(last[-1])),
        prior_precision=found if prior_structure == "layerwise" else next(iter(found.values())), **settings,
    ).fit(train_loader)  # fmt: skip
    return Training(laplace, losses, values, epochs)


def _check_hyperparameters(model: nn.Module, given: Iterable[Tensor]) -> list[Tensor]:
    found, own = list(given), {id(p) for p in model.parameters()}
    for t in found:
        if not isinstance(t, Tensor) or not t.requires_grad or not t.is_leaf or id(t) in own:
            what = "a parameter of the model" if id(t) in own else type(t).__name__
            raise OperandError(
                f"hyperparameters has {what}; expected leaves that require a gradient and are no parameters of the "
                "model, which trains those by its loss: keep them as plain tensors of the module"
            )
    return found


def _groups(model: nn.Module, prior_structure: str) -> dict[str, list[nn.Parameter]]:
    """Parameters by the module that owns them, or all of them."""
    network = Network(model.eval(), None)
    if prior_structure == "scalar":
        return {"all": list(network.parameters)}  # type: ignore[arg-type]
    groups: dict[str, list[nn.Parameter]] = {}
    for name, p in zip(network.names, network.parameters):
        groups.setdefault(name.rpartition(".")[0] or name, []).append(p)  # type: ignore[arg-type]
    return groups


def _prior(logs: dict[str, Tensor], prior_structure: str) -> Any:
    if prior_structure == "scalar":
        return logs["all"].exp()
    return {g: v.exp() for g, v in logs.items()}


def _penalty(groups: dict[str, list[nn.Parameter]], deltas: dict[str, float], mean: float) -> Tensor:
    parts = [0.5 * deltas[g] * (p - mean).square().sum() for g, own in groups.items() for p in own]
    return torch.stack(parts).sum()
