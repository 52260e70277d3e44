"""What can be done about trouble: drop the update, lower the lr, roll back, stop."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_radam.monitor.signals import local

__all__ = [
    "LearningRateCut",
    "Reaction",
    "RunningStatistics",
    "Snapshots",
    "UnstableTraining",
    "drop_update",
    "keep_update",
]

Reaction = Literal["log", "skip", "lower_lr", "rollback", "stop"]

_EXIT_CODE = 3


class UnstableTraining(SystemExit):
    """Ends the training, and with it the process, with exit code 3.

    Args:
        message: What happened, and where the checkpoint is.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


# Dropping an update ---------------------------------------------------------------------------


def drop_update(
    optimizer: Optimizer, params: Iterable[Tensor], bad: Tensor, *, scaled: bool = False
) -> None:
    """Have the optimizer's next step do nothing where `bad` is True; nobody waits for the device.

    RAdam and PyTorch's fused optimizers take the flag themselves. Others lose their gradients: on
    a CPU altogether, which leaves moments and step counts alone too; on another device, where the
    flag cannot be read in time, the gradients become 0, so that momentum still moves the weights
    once. A gradient is never multiplied by 0, since NaN times 0 is NaN.

    Args:
        optimizer: The optimizer that is about to step.
        params: Its parameters.
        bad: Boolean scalar on the device.
        scaled: Whether a GradScaler stands between. It sets the flag of fused optimizers itself,
            when it sees an infinity.
    """
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # GradScaler's own question
    if hasattr(type(optimizer), "found_inf") or (fused and not scaled):
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        return
    on_cpu = bad.device.type == "cpu"
    if on_cpu and not bad:
        return
    for param in params:
        if param.grad is None:
            continue
        if fused:
            local(param.grad).masked_fill_(bad, torch.inf)
        elif on_cpu:
            param.grad = None
        else:
            gradient = local(param.grad)
            gradient.masked_fill_(bad.to(gradient.device, non_blocking=True), 0.0)


def keep_update(optimizer: Optimizer) -> None:
    """Take `drop_update`'s flag back, for the next step."""
    if getattr(optimizer, "found_inf", None) is not None:
        optimizer.found_inf = None  # type: ignore[attr-defined]


class RunningStatistics:
    """Undo what the batches of a dropped update did to running means and variances.

    A batch with a NaN spoils batch norm's running mean in the forward pass already, where dropping
    the update comes too late: every later mean is NaN too, and with it every validation.

    Args:
        module: Its buffers `running_mean` and `running_var` are looked after.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> statistics = RunningStatistics(norm)
        >>> _ = norm(torch.tensor([[1.0], [torch.nan]]))
        >>> statistics.settle(torch.tensor(True))
        >>> norm.running_mean
        tensor([0.])
    """

    def __init__(self, module: nn.Module) -> None:
        found = [
            local(buffer)
            for name, buffer in module.named_buffers()
            if name.rpartition(".")[2] in ("running_mean", "running_var")
        ]
        self._buffers = [buffer for buffer in found if buffer.device == found[0].device]
        self._sizes = [len(buffer) for buffer in self._buffers]
        self._kept = self._read()

    @torch.no_grad()
    def settle(self, bad: Tensor) -> None:
        """Go back to the last step's values where `bad` is True, and else keep these."""
        now = self._read()
        if bad.device.type == "cpu" and not bad:
            self._kept = now
        elif self._buffers:
            self._kept = torch.where(bad, self._kept, now)
            torch._foreach_copy_(self._buffers, list(self._kept.split(self._sizes)))

    def _read(self) -> Tensor:
        return torch.cat(self._buffers) if self._buffers else torch.empty(0)


# Lowering the learning rate -------------------------------------------------------------------


class LearningRateCut:
    """A factor on the learning rate that falls at each cut and recovers by itself.

    The schedule does not see it: the factor is on the groups' `lr` during an update only.

    Args:
        factor: What a cut multiplies by, in (0, 1).
        floor: The least product of cuts, in (0, 1].
        recovery_steps: Updates after which one cut is undone, >= 1; the factor grows evenly on a
            log scale.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> cut = LearningRateCut(factor=0.5, floor=0.3, recovery_steps=2)
        >>> cut.cut(), cut.cut(), cut.recover()
        (0.5, 0.3, 0.4242640687119285)
    """

    def __init__(self, factor: float, floor: float, recovery_steps: int) -> None:
        if not 0 < factor < 1:
            raise ValueError(f"lr_factor={factor!r} must lie in (0, 1); 0.5 halves the lr")
        if not 0 < floor <= 1:
            raise ValueError(f"lr_floor={floor!r} must lie in (0, 1], as a share of the lr")
        if recovery_steps < 1:
            raise ValueError(f"lr_recovery_steps={recovery_steps!r} must be at least 1 update")
        self.factor, self.floor, self.recovery_steps = factor, floor, recovery_steps
        self.scale = 1.0
        self._scheduled: dict[Optimizer, list[Any]] = {}

    def cut(self) -> float:
        """Lower the factor once, and return it."""
        self.scale = max(self.floor, self.scale * self.factor)
        return self.scale

    def recover(self) -> float:
        """Take one update's step back towards 1, and return the factor."""
        self.scale = min(1.0, self.scale * self.factor ** (-1 / self.recovery_steps))
        return self.scale

    def apply(self, optimizer: Optimizer) -> None:
        """Multiply the groups' learning rates."""
        if self.scale < 1:
            self._scheduled[optimizer] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.scale

    def undo(self, optimizer: Optimizer) -> None:
        """Put back what the schedule had set."""
        scheduled = self._scheduled.pop(optimizer, [])
        for group, lr in zip(optimizer.param_groups, scheduled, strict=False):
            group["lr"] = lr


# Going back -----------------------------------------------------------------------------------


class _Snapshot(NamedTuple):
    """The module's tensors by name, and each optimizer's state by parameter."""

    step: int
    tensors: dict[str, Tensor]
    states: list[dict[Any, dict[str, Any]]]


class Snapshots:
    """Copies of the training state in the host's memory, of which the last good one is restored.

    A copy counts as good once the next is made without trouble in between: trouble is often in
    the weights some steps before it shows. Two copies are held, each as large as the weights and
    the optimizer's state together.

    Args:
        module: Its parameters and buffers are kept.
        optimizers: Their state is kept; their groups, where the schedule lives, are not.
        step: The step that is next.
    """

    def __init__(self, module: nn.Module, optimizers: Sequence[Optimizer], step: int = 0) -> None:
        self._module, self._optimizers = module, optimizers
        self._good = self._candidate = self._copy(step)
        self._quiet = True

    @property
    def step(self) -> int:
        """When the latest copy was made."""
        return self._candidate.step

    def trouble(self) -> None:
        """Hear of an event: the latest copy may be bad already."""
        self._quiet = False

    def take(self, step: int) -> None:
        """Copy the state, and promote the copy before it if all has been quiet since."""
        if self._quiet:
            self._good = self._candidate
        self._candidate = self._copy(step)
        self._quiet = True

    @torch.no_grad()
    def restore(self) -> int:
        """Go back to the last good copy, and return its step."""
        for name, tensor in _named_tensors(self._module):
            if name in self._good.tensors:
                local(tensor).copy_(self._good.tensors[name], non_blocking=True)
        for optimizer, kept in zip(self._optimizers, self._good.states, strict=True):
            _settle(optimizer)
            for param in list(optimizer.state):
                if param not in kept:
                    del optimizer.state[param]  # it had not been updated yet
                    continue
                state = optimizer.state[param]
                for key, value in kept[param].items():
                    if isinstance(value, Tensor):
                        local(state[key]).copy_(value, non_blocking=True)
                    else:
                        state[key] = copy.deepcopy(value)
        self._candidate = self._good
        self._quiet = True
        return self._good.step

    def _copy(self, step: int) -> _Snapshot:
        for optimizer in self._optimizers:
            _settle(optimizer)
        return _Snapshot(
            step,
            {name: _to_host(tensor) for name, tensor in _named_tensors(self._module)},
            [
                {
                    param: {
                        key: _to_host(value) if isinstance(value, Tensor) else copy.deepcopy(value)
                        for key, value in state.items()
                    }
                    for param, state in optimizer.state.items()
                }
                for optimizer in self._optimizers
            ],
        )


def _settle(optimizer: Optimizer) -> None:
    # RAdam corrects the step counts of dropped updates late, at the latest here.
    optimizer.state_dict()


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _to_host(tensor: Tensor) -> Tensor:
    tensor = local(tensor.detach())
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
