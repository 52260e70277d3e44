"""What the monitor adds to a Weights & Biases run: metric definitions and alerts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["alert", "define_metrics", "wandb_runs"]

# W&B refuses longer titles.
_TITLE_LENGTH = 63


def wandb_runs(loggers: Iterable[Any]) -> list[Run]:
    """Return the W&B runs behind a trainer's loggers; none without W&B and on ranks above 0."""
    runs: list[Run] = []
    for logger in loggers:
        # By name: the WandbLogger of pytorch_lightning is another class than that of lightning.
        if any(base.__name__ == "WandbLogger" for base in type(logger).__mro__):
            import wandb  # only where a WandbLogger has imported it already

            run = logger.experiment
            if isinstance(run, wandb.Run):
                runs.append(run)
    return runs


def define_metrics(run: Run, keys: Iterable[str]) -> None:
    """Put each key on Lightning's step axis and keep its extremes in the run's summary.

    The names are exact: W&B resolves overlapping patterns in no fixed order, and WandbLogger
    itself defines `*`.
    """
    for key in keys:
        run.define_metric(key, step_metric="trainer/global_step", summary="min,max,last")


def alert(run: Run, title: str, text: str) -> None:
    """Send an alert, at most one a minute for each title."""
    run.alert(title=title[:_TITLE_LENGTH], text=text, level="WARN", wait_duration=60)
