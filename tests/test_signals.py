"""The ring: what goes in comes out, in order, late on a device and at once on a CPU."""

import pytest
import torch

from lightning_radam.monitor.signals import Signal, SignalRing


def test_a_cpu_answers_at_once() -> None:
    ring = SignalRing(torch.device("cpu"))
    for step in range(5):
        ring.push(step, torch.tensor(step / 2), torch.tensor(1.0))
        assert list(ring.pop()) == [Signal(step, step / 2, 1.0)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_hands_out_every_step_and_never_waits() -> None:
    ring = SignalRing(torch.device("cuda"), every=4)
    seen: list[Signal] = []
    values = torch.arange(100.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(100):
            ring.push(step, values[step], None)
            seen += ring.pop()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seen += ring.pop(wait=True)
    assert seen == [Signal(step, float(step), None) for step in range(100)]


class _Elsewhere(SignalRing):
    """A ring on the CPU that behaves as on a device without streams."""

    def __init__(self, every: int) -> None:
        super().__init__(torch.device("cpu"))
        self._every = every
        self._halves = torch.full((2, every, 2), torch.nan)


def test_other_devices_answer_when_a_half_is_full() -> None:
    ring = _Elsewhere(every=3)
    seen = []
    for step in range(10):
        ring.push(step, torch.tensor(float(step)), None)
        seen.append([signal.step for signal in ring.pop()])
    assert seen == [[], [], [0, 1, 2], [], [], [3, 4, 5], [], [], [6, 7, 8], []]
    assert [signal.step for signal in ring.pop(wait=True)] == [9]
    assert list(ring.pop(wait=True)) == []


def test_a_norm_that_is_nan_is_not_a_missing_norm() -> None:
    ring = SignalRing(torch.device("cpu"))
    ring.push(0, torch.tensor(1.0), torch.tensor(float("nan")))
    ring.push(1, torch.tensor(1.0), None)
    first, second = ring.pop()
    assert first.grad_norm != first.grad_norm
    assert second.grad_norm is None
