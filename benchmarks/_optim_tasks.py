"""The five training tasks: readers of the data, models, batches, losses and test metrics. No optimizer in here."""

from __future__ import annotations

import gzip
import math
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _gp_data import DataMissing
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]

# Steps of a run are fixed per task and the same for every optimizer. `metric`: what the bars compare, less is better.
ABOUT: dict[str, dict[str, Any]] = {
    "mlp": {
        "title": "MLP 784-128-64-10, mnist10k with random shifts",
        "steps": 400, "metric": "error", "accuracy": True, "label": "test error rate",
    },
    "cnn": {
        "title": "CNN, 8 and 16 channels, mnist10k with random shifts",
        "steps": 400, "metric": "error", "accuracy": True, "label": "test error rate",
    },
    "char": {
        "title": "character transformer, 2 layers of 64, tinyshakespeare",
        "steps": 400, "metric": "loss", "accuracy": False, "label": "test loss, nats a character",
    },
    "gcn": {
        "title": "graph network 1433-16-7, cora, full batch",
        "steps": 200, "metric": "error", "accuracy": True, "label": "test error rate",
    },
    "autoencoder": {
        "title": "autoencoder 196-128-64-32-12-…-196, tanh, mnist10k pooled to 14 × 14",
        "steps": 1000, "metric": "error", "accuracy": False, "label": "test squared error of an image",
    },
}  # fmt: skip
BATCH, SHIFT = 128, 2  # images; pixels by which a classifier's training images are shifted at most
CONTEXT, SEQUENCES, DIM, LAYERS, HEADS = 32, 32, 64, 2, 4  # of the transformer
HIDDEN, DROPOUT = 16, 0.5  # of the graph network, as Kipf and Welling (2017) have them
CODE = (196, 128, 64, 32, 12)
TRAINING_IMAGES, TEXT_SHARE = 8000, 0.9
FEW_WORDS = 256  # of cora's 1433, the most frequent ones, where a task is asked for at a smaller size


@dataclass
class Task:
    """One model with its data. `batches` is not timed; `loss` is the forward pass and the mean loss of a batch."""

    model: nn.Module
    batches: Callable[[torch.Generator], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    test: Callable[[nn.Module], dict[str, float]]  # "loss" and "error" on the test set
    output: str  # the output layer's name
    terms: int | None = None  # loss terms behind a gradient, where the leading dimension does not tell
    per_position: bool = False  # the loss is a mean over tokens


# -- readers ---------------------------------------------------------------------------------------
def find(tail: str, data: str | None) -> Path:
    """The file below the data folder; `DataMissing` says what to do where there is none."""
    folders = [Path(p) for p in (data, os.environ.get("RITZ_DATA")) if p]
    path = next((f / tail for f in folders if (f / tail).is_file()), None)
    if path is None:
        looked = ", ".join(map(str, folders)) or "no folder was given"
        raise DataMissing(f"{tail} not found ({looked}); pass --data FOLDER or set RITZ_DATA to the folder with it")
    return path


def idx(path: Path) -> np.ndarray:
    """A gzipped idx file of bytes: two zeros, the type (8), the number of axes, sizes as big-endian int32, entries."""
    with gzip.open(path, "rb") as stream:
        raw = stream.read()
    zero, kind, axes = struct.unpack(">HBB", raw[:4])
    if zero != 0 or kind != 8:
        raise ValueError(f"{path.name} is no idx file of bytes: it starts with {raw[:4]!r}")
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


@lru_cache(maxsize=1)
def mnist(data: str | None) -> tuple[Tensor, Tensor]:
    """Images (10000, 28, 28) in [0, 1] and labels, in a fixed random order: the first 8000 are for training."""
    images = idx(find("mnist10k/t10k-images-idx3-ubyte.gz", data))
    labels = idx(find("mnist10k/t10k-labels-idx1-ubyte.gz", data))
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.from_numpy(images[order] / np.float32(255)), torch.from_numpy(labels[order].astype(np.int64))


@lru_cache(maxsize=1)
def text(data: str | None) -> tuple[Tensor, int]:
    """All characters as numbers, and how many different ones there are."""
    raw = np.frombuffer(find("text/tinyshakespeare.txt", data).read_bytes(), np.uint8)
    used, codes = np.unique(raw, return_inverse=True)
    return torch.from_numpy(codes.astype(np.int64)), len(used)


@lru_cache(maxsize=1)
def cora(data: str | None) -> dict[str, Tensor]:
    """Row-normalised features as coordinates, labels, splits, and the edges of D^(-1/2) (A + I) D^(-1/2)."""
    with np.load(find("citation/cora.npz", data)) as stored:
        part = {k: stored[k] for k in stored.files}
    n = len(part["labels"])
    rows = np.repeat(np.arange(n), np.diff(part["x_indptr"]))
    sums = np.bincount(rows, part["x_data"], minlength=n)
    values = part["x_data"] / np.maximum(sums, 1e-12)[rows]
    pairs = np.concatenate([part["edges"], part["edges"][:, ::-1], np.arange(n)[:, None].repeat(2, 1)])
    pairs = np.unique(pairs.astype(np.int64), axis=0)  # stored in either or both directions, and self-loops
    degree = np.bincount(pairs[:, 0], minlength=n)
    weights = 1 / np.sqrt(degree[pairs[:, 0]] * degree[pairs[:, 1]])
    found = {"rows": rows, "cols": part["x_indices"].astype(np.int64), "values": values.astype(np.float32)}
    found |= {"to": pairs[:, 0], "from": pairs[:, 1], "weights": weights.astype(np.float32)}
    found |= {k: part[k].astype(np.int64) for k in ("labels", "train", "val", "test")} | {"shape": part["x_shape"]}
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in found.items()}


# -- models ----------------------------------------------------------------------------------------
class Block(nn.Module):
    """Attention and MLP with their norms in front, from linear layers."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharTransformer(nn.Module):
    """Logits of the next character at every position."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, DIM)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, DIM))
        self.blocks = nn.Sequential(*(Block(DIM, HEADS) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, symbols)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)))


class GraphNetwork(nn.Module):
    """Two graph convolutions without bias; the features come with their dropout already applied."""

    def __init__(self, graph: dict[str, Tensor], features: int, classes: int) -> None:
        super().__init__()
        self.target, self.source, self.weights = graph["to"], graph["from"], graph["weights"]
        self.hidden = nn.Linear(features, HIDDEN, bias=False)
        self.output = nn.Linear(HIDDEN, classes, bias=False)

    def spread(self, x: Tensor) -> Tensor:
        """The product with the normalised adjacency matrix, edge by edge, in the dtype of x."""
        edges = self.weights.to(x.dtype)[:, None] * x[self.source]
        return torch.zeros_like(x).index_add(0, self.target, edges)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.spread(self.hidden(x))), DROPOUT, self.training)
        return self.spread(self.output(x))


# -- tasks -----------------------------------------------------------------------------------------
def epochs(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches: all n in a new order, again and again; a last incomplete batch is left out."""
    while True:
        yield from torch.randperm(n, generator=generator)[: n - n % size].split(size)


def scores(logits: Tensor, y: Tensor) -> dict[str, float]:
    logits = logits.float()
    wrong = (logits.argmax(-1) != y).float().mean()
    return {"loss": float(F.cross_entropy(logits.flatten(0, -2), y.flatten())), "error": float(wrong)}


def classifier(model: nn.Module, data: str | None, dtype: torch.dtype) -> Task:
    images, labels = mnist(data)
    n, side = TRAINING_IMAGES, torch.arange(28)
    padded = F.pad(images[:n], [SHIFT] * 4)

    def scaled(x: Tensor) -> Tensor:
        return ((x - 0.1307) / 0.3081).unsqueeze(1).to(dtype)

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        # Shifted images do not repeat, so that a low training loss cannot come from memorising 8000 of them.
        for i in epochs(n, BATCH, generator):
            rows, cols = (torch.randint(2 * SHIFT + 1, (BATCH, 1), generator=generator) + side for _ in range(2))
            yield scaled(padded[i[:, None, None], rows[:, :, None], cols[:, None, :]]), labels[i]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).float(), batch[1])

    test = scaled(images[n:])
    return Task(model, batches, loss, lambda model: scores(model(test), labels[n:]), output="output")


def named(*layers: nn.Module) -> nn.Sequential:
    """A chain whose last layer is called "output"."""
    model = nn.Sequential(*layers[:-1])
    model.add_module("output", layers[-1])
    return model


def mlp(data: str | None, dtype: torch.dtype, quick: bool) -> Task:
    hidden = [nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()]
    return classifier(named(*hidden, nn.Linear(64, 10)), data, dtype)


def cnn(data: str | None, dtype: torch.dtype, quick: bool) -> Task:
    convolutions = [nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU()]
    dense = [nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)]
    return classifier(named(*convolutions, *dense), data, dtype)


def char(data: str | None, dtype: torch.dtype, quick: bool) -> Task:
    codes, symbols = text(data)
    split, window = int(TEXT_SHARE * len(codes)), torch.arange(CONTEXT + 1)
    starts = torch.linspace(split, len(codes) - CONTEXT - 1, 32 if quick else 512).long()
    held_out = codes[starts[:, None] + window]

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:
            at = torch.randint(split - CONTEXT, (SEQUENCES, 1), generator=generator)
            rows = codes[at + window]
            yield rows[:, :-1], rows[:, 1:]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).float().flatten(0, 1), batch[1].flatten())

    def test(model: nn.Module) -> dict[str, float]:
        return scores(model(held_out[:, :-1]), held_out[:, 1:])

    return Task(CharTransformer(symbols), batches, loss, test, output="head", per_position=True)


def gcn(data: str | None, dtype: torch.dtype, quick: bool, few: bool = False) -> Task:
    graph = cora(data)
    n, features = graph["shape"].tolist()
    rows, cols, values, y, train = (graph[k] for k in ("rows", "cols", "values", "labels", "train"))
    if few:
        place = torch.bincount(cols, minlength=features).argsort(descending=True, stable=True).argsort()
        kept = place[cols] < FEW_WORDS
        rows, cols, values, features = rows[kept], place[cols[kept]], values[kept], FEW_WORDS
    targets = y[train]

    def dense(values: Tensor) -> Tensor:
        x = torch.zeros(n, features, dtype=dtype)
        x[rows, cols] = values.to(dtype)
        return x

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        while True:  # dropout of the sparse features costs little where only the entries are drawn
            kept = torch.rand(len(values), generator=generator) >= DROPOUT
            yield dense(values * kept / (1 - DROPOUT)), targets

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0])[train].float(), batch[1])

    def test(model: nn.Module) -> dict[str, float]:
        return scores(model(everything)[graph["test"]], y[graph["test"]])

    everything = dense(values)
    model = GraphNetwork(graph, features, int(y.max()) + 1)
    return Task(model, batches, loss, test, output="output", terms=len(train))


def autoencoder(data: str | None, dtype: torch.dtype, quick: bool) -> Task:
    x = F.avg_pool2d(mnist(data)[0].unsqueeze(1), 2).flatten(1)
    inputs, n = x.to(dtype), TRAINING_IMAGES
    layers: list[nn.Module] = []
    sizes = [*CODE, *CODE[-2::-1]]
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        layers += [nn.Linear(a, b)] + [nn.Tanh()] * (i != len(CODE) - 2)  # the code is linear
    model = named(*layers[:-1])  # logits of the pixels: the loss has the sigmoid

    def batches(generator: torch.Generator) -> Iterator[Batch]:
        return ((inputs[i], x[i]) for i in epochs(n, BATCH, generator))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        # Summed over pixels: the log-likelihood of an image, so that one image is one loss term.
        return F.binary_cross_entropy_with_logits(model(batch[0]).float(), batch[1], reduction="sum") / len(batch[1])

    def test(model: nn.Module) -> dict[str, float]:
        logits = model(inputs[n:]).float()
        entropy = F.binary_cross_entropy_with_logits(logits, x[n:], reduction="sum")
        squares = (torch.sigmoid(logits) - x[n:]).square().sum()
        return {"loss": float(entropy) / len(logits), "error": float(squares) / len(logits)}

    return Task(model, batches, loss, test, output="output")


MAKERS: dict[str, Callable[[str | None, torch.dtype, bool], Task]] = {
    "mlp": mlp, "cnn": cnn, "char": char, "gcn": gcn, "autoencoder": autoencoder
}  # fmt: skip


def make(name: str, data: str | None, seed: int, dtype: torch.dtype, quick: bool, few: bool = False) -> Task:
    """The task with a model initialised (by torch's defaults) from the seed, then converted to the dtype.

    `quick`: a small test set of text; `few`: fewer features of the graph's nodes.
    """
    torch.manual_seed(seed)
    task = gcn(data, dtype, quick, few) if name == "gcn" else MAKERS[name](data, dtype, quick)
    task.model.to(dtype)
    return task


def evaluate(task: Task) -> dict[str, float | None]:
    """Test loss and error in evaluation mode; not finite values as None, which JSON can hold."""
    task.model.eval()
    with torch.no_grad():
        found = task.test(task.model)
    task.model.train()
    return {k: v if math.isfinite(v) else None for k, v in found.items()}
