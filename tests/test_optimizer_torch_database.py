"""PyTorch's own optimizer test data base, run over RAdam."""

from __future__ import annotations

import re

import pytest
import torch
from torch.optim import lr_scheduler

from lightning_radam.optimizer import RAdam

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
from torch.testing._internal.common_optimizers import optim_db

INFO = {info.optim_cls.__name__: info for info in optim_db}
INPUTS = {i.desc: i.kwargs for i in INFO["RAdam"].optim_inputs_func(device="cpu")}
# The inputs of the data base that need a GPU only for being captured.
CAPTURABLE = {
    i.desc: i.kwargs
    for i in INFO["RAdam"].optim_inputs_func(device="cuda")
    if "capturable" in i.kwargs
}
ERRORS = {
    e.optimizer_error_input.desc: e
    for e in INFO["RAdam"].optim_error_inputs_func(device="cpu", dtype=torch.float32)
}
SCHEDULERS = [
    chain for name in ("RAdam", "SGD", "AdamW") for chain in INFO[name].scheduler_inputs
] + [
    [lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=30)],  # Cycles beta1, too.
    [lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=5)],
    [lambda o: lr_scheduler.CosineAnnealingLR(o, 30)],
    [lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7)],
    [lambda o: lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1))],
    [lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.9)],
    [lambda o: lr_scheduler.MultiStepLR(o, [5, 10])],
    [
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [10]
        )
    ],
    [
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
        )
    ],
]
KERNELS = [{"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}]


def train(optimizer_class, schedulers=(), steps=30, dtype=torch.float64, **settings):
    """The data base's toy: fit one output of a linear map, weight and bias in two groups."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((10, 5), (10,), (5,))
    )
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
    optimizer = optimizer_class(groups, **settings)
    chain = [scheduler(optimizer) for scheduler in schedulers]

    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).abs().pow(2).sum()
        if settings.get("maximize"):
            loss = -loss
        loss.backward()
        return loss

    losses = []
    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
        for scheduler in chain:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(losses[-1])
            else:
                scheduler.step()
    return weight, bias, losses


def torch_settings(kwargs):
    """The data base leaves torch.optim.RAdam's own default, which is not ours."""
    return {"decoupled_weight_decay": False} | kwargs


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_inputs(name, kernel, dtype):
    settings = torch_settings(INPUTS[name])
    ours = train(RAdam, dtype=dtype, **settings, **kernel)
    theirs = train(torch.optim.RAdam, dtype=dtype, **settings)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    tolerance = tolerance or {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(ours, theirs, **tolerance)
    assert abs(ours[2][-1]) < abs(ours[2][0])


@pytest.mark.parametrize("name", CAPTURABLE)
def test_capturable_inputs(name):
    settings = torch_settings(CAPTURABLE[name])
    ours = train(RAdam, **settings)
    theirs = train(torch.optim.RAdam, **(settings | {"capturable": False}))
    # torch computes with a float32 tensor lr in float32, even for float64 parameters.
    rtol = 1e-5 if isinstance(settings.get("lr"), torch.Tensor) else 1e-10
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("index", range(len(SCHEDULERS)))
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_schedulers(index, kernel):
    settings = {"decoupled_weight_decay": True, "weight_decay": 0.1, "lr": 0.02}
    ours = train(RAdam, SCHEDULERS[index], **settings, **kernel)
    theirs = train(torch.optim.RAdam, SCHEDULERS[index], **settings)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    error = ERRORS[name]
    given = error.optimizer_error_input
    params = [torch.nn.Parameter(torch.zeros(2))] if given.params is None else given.params
    if error.error_type is UserWarning:
        with pytest.warns(UserWarning, match=error.error_regex):
            RAdam(params, **given.kwargs)
        return
    with pytest.raises(error.error_type, match=error.error_regex):
        RAdam(params, **given.kwargs)


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = RAdam(table.parameters())
    table(torch.tensor([1])).sum().backward()
    message = (
        "RAdam does not support sparse gradients: a parameter of shape (10, 3) has one of layout "
        "torch.sparse_coo. Use sparse=False in nn.Embedding, or give that parameter to "
        "torch.optim.SparseAdam."
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        optimizer.step()
