"""A network as a function of selected parameters: which ones, in which order, and what makes it no function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import OperandError
from ..numerics import version

Selection = None | str | Tensor | dict[str, Tensor] | Iterable[str] | Iterable[Tensor]


class Network:
    """Outputs f(θ, x) of a module or a function, with θ the selected parameters as one vector.

    Args:
        model_or_fn: a module, or a function (params, x) -> outputs, called with ``params`` as they were given.
        params: of a module: None (all that require a gradient), parameters, names, or the names of submodules, whose
            parameters are all taken. Of a function: a tensor, a list or a dict of tensors.
        seed: fixes what is random in the forward pass (dropout); None refuses a network that is random.

    The order of θ is that of ``named_parameters`` (of the list or dict). Parameters are not copied; changing them in
    place afterwards makes products raise.
    """

    def __init__(self, model_or_fn: Any, params: Selection = None, *, seed: int | None = None) -> None:
        self.seed = seed
        self.module = model_or_fn if isinstance(model_or_fn, nn.Module) else None
        self._fn: Callable[..., Any] = model_or_fn
        self._form: type = dict  # in which a function takes its parameters
        if self.module is not None:
            check_mode(self.module, seed)
            chosen = select(self.module, params)
        elif not callable(model_or_fn):
            raise OperandError(
                f"the model is a {type(model_or_fn).__name__}; expected a module or a function (params, x) -> outputs"
            )
        else:
            chosen = self._given(params)
        self.names, self.parameters = tuple(chosen), tuple(chosen.values())
        kinds = {(p.dtype, p.device) for p in self.parameters}
        if len(kinds) > 1 or not self.parameters[0].is_floating_point():
            raise OperandError(f"the parameters have dtypes and devices {kinds}; expected one floating-point dtype")
        self.dtype, self.device = self.parameters[0].dtype, self.parameters[0].device
        self.shapes = tuple(p.shape for p in self.parameters)
        self.sizes = tuple(p.numel() for p in self.parameters)
        self.numel = sum(self.sizes)
        self._versions = [(p, version(p), p.data_ptr()) for p in self._watched()]

    def _given(self, params: Any) -> dict[str, Tensor]:
        if isinstance(params, Tensor):
            self._form = Tensor
            return {"params": params}
        if isinstance(params, dict) and params and all(isinstance(p, Tensor) for p in params.values()):
            return dict(params)
        if isinstance(params, Sequence) and params and all(isinstance(p, Tensor) for p in params):
            self._form = list
            return {str(i): p for i, p in enumerate(params)}
        raise OperandError(
            f"a function came with params={type(params).__name__}; expected the tensor, list or dict of tensors that "
            "it is called with"
        )

    def _watched(self) -> list[Tensor]:
        module = self.module
        return list(self.parameters) if module is None else [*module.parameters(), *module.buffers()]

    def _wrap(self, tensors: Sequence[Tensor]) -> Any:
        """The parameters as the module or function takes them."""
        if self._form is Tensor:
            return tensors[0]
        return list(tensors) if self._form is list else dict(zip(self.names, tensors))

    def check_unchanged(self) -> None:
        """Raise where a parameter or buffer was changed in place since this object was made."""
        now = {id(p) for p in self._watched()}
        if any(version(p) != v or p.data_ptr() != where or id(p) not in now for p, v, where in self._versions):
            raise OperandError(
                "the network's parameters or buffers were changed in place after its curvature operator was made; make "
                "the operator anew after a training step, and keep modules in eval mode"
            )

    def __call__(self, tensors: Sequence[Tensor], x: Any) -> Tensor:
        """Outputs at these values of the selected parameters."""
        # Fused attention kernels have no second derivative; the plain formula has all of them.
        with sdpa_kernel(SDPBackend.MATH), self._seeded():
            if self.module is not None:
                f = functional_call(self.module, self._wrap(tensors), _arguments(x))
            else:
                f = self._fn(self._wrap(tensors), x)
        if not isinstance(f, Tensor):
            raise OperandError(
                f"the network returned a {type(f).__name__}; expected a tensor of outputs: wrap it in a function "
                "(params, x) -> tensor"
            )
        return f

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        if self.seed is None:
            yield
            return
        with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
            torch.manual_seed(self.seed)
            yield

    def check_deterministic(self, x: Any) -> None:
        """Raise where two passes differ: every product would then be one of another matrix."""
        with torch.no_grad():
            first, second = self(self.parameters, x), self(self.parameters, x)
        if not torch.equal(torch.nan_to_num(first), torch.nan_to_num(second)):
            raise OperandError("two passes of the network on the same data differ; call model.eval(), or give seed=0")
        if not bool(torch.isfinite(first).all()):
            raise OperandError("the network's outputs on the first micro-batch have NaN or Inf; check weights and data")

    def meant_by(self, name: str) -> list[int]:
        """The selected parameters of this name, or of a module of this name; a tied one has several names."""
        names: dict[int, tuple[str, ...]] = {i: (n,) for i, n in enumerate(self.names)}
        if self.module is not None:
            index = {id(p): i for i, p in enumerate(self.parameters)}
            for n, p in self.module.named_parameters(remove_duplicate=False):
                if id(p) in index:
                    names[index[id(p)]] += (n,)
        return [i for i, own in names.items() if any(n == name or n.startswith(name + ".") for n in own)]

    # -- vectors ------------------------------------------------------------------------------------------------------

    def split(self, V: Tensor) -> list[Tensor]:
        """Parts (..., *shape) of vectors (..., P), one a parameter."""
        return [part.reshape(V.shape[:-1] + s) for part, s in zip(V.split(self.sizes, -1), self.shapes)]

    def join(self, parts: Sequence[Tensor | None], lead: tuple[int, ...] = ()) -> Tensor:
        """Vectors (*lead, P) from parts (*lead, *shape); a missing part is zero."""
        out = [
            torch.zeros(*lead, n, dtype=self.dtype, device=self.device) if part is None else part.reshape(*lead, n)
            for part, n in zip(parts, self.sizes)
        ]
        return torch.cat(out, -1)


def _arguments(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def select(module: nn.Module, params: Selection) -> dict[str, Tensor]:
    """The named parameters of a module that are meant, in the module's order."""
    named = dict(module.named_parameters())
    first = {id(p): name for name, p in named.items()}
    # A tied parameter has several names, and is meant by each of them.
    aliases = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    if params is None:
        found: dict[str, Tensor] = {name: p for name, p in named.items() if p.requires_grad}
        if not found:
            raise OperandError("no parameter of the model requires a gradient; give params=")
        return found
    if isinstance(params, (str, Tensor)):
        params = [params]  # type: ignore[list-item]
    wanted = list(params.values() if isinstance(params, dict) else params)  # type: ignore[union-attr]
    names: set[str] = set()
    for item in wanted:
        if isinstance(item, Tensor) and id(item) in first:
            names.add(first[id(item)])
            continue
        own = {own for n, own in aliases.items() if isinstance(item, str) and (n == item or n.startswith(item + "."))}
        if not own:
            what = f"a tensor {tuple(item.shape)}" if isinstance(item, Tensor) else repr(item)
            raise OperandError(f"params has {what}, which is none of the model's: {', '.join(named)}")
        names |= own
    if not names:
        raise OperandError("params is empty; expected parameters, names, or None for all that require a gradient")
    return {name: p for name, p in named.items() if name in names}


def check_mode(module: nn.Module, seed: int | None) -> None:
    """Refuse what couples examples, is random or has no second derivative."""
    for name, m in module.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (m.training or not m.track_running_stats):
            raise OperandError(
                f"{name or 'the model'} ({type(m).__name__}) normalises by the statistics of its batch, so that "
                "examples have no curvature of their own; call model.eval()"
            )
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and (m.sparse or m.max_norm is not None):
            what = "has sparse gradients" if m.sparse else "renormalises its weight in place"
            raise OperandError(
                f"{name or 'the model'} ({type(m).__name__}) {what}, which has no second derivative; set sparse=False "
                "and max_norm=None on it"
            )
        dropping = isinstance(m, nn.modules.dropout._DropoutNd)
        p = m.p if dropping else getattr(m, "dropout", 0.0)
        if seed is None and m.training and isinstance(p, float) and p > 0:
            raise OperandError(
                f"{name or 'the model'} ({type(m).__name__}) drops activations at random; call model.eval(), or give "
                "seed=0 for one fixed draw"
            )
