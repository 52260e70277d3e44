"""Loss and gradient norm of this project's own vision runs, as traces for the detectors.

    python -m benchmarks.vision_traces --out traces --digits
    python -m benchmarks.vision_traces --out traces --cifar FOLDER   # train.csv and its images
    python -m benchmarks.detectors --extra traces

A small timm backbone is trained from scratch with RAdam, its schedule and the monitor switched to
logging only, at several learning rates, of which the highest diverge. A run whose loss ends finite
and below half of where it began, and never rises above twice that, is written as healthy_*.csv, the
others as diverging_*.csv, with the columns step, loss, grad_norm.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import timm
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_radam import InstabilityMonitor, configure_radam

LRS = (0.001, 0.004, 0.016, 0.1, 1.0, 10.0)


class Classifier(L.LightningModule):
    """A timm backbone on images in memory.

    Args:
        backbone: A name of `timm.list_models()`.
        lr: Peak learning rate.
    """

    def __init__(self, backbone: str, lr: float):
        super().__init__()
        self.net = timm.create_model(backbone, pretrained=False, num_classes=10)
        self.lr = lr

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        images, labels = batch
        if torch.rand(()) < 0.5:
            images = images.flip(-1)
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return configure_radam(self, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.02)


def digits() -> TensorDataset:
    """scikit-learn's digits, at 32 pixels."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, 32).expand(-1, 3, -1, -1).contiguous()
    return TensorDataset(images, torch.tensor(data.target))


def competition(folder: Path, rows: int) -> TensorDataset:
    """The first rows of a competition's train.csv (id, label), with the images found by id."""
    train = pd.read_csv(folder / "train.csv", dtype=str).iloc[:rows]
    paths = {path.name: path for path in folder.rglob("*.jpg")}
    images = np.stack([np.asarray(Image.open(paths[item])) for item in train.iloc[:, 0]])
    labels = train.iloc[:, 1].astype("category").cat.codes.to_numpy(dtype=np.int64)
    scaled = torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return TensorDataset(scaled, torch.tensor(labels))


def trace(data: TensorDataset, backbone: str, lr: float, steps: int) -> pd.DataFrame:
    """Train, and return step, loss and grad_norm."""
    L.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        monitor = InstabilityMonitor(folder, log_every_n_steps=1, on_critical="log")
        logger = CSVLogger(folder, name="", version="csv", flush_logs_every_n_steps=10_000)
        trainer = L.Trainer(
            max_steps=steps,
            max_epochs=-1,
            logger=logger,
            callbacks=[monitor],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
        trainer.fit(Classifier(backbone, lr), loader)
        rows = pd.read_csv(Path(folder) / "csv/metrics.csv").dropna(subset="step")
    names = {"stability/loss": "loss", "stability/grad_norm": "grad_norm"}
    columns = rows[["step", *names]].rename(columns=names)
    return columns.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)


def is_healthy(losses: pd.Series) -> bool:
    """Whether a run ended well and never rose far above its start."""
    first, last = losses.iloc[:10].mean(), losses.iloc[-50:].mean()
    return math.isfinite(last) and last < first / 2 and losses.max() < 2 * first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the CSV files")
    parser.add_argument("--digits", action="store_true", help="train on scikit-learn's digits")
    parser.add_argument("--cifar", type=Path, help="folder of a CIFAR-10 competition")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of train.csv to use")
    parser.add_argument("--steps", type=int, default=800, help="optimizer updates a run")
    parser.add_argument("--backbone", default="resnet10t")
    args = parser.parse_args()
    if args.cifar and not (args.cifar / "train.csv").is_file():
        parser.error(f"--cifar={args.cifar} holds no train.csv: unpack the competition there")
    args.out.mkdir(parents=True, exist_ok=True)
    sets = {"digits": digits()} if args.digits else {}
    if args.cifar:
        sets["cifar10"] = competition(args.cifar, args.rows)
    for name, data in sets.items():
        for lr in LRS:
            rows = trace(data, args.backbone, lr, args.steps)
            kind = "healthy" if is_healthy(rows["loss"]) else "diverging"
            path = args.out / f"{kind}_{name}_lr{lr:g}.csv"
            rows.to_csv(path, index=False)
            print(f"{path}: {len(rows)} steps, loss {rows['loss'].iloc[-1]:.4g}", flush=True)


if __name__ == "__main__":
    main()
