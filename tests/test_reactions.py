"""Reactions without a trainer: what is dropped, lowered and brought back."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_radam import RAdam
from lightning_radam.monitor.reactions import (
    LearningRateCut,
    RunningStatistics,
    Snapshots,
    UnstableTraining,
    drop_update,
    keep_update,
)

OPTIMIZERS = {
    "RAdam": lambda params: RAdam(params, lr=0.1),
    "RAdam, foreach": lambda params: RAdam(params, lr=0.1, fused=False, foreach=True),
    "RAdam, single": lambda params: RAdam(params, lr=0.1, fused=False, foreach=False),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "AdamW, fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "AdamW, foreach": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "torch RAdam": lambda params: torch.optim.RAdam(params, lr=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    return copy.deepcopy({"model": model.state_dict(), "state": optimizer.state_dict()["state"]})


def assert_same(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_dropped_update_leaves_no_trace(name: str, bad: float) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(7):
        gradients(model, seed)
        optimizer.step()
    before = state(model, optimizer)
    gradients(model, 7)
    model[0].weight.grad[0, 0] = bad
    drop_update(optimizer, model.parameters(), torch.tensor(True))
    optimizer.step()
    keep_update(optimizer)
    assert_same(state(model, optimizer), before)
    # And the next one is as if the bad one had not been.
    twin = net()
    other = OPTIMIZERS[name](twin.parameters())
    for seed in [*range(7), 8]:
        gradients(twin, seed)
        other.step()
    gradients(model, 8)
    drop_update(optimizer, model.parameters(), torch.tensor(False))
    optimizer.step()
    assert_same(state(model, optimizer), state(twin, other))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gpu_drops_without_a_sync(name: str) -> None:
    model = net().cuda()
    if name == "RAdam, single" or name == "RAdam, foreach":
        pytest.skip("RAdam without its fused kernels reads the flag on the host")
    optimizer = OPTIMIZERS[name](model.parameters())
    for seed in range(7):
        for param in model.parameters():
            param.grad = torch.full_like(param, seed)
        optimizer.step()
    model[0].weight.grad[0, 0] = math.nan
    bad = torch.tensor(True, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        drop_update(optimizer, model.parameters(), bad)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("name", ["AdamW", "AdamW, fused", "RAdam"])
def test_a_grad_scaler_in_between_drops_too(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(1))
    gradients(model, 0)
    before = copy.deepcopy(model.state_dict())
    if name != "AdamW, fused":  # which unscales by itself
        scaler.unscale_(optimizer)
    # Finite gradients, so that the scaler has no reason of its own.
    drop_update(optimizer, model.parameters(), torch.tensor(True), scaled=True)
    scaler.step(optimizer)
    scaler.update()
    assert_same(model.state_dict(), before)


def test_the_lr_falls_to_the_floor_and_recovers() -> None:
    cut = LearningRateCut(factor=0.5, floor=0.2, recovery_steps=10)
    assert [cut.cut() for _ in range(4)] == [0.5, 0.25, 0.2, 0.2]
    cut.scale = 0.5
    scales = [cut.recover() for _ in range(12)]
    assert scales[4] == pytest.approx(math.sqrt(0.5))  # half-way, on a log scale
    assert scales[9:] == pytest.approx([1.0, 1.0, 1.0])
    assert scales[-1] == 1.0


def test_the_schedule_does_not_see_the_cut() -> None:
    params = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    lr = torch.tensor(0.5)
    groups = [{"params": params[:1], "lr": lr}, {"params": params[1:], "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    cut = LearningRateCut(factor=0.5, floor=0.1, recovery_steps=10)
    cut.apply(optimizer)
    assert optimizer.param_groups[1]["lr"] == 0.1
    cut.cut()
    cut.apply(optimizer)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.05]
    cut.undo(optimizer)
    cut.undo(optimizer)
    assert optimizer.param_groups[0]["lr"] is lr
    assert (lr, optimizer.param_groups[1]["lr"]) == (0.5, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.1, 10), r"lr_factor=1.0 must lie in \(0, 1\); 0.5 halves the lr"),
        ((0.5, 0.0, 10), r"lr_floor=0.0 must lie in \(0, 1\], as a share of the lr"),
        ((0.5, 0.1, 0), "lr_recovery_steps=0 must be at least 1 update"),
    ],
)
def test_bad_cuts_are_named(arguments: tuple[float, float, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRateCut(*arguments)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_going_back_is_complete(name: str) -> None:
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    snapshots = Snapshots(model, [optimizer], 0)
    start = state(model, optimizer)

    def steps(seeds: range) -> None:
        for seed in seeds:
            model(torch.randn(8, 3))  # moves the running statistics
            gradients(model, seed)
            optimizer.step()

    steps(range(3))
    assert snapshots.restore() == 0
    assert_same(state(model, optimizer), start)  # not even a step count is left
    steps(range(7))
    snapshots.take(7)
    good = state(model, optimizer)
    steps(range(7, 9))
    snapshots.take(9)  # now that of step 7 counts as good
    steps(range(9, 12))
    snapshots.trouble()
    snapshots.take(12)  # made in trouble: does not make that of step 9 good
    assert snapshots.step == 12
    assert snapshots.restore() == 7
    assert_same(state(model, optimizer), good)
    steps(range(7, 9))
    assert snapshots.restore() == 7  # as often as needed
    assert_same(state(model, optimizer), good)


def test_running_statistics_forget_a_dropped_batch() -> None:
    model = net()
    statistics = RunningStatistics(model)
    model(torch.randn(8, 3))
    statistics.settle(torch.tensor(False))
    kept = copy.deepcopy(model[1].state_dict())
    for bad in (math.nan, 1e30):  # finite, and as harmful
        model(torch.full((8, 3), bad))
        statistics.settle(torch.tensor(True))
        assert_same(model[1].running_mean, kept["running_mean"])
        assert_same(model[1].running_var, kept["running_var"])


def test_a_model_without_running_statistics_has_nothing_to_forget() -> None:
    RunningStatistics(nn.Linear(1, 1)).settle(torch.tensor(True))


def test_the_end_has_a_message_and_an_exit_code() -> None:
    end = UnstableTraining("because")
    assert isinstance(end, SystemExit)
    assert (str(end), end.code) == ("because", 3)
