"""One fold's run, said to LightningCLI as flags, so that its saved configuration holds it all."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

from lightning_radam.errors import InputError

__all__ = ["experiment_flags", "finish_tracking", "quiet_console", "run_flags"]


def quiet_console(tracking: str) -> None:
    """Keep the console to what a competitor reads: progress, scores, warnings that matter.

    Hides Lightning's hardware table and advertisements, warnings about what is so on purpose, and,
    for runs that stay on this machine, W&B's banner. Call it once, before training.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # small images load faster than workers start
        ".*number of training batches .* is smaller than the logging interval.*",
        "Experiment logs directory .* exists and is not empty",  # W&B was first to write there
        ".*treespec, LeafSpec.*",  # Lightning's own use of a name that PyTorch renames
    ):
        warnings.filterwarnings("ignore", message)
    if tracking == "offline":
        os.environ.setdefault("WANDB_SILENT", "true")


def experiment_flags(configs: Path, experiment: str) -> list[str]:
    """Return the flags that read `base.yaml`, then the experiment's own file.

    Raises:
        InputError: If the experiment has no file.
    """
    names = ["base"] if experiment == "base" else ["base", experiment]
    files = [configs / f"{name}.yaml" for name in names]
    for file in files:
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in configs.glob("*.yaml"))) or "none"
            raise InputError(f"experiment {file.stem!r} has no {file}; there are: {known}")
    return [f"--config={file}" for file in files]


def run_flags(
    folder: Path, *, tracking: str, project: str, experiment: str, fold: int
) -> list[str]:
    """Return the flags that send the curves, checkpoints and incidents of a fold to its folder.

    CSV files are always written; Weights & Biases joins them unless `tracking` is "csv".

    Args:
        folder: The fold's own folder.
        tracking: "offline", "online" or "csv".
        project: The W&B project.
        experiment: The W&B group, which holds the experiment's folds.
        fold: Number of the fold; the run's name.

    Raises:
        InputError: If `tracking` is another word, or W&B is wanted and not installed.
    """
    if tracking not in ("offline", "online", "csv"):
        raise InputError(f"tracking={tracking!r} must be 'offline', 'online' or 'csv'")
    loggers: list[dict[str, object]] = [
        {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(folder), "name": "", "version": ""},
        }
    ]
    if tracking != "csv":
        if find_spec("wandb") is None:
            raise InputError(
                f"tracking={tracking!r} needs Weights & Biases: pip install "
                "'lightning-radam[wandb]', or choose tracking 'csv'"
            )
        wandb_logger = {
            "save_dir": str(folder),
            "project": project,
            "group": experiment,
            "name": f"{experiment}-fold{fold}",
            "offline": tracking == "offline",
        }
        loggers.append(
            {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": wandb_logger}
        )
    return [
        f"--trainer.default_root_dir={folder}",
        f"--trainer.logger={json.dumps(loggers)}",
        f"--monitor.dirpath={folder}",
    ]


def finish_tracking() -> None:
    """Close the W&B run, if there is one, so that the next fold gets its own."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
