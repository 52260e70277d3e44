"""RAdam, its schedule and an instability monitor for PyTorch Lightning.

Everything public is here. A name's module is imported when the name is first used, so that plain
PyTorch users of `RAdam` do not pay for Lightning.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_radam.cli import RAdamCLI
    from lightning_radam.configure import RAdamConfig, configure_radam
    from lightning_radam.monitor.callback import InstabilityMonitor
    from lightning_radam.optimizer import RAdam
    from lightning_radam.schedule import WarmupDecayLR

__all__ = [
    "InstabilityMonitor",
    "RAdam",
    "RAdamCLI",
    "RAdamConfig",
    "WarmupDecayLR",
    "configure_radam",
]

__version__ = version("lightning-radam")

_MODULE_OF = {
    "InstabilityMonitor": "lightning_radam.monitor.callback",
    "RAdam": "lightning_radam.optimizer",
    "RAdamCLI": "lightning_radam.cli",
    "RAdamConfig": "lightning_radam.configure",
    "WarmupDecayLR": "lightning_radam.schedule",
    "configure_radam": "lightning_radam.configure",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
