"""What is measured at a step, and the queue that carries it to the host."""

import math

import pytest
import torch
from torch import nn

from lightning_radam.monitor.signals import SignalQueue, StepLoss, measure, owned_share


def numbers(queue: SignalQueue[int], *, wait: bool = False) -> list[tuple[int, list[float]]]:
    return [(step, row.tolist()) for step, row in queue.pop(wait=wait)]


def test_a_cpu_answers_at_once() -> None:
    queue: SignalQueue[int] = SignalQueue(torch.device("cpu"))
    for step in range(5):
        queue.push(step, torch.tensor([step / 2, 1.0]))
        assert numbers(queue) == [(step, [step / 2, 1.0])]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_hands_out_every_step_late_and_without_a_sync() -> None:
    queue: SignalQueue[int] = SignalQueue(torch.device("cuda"), every=4)
    seen = []
    values = torch.arange(100.0, device="cuda")[:, None]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(100):
            queue.push(step, values[step])
            late = [step for step, _ in queue.pop()]
            # The same delay on every rank: the four rows before the last four.
            assert late == (list(range(step - 7, step - 3)) if step % 4 == 3 and step > 3 else [])
            seen += late
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == list(range(96))
    assert numbers(queue, wait=True) == [(step, [float(step)]) for step in range(96, 100)]


def test_other_devices_answer_when_enough_have_gathered() -> None:
    queue: SignalQueue[int] = SignalQueue(torch.device("cpu"), every=3)
    seen = []
    for step in range(10):
        queue.push(step, torch.full((step,), float(step)))  # rows may differ in length
        seen.append(numbers(queue))
    rows = [(step, [float(step)] * step) for step in range(10)]
    assert seen == [[], [], rows[:3], [], [], rows[3:6], [], [], rows[6:9], []]
    assert numbers(queue, wait=True) == rows[9:]
    assert numbers(queue, wait=True) == []


def test_the_loss_of_a_step_is_the_mean_of_its_backward_passes() -> None:
    loss = StepLoss()
    assert loss.take() is None
    for value in (1.0, 2.0, 6.0):
        loss.start_batch()
        loss.add(torch.tensor(value, dtype=torch.bfloat16, requires_grad=True))
    assert loss.take() == 3.0
    assert loss.take() == 3.0  # for a second optimizer of the same batch
    loss.start_batch()
    assert loss.is_empty
    assert loss.take() is None


def parameters(*gradients: torch.Tensor | None) -> list[torch.Tensor]:
    params = []
    for gradient in gradients:
        like = torch.ones(1) if gradient is None else gradient
        param = nn.Parameter(torch.zeros_like(like.to_dense()))
        param.grad = gradient
        params.append(param)
    return params


def test_norms_are_those_of_pytorch() -> None:
    gradients = [torch.randn(3, 4), torch.randn(5).double(), torch.randn(2, 2)]
    row = measure(torch.tensor(0.5), parameters(*gradients, None))
    singles = [gradient.double().norm() for gradient in gradients]
    expected = [0.5, torch.stack(singles).norm(), *singles, 0.0]
    assert row.tolist() == pytest.approx([float(x) for x in expected], rel=1e-6)


def test_half_precision_does_not_overflow() -> None:
    gradient = torch.full((100,), 6e4, dtype=torch.float16)
    assert measure(torch.tensor(0.0), parameters(gradient))[1] == pytest.approx(6e5, rel=1e-3)


def test_sparse_gradients_have_a_norm() -> None:
    index, values = torch.tensor([[1, 1]]), torch.tensor([1.0, 2.0])
    gradient = torch.sparse_coo_tensor(index, values, (4,), check_invariants=True)
    assert measure(torch.tensor(0.0), parameters(gradient)).tolist() == [0.0, 3.0, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_coordinate_of_one_layer_shows(bad: float) -> None:
    gradient = torch.zeros(5)
    gradient[3] = bad
    loss, total, fine, broken = measure(torch.tensor(1.0), parameters(torch.ones(1), gradient))
    assert (loss, fine) == (1.0, 1.0)
    assert not total.isfinite()
    assert not broken.isfinite()


def test_without_any_gradient_the_norm_is_0() -> None:
    assert measure(torch.tensor(1.0), parameters(None, None)).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_plain_tensor_is_on_every_rank() -> None:
    assert owned_share([torch.zeros(2), torch.zeros(3)], 4) == [0.25, 0.25]
