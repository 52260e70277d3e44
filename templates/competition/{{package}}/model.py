"""Backbone, loss and metric. The optimizer is the `radam` section of the configuration."""

import lightning as L
import torch
from lightning_radam.competition.backbone import create_backbone
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy


class ImageClassifier(L.LightningModule):
    """A timm backbone with one output per class.

    Args:
        classes: The labels, in the order of the outputs.
        backbone: A name of `timm.list_models()`.
        pretrained: Start from timm's weights.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
    """

    def __init__(
        self,
        classes: list[str],
        backbone: str = "convnext_tiny",
        pretrained: bool = True,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.net = create_backbone(backbone, num_classes=len(classes), pretrained=pretrained)
        self.label_smoothing = label_smoothing
        self.val_accuracy = MulticlassAccuracy(len(classes), average="micro")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        images, targets = batch
        loss = F.cross_entropy(self(images), targets, label_smoothing=self.label_smoothing)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx: int) -> None:
        images, targets = batch
        logits = self(images)
        self.val_accuracy(logits, targets)
        self.log("val_loss", F.cross_entropy(logits, targets), prog_bar=True)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def predict_step(self, batch, batch_idx: int) -> torch.Tensor:
        return self(batch[0]).softmax(dim=1)
