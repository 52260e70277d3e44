"""RAdam on two processes gives the numbers of one: DDP, FSDP2, Lightning, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_radam.optimizer import RAdam

STEPS, SWITCH = 12, 4  # The switch lies before the rectification, at update 6.
VARIANTS = ("torch", "liu2019", "keras")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(FSDP|torch.distributed|barrier|_get_pg_default_device).*"
)


class Net(nn.Module):
    """Odd sizes, so that shards are uneven, and one too small for two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.last = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x))) * self.scale


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def optimizer_of(model: nn.Module, variant: str) -> RAdam:
    return RAdam(
        model.parameters(), lr=0.05, weight_decay=0.1, variant=variant, amsgrad=variant == "keras"
    )


def train(model: nn.Module, optimizer: RAdam, steps: range, rank: int = 0, ranks: int = 1) -> None:
    """Each rank has its share of every batch."""
    for step in steps:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        x = x.chunk(ranks)[rank]
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    options = dcp_state.StateDictOptions(full_state_dict=True)
    return dcp_state.get_model_state_dict(model, options=options)


def single(variant: str, steps: int = STEPS) -> dict[str, torch.Tensor]:
    model = net()
    train(model, optimizer_of(model, variant), range(steps))
    return model.state_dict()


def on_two_ranks(work: Callable[[int, Path], None], folder: Path) -> None:
    mp.spawn(_rank, (work, folder), nprocs=2)


def _rank(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    work(rank, folder)
    dist.destroy_process_group()


def ddp(rank: int, folder: Path) -> None:
    results = {}
    for variant in VARIANTS:
        model = DistributedDataParallel(net())
        train(model, optimizer_of(model, variant), range(STEPS), rank, 2)
        results[variant] = model.module.state_dict()
    torch.save(results, folder / f"{rank}.pt")


def fsdp(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for variant in VARIANTS:
        model = net()
        for layer in (model.first, model.last, model):
            fully_shard(layer, mesh=mesh)
        optimizer = optimizer_of(model, variant)
        train(model, optimizer, range(SWITCH), rank, 2)
        options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
        checkpoint = dcp_state.get_state_dict(model, optimizer, options=options)
        if rank == 0:
            torch.save(checkpoint, folder / f"{variant}.ckpt")
        train(model, optimizer, range(SWITCH, STEPS), rank, 2)
        results[variant] = weights(model)
    if rank == 0:
        torch.save(results, folder / "0.pt")


# The oldest torch that is allowed has an FSDP2 that runs on GPUs only.
needs_fsdp_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU"
)


@pytest.mark.parametrize("work", [ddp, pytest.param(fsdp, marks=needs_fsdp_on_cpu)])
def test_two_ranks_are_one(work, tmp_path):
    on_two_ranks(work, tmp_path)
    for file in tmp_path.glob("*.pt"):
        for variant, found in torch.load(file).items():
            expected = single(variant)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if work is fsdp:
        for variant in VARIANTS:
            goes_on_alone(variant, torch.load(tmp_path / f"{variant}.ckpt"))


def goes_on_alone(variant, checkpoint):
    """A checkpoint of two ranks, loaded on one."""
    model_state, optimizer_state = checkpoint
    model = net()
    optimizer = optimizer_of(model, variant)
    dcp_state.set_state_dict(
        model,
        optimizer,
        model_state_dict=model_state,
        optim_state_dict=optimizer_state,
    )
    assert {int(state["step"]) for state in optimizer.state.values()} == {SWITCH}
    train(model, optimizer, range(SWITCH, STEPS))
    torch.testing.assert_close(model.state_dict(), single(variant), rtol=1e-10, atol=1e-12)
