"""RAdamCLI: LightningCLI with a `radam` and a `monitor` section."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import fields
from difflib import get_close_matches
from types import MethodType
from typing import Any, NoReturn, Optional

from jsonargparse import Namespace, lazy_instance  # type: ignore[attr-defined]
from jsonargparse.typing import final
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_radam.configure import RAdamConfig, configure_radam
from lightning_radam.monitor.callback import InstabilityMonitor

__all__ = ["RAdamCLI"]


@final  # which tells jsonargparse to ask for its arguments, not for a class
class _Monitor(InstabilityMonitor):
    __doc__ = InstabilityMonitor.__doc__


_SECTIONS = {
    "radam": [field.name for field in fields(RAdamConfig)],
    "monitor": list(inspect.signature(InstabilityMonitor).parameters),
}


class _Parser(LightningArgumentParser):
    """A parser that answers a mistake in our sections with one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        line = _explain(message)
        if line is None:
            super().error(message, ex)
        _exit(line)


def _explain(message: str) -> str | None:
    """Say in one line what jsonargparse says of one of our sections in many."""
    found = re.search(r'key "(?:\w+\.)?(radam|monitor)"', message)
    if found is None:
        return None
    section = found[1]
    if word := re.search(r"Option '([\w.]+)' is not accepted", message):
        known = _SECTIONS[section]
        near = get_close_matches(word[1], known, n=1)
        hint = f"did you mean --{section}.{near[0]}?" if near else f"known are {', '.join(known)}"
        return f"--{section}.{word[1]} is unknown: {hint}"
    help_hint = f"is not allowed; --{section}.help says what is"
    if given := re.search(r"NestedArg\(key='(\w+)', val='(.*)'\)", message):  # a flag
        return f"--{section}.{given[1]}={given[2]} {help_hint}"
    if key := re.search(r'Parser key "(\w+)":', message.partition("Errors:")[2]):  # a file
        return f"{section}.{key[1]} {help_hint}"
    return None


def _exit(line: str) -> NoReturn:
    sys.stderr.write(f"error: {line}\n")
    raise SystemExit(2)


class RAdamCLI(LightningCLI):
    """Give any LightningModule RAdam, its schedule and the monitor from the command line.

    `--radam.lr 3e-4 --radam.warmup_proportion 0.05` sets the fields of `RAdamConfig`, and
    `--monitor.window 256` the arguments of `InstabilityMonitor`; `--radam null` and
    `--monitor null` switch them off. `--radam.help` and `--monitor.help` explain them, and
    `--print_config` shows everything. The constructor is LightningCLI's.

    A module with a `configure_optimizers` of its own (or a `--optimizer`) keeps it, unless
    `--override_optimizer true` hands it to RAdam. `radam` settings that would then do nothing are
    an error.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> args = ["--radam.lr=0.01", "--override_optimizer=true", "--seed_everything=1"]
        >>> cli = RAdamCLI(BoringModel, run=False, args=[*args, "--trainer.logger=false"])
        >>> cli.config.radam.lr
        0.01
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, one that knows near misses."""
        if self.parser_class is LightningArgumentParser:
            self.parser_class = _Parser
        return super().init_parser(**kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the two sections and the switch."""
        parser.add_argument(
            "--radam",
            type=Optional[RAdamConfig],  # noqa: UP045 (read at run time)
            default=RAdamConfig(),
            help="RAdam and its schedule; null for the module's own optimizer",
        )
        parser.add_argument(
            "--monitor",
            type=Optional[_Monitor],  # noqa: UP045
            default=lazy_instance(_Monitor),
            help="The instability monitor; null for none",
        )
        parser.add_argument(
            "--override_optimizer",
            type=bool,
            default=False,
            help="Replace the module's own configure_optimizers by the radam section",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args`, or the command line where there are none."""
        # LightningCLI warns when a program that has its own command line passes `args`. Passing
        # them is how this project's commands drive it, so it is no mistake here.
        if isinstance(args, (dict, Namespace)):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Build everything, hand the optimizer to the `radam` section, and add the monitor."""
        super().instantiate_classes()
        monitor = self._get(self.config_init, "monitor")
        if monitor is not None:
            self.trainer.callbacks.insert(0, monitor)  # type: ignore[attr-defined]
        config = self._get(self.config_init, "radam")
        if config is not None and self._may_configure(config):

            def configure_optimizers(module: LightningModule) -> dict[str, Any]:
                return configure_radam(module, config)

            self.model.configure_optimizers = MethodType(configure_optimizers, self.model)

    def _may_configure(self, config: RAdamConfig) -> bool:
        name = type(self.model).__name__
        if not is_overridden("configure_optimizers", self.model, LightningModule):
            return True
        if self._get(self.config_init, "override_optimizer"):
            rank_zero_info(f"RAdam replaces the optimizer that {name} configures itself")
            return True
        if config != RAdamConfig():
            _exit(
                f"{name} configures its optimizer itself, so --radam would do nothing: add "
                "--override_optimizer true, or --radam null"
            )
        rank_zero_info(f"{name} keeps its own optimizer; --override_optimizer true gives it RAdam")
        return False
