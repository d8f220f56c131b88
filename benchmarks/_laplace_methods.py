"""The contestants of the Laplace study: from a set to predictions, their own evidence, and what they chose.

Each takes a set, a seed and the weights of the MAP network where it starts from them, and returns a `Fit`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from _laplace_sets import Study, epoch, loss_of, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

DECAYS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of MAP, chosen on the validation rows
MEMBERS = 5
IVON_GRID = [(lr, h) for lr in (0.01, 0.03, 0.1, 0.3) for h in (0.1, 1.0)]  # learning rate, initial Hessian
IVON_SAMPLES = 64
HYPER = {"lr_hyp": 0.1, "n_hypersteps": 10}  # of everybody who trains with the evidence
LINK, OTHER_LINKS = "bridge", ("probit", "mc")  # the first is best for nearly everybody; the others are in the JSON
EVALUATIONS, FEW = 30, 10  # of the evidence during training; of the larger sets
LONGER = 3  # epochs of those who train once, with the evidence, where MAP trains six times

Prediction = Tensor | tuple[Tensor, Tensor]
"""Class probabilities (n, C); or means (m, n) and variances (m, n) of an equal mixture of m Gaussians."""


@dataclass
class Fit:
    """How a contestant predicts; its evidence of the training rows; numbers worth a column.

    ``others``: class probabilities by what else there is for the integral over Gaussian logits.
    """

    predict: Callable[[Tensor], Prediction]
    evidence: float | None = None
    about: dict[str, Any] = field(default_factory=dict)
    others: Callable[[Tensor], dict[str, Tensor]] | None = None


@dataclass
class Start:
    """The MAP network of a set and a seed: weights, the decay that was chosen, noise from the validation rows."""

    weights: dict[str, Tensor]
    decay: float
    sigma: float

    def model(self, found: Study) -> nn.Module:
        model = found.make()
        model.load_state_dict(self.weights)
        return model.eval()


# -- one network, several networks -----------------------------------------------------------------
@torch.no_grad()
def validation_loss(found: Study, f: Tensor) -> float:
    return float(loss_of(found, f, found.validation[1]))


def map_start(found: Study, seed: int) -> Start:
    """Decay and noise by the validation rows, then training on all rows."""
    best = (math.inf, 0.0)
    for decay in DECAYS:
        loss = validation_loss(found, trained(found, found.without, decay, seed)(found.validation[0]))
        best = min(best, (loss, decay))
    loss, decay = best
    model = trained(found, found.train, decay, seed)
    return Start(model.state_dict(), decay, math.sqrt(2 * loss) if found.regression else 1.0)


def mixture(found: Study, outputs: Callable[[Tensor], Tensor], sigma: float) -> Callable[[Tensor], Prediction]:
    """Predictions from outputs (m, n, C) of m networks."""

    @torch.no_grad()
    def predict(x: Tensor) -> Prediction:
        f = outputs(x)
        if not found.regression:
            return torch.softmax(f, -1).mean(0)
        return f.squeeze(-1), torch.full(f.shape[:2], sigma**2)

    return predict


def best_sigma(found: Study, f: Tensor) -> tuple[float, float]:
    """The lowest negative log-likelihood of the validation rows under a mixture with means f (m, n, 1), and its σ."""
    y = found.validation[1].squeeze(-1)

    def nll(sigma: float) -> float:
        z = -0.5 * ((f.squeeze(-1) - y) / sigma).square() - math.log(sigma)
        return -float((torch.logsumexp(z, 0) - math.log(len(f))).mean())

    return min((nll(sigma), sigma) for sigma in torch.logspace(-3, 1, 200).tolist())


def map_network(found: Study, seed: int, start: Start) -> Fit:
    model = start.model(found)
    return Fit(mixture(found, lambda x: model(x)[None], start.sigma), about={"decay": start.decay})


def ensemble(found: Study, seed: int, start: Start) -> Fit:
    """Five networks from five starts, at the decay of MAP."""

    def members(pair: Any) -> list[nn.Module]:
        return [trained(found, pair, start.decay, 1000 * seed + i) for i in range(MEMBERS)]

    sigma = 1.0
    if found.regression:
        f = torch.stack([m(found.validation[0]) for m in members(found.without)])
        _, sigma = best_sigma(found, f.detach())
    models = members(found.train)
    return Fit(mixture(found, lambda x: torch.stack([m(x) for m in models]), sigma))


# -- variational -----------------------------------------------------------------------------------
def ivon_outputs(found: Study, pair: Any, start: Start, lr: float, hess: float, seed: int) -> Callable:
    """The package's optimizer, as its documentation trains: one weight sample a step, cosine schedule."""
    from ivon import IVON

    torch.manual_seed(seed)
    model, generator, n = found.make(), torch.Generator().manual_seed(seed), len(pair[0])
    # The loss of regression is divided by σ², so that it is the negative log-likelihood; its prior then by σ² too.
    scale = start.sigma**-2 if found.regression else 1.0
    optimizer = IVON(
        model.parameters(), lr=lr, ess=n, hess_init=hess * scale, weight_decay=start.decay * scale / n,
        beta2=1 - 1e-3, clip_radius=1e-1,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, found.epochs)
    for _ in range(found.epochs):
        for x, y in epoch(pair, found.batch, generator):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                (scale * loss_of(found, model(x), y)).backward()
            optimizer.step()
        schedule.step()
    model.eval()

    @torch.no_grad()
    def outputs(x: Tensor) -> Tensor:
        torch.manual_seed(seed)
        draws = []
        for _ in range(IVON_SAMPLES):
            with optimizer.sampled_params():
                draws.append(model(x))
        return torch.stack(draws)

    return outputs


def ivon(found: Study, seed: int, start: Start) -> Fit:
    """Settings, and the noise of regression, where the validation rows are explained best."""
    best = (math.inf, 1.0, 0.0, 0.0)
    for lr, hess in IVON_GRID:
        f = ivon_outputs(found, found.without, start, lr, hess, seed)(found.validation[0])
        if found.regression:
            loss, sigma = best_sigma(found, f)
        else:
            p = torch.softmax(f, -1).mean(0)
            loss, sigma = float(nn.functional.nll_loss(p.log(), found.validation[1])), 1.0
        if math.isfinite(loss):
            best = min(best, (loss, sigma, lr, hess))
    _, sigma, lr, hess = best
    outputs = ivon_outputs(found, found.train, start, lr, hess, seed)
    return Fit(mixture(found, outputs, sigma), about={"lr": lr, "hess_init": hess})


# -- laplace-torch ---------------------------------------------------------------------------------
def loader(found: Study) -> DataLoader:
    return DataLoader(TensorDataset(*found.train), batch_size=found.batch, shuffle=True)


def peer_fit(found: Study, la: Any, evidence: float, about: dict[str, Any], piece: int = 100) -> Fit:
    def classes(x: Tensor, link: str = LINK) -> Tensor:
        torch.manual_seed(0)
        return torch.cat([la(part, link_approx=link).detach() for part in x.split(piece)])

    def values(x: Tensor) -> Prediction:
        parts = [la(part) for part in x.split(piece)]
        mean = torch.cat([p[0] for p in parts]).detach().reshape(1, -1)
        variance = torch.cat([p[1] for p in parts]).detach().reshape(1, -1)
        return mean, variance + float(la.sigma_noise) ** 2

    if found.regression:
        return Fit(values, evidence, about)
    return Fit(classes, evidence, about, lambda x: {link: classes(x, link) for link in OTHER_LINKS})


def faster_jacobians(found: Study, la: Any) -> None:
    """Predictions through BackPack where there are convolutions: equal to 1e-8, in a ninth of the time."""
    if found.name == "mnist10k":
        from laplace.curvature import BackPackGGN

        la._backend, la._backend_cls = None, BackPackGGN


def by_eigenvalues(la: Any) -> Callable[[Tensor], Tensor]:
    """The package's evidence of a classifier by its prior precision: one decomposition, not a determinant a step.

    The last layer of the digits has 7 850 weights, of which 200 determinants and their gradients take hours.
    """
    eigenvalues = torch.linalg.eigvalsh(la.H.detach()).clamp(min=0.0)
    squares = (la.mean - la.prior_mean).square().sum().detach()
    return lambda delta: la.log_likelihood - 0.5 * (torch.log1p(eigenvalues / delta).sum() + delta.sum() * squares)


def peer(found: Study, seed: int, start: Start, *, structure: str, subset: str) -> Fit:
    """Post hoc, prior precision and noise where the package's own evidence is highest."""
    from laplace import Laplace
    from laplace.curvature import BackPackGGN, CurvlinopsGGN

    # The same diagonal from either backend; for convolutions BackPack's takes a hundredth of the time.
    backend = BackPackGGN if found.name == "mnist10k" and structure == "diag" else CurvlinopsGGN
    model = start.model(found)
    la = Laplace(model, found.likelihood, subset_of_weights=subset, hessian_structure=structure, backend=backend)
    la.fit(loader(found))
    evidence_at = la.log_marginal_likelihood if found.regression or structure != "full" else by_eigenvalues(la)
    logs = torch.zeros(1, requires_grad=True), torch.tensor([math.log(start.sigma)], requires_grad=found.regression)
    optimizer = torch.optim.Adam([v for v in logs if v.requires_grad], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = -evidence_at(*[v.exp() for v in logs[: 1 + found.regression]])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        evidence = float(la.log_marginal_likelihood(*[v.exp() for v in logs[: 1 + found.regression]]))
    if subset == "all":
        faster_jacobians(found, la)
    # A whole covariance is made anew for every piece, the Jacobians of all weights take memory by examples.
    piece = 2000 if structure == "full" else 100
    return peer_fit(found, la, evidence, {"prior_precision": float(la.prior_precision)}, piece)


def peer_online(found: Study, seed: int, start: Start) -> Fit:
    from laplace import marglik_training
    from laplace.curvature import CurvlinopsGGN

    torch.manual_seed(seed)
    data = loader(found)
    la, _, _, _ = marglik_training(
        found.make(), data, found.likelihood, hessian_structure="kron", backend=CurvlinopsGGN,
        prior_structure="layerwise", optimizer_kwargs={"lr": found.lr},
        scheduler_cls=torch.optim.lr_scheduler.CosineAnnealingLR,
        scheduler_kwargs={"T_max": LONGER * found.epochs * len(data)}, **course(found),
    )  # fmt: skip
    evidence = float(la.log_marginal_likelihood().detach())
    faster_jacobians(found, la)
    return peer_fit(found, la, evidence, {})


def course(found: Study) -> dict[str, Any]:
    """When the evidence is looked at during training."""
    epochs = LONGER * found.epochs
    frequency = max(1, epochs // ((EVALUATIONS if found.regression else FEW) + 2))
    noise = {"sigma_noise_init": 0.3} if found.regression else {}
    return HYPER | noise | {"n_epochs": epochs, "n_epochs_burnin": 2 * frequency, "marglik_frequency": frequency}


# -- ritz ------------------------------------------------------------------------------------------
def our_fit(found: Study, la: Any, about: dict[str, Any]) -> Fit:
    def values(x: Tensor) -> Prediction:
        mean, variance = la.predict(x)
        return mean.reshape(1, -1), variance.reshape(1, -1) + float(la.sigma_noise) ** 2

    evidence, info = la.log_marginal_likelihood(return_info=True)
    about = about | {"standard_error": float(info.standard_error), "prior_precision": la.prior_precision}
    if found.regression:
        return Fit(values, float(evidence), about)
    others = lambda x: {link: la.predict(x, link=link) for link in OTHER_LINKS}  # noqa: E731
    return Fit(functools.partial(la.predict, link=LINK), float(evidence), about, others)


RANK = 600  # eigenpairs behind the variances of the digits; the other sets are decomposed whole


def ours(found: Study, seed: int, start: Start) -> Fit:
    """Post hoc; beside it the evidence of ritz's own Kronecker and diagonal structures at the same weights."""
    from ritz.laplace import Laplace

    model = start.model(found)
    noise = {"sigma_noise": start.sigma} if found.regression else {}
    others = {}
    for structure in ("kron", "diag"):
        la = Laplace(model, found.likelihood, structure=structure, **noise).fit(found.train)
        others[structure] = float(la.optimize_prior_precision().log_marginal_likelihood())
    la = Laplace(model, found.likelihood, rank=RANK, **noise).fit(found.train)
    return our_fit(found, la.optimize_prior_precision(), {"others": others})


def ours_online(found: Study, seed: int, start: Start) -> Fit:
    from ritz import Hutchinson, Lanczos
    from ritz.laplace import Laplace, marglik_training

    torch.manual_seed(seed)
    model = found.make()
    # Outputs × data of the digits are too many to decompose: rough Krylov estimates of the evidence while training.
    krylov = {"estimator": Hutchinson(10), "method": Lanczos(rtol=1e-2, max_matvecs=100)}
    krylov = krylov if found.name == "mnist10k" else {}
    training = marglik_training(
        model, loader(found), found.likelihood, structure="full", prior_structure="layerwise",
        optimizer=functools.partial(torch.optim.Adam, lr=found.lr, fused=True),
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, LONGER * found.epochs),
        **krylov, **course(found),
    )  # fmt: skip
    chosen = training.laplace
    la = Laplace(
        model, found.likelihood, prior_precision=chosen.prior_precision, rank=RANK,
        **({"sigma_noise": chosen.sigma_noise} if found.regression else {}),
    ).fit(found.train)  # fmt: skip
    return our_fit(found, la, {})


METHODS: dict[str, Callable[[Study, int, Start], Fit]] = {
    "MAP": map_network,
    "ensemble of 5": ensemble,
    "IVON": ivon,
    "laplace-torch diag": functools.partial(peer, structure="diag", subset="all"),
    "laplace-torch kron": functools.partial(peer, structure="kron", subset="all"),
    "laplace-torch last layer": functools.partial(peer, structure="full", subset="last_layer"),
    "laplace-torch online kron": peer_online,
    "ritz full": ours,
    "ritz online full": ours_online,
}
