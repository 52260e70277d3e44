"""Warm-up, then decay: keras-radam's learning-rate schedule as a function and as a scheduler."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["WarmupDecayLR", "warmup_decay"]


def warmup_decay(
    step: int,
    *,
    base_lr: float,
    total_steps: int,
    warmup_proportion: float = 0.1,
    min_lr: float = 0.0,
) -> float:
    r"""Return the learning rate of one optimizer update: a linear rise, then a linear fall.

    With `w = total_steps * warmup_proportion` (which may be fractional) and
    `d = max(total_steps - w, 1)`:

    .. math::
        lr_t = lr \cdot t / w                                   \quad (t \le w)
        lr_t = lr + (lr_{min} - lr) / d \cdot \min(t - w, d)    \quad (t > w)

    Args:
        step: The update `t`, counted from 1.
        base_lr: The peak learning rate, >= 0.
        total_steps: Length of the run in optimizer updates, >= 1.
        warmup_proportion: Share of the run that warms up, in [0, 1].
        min_lr: The learning rate at and after `total_steps`, absolute, >= 0.

    Returns:
        The learning rate of update `step`.

    Example:
        >>> run = {"base_lr": 1.0, "total_steps": 5, "warmup_proportion": 0.4}
        >>> [warmup_decay(t, **run) for t in range(1, 7)]
        [0.5, 1.0, 0.6666666666666667, 0.33333333333333337, 0.0, 0.0]

    Source:
        CyberZHG/keras-radam 0.20.0, `keras_radam/optimizer_v2.py`, in the same order of operations.
    """
    warmup_steps = total_steps * warmup_proportion
    if step <= warmup_steps:
        return base_lr * (step / warmup_steps)
    decay_steps = max(total_steps - warmup_steps, 1)
    decay_rate = (min_lr - base_lr) / decay_steps
    return base_lr + decay_rate * min(step - warmup_steps, decay_steps)


class WarmupDecayLR(LRScheduler):
    """Set the learning rate of each parameter group by `warmup_decay`, once per optimizer update.

    Call `step()` after each `optimizer.step()`. Under Lightning, `configure_radam` arranges this
    (`interval="step"`). Each group keeps its own peak, the `lr` that it had when the scheduler was
    made; `min_lr` is absolute and shared.

    Args:
        optimizer: The optimizer whose `lr` is set.
        total_steps: Length of the run in optimizer updates, >= 1.
        warmup_proportion: Share of the run that warms up, in [0, 1].
        min_lr: The learning rate at the end of the run, >= 0.

    Raises:
        ValueError: If a value lies outside its range.

    The saved state is the position alone, so a run that is resumed with another `total_steps`
    continues on the new curve.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = WarmupDecayLR(optimizer, total_steps=4, warmup_proportion=0.5)
        >>> lrs = []
        >>> for _ in range(4):
        ...     lrs.append(scheduler.get_last_lr()[0])
        ...     optimizer.step()
        ...     scheduler.step()
        >>> lrs
        [0.5, 1.0, 0.5, 0.0]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_proportion: float = 0.1,
        min_lr: float = 0.0,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(
                f"total_steps={total_steps!r} must be a whole number of optimizer updates, >= 1; "
                "under Lightning, configure_radam(total_steps='auto') counts them"
            )
        if not 0.0 <= warmup_proportion <= 1.0:
            raise ValueError(
                f"warmup_proportion={warmup_proportion!r} must lie in [0, 1]: it is a share of "
                "total_steps, not a number of steps"
            )
        if not (min_lr >= 0.0 and math.isfinite(min_lr)):
            raise ValueError(f"min_lr={min_lr!r} must be a finite learning rate, >= 0")
        self.total_steps = total_steps
        self.warmup_proportion = warmup_proportion
        self.min_lr = min_lr
        self._said_spent = False
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of the coming update for each parameter group."""
        # Lightning also steps after the last update; only an update beyond it is news.
        if self.last_epoch > self.total_steps and not self._said_spent:
            self._said_spent = True
            warnings.warn(
                f"the schedule's {self.total_steps} steps are spent: update {self.last_epoch} and "
                f"every further one trains at min_lr={self.min_lr:g}",
                stacklevel=3,
            )
        return [
            warmup_decay(
                self.last_epoch + 1,
                base_lr=float(base_lr),
                total_steps=self.total_steps,
                warmup_proportion=self.warmup_proportion,
                min_lr=self.min_lr,
            )
            for base_lr in self.base_lrs
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the schedule: the number of updates done."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position and set the learning rates that this schedule has there."""
        self.last_epoch = int(state_dict["last_epoch"])
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
