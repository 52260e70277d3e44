"""Training one fold, and predicting with it."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_radam import RAdamCLI
from lightning_radam.competition.predictions import write_predictions
from lightning_radam.competition.runs import (
    experiment_flags,
    finish_tracking,
    quiet_console,
    run_flags,
)
from lightning_radam.errors import InputError

from . import settings
from .data import ImageData, classes
from .model import ImageClassifier


def train_fold(experiment: str, fold: int, folder: Path, anew: bool, override: list[str]) -> None:
    """Fit on all folds but one; keep the best checkpoint and its predictions of that one."""
    done = folder / "oof.csv"
    if done.exists() and not anew:
        print(f"fold {fold}: done already, kept ({folder})")
        return
    if folder.exists():
        print(
            f"fold {fold}: {'trained anew' if done.exists() else 'was interrupted, starts again'}"
        )
        shutil.rmtree(folder)
    print(f"fold {fold}: training", flush=True)
    quiet_console(settings.TRACKING)
    best = ModelCheckpoint(monitor="val_accuracy", mode="max", filename="best")
    flags = [
        *experiment_flags(settings.CONFIGS, experiment),
        *run_flags(
            folder,
            tracking=settings.TRACKING,
            project=settings.SLUG,
            experiment=experiment,
            fold=fold,
        ),
        f"--model.classes={classes()!r}",
        f"--data.fold={fold}",
        *override,
    ]
    cli = RAdamCLI(
        ImageClassifier,
        ImageData,
        args=flags,
        run=False,
        trainer_defaults={"callbacks": [best]},
        load_from_checkpoint_support=False,
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    rows = cli.trainer.predict(
        cli.model, cli.datamodule.val_dataloader(), ckpt_path=best.best_model_path
    )
    finish_tracking()
    write_predictions(
        done, settings.ID, cli.datamodule.val_ids, classes(), torch.cat(rows).tolist()
    )


def predict_fold(path: Path, ids: Sequence[str]) -> None:
    """Write the fold's predictions of the test images."""
    checkpoint = path.parent / "checkpoints/best.ckpt"
    if not (path.parent / "oof.csv").exists():
        raise InputError(f"{path.parent} is not trained to the end: run the verb `train` first")
    quiet_console(settings.TRACKING)
    model = ImageClassifier.load_from_checkpoint(checkpoint, weights_only=True, pretrained=False)
    data = ImageData.load_from_checkpoint(checkpoint, weights_only=True)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False)
    rows = trainer.predict(model, data.test_dataloader(ids))
    write_predictions(path, settings.ID, ids, model.hparams.classes, torch.cat(rows).tolist())
