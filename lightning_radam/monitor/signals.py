"""The loss and the gradient norms of an optimizer step, and their way to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["SignalQueue", "StepLoss", "local", "measure", "owned_share"]

Label = TypeVar("Label")

_HALF = {torch.float16, torch.bfloat16}


class StepLoss:
    """The mean loss of the backward passes that lead to one optimizer step.

    Example:
        >>> loss = StepLoss()
        >>> loss.add(torch.tensor(1.0))
        >>> loss.add(torch.tensor(2.0))
        >>> loss.take()
        tensor(1.5000)
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._taken = False

    @property
    def is_empty(self) -> bool:
        """Whether there has been no backward pass since the last step."""
        return self._count == 0

    def start_batch(self) -> None:
        """Forget a loss that a step has used; one of a batch still accumulating stays."""
        if self._taken:
            self._sum, self._count, self._taken = None, 0, False

    def add(self, loss: Tensor) -> None:
        """Take in the loss of one backward pass."""
        self.start_batch()
        loss = loss.detach().float()
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1

    def take(self) -> Tensor | None:
        """Return the mean, None if there was no backward pass; a second optimizer gets the same."""
        self._taken = True
        return None if self._sum is None else self._sum / self._count


def local(tensor: Tensor) -> Tensor:
    """Return this process' part of a DTensor, the values of a sparse tensor, or the tensor."""
    if hasattr(tensor, "to_local"):
        part: Tensor = tensor.to_local()
        return part
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def owned_share(params: Sequence[Tensor], world_size: int) -> list[float]:
    """Return, for each parameter, one over the number of processes that hold the same piece of it.

    Summed over all processes, squares weighted like this count every piece once: a plain tensor
    (DDP) is on all of them, a DTensor on as many as do not share it out.
    """
    shares = []
    for param in params:
        pieces = 1
        for dim, placement in enumerate(getattr(param, "placements", ())):
            if placement.is_shard():
                pieces *= param.device_mesh.size(dim)  # type: ignore[attr-defined]
        shares.append(pieces / world_size)
    return shares


@torch.no_grad()
def measure(loss: Tensor, params: Sequence[Tensor], share: Tensor | None = None) -> Tensor:
    """Return `[loss, global gradient norm, norm of each parameter's gradient]`, in float32.

    Nothing waits for the device. A non-finite gradient anywhere makes the global norm non-finite.

    Args:
        loss: Scalar.
        params: Parameters with a gradient, or without: their norm is 0.
        share: `owned_share` on the loss' device where there is more than one process. They then
            exchange everything in one sum, and all get the same numbers: the mean loss, the norms
            of the whole gradient.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> measure(torch.tensor(0.5), [weight])
        tensor([0.5000, 5.0000, 5.0000])
    """
    gradients = [local(p.grad) for p in params if p.grad is not None]
    norms = _norms(gradients, loss.device) if gradients else torch.empty(0, device=loss.device)
    if len(gradients) < len(params):
        zero, found = torch.zeros((), device=loss.device), iter(norms.unbind())
        norms = torch.stack([zero if p.grad is None else next(found) for p in params])
    loss = loss.detach().float().reshape(1)
    if share is not None:
        packed = torch.cat([loss / dist.get_world_size(), norms.square() * share])
        dist.all_reduce(packed)
        loss, norms = packed[:1], packed[1:].sqrt()
    return torch.cat([loss, torch.linalg.vector_norm(norms).reshape(1), norms])


def _norms(gradients: list[Tensor], device: torch.device) -> Tensor:
    # Half precision would overflow at 65504 or keep two digits; float64 must not be narrowed.
    dtypes = {gradient.dtype for gradient in gradients}
    dtype = torch.float32 if dtypes & _HALF and torch.float64 not in dtypes else None
    norms = torch._foreach_norm(gradients, 2, dtype)
    if device.type == "cpu":  # where reading a number is cheaper than stacking it
        return torch.tensor([norm.item() for norm in norms], dtype=torch.float32)
    return torch.stack([norm.to(device, torch.float32) for norm in norms])


class _Batch(NamedTuple):
    """Rows on their way to the host, there once `arrived` has fired."""

    labels: list[Any]
    lengths: list[int]
    source: Tensor  # kept: its memory must not be used again while it is being copied
    host: Tensor
    arrived: torch.cuda.Event | None


class SignalQueue(Generic[Label]):
    """Carry labelled rows of numbers from the device to the host, in order.

    On a CPU a row is readable at once. On CUDA, `every` rows travel together to pinned memory on a
    side stream, and are handed out when the next `every` are sent: 8 to 16 steps late, when they
    have long arrived, and at the same step on every rank, so that all ranks decide alike. Other
    devices copy `every` rows at a time.

    Args:
        device: Where the rows are.
        every: Rows per copy, >= 1; None is 1 on a CPU and 8 elsewhere.

    Example:
        >>> queue = SignalQueue(torch.device("cpu"))
        >>> queue.push("first", torch.tensor([0.5, 2.0]))
        >>> list(queue.pop())
        [('first', tensor([0.5000, 2.0000]))]
    """

    def __init__(self, device: torch.device, every: int | None = None) -> None:
        self._every = every or (1 if device.type == "cpu" else 8)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._labels: list[Label] = []
        self._rows: list[Tensor] = []
        self._travelling: deque[_Batch] = deque()

    def push(self, label: Label, row: Tensor) -> None:
        """Take in a row of any length; waits for nothing."""
        self._labels.append(label)
        self._rows.append(row)
        if len(self._rows) == self._every:
            self._send()

    def pop(self, *, wait: bool = False) -> Iterator[tuple[Label, Tensor]]:
        """Hand out what has arrived.

        Args:
            wait: Wait for every row pushed so far. For the end of an epoch or a run.
        """
        if wait and self._rows:
            self._send()
        held_back = 0 if wait or self._stream is None else 1
        while len(self._travelling) > held_back:
            batch = self._travelling.popleft()
            if batch.arrived is not None:
                batch.arrived.synchronize()
            yield from zip(batch.labels, batch.host.split(batch.lengths), strict=True)

    def _send(self) -> None:
        source = torch.cat(self._rows)
        host, arrived = source, None
        if self._stream is not None:
            host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._stream.wait_stream(torch.cuda.current_stream(source.device))
            with torch.cuda.stream(self._stream):
                host.copy_(source, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(self._stream)
        elif source.device.type != "cpu":
            host = source.cpu()
        lengths = [len(row) for row in self._rows]
        self._travelling.append(_Batch(self._labels, lengths, source, host, arrived))
        self._labels, self._rows = [], []
