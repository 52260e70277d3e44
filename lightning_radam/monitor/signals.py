"""One row of numbers per optimizer step, read from the device without making it wait."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Signal", "SignalRing"]


class Signal(NamedTuple):
    """What is watched at one optimizer step: the loss, and the global gradient norm if known."""

    step: int
    loss: float
    grad_norm: float | None


class _Batch(NamedTuple):
    """Rows on their way to the host, readable once `arrived` has fired."""

    steps: list[int]
    rows: Tensor
    arrived: torch.cuda.Event | None


class SignalRing:
    """Carry losses and gradient norms from the device to the host.

    On a CPU a row is readable at once. On CUDA the rows gather in a ring on the device; each half
    of it travels to pinned memory on a side stream, and is handed out once it has arrived: some
    `every` steps late, and no step ever waits. Other devices copy each half when it is full.

    Args:
        device: Where the losses are.
        every: Steps per copy, >= 1; a CPU needs no ring and uses 1.

    Example:
        >>> ring = SignalRing(torch.device("cpu"))
        >>> ring.push(0, torch.tensor(0.5), None)
        >>> list(ring.pop())
        [Signal(step=0, loss=0.5, grad_norm=None)]
    """

    def __init__(self, device: torch.device, every: int = 8) -> None:
        self._cuda = device.type == "cuda"
        self._every = 1 if device.type == "cpu" else every
        self._halves = torch.full((2, self._every, 2), math.nan, device=device)
        self._left: list[torch.cuda.Event | None] = [None, None]
        self._half = 0
        self._steps: list[int] = []
        self._has_norm: dict[int, bool] = {}
        self._travelling: deque[_Batch] = deque()
        self._stream = torch.cuda.Stream(device) if self._cuda else None

    def push(self, step: int, loss: Tensor, grad_norm: Tensor | None) -> None:
        """Write one step's values; launches copies on the device and waits for nothing."""
        left = self._left[self._half]
        if not self._steps and left is not None:
            torch.cuda.current_stream().wait_event(left)  # the device's queue waits, not we
        row = self._halves[self._half, len(self._steps)]
        row[0].copy_(loss)
        if grad_norm is not None:
            row[1].copy_(grad_norm)
        self._steps.append(step)
        self._has_norm[step] = grad_norm is not None
        if len(self._steps) == self._every:
            self._send()

    def pop(self, *, wait: bool = False) -> Iterator[Signal]:
        """Hand out the steps that have arrived, in order.

        Args:
            wait: Wait for every step pushed so far. For the end of a run.
        """
        if wait and self._steps:
            self._send()
        while self._travelling:
            batch = self._travelling[0]
            if batch.arrived is not None:
                if wait:
                    batch.arrived.synchronize()
                elif not batch.arrived.query():
                    return
            self._travelling.popleft()
            for step, (loss, norm) in zip(batch.steps, batch.rows.tolist(), strict=True):
                yield Signal(step, loss, norm if self._has_norm.pop(step) else None)

    def _send(self) -> None:
        rows = self._halves[self._half, : len(self._steps)]
        arrived: torch.cuda.Event | None = None
        if self._stream is not None:
            host = torch.empty(rows.shape, pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                host.copy_(rows, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(self._stream)
        else:
            host = rows.to("cpu", copy=True)
        self._left[self._half] = arrived
        self._travelling.append(_Batch(self._steps, host, arrived))
        self._steps = []
        self._half = 1 - self._half
