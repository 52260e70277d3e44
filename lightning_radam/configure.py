"""`configure_optimizers` in one line: RAdam with a schedule as long as the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import nn

from lightning_radam.errors import InputError
from lightning_radam.optimizer import RAdam
from lightning_radam.param_groups import parameter_groups
from lightning_radam.schedule import Decay, WarmupDecayLR

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["RAdamConfig", "RAdamKeywords", "configure_radam"]


@dataclass
class RAdamConfig:
    """Everything that `configure_radam` can be told.

    Plain values only, so that it may stand in `save_hyperparameters()` and be read back from a
    checkpoint with `weights_only=True`. Numbers may come as text, since YAML readers take `1e-5`
    for a word.

    Args:
        lr: Peak learning rate, > 0.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the root of the second moment, >= 0.
        weight_decay: Decoupled weight decay, >= 0; biases and norms never decay.
        variant: Which reference RAdam follows: "torch", "liu2019" or "keras".
        total_steps: Length of the schedule in optimizer updates; "auto" is the length of the run.
        warmup_proportion: Share of the schedule that warms up, in [0, 1].
        warmup_steps: Length of the warm-up in updates, in place of `warmup_proportion`.
        min_lr: Learning rate at the end of the schedule, >= 0.
        decay: Shape of the fall: "linear", "cosine" or "constant".
        layer_decay: Factor on `lr` from one layer of a timm model to the one below, in (0, 1].
        head_lr_multiplier: Factor on `lr` for the classifier of a timm model, > 0.

    Raises:
        ValueError: If a number is no number. Ranges are checked where the values are used.

    Example:
        >>> RAdamConfig(lr="3e-4").lr
        0.0003
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    variant: Literal["torch", "liu2019", "keras"] = "torch"
    total_steps: int | Literal["auto"] = "auto"
    warmup_proportion: float = 0.1
    warmup_steps: float | None = None
    min_lr: float = 0.0
    decay: Decay = "linear"
    layer_decay: float = 1.0
    head_lr_multiplier: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and "float" in str(field.type):
                setattr(self, field.name, _number(field.name, value))
        self.betas = (float(self.betas[0]), float(self.betas[1]))


class RAdamKeywords(TypedDict, total=False):
    """The fields of `RAdamConfig` as keywords; see there."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    variant: Literal["torch", "liu2019", "keras"]
    total_steps: int | Literal["auto"]
    warmup_proportion: float
    warmup_steps: float | None
    min_lr: float
    decay: Decay
    layer_decay: float
    head_lr_multiplier: float


# Checkpoints that hold a configuration among their hyperparameters can then be read safely.
torch.serialization.add_safe_globals([RAdamConfig])


def configure_radam(
    module: nn.Module, config: RAdamConfig | None = None, **keywords: Unpack[RAdamKeywords]
) -> dict[str, Any]:
    """Build RAdam and its schedule for a module, in the form that Lightning wants.

    Args:
        module: The module to train: a LightningModule (of `lightning` or `pytorch_lightning`)
            attached to a trainer, or any module if `total_steps` is a number.
        config: The settings; None means all defaults.
        **keywords: Fields of `RAdamConfig`, which they replace.

    Returns:
        Lightning's dictionary: `"optimizer"`, and `"lr_scheduler"` with the `"scheduler"` stepped
        after every update. In a loop of your own, call `scheduler.step()` after
        `optimizer.step()`.

    Raises:
        TypeError: If a keyword is no field of `RAdamConfig`.
        ValueError: If a value lies outside its range.
        InputError: If `total_steps` is "auto" and the length of the run is not known.

    Example:
        >>> configured = configure_radam(nn.Linear(2, 1), lr=0.5, total_steps=100)
        >>> configured["lr_scheduler"]["interval"]
        'step'
        >>> configured["lr_scheduler"]["scheduler"].get_last_lr()  # update 1 of a warm-up of 10
        [0.05, 0.05]
    """
    _check_words(keywords)
    config = replace(config or RAdamConfig(), **keywords)
    optimizer = RAdam(
        parameter_groups(
            module,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            head_lr_multiplier=config.head_lr_multiplier,
        ),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        variant=config.variant,
    )
    scheduler = WarmupDecayLR(
        optimizer,
        total_steps=_run_length(module) if config.total_steps == "auto" else config.total_steps,
        warmup_proportion=config.warmup_proportion,
        min_lr=config.min_lr,
        decay=config.decay,
        warmup_steps=config.warmup_steps,
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "radam/lr"},
    }


def _run_length(module: nn.Module) -> int:
    """Return the number of optimizer updates of the run that the module's trainer will make."""
    try:
        trainer: Any = module.trainer
    except (AttributeError, RuntimeError):  # a plain module, or one without a trainer yet
        trainer = None
    # Asked of the class: reading the property builds the data loaders. Fabric's stand-in for a
    # trainer does not have it.
    if not hasattr(type(trainer), "estimated_stepping_batches"):
        raise InputError(
            "total_steps='auto' needs a trainer, and this module has none: "
            "give total_steps=N, the number of optimizer updates"
        )
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise InputError(
            "total_steps='auto' needs a run with an end, but the trainer has max_epochs=-1 and no "
            "max_steps: set one of them, or total_steps=N, the number of optimizer updates"
        )
    return int(steps)


def _check_words(keywords: RAdamKeywords) -> None:
    known = [field.name for field in fields(RAdamConfig)]
    for word in keywords:
        if word not in known:
            near = get_close_matches(word, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise TypeError(f"configure_radam does not know {word!r}: {hint}")


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} must be a number, such as 1.0e-3") from None
