"""KFAC: running Kronecker factors, inverted or decomposed at every update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import EmpiricalFisher, Expand, OneHot
from ..curvature.sharing import LossTerms, WeightSharing, loss_terms
from ..curvature.statistics import Statistics
from ..errors import ConvergenceWarning, OperandError
from ..operators.structured import Dense, Diagonal
from .base import CurvatureOptimizer
from .collect import one_hot_counts
from .factors import stack, unstack
from .groups import Plan, is_mean
from .inverses import (
    Eigen,
    Inverse,
    bias_correction,
    damped_inverse,
    damped_quotient,
    eigen_apply,
    eigen_factor,
    running_mean,
    split_damping,
)
from .layer import MatrixLayer
from .settings import AdamW, KLClip, NormClip, Schedule, Settings, Structures, schedule


class KFAC(CurvatureOptimizer):
    """Natural gradient by Kronecker-factored curvature with inverses.

    S_A ← ρ S_A + (1 − ρ) A and S_B likewise on update steps; the preconditioner is made from them at once.

    Args:
        stat_decay: ρ. Factors start at ``start`` times the identity; with start = 0 they are divided by 1 − ρᵗ.
        inverse: :class:`Inverse` or :class:`Eigen`.
        pi_damping: with Inverse(), λ_A = π√λ and λ_B = √λ/π, π² = (tr S_A/d_A)/(tr S_B/d_B). False: λ on both.
        structures: Dense() and Diagonal() can be inverted, for each factor.
        others: as in :class:`~ritz.optim.SINGD`.

    A factor that cannot be inverted in float32 is tried in float64; if that fails too, the identity takes its place,
    with a ``ConvergenceWarning`` naming the layer. In bfloat16 the factors and inverses are stored rounded and inverted
    in float32.

    Raises:
        OperandError: structures that have no inverse within the class, and what :class:`~ritz.optim.SINGD` raises.

    Cost: per update O(d² m + d³) a factor, by a decomposition; per step two products with .grad or with the rows.
    State: S_A, S_B and the momentum; inverses are made from them again after loading.

    Reference: Martens, Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015).
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        damping: float = 1e-3,
        stat_decay: float = 0.95,
        start: float = 0.0,
        inverse: Inverse | Eigen = Inverse(),
        pi_damping: bool = True,
        update_interval: int | Schedule = 10,
        structures: Structures = Dense(),
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        weight_sharing: WeightSharing = Expand(),
        reduction: str = "mean",
        num_loss_terms: int | Callable[[], int] | LossTerms | None = None,
        statistics: Statistics = EmpiricalFisher(),
        curvature_dtype: torch.dtype | None = None,
        clip: NormClip | KLClip | None = None,
        fallback: AdamW = AdamW(),
        row_form: bool | None = None,
        compensate: bool = True,
        strict: bool = False,
        model: nn.Module | None = None,
        grad_scale: Any = None,
        process_group: Any = None,
        foreach: bool | None = None,
    ) -> None:
        settings = Settings(
            structures=structures, update_interval=schedule(update_interval), weight_sharing=weight_sharing,
            loss_terms=loss_terms(num_loss_terms), statistics=statistics, curvature_dtype=curvature_dtype, clip=clip,
            fallback=fallback, row_form=row_form, compensate=compensate, rule=inverse,
        )  # fmt: skip
        defaults = {
            "lr": lr, "momentum": momentum, "damping": damping, "stat_decay": stat_decay, "start": start,
            "pi_damping": pi_damping, "weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay,
            "mean_loss": is_mean(reduction),
        }  # fmt: skip
        super().__init__(
            model_or_params, defaults, settings, model=model, strict=strict, grad_scale=grad_scale,
            process_group=process_group, foreach=foreach,
        )  # fmt: skip

    def _plan(self, group: dict[str, Any]) -> list[Plan]:
        plans = super()._plan(group)
        for plan in plans:
            for found in plan.matrices:
                assert plan.settings is not None
                layer = MatrixLayer(found.name, found.sites, plan.bias_of(found), 0, plan.settings)
                for structure in layer.structures:
                    if not isinstance(structure, (Dense, Diagonal)):
                        raise OperandError(
                            f"KFAC got {structure} for {layer.name}; expected Dense() or Diagonal(), which it can "
                            "invert: use SINGD for the other structures"
                        )
        return plans

    # -- factors ------------------------------------------------------------------------------------------------------

    def whiten(self, layer: MatrixLayer, side: int, rows: Tensor | OneHot) -> Tensor:
        dtype = layer.settings.curvature_dtype or layer.weight.dtype
        if isinstance(rows, OneHot):
            return one_hot_counts(rows, dtype)
        return layer.structures[side].outer(rows.to(dtype).mT)

    def update(self, layers: list[MatrixLayer], statistics: list[tuple[Tensor, Tensor]], group: dict) -> None:
        rho = group["stat_decay"]
        for layer, found in zip(layers, statistics):
            state = self.state[layer.weight]
            dtype = layer.settings.curvature_dtype or layer.weight.dtype
            for side, name in enumerate(("S_A", "S_B")):
                if name not in state:
                    unit = layer.structures[side].identity(layer.sizes[side], dtype=dtype, device=layer.weight.device)
                    state[name] = group["start"] * unit
                state[name].copy_(running_mean(state[name], found[side], rho))
            state["updates"] = state.get("updates", 0) + 1

    def two_sided(self, layer: MatrixLayer) -> bool:
        return isinstance(layer.settings.rule, Inverse)

    def apply_factor(self, layers: list[MatrixLayer], side: int, X: Tensor, overwrite: bool = False) -> Tensor:
        P = stack([self._inverse(layer, side) for layer in layers])
        return layers[0].structures[side].matmul(P, X.to(P.dtype)).to(X.dtype)

    def precondition(self, layers: list[MatrixLayer], G: Tensor, overwrite: bool = False) -> Tensor:
        if self.two_sided(layers[0]):
            return super().precondition(layers, G, overwrite)
        return stack([self._by_eigen(layer, g) for layer, g in zip(layers, unstack(G, len(layers)))])

    def _running(self, layer: MatrixLayer) -> list[Tensor]:
        """S_A and S_B in float32 or better, corrected for their start at zero; the identity before the first update."""
        state, group = self.state[layer.weight], self.param_groups[layer.group]
        if "S_A" not in state:
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            pairs = zip(layer.structures, layer.sizes)
            return [S.identity(d, dtype=dtype, device=layer.weight.device) for S, d in pairs]
        correction = bias_correction(group["start"], group["stat_decay"], state["updates"])
        wide = torch.promote_types(state["S_A"].dtype, torch.float32)
        return [state[name].to(wide) / correction for name in ("S_A", "S_B")]

    def _inverse(self, layer: MatrixLayer, side: int) -> Tensor:
        name = ("A⁻¹", "B⁻¹")[side]
        if name not in layer.cache:
            self._invert(layer)
        return layer.cache[name]

    def _invert(self, layer: MatrixLayer) -> None:
        """Both inverses, kept with the layer until its factors change."""
        group, S = self.param_groups[layer.group], self._running(layer)
        means = [float(s.trace(F, d)) / d for s, F, d in zip(layer.structures, S, layer.sizes)]
        damping = split_damping(means, group["damping"], group["pi_damping"])
        dtype = layer.settings.curvature_dtype or layer.weight.dtype
        for side, name in enumerate(("A⁻¹", "B⁻¹")):
            found = damped_inverse(layer.structures[side], S[side], layer.sizes[side], damping[side])
            if found is None:
                _singular(layer, side, f"{damping[side]:.1e}, in float64 either")
                found = layer.structures[side].identity(layer.sizes[side], dtype=S[side].dtype, device=S[side].device)
            layer.cache[name] = found.to(dtype)

    def _by_eigen(self, layer: MatrixLayer, G: Tensor) -> Tensor:
        damping = self.param_groups[layer.group]["damping"]
        if "l_A" not in layer.cache:
            for side, S in enumerate(self._running(layer)):
                found = eigen_factor(layer.structures[side], S, layer.sizes[side], damping)
                if found is None:
                    _singular(layer, side, "0")
                    found = torch.ones(layer.sizes[side], dtype=S.dtype, device=S.device), None
                layer.cache["l_" + "AB"[side]] = found[0]
                if found[1] is not None:
                    layer.cache["Q_" + "AB"[side]] = found[1]
        cache = layer.cache
        return eigen_apply(G, cache["l_A"], cache.get("Q_A"), cache["l_B"], cache.get("Q_B"), damping)

    def apply_cost(self, layer: MatrixLayer, side: int, width: int) -> float:
        return layer.structures[side].apply_cost(layer.sizes[side], width)

    def factor_bytes(self, layer: MatrixLayer) -> int:
        dtype = layer.settings.curvature_dtype or layer.weight.dtype
        return sum(S.storage(d, dtype) for S, d in zip(layer.structures, layer.sizes))

    def vector_copies(self, group: dict) -> int:
        return 1

    def vector_step(
        self,
        vectors: list[nn.Parameter],
        gradients: list[Tensor],
        group: dict,
        settings: Settings,
        terms: float,
        due: bool,
    ) -> list[Tensor]:
        natural, rho = [], group["stat_decay"]
        for p, g in zip(vectors, gradients):
            state, dtype = self.state[p], settings.curvature_dtype or p.dtype
            wide = torch.promote_types(dtype, torch.float32)
            g = g.to(wide)
            if due:
                old = state["S"].to(wide) if "S" in state else group["start"] * torch.ones_like(g)
                state["S"] = running_mean(old, terms * g.square(), rho).to(dtype)
                state["updates"] = state.get("updates", 0) + 1
            S = torch.ones_like(g)  # before the first update, as for matrices
            if "S" in state:
                S = state["S"].to(wide) / bias_correction(group["start"], rho, state["updates"])
            natural.append(damped_quotient(g, S, group["damping"]).to(p.dtype))
        return natural


def _singular(layer: MatrixLayer, side: int, damping: str) -> None:
    """Say that a factor cannot be inverted."""
    warnings.warn(
        f"KFAC: the {('input', 'output')[side]} factor of {layer.name} has no inverse at damping {damping}; the "
        "identity is used in its place: raise damping",
        ConvergenceWarning,
        stacklevel=7,
    )
