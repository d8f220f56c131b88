"""SINGD, INGD and IKFAC: inverse-free natural gradient with structured Kronecker factors.

Every layer keeps K and C with K Kᵀ ≈ (A + λI)⁻¹ and C Cᵀ ≈ (B + λI)⁻¹ in factored form, and moves them by products
alone: no inverse, no decomposition, so that they live in bfloat16 as well. docs/derivations/natural_gradient.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import EmpiricalFisher, Expand, OneHot
from ..curvature.sharing import LossTerms, WeightSharing, loss_terms
from ..curvature.statistics import Statistics
from ..errors import OperandError
from ..operators.structured import Dense
from .base import CurvatureOptimizer
from .collect import one_hot_counts
from .factors import apply_square, has_square, stack, unstack
from .groups import Plan, is_mean, size_of
from .inverse_free import LargestEntry, SpectralNorm, directions, first_scale, multiplicative_step
from .layer import MatrixLayer
from .settings import AdamW, DenseBelow, KLClip, NormClip, Schedule, Settings, Structures, schedule
from .vectors import factor_step


class SINGD(CurvatureOptimizer):
    """Structured inverse-free natural gradient descent.

    On update steps, with U = Kᵀ aᵀ and V = Cᵀ gᵀ over the rows of inputs and output gradients, the projection Π of the
    structure, and average traces tr(M) = trace(M)/dim:

        H_K = Π(U Uᵀ),  H_C = Π(V Vᵀ)
        D_K = tr(H_C) H_K + λ tr(CᵀC) Π(KᵀK) − I,   and D_C with the roles exchanged
        m ← α₁ m + c D,   K ← K (I − β₁ m_K),   C ← C (I − β₁ m_C)

    and on every step W ← W − β₂ M, where M ← α₂ M + C Cᵀ G K Kᵀ.

    Args:
        model_or_params: the model; or parameters or group dictionaries, with ``model=``. A group may have any argument
            down to ``compensate`` as a key, except ``statistics``. Matrices get Kronecker factors, norms and other
            vectors a diagonal factor, and what no rule covers is trained by ``fallback`` in a parameter group of its
            own: see ``report()``.
        lr: step size β₂. Schedulers act on it.
        momentum: α₂, without dampening.
        damping: λ, added to A and B.
        riemannian_momentum: α₁, of the factors' updates. 0 keeps no m.
        lr_cov: step size β₁ of the factors; a number or a callable of the step.
        normalize: c = (1 − α₁)/2, and β₁ divided by max(1, size of m): its :class:`~ritz.optim.LargestEntry` (True, the
            authors' measure; with wide dense factors stay at lr_cov ≤ 0.1) or its :class:`~ritz.optim.SpectralNorm`
            (lr_cov up to 0.5). False: c = 1/2, as in the paper; lr_cov of 0.05 and more then diverges on small
            networks.
        second_order: I − β₁m + (β₁m)²/2 instead of I − β₁m.
        adaptive: False leaves out the traces of the other factor (IKFAC).
        start: K and C start at this multiple of the identity. None: at the multiple that whitens a layer's first
            statistics on average, s⁴ (ā b̄ + λ) = 1 with the mean diagonals of A and B, so that the first steps have
            the length of later ones; use it with ``clip``.
        update_interval: an int, :class:`~ritz.optim.EarlyDense`, or a callable step -> bool.
        structures: one structure, a pair for (K, C), or a rule from a size to a structure; see
            :mod:`ritz.operators.structured`.
        weight_decay, decoupled_weight_decay: W ← (1 − lr·weight_decay) W before the step; or (False) added to the
            natural gradient, through momentum, as the authors do.
        weight_sharing: :class:`~ritz.curvature.Expand` or :class:`~ritz.curvature.Reduce`.
        reduction, num_loss_terms: "mean" or "sum", and over how many terms: None counts each layer's leading dimension;
            an int, a callable, or PerPosition() (a mean over tokens).
        statistics: EmpiricalFisher(), MonteCarloFisher() or GaussNewton(); the last two want ``accumulate_curvature``.
        curvature_dtype: of K, C and m; None follows the weight.
        clip: :class:`~ritz.optim.NormClip` or :class:`~ritz.optim.KLClip` of the natural gradient.
        row_form: compute the natural gradient from captured rows: None where it is cheaper, True, False.
        compensate: weights in bfloat16 or float16 keep what rounding took from them in the state, and get it back with
            the next step (Kahan): without it, steps below 2⁻⁹ of a weight are lost.
        grad_scale: a GradScaler (needed where ``unscale_`` is used), or a fixed loss scale.
        process_group: over which statistics are summed; found from a DistributedDataParallel model.
        foreach: batch layers of equal shape; None does so for small ones.

    Raises:
        OperandError: parameters without their model, unknown structures or reductions, sharded or sparse parameters;
            with ``strict``, parameters without a rule.

    Cost: per update O(d² m + d³) for a dense factor of size d and m rows, O(kdm + k²d) for hierarchical and
    block-diagonal ones, O(dm log d) for Toeplitz; per step the products with .grad, or with the rows where they are
    fewer. State: K, C, m_K, m_C and the momentum.

    Reference: Lin, Dangel, Eschenhagen, Neklyudov, Kristiadi, Turner, Makhzani, "Structured inverse-free natural
    gradient descent: memory-efficient & numerically-stable KFAC" (2024). Departures: ``normalize`` is on, weight decay
    is decoupled, statistics are normalised when the step comes.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        damping: float = 1e-3,
        riemannian_momentum: float = 0.5,
        lr_cov: float | Callable[[int], float] = 0.1,
        normalize: bool | LargestEntry | SpectralNorm = True,
        second_order: bool = False,
        adaptive: bool = True,
        start: float | None = 1.0,
        update_interval: int | Schedule = 10,
        structures: Structures = DenseBelow(),
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
        _check_start(start)
        settings = Settings(
            structures=structures, update_interval=schedule(update_interval), weight_sharing=weight_sharing,
            loss_terms=loss_terms(num_loss_terms), statistics=statistics, curvature_dtype=curvature_dtype, clip=clip,
            lr_cov=lr_cov if callable(lr_cov) else None, size=size_of(normalize), fallback=fallback, row_form=row_form,
            compensate=compensate,
        )  # fmt: skip
        defaults = {
            "lr": lr, "momentum": momentum, "damping": damping, "riemannian_momentum": riemannian_momentum,
            "lr_cov": 0.0 if callable(lr_cov) else lr_cov, "normalize": normalize is not False, "start": start,
            "second_order": second_order, "adaptive": adaptive, "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay, "mean_loss": is_mean(reduction),
        }  # fmt: skip
        super().__init__(
            model_or_params, defaults, settings, model=model, strict=strict, grad_scale=grad_scale,
            process_group=process_group, foreach=foreach,
        )  # fmt: skip

    def _plan(self, group: dict[str, Any]) -> list[Plan]:
        if "start" in group:
            _check_start(group["start"])
        return super()._plan(group)

    # -- factors ------------------------------------------------------------------------------------------------------

    def _factor(self, layer: MatrixLayer, side: int) -> Tensor:
        """K or C in flat storage, made on first use."""
        state, name = self.state[layer.weight], "KC"[side]
        dtype = layer.settings.curvature_dtype or layer.weight.dtype
        if name not in state:
            group, d = self.param_groups[layer.group], layer.sizes[side]
            unit = layer.structures[side].identity(d, dtype=dtype, device=layer.weight.device)
            state[name] = unit if group["start"] is None else group["start"] * unit
            if group["riemannian_momentum"]:
                state["m_" + name] = torch.zeros_like(state[name])
        return state[name]

    def whiten(self, layer: MatrixLayer, side: int, rows: Tensor | OneHot) -> Tensor:
        K, structure = self._factor(layer, side), layer.structures[side]
        if isinstance(rows, OneHot):
            return K.square() * one_hot_counts(rows, K.dtype)
        return structure.outer(structure.rmatmul(K, rows.to(K.dtype).mT))

    def update(self, layers: list[MatrixLayer], statistics: list[tuple[Tensor, Tensor]], group: dict) -> None:
        set_rate(layers[0].settings, group)
        S, d = layers[0].structures, layers[0].sizes
        stored = [stack([self._factor(layer, side) for layer in layers]) for side in (0, 1)]
        wide = torch.promote_types(stored[0].dtype, torch.float32)  # rounded once, when they are stored again
        F = [K.to(wide) for K in stored]
        H = [stack([own[side] for own in statistics]).to(wide) for side in (0, 1)]
        if group["start"] is None:
            self._start(layers, F, H, group)
        size = layers[0].settings.size if group["normalize"] else None
        for side, D in enumerate(directions(S, d, F, H, group["damping"], group["adaptive"])):
            name = "KC"[side]
            m = self._momentum(layers, "m_" + name, D, group)
            new = multiplicative_step(S[side], F[side], m, d[side], group["lr_cov"], size, group["second_order"])
            for layer, piece in zip(layers, unstack(new, len(layers))):
                self.state[layer.weight][name].copy_(piece)

    def _start(self, layers: list[MatrixLayer], F: list[Tensor], H: list[Tensor], group: dict) -> None:
        """Scale the factors of layers that are updated for the first time, and the statistics whitened by them."""
        new = torch.tensor([[not self.state[layer.weight].get("started")] for layer in layers], device=F[0].device)
        new = new.reshape(H[0].shape[:-1] + (1,))
        if not new.any():
            return
        S, d = layers[0].structures, layers[0].sizes
        squares, reached = first_scale(S, d, H, group["damping"], group["adaptive"])
        for side, square in enumerate(squares):
            square = torch.where(new, square, torch.ones_like(square))
            F[side], H[side] = F[side] * square.sqrt(), H[side] * square
        for layer, done in zip(layers, (new & reached).flatten().tolist()):
            if done:
                self.state[layer.weight]["started"] = 1

    def _momentum(self, layers: list[MatrixLayer], name: str, D: Tensor, group: dict) -> Tensor:
        """m ← α₁ m + c D, stored in the factors' dtype."""
        alpha = group["riemannian_momentum"]
        m = D * ((1.0 - alpha) / 2 if group["normalize"] else 0.5)
        if alpha:
            m = alpha * stack([self.state[layer.weight][name] for layer in layers]).to(D.dtype) + m
            for layer, piece in zip(layers, unstack(m, len(layers))):
                self.state[layer.weight][name].copy_(piece)
        return m

    # -- preconditioning ----------------------------------------------------------------------------------------------

    def apply_factor(self, layers: list[MatrixLayer], side: int, X: Tensor, overwrite: bool = False) -> Tensor:
        return apply_square(layers, side, X, self._factor, overwrite)

    def apply_cost(self, layer: MatrixLayer, side: int, width: int) -> float:
        structure = layer.structures[side]
        return structure.apply_cost(layer.sizes[side], width) * (1 if has_square(structure) else 2)

    def vector_step(
        self,
        vectors: list[nn.Parameter],
        gradients: list[Tensor],
        group: dict,
        settings: Settings,
        terms: float,
        due: bool,
    ) -> list[Tensor]:
        if due:
            set_rate(settings, group)
        return factor_step(self, vectors, gradients, group, settings.curvature_dtype, terms, due)

    def factor_bytes(self, layer: MatrixLayer) -> int:
        copies = 2 if self.param_groups[layer.group]["riemannian_momentum"] else 1
        dtype = layer.settings.curvature_dtype or layer.weight.dtype
        return copies * sum(S.storage(d, dtype) for S, d in zip(layer.structures, layer.sizes))

    def vector_copies(self, group: dict) -> int:
        return 2 if group["riemannian_momentum"] else 1


def _check_start(start: float | None) -> None:
    if start is not None and not start > 0:
        raise OperandError(f"start={start!r}; expected a positive multiple of the identity, or None")


def set_rate(settings: Settings, group: dict) -> None:
    """This step's lr_cov, where it is a callable."""
    if settings.lr_cov is not None:
        group["lr_cov"] = float(settings.lr_cov(group["step"]))


class INGD(SINGD):
    """Inverse-free natural gradient descent: :class:`SINGD` with dense factors.

    Reference: Lin, Duruisseaux, Leok, Nielsen, Khan, Schmidt, "Simplifying momentum-based positive-definite submanifold
    optimization with applications to deep learning" (2023).
    """

    def __init__(self, model_or_params: nn.Module | Iterable[Any], lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(model_or_params, lr, structures=Dense(), **settings)


class IKFAC(SINGD):
    """Inverse-free KFAC: each factor follows its own curvature alone, without Riemannian momentum.

    K Kᵀ = (S_A + λI)⁻¹ + O(β₁²) for KFAC's running factor S_A ← (1 − β₁) S_A + β₁ A. Takes the arguments of
    :class:`SINGD` except ``adaptive`` and ``riemannian_momentum``; the structures are dense unless given.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        *,
        structures: Structures = Dense(),
        **settings: Any,
    ) -> None:
        super().__init__(
            model_or_params, lr, structures=structures, adaptive=False, riemannian_momentum=0.0, **settings
        )
