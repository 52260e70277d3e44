"""Before the first step: does the schedule fit the run?"""

from __future__ import annotations

import math
import sys
import warnings
from importlib import import_module
from typing import Any

from lightning_radam.schedule import WarmupDecayLR

__all__ = ["lightning_callbacks", "pytorch_lightning_callbacks", "schedule_problems"]

# A difference below this share of the run is not worth a word.
_NEGLIGIBLE = 0.01


def schedule_problems(trainer: Any) -> list[str]:
    """Compare every `WarmupDecayLR` of a trainer with the run that the trainer will make.

    Args:
        trainer: A trainer of `lightning` or `pytorch_lightning` whose optimizers are set up.

    Returns:
        One line for each schedule that does not fit: the numbers, and the remedy.
    """
    ours = [c for c in trainer.lr_scheduler_configs if isinstance(c.scheduler, WarmupDecayLR)]
    if not ours:  # most trainers: they are not even asked for their length
        return []
    run = trainer.estimated_stepping_batches
    automatic = trainer.lightning_module.automatic_optimization
    problems = []
    for config in ours:
        per_update = not automatic or (config.interval == "step" and config.frequency == 1)
        problem = (
            _length_problem(config.scheduler, run)
            if per_update
            else _interval_problem(config.scheduler, config.interval, config.frequency, run)
        )
        if problem:
            problems.append(problem)
    return problems


def _length_problem(schedule: WarmupDecayLR, run: float) -> str | None:
    total, warmup = schedule.total_steps, schedule.warmup_steps
    if math.isinf(run) or abs(run - total) < _NEGLIGIBLE * run:
        return None
    opening = (
        f"WarmupDecayLR has total_steps={total:,}, but this run has {run:,.0f} optimizer updates"
    )
    remedy = f"use total_steps='auto' (configure_radam), or total_steps={run:.0f}"
    if total > run and warmup >= run:
        return f"{opening}: the warm-up alone takes {warmup:,.0f}, so it would never end; {remedy}"
    if schedule.decay == "constant":
        return None
    if total < run:
        share = (run - total) / run
        return (
            f"{opening}: the last {share:.0%} of this run would train at "
            f"min_lr={schedule.min_lr:g}; {remedy}"
        )
    peak = max(float(lr) for lr in schedule.base_lrs)
    last = schedule.lr_of(int(run), peak)
    return (
        f"{opening}: it would stop at lr={last:g}, {last / peak:.0%} of its peak, without having "
        f"decayed to min_lr={schedule.min_lr:g}; {remedy}"
    )


def _interval_problem(schedule: WarmupDecayLR, interval: str, frequency: int, run: float) -> str:
    every = interval if frequency == 1 else f"{frequency} {interval}s"
    updates = "" if math.isinf(run) else f" in a run of {run:,.0f} updates"
    return (
        f"WarmupDecayLR counts optimizer updates, but the trainer would step it once per {every}"
        f"{updates}, so that it would move at a fraction of its pace; return "
        "configure_radam(self) from configure_optimizers, or set interval='step' and frequency=1 "
        "in its lr_scheduler dictionary; LightningCLI's --lr_scheduler cannot, RAdamCLI does"
    )


class _ScheduleCheck:
    """Warns at the start of a fit if a `WarmupDecayLR` does not fit the run."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn once for each schedule that does not fit."""
        if trainer.is_global_zero:
            for problem in schedule_problems(trainer):
                warnings.warn(problem, stacklevel=2)


def __getattr__(name: str) -> type:
    """Make the check as a callback of `lightning` or `pytorch_lightning`, when first asked for.

    The two have a Callback class each, and nobody should pay for importing the other one. As
    attributes of this module the classes can be pickled, which strategies that spawn do.
    """
    package = {
        "LightningScheduleCheck": "lightning.pytorch",
        "PyTorchLightningScheduleCheck": "pytorch_lightning",
    }.get(name)
    if package is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    callback = import_module(package).Callback
    made = type(name, (_ScheduleCheck, callback), {"__module__": __name__})
    globals()[name] = made
    return made


def _made(name: str) -> type:
    return getattr(sys.modules[__name__], name)  # type: ignore[no-any-return]


def lightning_callbacks() -> list[Any]:
    """Return the check for a trainer of `lightning`, which calls this through an entry point.

    So the check does not depend on being remembered.
    """
    return [_made("LightningScheduleCheck")()]


def pytorch_lightning_callbacks() -> list[Any]:
    """Return the check for a trainer of `pytorch_lightning`, likewise."""
    return [_made("PyTorchLightningScheduleCheck")()]
