"""What only a GPU can show: no synchronization, graphs, the fused CUDA kernels' numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_radam.optimizer import RAdam

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

VARIANTS = ("torch", "liu2019", "keras")
STEPS = 12


def params(device="cuda", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4,), (), (1000, 70)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def set_grads(parameters, step):
    generator = torch.Generator().manual_seed(step)
    for param in parameters:
        grad = torch.randn(param.shape, generator=generator).to(param.device, param.dtype)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def train(parameters, optimizer, steps=STEPS):
    for step in range(steps):
        set_grads(parameters, step)
        optimizer.step()
    return [param.detach().cpu() for param in parameters]


@pytest.fixture
def no_sync():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(
    "kernel", [{"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}], ids=str
)
def test_gpu_and_cpu_agree(variant, amsgrad, kernel):
    settings = {"lr": 0.02, "weight_decay": 0.1, "variant": variant, "amsgrad": amsgrad}
    expected = train(cpu := params("cpu"), RAdam(cpu, **settings))
    found = train(gpu := params(), RAdam(gpu, **settings, **kernel))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("lr", ["number", "cpu", "cuda"])
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("kernel", [{}, {"foreach": True}], ids=str)
def test_steps_do_not_wait(lr, flag, kernel, no_sync):
    value = 0.02 if lr == "number" else torch.tensor(0.02, device=lr)
    parameters = params(dtype=torch.float32)
    torch.cuda.set_sync_debug_mode("default")
    optimizer = RAdam(parameters, lr=value, weight_decay=0.1, **kernel)
    set_grads(parameters, 0)
    zero = torch.zeros((), device="cuda")
    if flag and kernel:
        pytest.skip("only the fused kernels take the flag on the device")
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(STEPS):
        optimizer.found_inf = zero if flag else None
        optimizer.step()


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_dropped_on_the_device(variant):
    def run(flagged):
        parameters = params()
        optimizer = RAdam(parameters, variant=variant)
        for step in range(STEPS):
            set_grads(parameters, step)
            drop = step in (0, 3, 7, STEPS - 1)
            if drop and not flagged:
                continue
            if flagged:
                optimizer.found_inf = torch.tensor(float(drop), device="cuda")
            optimizer.step()
        return [p.detach() for p in parameters], optimizer.state_dict()["state"]

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("decoupled", [True, False])
def test_captured_in_a_graph(variant, decoupled):
    settings = {"weight_decay": 0.1, "variant": variant, "decoupled_weight_decay": decoupled}
    lr = torch.tensor(0.02, device="cuda")
    expected = train(plain := params("cpu"), RAdam(plain, lr=0.02, **settings))

    parameters = params()
    start = copy.deepcopy([p.detach() for p in parameters])
    optimizer = RAdam(parameters, lr=lr, capturable=True, **settings)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        set_grads(parameters, 0)
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    with torch.no_grad():  # Back to the beginning: capturing ran a step, warming up another.
        for param, value in zip(parameters, start, strict=True):
            param.copy_(value)
            for state in optimizer.state[param].values():
                state.zero_()
    for step in range(STEPS):
        set_grads(parameters, step)
        graph.replay()
    found = [param.detach().cpu() for param in parameters]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_capturing_without_capturable_is_refused():
    parameters = params()
    set_grads(parameters, 0)
    optimizer = RAdam(parameters)
    optimizer.step()
    message = r"capturable=False: .* Set capturable=True\."
    with (
        pytest.raises(RuntimeError, match=message),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


def test_adamw_fused_state_moves_over():
    """AdamW(fused=True) keeps its steps on the device; here they come to the host."""
    parameters = params()
    first = torch.optim.AdamW(parameters, fused=True)
    train(parameters, first, 3)
    second = RAdam(parameters)
    second.load_state_dict(first.state_dict())
    train(parameters, second, 1)
    assert all(state["step"].is_cpu for state in second.state.values())
    first.load_state_dict(second.state_dict())
    train(parameters, first, 1)
    assert all(state["step"] == 5 for state in first.state.values())
