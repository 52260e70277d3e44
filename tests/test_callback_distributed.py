"""Two processes on a CPU: any rank's trouble is everyone's, under DDP and FSDP2."""

import math
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.fsdp import fully_shard

from lightning_radam import InstabilityMonitor
from lightning_radam.monitor.incidents import read_incidents
from tests.boring import Faulty, smooth, trainer

EPOCHS = 3
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
fsdp2_on_cpu = pytest.mark.skipif(TORCH < (2, 7), reason="FSDP2 runs on a CPU from PyTorch 2.7 on")
# Batch by batch, on rank 1 only.
FAULTS = {0: ("loss", math.inf), 5: ("input", math.nan), 20: ("layer", math.nan)}


class Sharded(Faulty):
    """Without batch norm, whose buffers FSDP2 leaves to each rank."""

    def __init__(self, faults: dict[int, tuple[str, float]], rank: int | None) -> None:
        super().__init__(faults, rank)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2, 15), torch.nn.Tanh(), torch.nn.Linear(15, 1)
        )

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer, mesh=mesh)

    def on_after_backward(self) -> None:
        place, value = self.fault()
        if place == "layer":
            self.net[0].weight.grad.to_local()[0, 0] = value


class Counting(InstabilityMonitor):
    """Counts the reductions made in its own hook."""

    reductions = 0

    def on_before_optimizer_step(self, *args: Any) -> None:
        reduce = dist.all_reduce

        def counted(*given: Any, **settings: Any) -> Any:
            self.reductions += 1
            return reduce(*given, **settings)

        dist.all_reduce = counted
        try:
            super().on_before_optimizer_step(*args)
        finally:
            dist.all_reduce = reduce


def _rank(rank: int, folder: Path, port: int, kind: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "NODE_RANK": "0",
        "LOCAL_RANK": str(rank),
    }
    strategy: Strategy
    if kind == "ddp":
        strategy, model = DDPStrategy(process_group_backend="gloo"), Faulty(FAULTS, rank=1)
    else:
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
        model = Sharded(FAULTS, rank=1)
    monitor = Counting(dirpath=str(folder), on_warning="rollback")
    run = trainer(max_epochs=EPOCHS, strategy=strategy, devices=2, callbacks=[monitor])
    norms: list[torch.Tensor] = []
    take_in = monitor._take_in

    def spy(trainer: Any, run: Any, step: Any, row: torch.Tensor) -> Any:
        norms.append(row[: 2 + step.layers])
        return take_in(trainer, run, step, row)

    monitor._take_in = spy  # type: ignore[method-assign]
    run.fit(model, smooth())
    weights = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in model.state_dict().items()
    }
    found = {
        "weights": weights,
        "rows": torch.stack(norms),
        "dropped": monitor.dropped_updates,
        "reductions": monitor.reductions,
        "steps": run.global_step,
        "detector": monitor.state_dict()["streams"][0]["detector"],
    }
    torch.save(found, folder / f"{rank}.pt")


def two_ranks(folder: Path, kind: str) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (folder, port, kind), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=fsdp2_on_cpu)])
def test_trouble_on_one_rank_is_dropped_by_both(tmp_path: Path, kind: str) -> None:
    first, second = two_ranks(tmp_path, kind)
    assert first["dropped"] == second["dropped"] == 3
    assert first["reductions"] == second["reductions"] == first["steps"]  # one a step
    for name, tensor in first["weights"].items():
        assert tensor.isfinite().all(), name
        assert "running" in name or torch.equal(tensor, second["weights"][name]), name
    # Both see the same numbers, and so both decide alike.
    torch.testing.assert_close(first["rows"], second["rows"], rtol=0, atol=0, equal_nan=True)
    assert first["detector"] == second["detector"]
    found = [i for i in read_incidents(tmp_path / "incidents.jsonl") if i["kind"] == "non_finite"]
    assert {i["step"] for i in found} == {0, 5, 20}  # once: rank 0 writes
    # A gradient's norm is that of the whole gradient, not of a rank's part.
    total, layers = first["rows"][:, 1], first["rows"][:, 2:]
    good = total.isfinite()
    torch.testing.assert_close(total[good], layers[good].norm(dim=1))


def _norm(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_radam.monitor.signals import measure, owned_share

    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 1))
    x = torch.randn(8, 3)
    model(x).square().mean().backward()
    expected = [float(p.grad.norm()) for p in model.parameters()]
    model.zero_grad()
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))  # the other layer stays whole
    loss = model(x.chunk(2)[rank]).square().mean()
    loss.backward()
    for param in model[1].parameters():  # as DDP would
        dist.all_reduce(param.grad)
        param.grad /= 2
    params = list(model.parameters())
    row = measure(loss, params, torch.tensor(owned_share(params, 2)))
    torch.save((row, expected), folder / f"{rank}.pt")
    dist.destroy_process_group()


@fsdp2_on_cpu
@pytest.mark.filterwarnings("ignore")
def test_sharded_and_whole_gradients_have_one_norm(tmp_path: Path) -> None:
    mp.spawn(_norm, (tmp_path,), nprocs=2)
    for rank in range(2):
        row, expected = torch.load(tmp_path / f"{rank}.pt")
        assert row[2:].tolist() == pytest.approx(expected, rel=1e-5)
        assert float(row[1]) == pytest.approx(math.hypot(*expected), rel=1e-5)
