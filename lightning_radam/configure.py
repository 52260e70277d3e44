"""`configure_optimizers` in one line: RAdam with a schedule as long as the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningModule

from lightning_radam.errors import InputError
from lightning_radam.optimizer import RAdam
from lightning_radam.param_groups import weight_decay_groups
from lightning_radam.schedule import WarmupDecayLR

__all__ = ["RAdamConfig", "configure_radam"]


@dataclass
class RAdamConfig:
    """Everything that `configure_radam` can be told.

    Args:
        lr: Peak learning rate, > 0.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the root of the second moment, >= 0.
        weight_decay: Decoupled weight decay, >= 0; biases and norms never decay.
        total_steps: Length of the schedule in optimizer updates; "auto" is the length of the run.
        warmup_proportion: Share of the schedule that warms up, in [0, 1].
        min_lr: Learning rate at the end of the schedule, >= 0.
        variant: Which reference RAdam follows, see `RAdam`.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    total_steps: int | Literal["auto"] = "auto"
    warmup_proportion: float = 0.1
    min_lr: float = 0.0
    variant: Literal["torch", "liu2019", "keras"] = "torch"


def configure_radam(module: LightningModule, config: RAdamConfig | None = None) -> dict[str, Any]:
    """Build RAdam and its schedule for a module, in the form that Lightning wants.

    Args:
        module: The module to train, attached to a trainer unless `config.total_steps` is a number.
        config: The settings; None means all defaults.

    Returns:
        Lightning's dictionary: the optimizer, and the scheduler stepped after every update.

    Raises:
        InputError: If `total_steps` is "auto" and the trainer does not know the run's length.

    Example:
        >>> import torch
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(2, 1)
        ...     def configure_optimizers(self):
        ...         return configure_radam(self, RAdamConfig(lr=0.5, total_steps=100))
        >>> configured = Net().configure_optimizers()
        >>> configured["lr_scheduler"]["interval"]
        'step'
        >>> configured["lr_scheduler"]["scheduler"].get_last_lr()  # update 1 of a warm-up of 10
        [0.05, 0.05]
    """
    config = config or RAdamConfig()
    optimizer = RAdam(
        weight_decay_groups(module, config.weight_decay),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        variant=config.variant,
    )
    scheduler = WarmupDecayLR(
        optimizer,
        total_steps=_run_length(module) if config.total_steps == "auto" else config.total_steps,
        warmup_proportion=config.warmup_proportion,
        min_lr=config.min_lr,
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "radam/lr"},
    }


def _run_length(module: LightningModule) -> int:
    """Return the number of optimizer updates of the run that the module's trainer will make."""
    try:
        trainer = module.trainer
    except RuntimeError:
        raise InputError(
            "total_steps='auto' needs a trainer, and this module has none yet: "
            "give total_steps=N, the number of optimizer updates"
        ) from None
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise InputError(
            "total_steps='auto' needs a run with an end, but the trainer has max_epochs=-1 and no "
            "max_steps: set one of them, or total_steps=N, the number of optimizer updates"
        )
    return int(steps)
