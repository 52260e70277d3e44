"""scikit-learn's digits as loaders, and a small network; shared by the examples."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split


def loaders(batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """Four fifths to train on, one to validate on."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    parts = random_split(data, [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    train, val = (DataLoader(part, batch_size, shuffle=i == 0) for i, part in enumerate(parts))
    return train, val


def network(width: int = 32) -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


class Digits(L.LightningModule):
    """A classifier that leaves its optimizer to others.

    Args:
        width: Channels of the first convolution.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.net = network(width)

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx: int) -> None:
        hits = self.net(batch[0]).argmax(1) == batch[1]
        self.log("val_accuracy", hits.float().mean(), prog_bar=True)
