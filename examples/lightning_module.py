"""RAdam, its schedule and the monitor in a LightningModule."""

import lightning as L
from digits import Digits, loaders

from lightning_radam import InstabilityMonitor, RAdamConfig, configure_radam


class MyDigits(Digits):
    def configure_optimizers(self):
        return configure_radam(self, RAdamConfig(lr=0.01, betas=(0.9, 0.99), weight_decay=0.01))


def main() -> float:
    L.seed_everything(0)
    train, val = loaders()
    monitor = InstabilityMonitor()
    trainer = L.Trainer(max_epochs=8, callbacks=[monitor], log_every_n_steps=5)
    trainer.fit(MyDigits(), train, val)
    accuracy = trainer.callback_metrics["val_accuracy"].item()
    print(f"validation accuracy {accuracy:.3f}, {monitor.incidents} incidents")
    return accuracy


if __name__ == "__main__":
    main()
