"""Benchmark: a whole training step of structured second-order optimizers against AdamW and the package singd.

    python benchmarks/optim_step.py --data FOLDER      # FOLDER holds mnist10k/*.gz (or set RITZ_DATA)
    python benchmarks/optim_step.py --quick            # smoke test at small sizes
    python benchmarks/optim_step.py --only mlp dense T=10

One process, one thread, float32, batch 128. In every round each contestant runs a block of ten steps, so that a factor
update of T = 10 falls into each block exactly once; contestants take turns, starting with another one in each round.
The figure is the median over rounds of a block's time over that of `torch.optim.AdamW(foreach=True)` in that round.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import _common
import numpy as np
import torch
from _common import ROOT
from _optim_step_report import STRUCTURES, finish
from torch import Tensor, nn
from torch.nn import functional as F

if importlib.util.find_spec("ritz") is None:
    sys.path.insert(0, str(ROOT / "src"))

BLOCK = 10
MODELS = ("mlp", "transformer")
SIZES: dict[str, dict[str, Any]] = {
    "mlp": {"sizes": [784, 1024, 1024, 10]},
    "transformer": {"dim": 256, "layers": 4, "hidden": 1024, "heads": 4},
}
QUICK: dict[str, dict[str, Any]] = {
    "mlp": {"sizes": [784, 48, 40, 10]},
    "transformer": {"dim": 32, "layers": 1, "hidden": 64, "heads": 2},
}
# The same for everybody. Weight decay is what torch's AdamW has by default; rates are small, so that nobody diverges.
LR, MOMENTUM, WEIGHT_DECAY = 1e-4, 0.9, 1e-2
DAMPING, LR_COV, RIEMANNIAN_MOMENTUM = 1e-3, 1e-2, 0.5
AUTHORS = {  # our name of a structure -> theirs
    "dense": "dense", "diagonal": "diagonal", "block30": "block30diagonal", "hierarchical": "hierarchical15_15",
    "toeplitz": "triltoeplitz",
}  # fmt: skip


# -- contestants -----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Contestant:
    package: str
    optimizer: str
    structure: str = ""
    interval: int = 0
    form: str = ""
    sharing: str = ""
    block: int = BLOCK
    slow: bool = False  # runs in the first rounds only, see --slow-rounds

    @property
    def label(self) -> str:
        kind = {"torch": self.optimizer, "singd": "singd"}.get(self.package, f"ritz {self.optimizer}")
        return ", ".join(filter(None, [f"{kind} {self.structure}".strip(), self.form, self.sharing]))

    @property
    def words(self) -> dict[str, str]:
        """What `--only` can ask for."""
        fields = {k: getattr(self, k) for k in ("package", "optimizer", "structure", "form", "sharing")}
        return fields | {"interval": f"T={self.interval}" if self.interval else ""}


YARDSTICK = Contestant("torch", "AdamW foreach")


def contestants(model: str) -> list[Contestant]:
    """Everybody on one model. T = 1 on the transformer has no bar and takes long: five steps, in few rounds."""
    deep = model == "transformer"
    out = [YARDSTICK, Contestant("torch", "AdamW fused"), Contestant("torch", "SGD momentum")]

    def add(package: str, optimizer: str, structure: str, interval: int, form: str, sharing: str) -> None:
        long = deep and interval == 1
        block = 5 if long else BLOCK
        if package == "singd" and structure == "toeplitz":  # hundreds of times slower than AdamW: one update a block
            long, block = True, interval
        out.append(Contestant(package, optimizer, structure, interval, form, sharing, block, long))

    for package in ("ritz", "singd"):
        for structure in STRUCTURES:
            for interval in (10, 1):
                forms = ("auto",) if deep else ("rows", "plain", "auto") if interval == 10 else ("rows", "plain")
                shared = ("expand", "reduce") if structure in ("dense", "diagonal") else ("expand",)
                if deep and package == "singd" and structure == "toeplitz":
                    continue
                for form in forms if package == "ritz" else ("",):
                    for sharing in shared if deep else ("",):
                        add(package, "SINGD", structure, interval, form, sharing)
        if package == "ritz":
            for interval in (10, 1):
                add("ritz", "KFAC", "", interval, "", "expand" if deep else "")
    return out


def build(c: Contestant, net: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimizers that one step of this contestant calls."""
    if c.package == "torch":
        return [torch_optimizer(c.optimizer, list(net.parameters()))]
    if c.package == "singd":
        from singd.optim.optimizer import SINGD

        # This class knows Linear and Conv2d only: the rest goes to AdamW.
        layers = [m for m in net.modules() if isinstance(m, nn.Linear)]
        own = [p for m in layers for p in m.parameters()]
        rest = [p for p in net.parameters() if all(p is not q for q in own)]
        theirs = SINGD(
            net, own, lr=LR, momentum=MOMENTUM, damping=DAMPING, alpha1=RIEMANNIAN_MOMENTUM, lr_cov=LR_COV,
            weight_decay=WEIGHT_DECAY, T=c.interval, structures=(AUTHORS[c.structure],) * 2,
            kfac_approx=c.sharing or "expand", normalize_lr_cov=True,
        )  # fmt: skip
        return [theirs] + ([torch_optimizer("AdamW foreach", rest)] if rest else [])
    from ritz import optim
    from ritz.curvature import Expand, Reduce
    from ritz.operators import structured

    common: dict[str, Any] = {"lr": LR, "momentum": MOMENTUM, "damping": DAMPING, "weight_decay": WEIGHT_DECAY}
    common |= {"update_interval": c.interval, "weight_sharing": Reduce() if c.sharing == "reduce" else Expand()}
    common |= {"fallback": optim.AdamW(lr=LR, weight_decay=WEIGHT_DECAY)}
    if c.optimizer == "KFAC":
        return [optim.KFAC(net, inverse=optim.Inverse(), **common)]
    structure = {
        "dense": structured.Dense(), "diagonal": structured.Diagonal(), "block30": structured.BlockDiagonal(30),
        "hierarchical": structured.Hierarchical(15, 15), "toeplitz": structured.LowerToeplitz(),
    }[c.structure]  # fmt: skip
    common |= {"lr_cov": LR_COV, "riemannian_momentum": RIEMANNIAN_MOMENTUM, "normalize": True}
    form = {"rows": True, "plain": False, "auto": None}[c.form]
    return [optim.SINGD(net, structures=structure, row_form=form, **common)]


def torch_optimizer(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name == "SGD momentum":
        return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    way: dict[str, Any] = {name.removeprefix("AdamW "): True}  # foreach or fused
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **way)


# -- models and data -------------------------------------------------------------------------------
class Encoder(nn.Module):
    """One pre-norm transformer layer on tokens (n, R, dim)."""

    def __init__(self, dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, R, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, R, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, R, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """Images (n, 3, 32, 32) as 16 patches of 8 x 8, learned positions, mean over tokens before the last layer."""

    def __init__(self, dim: int, layers: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 8 * 8, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(16, dim))
        self.layers = nn.Sequential(*(Encoder(dim, hidden, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.view(len(x), 3, 4, 8, 4, 8).permute(0, 2, 4, 1, 3, 5).reshape(len(x), 16, 192)
        return self.head(self.norm(self.layers(self.embed(patches) + self.positions)).mean(1))


def make_model(model: str, settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)  # everybody starts from the same weights
    if model == "transformer":
        return Transformer(**settings)
    sizes, layers = settings["sizes"], []
    for a, b in zip(sizes, sizes[1:]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def shapes(net: nn.Module) -> dict[str, Any]:
    """What the memory formulas need: (d_K, d_C) of every linear layer, and the numbers in norms and in the rest."""
    linear = [(m.in_features + (m.bias is not None), m.out_features) for m in net.modules() if isinstance(m, nn.Linear)]
    norms = sum(p.numel() for m in net.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters())
    total = sum(p.numel() for p in net.parameters())
    return {"linear": linear, "norms": norms, "rest": total - norms - sum(a * b for a, b in linear), "total": total}


def find_mnist(data: str | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Images (n, 28, 28) in [0, 1] and labels (n,), or None."""
    for folder in filter(None, (data, os.environ.get("RITZ_DATA"))):
        stems = [Path(folder) / "mnist10k" / f"t10k-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
        if all(path.is_file() for path in stems):
            images, labels = (np.frombuffer(gzip.decompress(p.read_bytes()), np.uint8) for p in stems)
            return images[16:].reshape(-1, 28, 28).astype(np.float32) / 255, labels[8:].astype(np.int64)
    return None


def make_batches(model: str, mnist: tuple[np.ndarray, np.ndarray] | None, n: int) -> list[tuple[Tensor, Tensor]]:
    """One batch for each step of a block. The transformer gets digits padded to 32 x 32, in three equal channels."""
    rng = torch.Generator().manual_seed(1)
    if mnist is None:
        X, y = torch.rand(BLOCK * n, 28, 28, generator=rng), torch.randint(10, (BLOCK * n,), generator=rng)
    else:
        picked = torch.randperm(len(mnist[0]), generator=rng)[: BLOCK * n]
        X, y = torch.from_numpy(mnist[0])[picked], torch.from_numpy(mnist[1])[picked]
    if model == "mlp":
        X = X.flatten(1)
    else:
        X = F.pad(X, (2, 2, 2, 2)).unsqueeze(1).repeat(1, 3, 1, 1)
    return list(zip(X.split(n), y.split(n)))


# -- the race --------------------------------------------------------------------------------------
class Racer:
    """A contestant with its own copy of the model."""

    def __init__(self, contestant: Contestant, model: str, settings: dict[str, Any]) -> None:
        self.contestant = contestant
        self.record: dict[str, Any] = {"model": model, "label": contestant.label} | asdict(contestant) | {"rounds": []}
        try:
            self.net = make_model(model, settings)
            self.optimizers = build(contestant, self.net)
        except Exception as error:  # a package that is missing or refuses costs its rows, not the run
            self.fail(error)

    def fail(self, error: Exception) -> None:
        self.record["failure"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        who = f"{self.record['model']}, {self.record['label']}, T = {self.record['interval']}"
        print(f"  {who}: LEFT OUT: {self.record['failure']}", flush=True)

    def run(self, batches: list[tuple[Tensor, Tensor]], turn: int) -> None:
        """One block of steps; `turn` < 0 is the warm-up, whose time is dropped."""
        gc.collect()
        gc.disable()
        try:
            cpu, wall = time.process_time(), time.perf_counter()
            for X, y in batches[: self.contestant.block]:
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                loss = F.cross_entropy(self.net(X), y)
                loss.backward()
                for optimizer in self.optimizers:
                    optimizer.step()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        except Exception as error:
            self.fail(error)
            return
        finally:
            gc.enable()
        if turn >= 0:
            steps = self.contestant.block
            self.record["rounds"].append({"round": turn, "cpu": cpu / steps, "wall": wall / steps})
        self.record["loss"] = float(loss.detach())
        for key, value in memory(self.optimizers).items():
            self.record[key] = max(value, self.record.get(key, 0))


def tensors(thing: Any) -> Iterator[Tensor]:
    """Every tensor inside dicts, lists and plain objects (singd keeps its factors in objects)."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for value in thing.values():
            yield from tensors(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from tensors(value)
    elif hasattr(thing, "__dict__"):
        yield from tensors(vars(thing))


def memory(optimizers: list[torch.optim.Optimizer]) -> dict[str, int]:
    """Bytes kept between steps: state, step counters (tensors without an axis), and what is cached to save time."""
    held: dict[int, Tensor] = {}
    for optimizer in optimizers:
        # singd's factors are not in `state`
        parts = [optimizer.state] + [getattr(optimizer, name, None) for name in ("Ks", "Cs", "m_Ks", "m_Cs")]
        held |= {id(t): t for part in parts for t in tensors(part)}
    caches = sum(optimizer.cache_bytes() for optimizer in optimizers if hasattr(optimizer, "cache_bytes"))
    sizes = [(t.numel() * t.element_size(), t.ndim > 0) for t in held.values()]
    return {
        "state_bytes": sum(size for size, counts in sizes if counts),
        "counter_bytes": sum(size for size, counts in sizes if not counts),
        "cache_bytes": caches,
    }


def race(model: str, entrants: list[Contestant], options: argparse.Namespace, result: dict, path: Path) -> None:
    settings = (QUICK if options.quick else SIZES)[model]
    batches = make_batches(model, find_mnist(options.data), options.batch)
    racers = [Racer(c, model, settings) for c in entrants]
    result["models"][model] = {"settings": settings, "shapes": shapes(make_model(model, settings))}
    result["rows"] += [racer.record for racer in racers]
    began = time.monotonic()
    for turn in range(-1, options.rounds):
        if turn > 0 and time.monotonic() - began > 60 * options.minutes:
            print(f"  {model}: {options.minutes:g} minutes are over after {turn} rounds", flush=True)
            break
        start = max(turn, 0) * len(racers) // options.rounds
        for racer in racers[start:] + racers[:start]:
            if "failure" not in racer.record and not (racer.contestant.slow and turn >= options.slow_rounds):
                racer.run(batches, turn)
        result["models"][model]["seconds"] = time.monotonic() - began
        result["environment"]["load_average_end"] = os.getloadavg()
        _common.write_json(path, result)
        said = "warm-up" if turn < 0 else f"round {turn + 1} of {options.rounds}"
        print(f"  {model}, {said}: {time.monotonic() - began:.0f} s so far", flush=True)


def arguments() -> argparse.Namespace:
    kinds: dict[str, list[str]] = {"model": list(MODELS)}
    for c in (c for model in MODELS for c in contestants(model)):
        for kind, word in c.words.items():
            if word and word not in kinds.setdefault(kind, []):
                kinds[kind].append(word)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [word for words in kinds.values() for word in words]
    help = f"what to run: {', '.join(known)}; words of different kinds narrow down; {YARDSTICK.label} always runs"
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", choices=known, help=help)
    parser.add_argument("--quick", action="store_true", help="smoke test at small sizes, in a minute or two")
    parser.add_argument("--rounds", type=int, help="measured rounds after one to warm up (default 9; quick: 2)")
    parser.add_argument("--slow-rounds", type=int, help="of the slow rows: singd's Toeplitz, T = 1 on the transformer")
    parser.add_argument("--minutes", type=float, default=45.0, help="no further round of a model after that")
    parser.add_argument("--batch", type=int, help="samples a step (default 128; quick: 32)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", help="folder that holds mnist10k/*.gz (or set RITZ_DATA); else random images")
    parser.add_argument("--output", type=Path, default=_common.HERE / "results")
    parser.add_argument("--name", help="stem of the result files (default optim-step-cpu-DATE)")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="measure nothing: table and figure of a saved run")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.quick else 9)
    options.slow_rounds = options.slow_rounds or (1 if options.quick else 3)
    options.batch = options.batch or (32 if options.quick else 128)
    options.kinds = {kind: [w for w in words if w in options.only] for kind, words in kinds.items()}
    return options


def wanted(c: Contestant, kinds: dict[str, list[str]]) -> bool:
    return c == YARDSTICK or all(word in kinds[kind] for kind, word in c.words.items() if kinds.get(kind))


def main() -> int:
    options = arguments()
    if options.redraw:
        return finish(json.loads(options.redraw.read_text()), options.redraw)
    torch.set_num_threads(options.threads)
    stem = f"optim-step-{'quick-' if options.quick else ''}cpu-{time.strftime('%Y-%m-%d')}"
    path = options.output / f"{options.name or stem}.json"
    environment = _common.environment(options.threads, "cpu") | {"dtype": "float32"}
    has_singd = importlib.util.find_spec("singd") is not None
    environment["versions"]["singd"] = metadata.version("singd") if has_singd else None
    data = "MNIST (10 000 digits)" if find_mnist(options.data) else "random images (no mnist10k found)"
    settings = {"batch": options.batch, "rounds": options.rounds, "quick": options.quick, "data": data, "lr": LR}
    settings |= {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "damping": DAMPING, "lr_cov": LR_COV}
    settings |= {"riemannian_momentum": RIEMANNIAN_MOMENTUM, "normalize": True}
    result: dict[str, Any] = {"environment": environment, "settings": settings, "models": {}, "rows": [], "notes": []}
    print(f"  data: {data}", flush=True)
    if not has_singd:
        result["notes"].append("The package singd is not installed (`pip install singd`): its rows are left out.")
        print(f"  {result['notes'][-1]}", flush=True)
    for model in options.kinds["model"] or MODELS:
        entrants = [c for c in contestants(model) if wanted(c, options.kinds) and (has_singd or c.package != "singd")]
        race(model, entrants, options, result, path)
    return finish(result, path)


if __name__ == "__main__":
    sys.exit(main())
