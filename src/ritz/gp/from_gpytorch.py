"""A GPyTorch model as one of ours: kernel, mean, noise and priors, read by the names of classes and attributes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, distributions, nn

from ..errors import OperandError
from ..kernels import (
    RBF,
    AdditiveKernel,
    Kernel,
    Linear,
    Matern,
    Periodic,
    Polynomial,
    ProductKernel,
    RationalQuadratic,
    Scale,
)
from .exact import NOISE_FLOOR, ExactGP
from .means import ConstantMean, LinearMean, Mean, ZeroMean
from .noise import FixedNoise
from .priors import checked_priors

# What each class becomes, and which of its attributes are copied.
KERNELS: dict[str, tuple[Callable[..., Kernel], tuple[str, ...]]] = {
    "RBFKernel": (lambda k, **active: RBF(k.ard_num_dims, **active), ("lengthscale",)),
    "MaternKernel": (lambda k, **active: Matern(k.nu, k.ard_num_dims, **active), ("lengthscale",)),
    "RQKernel": (lambda k, **active: RationalQuadratic(k.ard_num_dims, **active), ("lengthscale", "alpha")),
    "PeriodicKernel": (lambda k, **active: Periodic(k.ard_num_dims, **active), ("lengthscale", "period_length")),
    "LinearKernel": (lambda k, **active: Linear(k.ard_num_dims, **active), ("variance",)),
    "PolynomialKernel": (lambda k, **active: Polynomial(int(k.power), **active), ("offset",)),
}
COMPOSITE = ("ScaleKernel", "AdditiveKernel", "ProductKernel")
MEANS = ("ConstantMean", "ZeroMean", "LinearMean")
PARTS = ("covar_module", "mean_module", "likelihood")
TRANSFORMS = ("input_transform", "outcome_transform", "feature_extractor")  # whatever they are made of
LIKELIHOODS = ("GaussianLikelihood", "FixedNoiseGaussianLikelihood")
PRIORS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "GammaPrior": (distributions.Gamma, ("concentration", "rate")),
    "HalfCauchyPrior": (distributions.HalfCauchy, ("scale",)),
    "HalfNormalPrior": (distributions.HalfNormal, ("scale",)),
    "LogNormalPrior": (distributions.LogNormal, ("loc", "scale")),
    "NormalPrior": (distributions.Normal, ("loc", "scale")),
    "UniformPrior": (distributions.Uniform, ("low", "high")),
}


def from_gpytorch(model: Any, **settings: Any) -> ExactGP:
    """The process of a ``gpytorch.models.ExactGP``, at its present hyper-parameters.

    Args:
        model: has ``covar_module`` (RBF, Matérn, rational quadratic, periodic, linear and polynomial kernels, scaled,
            added and multiplied, with ARD and active_dims), ``mean_module`` (constant, zero, linear) and ``likelihood``
            (Gaussian, with a learned or with fixed noise).
        settings: further arguments of :class:`ExactGP`, such as ``solver`` or ``backend``.

    Returns:
        An :class:`ExactGP` in the dtype and on the device of the model, with copies of its values; parameters that do
        not require grad stay so. The data stays where it is: ``model.train_inputs[0]`` and ``model.train_targets``. The
        lower bound of the noise becomes ``noise_floor``; gamma, normal, log-normal, half-normal, half-Cauchy and
        uniform priors become torch distributions.

    Raises:
        OperandError: a part of a class that is not named above, or with batches; further modules or parameters of the
            model, such as a feature extractor or a transform of inputs or outcomes.

    Warns:
        UserWarning: for every prior or constraint that is not carried over; the values are copied all the same.

    GPyTorch is not imported: classes are known by name, attributes are read. A subclass of your own has another name
    and is refused, since nothing is known of what it changes.
    """
    for name in PARTS:
        if not hasattr(model, name):
            raise OperandError(
                f"{type(model).__name__} has no {name}; expected a gpytorch.models.ExactGP with covar_module, "
                "mean_module and likelihood"
            )
    _refuse_others(model)
    like = next(iter(model.covar_module.parameters()))
    copies: dict[int, nn.Module] = {}  # by id of GPyTorch's module
    kernel = _kernel(model.covar_module, None, like, copies)
    mean = _mean(model.mean_module, like)
    noise, floor = _noise(model.likelihood)
    asked = dict(settings.pop("priors", None) or {})
    gp = ExactGP(kernel, mean, noise, **{"noise_floor": floor, **settings}).to(like.device, like.dtype)
    if gp.noise_model is None:
        gp.noise = noise  # again, in the dtype of the model
        _copy_flag(model.likelihood, gp, "noise")
    copies[id(model.mean_module)] = mean
    copies[id(getattr(model.likelihood, "noise_covar", model.likelihood))] = gp
    gp.priors = checked_priors(gp, {**_priors(model, gp, copies), **asked})
    _report_constraints(model)
    return gp


def _refuse(what: str, module: Any, supported: Sequence[str]) -> NoReturn:
    raise OperandError(f"the {what} is a {type(module).__name__}; supported are {', '.join(supported)}")


def _refuse_others(model: Any) -> None:
    """Refuse what belongs to the model and to none of the parts that are copied."""
    priors = [prior for _, _, prior, *_ in model.named_priors()] if hasattr(model, "named_priors") else []
    known = [module for module in (*(getattr(model, name) for name in PARTS), *priors) if isinstance(module, nn.Module)]
    copied = {id(t) for module in known for t in (*module.parameters(), *module.buffers())}
    own = getattr(model, "_parameters", {}).items()
    children = getattr(model, "_modules", {}).items()
    others = [name for name, p in own if p is not None and id(p) not in copied]
    others += [
        name
        for name, module in children
        if module is not None and any(id(t) not in copied for t in (*module.parameters(), *module.buffers()))
    ]
    others += [name for name in TRANSFORMS if getattr(model, name, None) is not None and name not in others]
    if others:
        raise OperandError(
            f"{type(model).__name__} has {', '.join(others)} beside {', '.join(PARTS)}, which alone can be read: apply "
            "transforms to the data, give ExactGP a kernel that contains the rest, or take it out of the model"
        )


def _kernel(
    source: Any, columns: tuple[int, ...] | None, like: Tensor, copies: dict[int, nn.Module], selects: bool = True
) -> Kernel:
    """Our copy of a kernel that sees the given columns of the points (None: all)."""
    name = type(source).__name__
    if tuple(getattr(source, "batch_shape", ())):
        raise OperandError(f"{name} has batch_shape {tuple(source.batch_shape)}; expected kernels without batches")
    # GPyTorch selects columns when a kernel is called, and a scaled kernel calls its base's forward, which does not:
    # the base's active_dims are copied to the ScaleKernel instead.
    if selects and source.active_dims is not None:
        own = [int(i) for i in source.active_dims]
        columns = tuple(own if columns is None else (columns[i] for i in own))
    ours: Kernel
    if name == "ScaleKernel":
        ours = Scale(_kernel(source.base_kernel, columns, like, copies, selects=False))
        _copy(source, ours, ("outputscale",), like)
    elif name in ("AdditiveKernel", "ProductKernel"):
        parts = [_kernel(k, columns, like, copies) for k in source.kernels]
        ours = (AdditiveKernel if name == "AdditiveKernel" else ProductKernel)(*parts)
    elif name in KERNELS:
        make, attributes = KERNELS[name]
        ours = make(source, active_dims=columns)
        _copy(source, ours, attributes, like)
    else:
        _refuse("kernel", source, (*KERNELS, *COMPOSITE))
    copies[id(source)] = ours
    return ours


def _copy(source: Any, ours: nn.Module, attributes: Sequence[str], like: Tensor) -> None:
    ours.to(like.device, like.dtype)
    for attribute in attributes:
        value = getattr(source, attribute).detach()
        setattr(ours, attribute, value.reshape(getattr(ours, attribute).shape))
        _copy_flag(source, ours, attribute)


def _copy_flag(source: Any, ours: nn.Module, attribute: str) -> None:
    """Leave a parameter fixed that was."""
    raw = getattr(source, f"raw_{attribute}", None)
    if isinstance(raw, Tensor):
        getattr(ours, f"raw_{attribute}").requires_grad_(raw.requires_grad)


def _mean(source: Any, like: Tensor) -> Mean:
    name = type(source).__name__
    if tuple(getattr(source, "batch_shape", ())):
        raise OperandError(f"{name} has batch_shape {tuple(source.batch_shape)}; expected a mean without batches")
    if name == "ZeroMean":
        return ZeroMean()
    mean: Mean
    if name == "ConstantMean":
        mean = ConstantMean()
        pairs = [(mean.constant, source.constant)]
    elif name == "LinearMean":
        mean = LinearMean(source.weights.shape[-2])
        pairs = [(mean.weights, source.weights), (mean.bias, source.bias)]
    else:
        _refuse("mean", source, MEANS)
    mean.to(like.device, like.dtype)
    for ours, value in pairs:
        with torch.no_grad():
            ours.zero_() if value is None else ours.copy_(value.reshape(ours.shape))
        ours.requires_grad_(value is not None and value.requires_grad)
    return mean


def _noise(source: Any) -> tuple[float | FixedNoise, float]:
    """The noise, and its lower bound."""
    name = type(source).__name__
    if name == "FixedNoiseGaussianLikelihood":
        if getattr(source, "second_noise_covar", None) is not None:
            raise OperandError(
                "the likelihood has learn_additional_noise=True; supported is fixed or learned noise alone"
            )
        return FixedNoise(source.noise), NOISE_FLOOR
    if name != "GaussianLikelihood":
        _refuse("likelihood", source, LIKELIHOODS)
    if source.noise.numel() != 1:
        raise OperandError(f"the noise has shape {tuple(source.noise.shape)}; expected a likelihood without batches")
    owner = getattr(source, "noise_covar", source)
    bound = getattr(getattr(owner, "raw_noise_constraint", None), "lower_bound", None)
    return float(source.noise.detach()), NOISE_FLOOR if bound is None else float(bound)


def _priors(model: Any, gp: ExactGP, copies: dict[int, nn.Module]) -> dict[str, Any]:
    """Priors by the path of the attribute in ``gp``; a warning for each one that is not known."""
    paths = {id(module): name for name, module in gp.named_modules()}
    found = {}
    for name, module, prior, *_ in model.named_priors() if hasattr(model, "named_priors") else ():
        attribute = name.rpartition(".")[2].removesuffix("_prior")
        attribute = "constant" if type(module).__name__ == "ConstantMean" else attribute
        ours, kind = copies.get(id(module)), type(prior).__name__
        if ours is None or kind not in PRIORS or not isinstance(getattr(ours, attribute, None), Tensor):
            _warn(f"the prior {kind} of {name} is not carried over (known are {', '.join(PRIORS)})")
            continue
        make, attributes = PRIORS[kind]
        path = paths[id(ours)]
        found[f"{path}.{attribute}" if path else attribute] = make(*(getattr(prior, a).detach() for a in attributes))
    return found


def _report_constraints(model: Any) -> None:
    for name, constraint in model.named_constraints() if hasattr(model, "named_constraints") else ():
        kind = type(constraint).__name__
        if kind != "Positive" and not (kind == "GreaterThan" and name.endswith("raw_noise_constraint")):
            _warn(
                f"the constraint {constraint} of {name.removesuffix('_constraint')} is not carried over: its value is"
            )


def _warn(message: str) -> None:
    warnings.warn(f"from_gpytorch: {message}", UserWarning, stacklevel=4)
