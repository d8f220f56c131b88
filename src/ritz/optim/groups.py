"""From what the user gives to parameter groups: numbers in the group, values beside it, one rule per parameter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..curvature import Found, discover
from ..curvature.sharing import loss_terms
from ..errors import OperandError
from .inverse_free import LargestEntry, SpectralNorm
from .settings import AdamW, Settings, choose, schedule

# Settings that are values: a group's dictionary may have them, but the state dictionary must stay plain.
VALUES = (
    "structures", "weight_sharing", "curvature_dtype", "clip", "fallback", "row_form", "compensate", "sum_per_term",
    "rule",
)  # fmt: skip
# Settings that groups cannot have.
WHOLE = ("model", "statistics", "strict", "grad_scale", "process_group", "foreach")


@dataclass
class Plan:
    """One parameter group to be, and what it holds. ``settings`` is None for a fallback group."""

    group: dict[str, Any]
    settings: Settings | None
    matrices: list[Found] = field(default_factory=list)
    vectors: list[nn.Parameter] = field(default_factory=list)
    names: dict[nn.Parameter, tuple[str, str]] = field(default_factory=dict)  # name, rule or reason

    def bias_of(self, found: Found) -> nn.Parameter | None:
        """The bias that is a column of this weight's matrix."""
        bias = found.bias
        return bias if bias is not None and self.names.get(bias, ("", ""))[1] == "bias column" else None


def plan_groups(group: dict[str, Any], base: Settings, model: nn.Module | None, *, strict: bool) -> list[Plan]:
    """Split one group into what has a rule and what the fallback trains.

    Raises:
        OperandError: parameters without their model, lazy or sharded parameters, sparse gradients; with ``strict``,
            any parameter without a rule.
    """
    group = dict(group)
    given = group.pop("params")
    parameters = [p[1] if isinstance(p, tuple) else p for p in ([given] if isinstance(given, nn.Parameter) else given)]
    for p in parameters:
        _check(p)
    found = discover(model) if model is not None else {}
    if not any(p in found for p in parameters):
        raise OperandError(
            "the optimizer got parameters without the model that uses them; expected the model itself (SINGD(model, "
            "lr)), or the parameters and model=model: its layers are watched for their inputs and output gradients"
        )
    settings = _settings(group, base)
    plan = Plan({**group, "params": []}, settings)
    rest: list[nn.Parameter] = []
    inside = set(parameters)
    biases = {found[p].bias: found[p] for p in parameters if p in found and found[p].sites}
    for p in parameters:
        own = found.get(p) or Found("(not in the model)", p, reason="not a parameter of the model")
        weight = biases.get(p)
        if own.sites:
            plan.matrices.append(own)
            plan.names[p] = own.name, own.sites[0].rule.name
        elif weight is not None and p.requires_grad and weight.parameter.requires_grad and weight.parameter in inside:
            plan.names[p] = own.name, "bias column"
        elif own.vector or p.ndim <= 1:
            plan.vectors.append(p)
            plan.names[p] = own.name, "diagonal"
        else:
            if "sparse" in own.reason:
                raise OperandError(
                    f"{own.name} is {own.reason}, which no rule and no fallback serves; use sparse=False"
                )
            rest.append(p)
            continue
        plan.group["params"].append(p)
    plans = [plan] if plan.group["params"] else []
    if rest:
        plans.append(_fallback(rest, found, settings.fallback, strict))
    return plans


def _fallback(rest: list[nn.Parameter], found: dict[nn.Parameter, Found], fallback: AdamW, strict: bool) -> Plan:
    reasons = {p: (found[p].name, found[p].reason) if p in found else ("?", "not in the model") for p in rest}
    if strict:
        listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.values())
        raise OperandError(f"strict=True, and these parameters have no curvature rule: {listed}")
    plan = Plan({"params": rest, "lr": fallback.lr, "betas": fallback.betas, "eps": fallback.eps}, None)
    plan.group["weight_decay"] = fallback.weight_decay
    plan.names = {p: (name, f"AdamW: {reason}") for p, (name, reason) in reasons.items()}
    return plan


def _settings(group: dict[str, Any], base: Settings) -> Settings:
    """Take the values out of a group's dictionary; numbers stay."""
    for name in WHOLE:
        if name in group:
            raise OperandError(f"a parameter group has {name}=...; expected it as an argument of the whole optimizer")
    changes = {name: group.pop(name) for name in VALUES if name in group}
    if "update_interval" in group:
        changes["update_interval"] = schedule(group.pop("update_interval"))
    if "inverse" in group:  # KFAC's own
        changes["rule"] = group.pop("inverse")
    if "num_loss_terms" in group:
        changes["loss_terms"] = loss_terms(group.pop("num_loss_terms"))
    if callable(group.get("lr_cov")):
        changes["lr_cov"] = group.pop("lr_cov")
    elif "lr_cov" in group:
        changes["lr_cov"] = None
    if "normalize" in group:
        changes["size"] = size_of(group["normalize"])
        group["normalize"] = group["normalize"] is not False
    if "reduction" in group:
        group["mean_loss"] = is_mean(group.pop("reduction"))
    settings = replace(base, **changes)
    choose(settings.structures, 1, 1)  # refuses what is no structure, before any layer is made
    return settings


def size_of(normalize: Any) -> LargestEntry | SpectralNorm:
    """The measure of a factor's update behind ``normalize``."""
    if isinstance(normalize, bool):
        return LargestEntry()
    if isinstance(normalize, (LargestEntry, SpectralNorm)):
        return normalize
    raise OperandError(f"normalize={normalize!r}; expected True, False, LargestEntry() or SpectralNorm()")


def is_mean(reduction: str) -> bool:
    """Whether the loss is a mean over its terms; torch's word for it."""
    if reduction not in ("mean", "sum"):
        raise OperandError(f"reduction={reduction!r}; expected 'mean' or 'sum', the reduction of the training loss")
    return reduction == "mean"


def _check(p: Any) -> None:
    if not isinstance(p, nn.Parameter):
        raise OperandError(f"a parameter group has a {type(p).__name__}; expected parameters of the model")
    if isinstance(p, UninitializedParameter):
        raise OperandError("a parameter is not initialised yet (a lazy module); run one forward pass before this")
    if type(p.data).__name__ == "DTensor" or hasattr(p, "device_mesh"):
        raise OperandError(
            "a parameter is sharded (DTensor), which the curvature optimizers do not serve yet; use "
            "DistributedDataParallel, or wrap the model after training with them"
        )
