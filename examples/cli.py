"""RAdamCLI: `python examples/cli.py fit --config configs/minimal.yaml --radam.lr 0.005`."""

import lightning as L
from digits import Digits, loaders

from lightning_radam import RAdamCLI


class DigitsData(L.LightningDataModule):
    """scikit-learn's digits.

    Args:
        batch_size: Images per optimizer update.
    """

    def __init__(self, batch_size: int = 64):
        super().__init__()
        self.train, self.val = loaders(batch_size)

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val


if __name__ == "__main__":
    RAdamCLI(Digits, DigitsData, seed_everything_default=0)
