"""The public optimizers with the settings of a recorded run of the original authors' code."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import Expand, PerExample, PerPosition, Reduce
from ..errors import OperandError
from ..operators.structured import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Hierarchical,
    LowerToeplitz,
    Structure,
    UpperToeplitz,
)
from ..optim import INGD, KFAC, SINGD, Eigen, Inverse

STRUCTURES: dict[str, Structure] = {
    "dense": Dense(),
    "diagonal": Diagonal(),
    "block30diagonal_fixed": BlockDiagonal(30),
    "hierarchical15_15": Hierarchical(15, 15),
    "triltoeplitz": LowerToeplitz(),
    "triutoeplitz": UpperToeplitz(),
}


def optimizer_from_trace(config: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    """The public class that repeats a recorded trajectory.

    Args:
        config: the description that is stored with a trajectory: ``optimizer``, ``hyper`` (under the authors' names),
            ``loss``, ``groups``, ``preconditioner_dtype``, ``grad_scale``, ``step_counter_after_first_step``.
        model: an ``nn.Sequential`` whose children are named as in the trajectory, already in its dtype.

    Returns:
        :class:`~ritz.optim.SINGD` for "SINGD", :class:`~ritz.optim.INGD` for "LocalOptimizer",
        :class:`~ritz.optim.KFAC`
        for "KFACOptimizer" (both of Lin et al. 2023), with schedules as hooks of the optimizer: nothing has to be set
        from outside. A loss scale is the user's part: multiply the loss by ``config["grad_scale"][step]``.

    Raises:
        OperandError: an optimizer or a structure that ritz does not have, or does not repeat ("block30diagonal" as
            it was shipped multiplies by K where Kᵀ is meant; its corrected runs are "block30diagonal_fixed").
    """
    name = config["optimizer"]
    if name == "SINGD":
        return _singd(config, model)
    if name in ("LocalOptimizer", "KFACOptimizer"):
        return _lin2023(config, model)
    raise OperandError(f"the trace is of {name!r}; expected SINGD, LocalOptimizer or KFACOptimizer")


# -- singd 0.0.5 ------------------------------------------------------------------------------------------------------


def _singd(config: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    hyper = config["hyper"]
    common = _singd_settings(hyper)
    lr, schedule = _number_or_rule(hyper["lr"])
    scales = config.get("grad_scale")
    groups: list[dict[str, Any]] = []
    rest = dict(model.named_parameters())
    for layer, overrides in (config.get("groups") or {}).items():
        own = [rest.pop(f"{layer}.{part}") for part in ("weight", "bias") if f"{layer}.{part}" in rest]
        group: dict[str, Any] = {"params": own, **_singd_settings({**hyper, **overrides})}
        groups.append(group | {"lr": overrides.get("lr", lr)})
    if rest:
        groups.append({"params": list(rest.values())})
    dtypes = config.get("preconditioner_dtype") or hyper.get("preconditioner_dtype")
    optimizer = SINGD(
        groups, lr, model=model, decoupled_weight_decay=False, second_order=False, row_form=False, foreach=False,
        compensate=False,
        curvature_dtype=getattr(torch, dtypes[0]) if dtypes and dtypes[0] else None,
        grad_scale=(lambda step: scales[step]) if scales else None, **common,
    )  # fmt: skip
    if schedule is not None:
        _every_step(optimizer, lambda group: group.__setitem__("lr", schedule(group["step"])))
    return optimizer


def _singd_settings(hyper: dict[str, Any]) -> dict[str, Any]:
    """The authors' names in ours; ``lr`` apart."""
    average = hyper.get("loss_average", "batch")
    like_kfac = hyper.get("kfac_like", False)
    lr_cov, rule = _number_or_rule(hyper.get("lr_cov", 1e-2))
    return {
        "momentum": hyper.get("momentum", 0.9),
        "damping": hyper.get("damping", 1e-3),
        "riemannian_momentum": 0.0 if like_kfac else hyper.get("alpha1", 0.5),
        "adaptive": not like_kfac,
        "weight_decay": hyper.get("weight_decay", 0.0),
        "update_interval": hyper.get("T", 10),
        "lr_cov": rule or lr_cov,
        "normalize": hyper.get("normalize_lr_cov", False),
        "weight_sharing": Reduce() if hyper.get("kfac_approx", "expand") == "reduce" else Expand(),
        "structures": tuple(_structure(s) for s in hyper.get("structures", ("dense", "dense"))),
        "reduction": "sum" if average is None else "mean",
        "num_loss_terms": PerPosition() if average == "batch+sequence" else PerExample(),
    }


def _structure(name: str) -> Structure:
    if name not in STRUCTURES:
        raise OperandError(f"the trace has the structure {name!r}; expected one of {', '.join(STRUCTURES)}")
    return STRUCTURES[name]


# -- the code of Lin et al. 2023 --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MeanOverSums(Expand):
    """Their scaling of convolutions: A is divided and B multiplied by the number of positions."""

    def inputs(self, a: Tensor) -> Tensor:
        return a.flatten(0, 1) / a.shape[1] ** 0.5

    def outputs(self, g: Tensor) -> Tensor:
        return g.flatten(0, 1) * g.shape[1] ** 0.5


def _lin2023(config: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    hyper, ingd = config["hyper"], config["optimizer"] == "LocalOptimizer"
    interval = hyper.get("TCov", 10)
    jump = config.get("step_counter_after_first_step")

    def counter(step: int) -> int:
        """Their step counter at a step of the trajectory: it may have been moved after the first one."""
        return step if jump is None or step == 0 else jump + step - 1

    common: dict[str, Any] = {
        "momentum": hyper.get("momentum", 0.9), "damping": hyper.get("damping", 1e-3), "row_form": False,
        "update_interval": lambda step: counter(step) % interval == 0, "decoupled_weight_decay": False,
        "foreach": False,
        "compensate": False,
        "reduction": config["loss"]["reduction"], "weight_sharing": _MeanOverSums(), "model": model,
    }  # fmt: skip
    groups = [{"params": list(model.parameters()), "sum_per_term": True}]
    optimizer: torch.optim.Optimizer
    if ingd:

        def rate(step: int) -> float:
            """Their hard-coded warm-up."""
            at = counter(step)
            return 2e-4 if at <= 100 else 2e-3 if at < 500 else hyper.get("lr_cov", 1e-2)

        alpha = hyper.get("beta2", 0.5)
        optimizer = INGD(groups, hyper["lr"], lr_cov=rate, riemannian_momentum=alpha, normalize=False, **common)
    else:
        optimizer = KFAC(
            groups, hyper["lr"], stat_decay=hyper.get("stat_decay", 0.95), start=1.0, pi_damping=False,
            inverse=Eigen() if hyper.get("use_eign") else Inverse(), **common,
        )  # fmt: skip
    decay = hyper.get("weight_decay", 1e-2)
    late = lambda group: decay if counter(group["step"]) >= 20 * interval else 0.0  # noqa: E731
    _every_step(optimizer, lambda group: group.__setitem__("weight_decay", late(group)))
    return optimizer


# -- schedules that a trace states as text ----------------------------------------------------------------------------


def _every_step(optimizer: torch.optim.Optimizer, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply a change to every group before each step."""

    def hook(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in opt.param_groups:
            change(group)

    optimizer.register_step_pre_hook(hook)


def _number_or_rule(given: Any) -> tuple[float, Callable[[int], float] | None]:
    """A number; or the value at step 0 and the rule, where it is a formula in ``step`` such as "0.05*0.9**step, …"."""
    if not isinstance(given, str):
        return float(given), None
    tree = ast.parse(given.split(",")[0].strip(), mode="eval").body
    rule = lambda step: float(_evaluate(tree, step))  # noqa: E731
    return rule(0), rule


OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def _evaluate(node: ast.expr, step: int) -> Any:
    """Arithmetic with numbers and the name ``step``, and nothing else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.Name) and node.id == "step":
        return step
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_evaluate(node.left, step), _evaluate(node.right, step))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand, step)
    raise OperandError(f"a schedule has {ast.unparse(node)!r}; expected arithmetic with numbers and `step`")
