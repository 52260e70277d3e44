"""A timm backbone under RAdamCLI: `python examples/vision.py fit --config configs/vision.yaml`."""

import timm
from cli import DigitsData
from digits import Digits

from lightning_radam import RAdamCLI


class Backbone(Digits):
    """The digits classifier with a timm backbone.

    Args:
        backbone: A name of `timm.list_models()`.
        pretrained: Start from timm's weights.
    """

    def __init__(self, backbone: str = "resnet10t", pretrained: bool = False):
        super().__init__()
        self.net = timm.create_model(backbone, pretrained, in_chans=1, num_classes=10)


if __name__ == "__main__":
    RAdamCLI(Backbone, DigitsData, seed_everything_default=0)
