"""Which parameter of a model is the weight of a linear map, and what becomes of the others, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .attention import AttentionRule
from .layers import LayerRule, rule_for

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


@dataclass
class Site:
    """One module that multiplies by a weight."""

    module: nn.Module
    rule: LayerRule
    weight: nn.Parameter
    bias: nn.Parameter | None


@dataclass
class Found:
    """A parameter: the sites of a weight with its own bias, or the reason why it has none."""

    name: str
    parameter: nn.Parameter
    sites: list[Site] = field(default_factory=list)
    bias: nn.Parameter | None = None
    vector: bool = False
    reason: str = ""


def discover(model: nn.Module) -> dict[nn.Parameter, Found]:
    """Every parameter of the model, trainable or not, with the sites that use it.

    A weight used by several modules of one type (tied) has all of them as its sites. A bias belongs to its weight where
    every site of the weight has this bias and no other weight has it.
    """
    found = {p: Found(name, p) for name, p in model.named_parameters()}
    sites, strangers = _sites(model)
    by_weight: dict[nn.Parameter, list[Site]] = {}
    for site in sites:
        by_weight.setdefault(site.weight, []).append(site)
    for weight, own in by_weight.items():
        if len({type(site.rule) for site in own}) > 1:
            found[weight].reason = "tied between " + " and ".join(sorted({site.rule.name for site in own}))
        elif weight in strangers:
            found[weight].reason = f"tied with {strangers[weight]}, which has no rule"
        else:
            found[weight].sites = own
            biases = {id(site.bias) for site in own}
            others = [s for s in sites if s.bias is own[0].bias and s.weight is not weight]
            if own[0].bias is not None and len(biases) == 1 and not others and own[0].bias not in strangers:
                found[weight].bias = own[0].bias
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, NORMS) or p.ndim <= 1:
                found[p].vector = True
            if not found[p].sites and not found[p].reason:
                why = rule_for(module)
                found[p].reason = why if isinstance(why, str) else f"{type(module).__name__}.{name} has no rule"
    return found


def _sites(model: nn.Module) -> tuple[list[Site], dict[nn.Parameter, str]]:
    """The modules with a rule, and the parameters that modules without one have, with what those are."""
    sites: list[Site] = []
    strangers: dict[nn.Parameter, str] = {}
    projections = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            rule, packed = AttentionRule(), module.in_proj_weight is not None
            for w in (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight):
                if isinstance(w, nn.Parameter):
                    sites.append(Site(module, rule, w, module.in_proj_bias if packed else None))
            weight: Any = module.out_proj.weight
            sites.append(Site(module, rule, weight, module.out_proj.bias))
            continue
        if id(module) in projections:
            continue  # never called as a module
        rule_or_reason = rule_for(module)
        own = dict(module.named_parameters(recurse=False))  # no weight: it is computed from parameters elsewhere
        if isinstance(rule_or_reason, LayerRule) and "weight" in own:
            sites.append(Site(module, rule_or_reason, own["weight"], own.get("bias")))
            continue
        for name, p in own.items():
            strangers[p] = rule_or_reason if isinstance(rule_or_reason, str) else f"{type(module).__name__}.{name}"
    return sites, strangers
