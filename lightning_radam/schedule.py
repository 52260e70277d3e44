"""Warm-up, then decay: keras-radam's learning-rate schedule as a function and as a scheduler."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Decay", "WarmupDecayLR", "warmup_decay"]

Decay = Literal["linear", "cosine", "constant"]


def warmup_decay(
    step: int,
    *,
    base_lr: float,
    total_steps: int,
    warmup_proportion: float = 0.1,
    min_lr: float = 0.0,
    decay: Decay = "linear",
    warmup_steps: float | None = None,
) -> float:
    r"""Return the learning rate of one optimizer update: a linear rise, then a fall.

    With `w = total_steps * warmup_proportion`, which may be fractional,
    `d = max(total_steps - w, 1)` and `s = min(t - w, d)`:

    .. math::
        lr_t &= lr \cdot t / w                                    && t \le w             \\
        lr_t &= lr + (lr_{min} - lr) / d \cdot s                  && t > w, \text{linear} \\
        lr_t &= lr_{min} + (lr - lr_{min}) (1 + \cos(\pi s / d)) / 2  && t > w, \text{cosine} \\
        lr_t &= lr                                                && t > w, \text{constant}

    Args:
        step: The update `t`, counted from 1.
        base_lr: The peak learning rate, >= 0.
        total_steps: Length of the schedule in optimizer updates, >= 1.
        warmup_proportion: Share of the schedule that warms up, in [0, 1].
        min_lr: The learning rate at and after `total_steps`, absolute, >= 0; unused by "constant".
        decay: Shape of the fall: "linear" (keras-radam's), "cosine" or "constant" (none).
        warmup_steps: Length `w` of the warm-up in updates, in place of `warmup_proportion`.

    Returns:
        The learning rate of update `step`.

    Raises:
        ValueError: If `step` is below 1, or `decay` is another word.

    Example:
        >>> run = {"base_lr": 1.0, "total_steps": 5, "warmup_proportion": 0.4}
        >>> [round(warmup_decay(t, **run), 2) for t in range(1, 7)]
        [0.5, 1.0, 0.67, 0.33, 0.0, 0.0]
        >>> [round(warmup_decay(t, decay="cosine", **run), 2) for t in range(1, 7)]
        [0.5, 1.0, 0.75, 0.25, 0.0, 0.0]

    Source:
        CyberZHG/keras-radam 0.20.0, `keras_radam/optimizer_v2.py`: "linear" is its arithmetic in
        its order, so that the results agree to the last bit.
    """
    if step < 1:
        raise ValueError(f"step={step!r} must be 1 or more: updates are counted from 1")
    warmup = total_steps * warmup_proportion if warmup_steps is None else warmup_steps
    if step <= warmup:
        return base_lr * (step / warmup)
    decay_steps = max(total_steps - warmup, 1)
    decayed = min(step - warmup, decay_steps)
    if decay == "linear":
        return base_lr + (min_lr - base_lr) / decay_steps * decayed
    if decay == "cosine":
        return min_lr + (base_lr - min_lr) * (1 + math.cos(math.pi * decayed / decay_steps)) / 2
    if decay == "constant":
        return base_lr
    raise _decay_error(decay)


class WarmupDecayLR(LRScheduler):
    """Set the learning rate of each parameter group by `warmup_decay`, once per optimizer update.

    Call `step()` after each `optimizer.step()`. Under Lightning, `configure_radam` arranges this
    (`interval="step"`). Each group keeps its own peak, the `lr` that it had when the scheduler was
    made; `min_lr` is absolute and shared, and a group whose peak lies below it stays at its peak.

    The saved state is the position alone, so a run that is resumed with another `total_steps`
    goes on upon the new curve. Past `total_steps` it stays where it ended, and warns once.

    Args:
        optimizer: The optimizer whose `lr` is set.
        total_steps: Length of the schedule in optimizer updates, >= 1.
        warmup_proportion: Share of the schedule that warms up, in [0, 1].
        min_lr: The learning rate at the end of the schedule, >= 0.
        decay: Shape of the fall: "linear" (keras-radam's), "cosine" or "constant".
        warmup_steps: Length of the warm-up in updates, >= 0, in place of `warmup_proportion`.

    Raises:
        ValueError: If a value lies outside its range.

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
        decay: Decay = "linear",
        warmup_steps: float | None = None,
    ) -> None:
        check_schedule(total_steps, warmup_proportion, min_lr, decay, warmup_steps)
        self.total_steps = total_steps
        self.warmup_proportion = warmup_proportion
        self.min_lr = min_lr
        self.decay: Decay = decay
        self.warmup_steps = (
            total_steps * warmup_proportion if warmup_steps is None else warmup_steps
        )
        self._said_spent = False
        super().__init__(optimizer)

    def lr_of(self, step: int, base_lr: float) -> float:
        """Return the learning rate of update `step` (from 1) for a group with this peak."""
        return warmup_decay(
            step,
            base_lr=base_lr,
            total_steps=self.total_steps,
            min_lr=min(self.min_lr, base_lr),
            decay=self.decay,
            warmup_steps=self.warmup_steps,
        )

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of the coming update for each parameter group."""
        # Lightning also steps after the last update; only an update beyond it is news.
        if self.last_epoch > self.total_steps and self.decay != "constant" and not self._said_spent:
            self._said_spent = True
            warnings.warn(
                f"the schedule's {self.total_steps} steps are spent: update {self.last_epoch} and "
                f"every further one trains at min_lr={self.min_lr:g}",
                stacklevel=3,
            )
        return [self.lr_of(self.last_epoch + 1, float(base_lr)) for base_lr in self.base_lrs]

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
        self._last_lr = [
            group["lr"].clone() if isinstance(group["lr"], torch.Tensor) else group["lr"]
            for group in self.optimizer.param_groups
        ]


def check_schedule(
    total_steps: int,
    warmup_proportion: float,
    min_lr: float,
    decay: str,
    warmup_steps: float | None,
) -> None:
    """Raise ValueError, with the value, its range and the remedy, unless all are allowed."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(
            f"total_steps={total_steps!r} must be a whole number of optimizer updates, >= 1; "
            "under Lightning, configure_radam(total_steps='auto') counts them"
        )
    if not 0.0 <= warmup_proportion <= 1.0:
        raise ValueError(
            f"warmup_proportion={warmup_proportion!r} must lie in [0, 1]: it is a share of "
            "total_steps; for a number of updates use warmup_steps"
        )
    if warmup_steps is not None and not 0.0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps!r} must lie between 0 and total_steps={total_steps}: "
            "it is a number of updates; for a share use warmup_proportion"
        )
    if not (min_lr >= 0.0 and math.isfinite(min_lr)):
        raise ValueError(f"min_lr={min_lr!r} must be a finite learning rate, >= 0")
    if decay not in get_args(Decay):
        raise _decay_error(decay)


def _decay_error(decay: str) -> ValueError:
    return ValueError(f"decay={decay!r} must be one of {', '.join(map(repr, get_args(Decay)))}")
