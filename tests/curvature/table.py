"""Layers in all their variants: how to build one, how to call it, and where its output has the examples."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn


class Conv1D(nn.Module):
    """The linear layer of GPT-2 implementations: weight (d_in, d_out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        size = (*x.shape[:-1], self.nf)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(size)


@dataclass
class Case:
    """``call(module, *inputs)`` gives an output whose axis ``axis`` counts the examples (None: one example)."""

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple
    axis: int | None = 0
    kwargs: dict = field(default_factory=dict)

    def module(self):
        torch.manual_seed(0)
        return self.build().double()

    def call(self, module):
        found = module(*self.inputs, **self.kwargs)
        return found[0] if isinstance(found, tuple) else found

    def examples(self, module):
        """The output with examples first."""
        y = self.call(module)
        return y.unsqueeze(0) if self.axis is None else y.movedim(self.axis, 0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def linear(name, shape, **settings):
    axis = None if len(shape) == 1 else 0
    return Case(f"linear {name}", lambda: nn.Linear(4, 3, **settings), (randn(*shape),), axis)


LINEAR = [
    linear("1-d", (4,)),
    linear("2-d", (5, 4)),
    linear("3-d", (2, 5, 4)),
    linear("4-d", (2, 3, 5, 4)),
    linear("2-d, no bias", (5, 4), bias=False),
    linear("3-d, no bias", (2, 5, 4), bias=False),
    Case("linear, by keyword", lambda: nn.Linear(4, 3), (), 0, {"input": randn(2, 5, 4)}),
    Case("Conv1D", lambda: Conv1D(3, 4), (randn(2, 5, 4),)),
]

SIZES = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


def conv(dims, name, kernel=3, batched=True, transposed=False, channels=(4, 6), kwargs=None, **settings):
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    x = randn(*((2,) if batched else ()), channels[0], *SIZES[dims])
    label = f"{kind.__name__} {name}"
    return Case(label, lambda: kind(*channels, kernel, **settings), (x,), 0 if batched else None, kwargs or {})


def convolutions(dims):
    yield conv(dims, "plain")
    yield conv(dims, "kernel 1, no bias", kernel=1, bias=False)
    yield conv(dims, "stride and padding", stride=2, padding=1)
    yield conv(dims, "dilation", dilation=2, padding=2)
    yield conv(dims, "same, odd kernel", padding="same")
    yield conv(dims, "same, even kernel", kernel=4, padding="same")
    yield conv(dims, "same, even kernel, dilation", kernel=2, dilation=3, padding="same")
    yield conv(dims, "valid", padding="valid")
    yield conv(dims, "unbatched", padding=1, batched=False)
    for mode in ("reflect", "replicate", "circular"):
        yield conv(dims, mode, padding=2, stride=2, padding_mode=mode)
        yield conv(dims, f"{mode}, same, even kernel", kernel=4, padding="same", padding_mode=mode)


CONV = [case for dims in (1, 2, 3) for case in convolutions(dims)]
CONV += [
    conv(2, "all different", kernel=(3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3)),
    conv(2, "all different, circular", kernel=(3, 2), stride=(2, 1), padding=(0, 2), padding_mode="circular"),
]


def transposed(dims):
    yield conv(dims, "plain", transposed=True)
    yield conv(dims, "stride", transposed=True, stride=2, bias=False)
    yield conv(dims, "stride, padding, output_padding", transposed=True, stride=3, padding=1, output_padding=2)
    yield conv(dims, "dilation", transposed=True, dilation=2, stride=2, padding=1)
    yield conv(dims, "padding beyond the kernel", transposed=True, kernel=2, padding=2, stride=3)
    yield conv(dims, "unbatched", transposed=True, stride=2, batched=False)
    size = [2 * s + 2 for s in SIZES[dims]]  # stride 2, kernel 3: 2s + 1 or 2s + 2
    yield conv(dims, "output_size", transposed=True, stride=2, kwargs={"output_size": size})


TRANSPOSED = [case for dims in (1, 2, 3) for case in transposed(dims)]
GROUPED = [
    conv(1, "groups", groups=2, padding=1),
    conv(2, "groups", groups=2, kernel=(3, 2), stride=2, padding=(1, 0), dilation=(1, 2)),
    conv(2, "depthwise", groups=4, channels=(4, 8), padding=1),
    conv(3, "groups", groups=2),
    conv(1, "groups", transposed=True, groups=2, stride=2, padding=1),
    conv(2, "groups", transposed=True, groups=2, stride=2, output_padding=1),
    conv(3, "groups", transposed=True, groups=2, dilation=2),
]

TOKENS = torch.tensor([[1, 0, 3, 1, 6], [0, 2, 2, 5, 1]])
EMBEDDING = [
    Case("embedding 1-d", lambda: nn.Embedding(7, 3), (TOKENS[0],)),
    Case("embedding 2-d", lambda: nn.Embedding(7, 3), (TOKENS,)),
    Case("embedding 3-d", lambda: nn.Embedding(7, 3), (TOKENS.reshape(2, 5, 1),)),
    Case("embedding with padding", lambda: nn.Embedding(7, 3, padding_idx=1), (TOKENS,)),
    Case("embedding of a number", lambda: nn.Embedding(7, 3), (torch.tensor(4),), None),
]


def attention(name, q=4, kv=5, pattern="self", batch_first=True, batched=True, sizes=(6, 6), call=None, **settings):
    """L = 4 queries, S = 5 keys, 3 examples; ``pattern``: which of the three inputs are one tensor."""

    def sequence(length, width, seed):
        x = randn(*((3,) if batched else ()), length, width + seed)[..., seed:]
        return x if batch_first or not batched else x.transpose(0, 1).contiguous()

    query, other = sequence(q, 6, 0), sequence(kv, 6, 1)
    if pattern == "self":
        inputs = (query, query, query)
    elif pattern == "cross":
        inputs = (query, other, other)
    else:
        inputs = (query, sequence(kv, sizes[0], 2), sequence(kv, sizes[1], 3))
    axis = None if not batched else 0 if batch_first else 1
    build = lambda: nn.MultiheadAttention(6, 2, batch_first=batch_first, **settings)
    return Case(f"attention {name}", build, inputs, axis, call or {})


PADDED = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]).bool()
CAUSAL = torch.ones(4, 4).triu(1).bool()
PATTERNS = [(p, first) for p in ("self", "cross", "different") for first in (True, False)]
ATTENTION = [attention(f"{p}, batch_first={first}", pattern=p, batch_first=first) for p, first in PATTERNS]
ATTENTION += [attention(f"{p}, no bias", pattern=p, batch_first=f, bias=False) for p, f in PATTERNS[::3]]
ATTENTION += [
    attention("kdim and vdim", pattern="different", sizes=(5, 4), kdim=5, vdim=4),
    attention("kdim, no bias", pattern="different", sizes=(5, 6), kdim=5, bias=False, batch_first=False),
    attention("masked keys", pattern="cross", call={"key_padding_mask": PADDED}),
    attention("masked keys, no weights", pattern="cross", call={"key_padding_mask": PADDED, "need_weights": False}),
    attention("causal, no weights", call={"attn_mask": CAUSAL, "need_weights": False}, batch_first=False),
    attention("causal hint", call={"attn_mask": CAUSAL, "need_weights": False, "is_causal": True}),
    attention("no weights", pattern="different", call={"need_weights": False}),
    attention("further keys", add_bias_kv=True, add_zero_attn=True),
    attention("unbatched", pattern="cross", batched=False),
]


def encoder(name, axis=0, **settings):
    x = randn(3, 4, 6) if axis == 0 else randn(4, 3, 6)
    build = lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=axis == 0, **settings)
    return Case(f"encoder layer {name}", build, (x,), axis)


ENCODER = [encoder("batch first"), encoder("sequence first", axis=1), encoder("norm first", norm_first=True)]

ALL = [*LINEAR, *CONV, *TRANSPOSED, *EMBEDDING, *ATTENTION, *ENCODER]  # groups=1: rows make the gradient
