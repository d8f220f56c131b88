"""What each process of the data-parallel tests does; importable by name, as spawned processes need it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.optim.problems import Net, loss_of, normal, perceptron
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ritz.operators.structured import Dense, Hierarchical
from ritz.optim import KFAC, SINGD, Eigen

STEPS, INTERVAL, ROWS = 10, 3, 24  # 24 rows a batch, in equal parts for 2 and 4 processes

CASES: dict[str, Callable[..., Any]] = {
    "singd dense": partial(SINGD, structures=Dense()),
    "singd hierarchical": partial(SINGD, structures=Hierarchical(2, 1)),
    "singd sum": partial(SINGD, structures=Dense(), reduction="sum"),
    "kfac": KFAC,
    "kfac eigen": partial(KFAC, inverse=Eigen()),
}


class Branched(nn.Module):
    """A net with a branch that only some passes take."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = perceptron(5, 6, 3, seed=1), perceptron(5, 3, seed=2)

    def forward(self, x: Tensor, taken: int) -> Tensor:
        """The branch on the first ``taken`` rows."""
        f = self.trunk(x)
        return torch.cat([f[:taken] + self.branch(x[:taken]), f[taken:]]) if taken else f


def data(step: int) -> tuple[Tensor, Tensor]:
    X = normal(ROWS, 5, seed=step)
    return X, torch.sin(X[:, :3])


def share(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    """The rows of one process."""
    X, Y = data(step)
    return X.chunk(world)[rank], Y.chunk(world)[rank]


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return CASES[name](model, 0.02, damping=0.01, update_interval=INTERVAL)


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Callable[[int], tuple[Tensor, Tensor]], *, total: float
) -> None:
    """``total`` multiplies the mean loss: the number of rows makes it a sum."""
    for step in range(STEPS):
        X, Y = batches(step)
        optimizer.zero_grad()
        (total * loss_of(model(X), Y)).backward()
        optimizer.step()


def branched_loop(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int) -> None:
    """Half of the rows take the branch: those of the first half of the processes."""
    for step in range(STEPS):
        X, Y = share(step, rank, world)
        taken = len(X) if 2 * rank < world else 0
        taken = taken // 2 if world == 1 else taken
        optimizer.zero_grad()
        loss_of(model(X, taken), Y).backward()
        optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


class Calls:
    """Counts the collectives that are issued from Python, by step."""

    def __init__(self) -> None:
        self.now, self.by_step = 0, []
        self._original = dist.all_reduce
        dist.all_reduce = self._count

    def _count(self, *args: Any, **kwargs: Any) -> Any:
        self.now += 1
        return self._original(*args, **kwargs)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        def after(opt: Any, args: Any, kwargs: Any) -> None:
            self.by_step.append(self.now)
            self.now = 0

        self.now, self.by_step = 0, []
        optimizer.register_step_post_hook(after)


def work(rank: int, world: int, folder: str) -> None:
    """Everything that one process does; the results go to a file of its own."""
    torch.set_num_threads(1)
    store = Path(folder) / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found: dict[str, Any] = {}
    calls = Calls()
    for name in CASES:
        model = DistributedDataParallel(Net())
        optimizer = optimizer_of(name, model)
        calls.watch(optimizer)
        total = ROWS / world if name == "singd sum" else 1.0
        loop(model, optimizer, lambda step: share(step, rank, world), total=total)
        found[name] = values(model.module)
        found[name + ": calls"] = list(calls.by_step)
    found["branched"] = branched(rank, world)
    found["alone"] = alone(rank)
    found["refused"] = refused()
    found["group"] = by_group(rank, world)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def branched(rank: int, world: int) -> list[Tensor]:
    model = DistributedDataParallel(Branched(), find_unused_parameters=True)
    branched_loop(model, optimizer_of("singd dense", model), rank, world)
    return values(model.module)


def refused() -> str:
    """A process group, and a model that nobody wraps."""
    try:
        SINGD(Net(), 0.02)
    except ValueError as error:
        return str(error)
    return ""


def alone(rank: int) -> list[Tensor]:
    """Every process trains a model of its own."""
    model = Net(seed=rank)
    optimizer = SINGD(model, 0.02, process_group=False, update_interval=INTERVAL)
    loop(model, optimizer, data, total=1.0)
    return values(model)


def by_group(rank: int, world: int) -> list[Tensor]:
    """No wrapper: the gradients are averaged by hand, and the group is named."""
    model = Net()
    settings = {"structures": Dense(), "damping": 0.01, "update_interval": INTERVAL}
    optimizer = SINGD(model, 0.02, process_group=dist.group.WORLD, **settings)
    for step in range(STEPS):
        X, Y = share(step, rank, world)
        optimizer.zero_grad()
        loss_of(model(X), Y).backward()
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world
        optimizer.step()
    return values(model)
