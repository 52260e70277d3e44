"""RAdamCLI: LightningCLI with a `radam` and a `monitor` section."""

from __future__ import annotations

from types import MethodType
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_radam.configure import RAdamConfig, configure_radam
from lightning_radam.monitor.callback import InstabilityMonitor

__all__ = ["RAdamCLI"]


class RAdamCLI(LightningCLI):
    """Give any LightningModule RAdam, its schedule and the monitor from the command line.

    `--radam.lr 3e-4 --radam.warmup_proportion 0.05` sets the fields of `RAdamConfig`, and
    `--monitor.window 256` the arguments of `InstabilityMonitor`. The constructor is LightningCLI's.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> args = ["--radam.lr=0.01", "--trainer.logger=false", "--seed_everything=1"]
        >>> cli = RAdamCLI(BoringModel, run=False, args=args)
        >>> cli.config.radam.lr
        0.01
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the two sections."""
        parser.add_argument("--radam", type=RAdamConfig, default=RAdamConfig())
        parser.add_lightning_class_args(InstabilityMonitor, "monitor")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args`, or the command line where there are none."""
        # LightningCLI warns when a program that has its own command line passes `args`. Passing
        # them is how this project's commands drive it, so it is no mistake here.
        if isinstance(args, (dict, Namespace)):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Build everything, and have the module's optimizer configured by the `radam` section."""
        super().instantiate_classes()
        config: RAdamConfig = self._get(self.config_init, "radam")

        def configure_optimizers(module: LightningModule) -> dict[str, Any]:
            return configure_radam(module, config)

        self.model.configure_optimizers = MethodType(configure_optimizers, self.model)
