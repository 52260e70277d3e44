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
# The oldest torch that is allowed has an FSDP2 that runs on GPUs only.
fsdp2_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU"
)
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


def true_norms(model: Faulty) -> list[float]:
    """The norm of each parameter's whole gradient."""
    gradients = [param.grad for param in model.parameters()]
    whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
    return [float(gradient.norm()) for gradient in whole]


class Counting(InstabilityMonitor):
    """Counts the reductions in its hook, and keeps the norms of one step as others see them."""

    reductions = 0
    norms: tuple[float, ...] = ()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 1:
            self.norms = tuple(true_norms(module))
        reduce = dist.all_reduce

        def counted(*given: Any, **settings: Any) -> Any:
            self.reductions += 1
            return reduce(*given, **settings)

        dist.all_reduce = counted
        try:
            super().on_before_optimizer_step(trainer, module, optimizer)
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
    rows: list[torch.Tensor] = []
    take_in = monitor._take_in

    def spy(trainer: Any, run: Any, step: Any, row: torch.Tensor) -> Any:
        rows.append(row[: 2 + step.layers])
        return take_in(trainer, run, step, row)

    monitor._take_in = spy  # type: ignore[method-assign]
    run.fit(model, smooth())
    weights = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in model.state_dict().items()
    }
    found = {
        "weights": weights,
        "rows": torch.stack(rows),
        "norms": monitor.norms,
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
    _, total, *layers = first["rows"][1].tolist()
    expected = pytest.approx(sorted(first["norms"]), rel=1e-5, abs=1e-6)
    assert sorted(layers) == expected  # the optimizer groups them otherwise
    assert total == pytest.approx(math.hypot(*first["norms"]), rel=1e-5)
