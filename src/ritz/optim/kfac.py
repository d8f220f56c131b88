"""KFAC: running Kronecker factors, inverted or decomposed at every update."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import EmpiricalFisher, Expand, OneHot
from ..curvature.sharing import LossTerms, WeightSharing, loss_terms
from ..curvature.statistics import Statistics
from ..errors import ConvergenceWarning, OperandError
from ..operators.structured import Dense, Diagonal, Structure
from .base import CurvatureOptimizer
from .collect import one_hot_counts
from .factors import stack, unstack
from .groups import Plan, is_mean
from .layer import MatrixLayer
from .settings import AdamW, KLClip, NormClip, Schedule, Settings, Structures, schedule


@dataclass(frozen=True)
class Inverse:
    """N = (S_B + λ_B I)⁻¹ G (S_A + λ_A I)⁻¹ by Cholesky factors: damping on each factor."""


@dataclass(frozen=True)
class Eigen:
    """N = Q_B [(Q_Bᵀ G Q_A) / (l_B l_Aᵀ + λ)] Q_Aᵀ by eigendecompositions: damping on the product."""


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
        strict: bool = False,
        model: nn.Module | None = None,
        grad_scale: Any = None,
        process_group: Any = None,
        foreach: bool | None = None,
    ) -> None:
        settings = Settings(
            structures=structures, update_interval=schedule(update_interval), weight_sharing=weight_sharing,
            loss_terms=loss_terms(num_loss_terms), statistics=statistics, curvature_dtype=curvature_dtype, clip=clip,
            fallback=fallback, row_form=row_form, rule=inverse,
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
                state[name].copy_(rho * state[name].to(found[side].dtype) + (1.0 - rho) * found[side])
            state["updates"] = state.get("updates", 0) + 1

    def two_sided(self, layer: MatrixLayer) -> bool:
        return isinstance(layer.settings.rule, Inverse)

    def apply_factor(self, layers: list[MatrixLayer], side: int, X: Tensor, overwrite: bool = False) -> Tensor:
        P = stack([self._inverse(layer, side) for layer in layers])
        return layers[0].structures[side].matmul(P, X.to(P.dtype)).to(X.dtype)

    def precondition(self, layers: list[MatrixLayer], G: Tensor, overwrite: bool = False) -> Tensor:
        if self.two_sided(layers[0]):
            return super().precondition(layers, G, overwrite)
        natural = [eigen_apply(self, layer, g) for layer, g in zip(layers, unstack(G, len(layers)))]
        return stack(natural)

    def _running(self, layer: MatrixLayer) -> list[Tensor]:
        """S_A and S_B in float32 or better, corrected for their start at zero; the identity before the first update."""
        state, group = self.state[layer.weight], self.param_groups[layer.group]
        if "S_A" not in state:
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            pairs = zip(layer.structures, layer.sizes)
            return [S.identity(d, dtype=dtype, device=layer.weight.device) for S, d in pairs]
        correction = 1.0 - (group["stat_decay"] ** state["updates"] if group["start"] == 0 else 0.0)
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
        damping = [group["damping"], group["damping"]]
        if group["pi_damping"]:
            means = [float(s.trace(F, d)) / d for s, F, d in zip(layer.structures, S, layer.sizes)]
            pi = (max(means[0], 1e-30) / max(means[1], 1e-30)) ** 0.5
            damping = [pi * group["damping"] ** 0.5, group["damping"] ** 0.5 / pi]
        dtype = layer.settings.curvature_dtype or layer.weight.dtype
        for side, name in enumerate(("A⁻¹", "B⁻¹")):
            found = damped_inverse(layer.structures[side], S[side], layer.sizes[side], damping[side])
            if found is None:
                singular(layer, side, f"{damping[side]:.1e}, in float64 either")
                found = layer.structures[side].identity(layer.sizes[side], dtype=S[side].dtype, device=S[side].device)
            layer.cache[name] = found.to(dtype)

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
                state["S"] = (rho * old + (1.0 - rho) * terms * g.square()).to(dtype)
                state["updates"] = state.get("updates", 0) + 1
            S = torch.ones_like(g)  # before the first update, as for matrices
            if "S" in state:
                S = state["S"].to(wide) / (1.0 - (rho ** state["updates"] if group["start"] == 0 else 0.0))
            S = S + group["damping"]
            natural.append((g / S.where(S > 0, 1.0)).to(p.dtype))  # an entry that never had a gradient, without damping
        return natural


def singular(layer: MatrixLayer, side: int, damping: str) -> None:
    """Say that a factor cannot be inverted."""
    warnings.warn(
        f"KFAC: the {('input', 'output')[side]} factor of {layer.name} has no inverse at damping {damping}; the "
        "identity is used in its place: raise damping",
        ConvergenceWarning,
        stacklevel=7,
    )


def damped_inverse(structure: Structure, S: Tensor, d: int, damping: float) -> Tensor | None:
    """(S + λI)⁻¹ in flat storage; None where there is no Cholesky factor, in float64 either."""
    if isinstance(structure, Diagonal):
        inverse = 1.0 / (S + damping)
        return inverse if bool(torch.isfinite(inverse).all()) else None
    M = structure.to_dense(S, d)
    M = 0.5 * (M + M.mT) + damping * torch.eye(d, dtype=S.dtype, device=S.device)
    for dtype in dict.fromkeys((S.dtype, torch.float64)):
        factor, info = torch.linalg.cholesky_ex(M.to(dtype))
        # A pivot that is rounding error of its diagonal entry may have either sign: that the root exists says nothing.
        pivots = factor.diagonal().square() > d * torch.finfo(dtype).eps * M.diagonal()
        if not bool(info) and bool(torch.isfinite(factor).all() & pivots.all()):
            return torch.cholesky_inverse(factor).to(S.dtype).flatten()
    return None


def eigen_apply(optimizer: KFAC, layer: MatrixLayer, G: Tensor) -> Tensor:
    """Damping on the product of eigenvalues; diagonal factors are their own eigenvalues."""
    damping = optimizer.param_groups[layer.group]["damping"]
    if "l_A" not in layer.cache:
        for side, S in enumerate(optimizer._running(layer)):
            structure, d, name = layer.structures[side], layer.sizes[side], "AB"[side]
            eigenvalues, Q = S, None
            if isinstance(structure, Dense):
                M = structure.to_dense(S, d)
                eigenvalues, Q = torch.linalg.eigh(0.5 * (M + M.mT))
            # Damping of the product covers zeros of both factors; without it they are rounding errors of either sign.
            zero = d * torch.finfo(S.dtype).eps * eigenvalues.max()
            if damping == 0 and bool((eigenvalues <= zero).any()):
                singular(layer, side, "0")
                eigenvalues, Q = torch.ones_like(eigenvalues), None
            layer.cache["l_" + name] = eigenvalues
            if Q is not None:
                layer.cache["Q_" + name] = Q
    l_A, l_B, Q_A, Q_B = (layer.cache.get(k) for k in ("l_A", "l_B", "Q_A", "Q_B"))
    assert l_A is not None and l_B is not None
    N = G.to(l_A.dtype)
    N = N if Q_B is None else Q_B.mT @ N
    N = N if Q_A is None else N @ Q_A
    N = N / (l_B.unsqueeze(1) * l_A + damping)
    N = N if Q_B is None else Q_B @ N
    return (N if Q_A is None else N @ Q_A.mT).to(G.dtype)
