"""InstabilityMonitor: Lightning's hooks on one side, detectors and incidents on the other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_radam.monitor.detectors import Event, InstabilityDetector
from lightning_radam.monitor.incidents import IncidentLog
from lightning_radam.monitor.signals import Signal, SignalRing
from lightning_radam.monitor.telemetry import radam_scalars
from lightning_radam.tracking.wandb import alert, define_metrics, wandb_runs

__all__ = ["InstabilityMonitor"]

_log = logging.getLogger("lightning_radam")

_KEYS = (
    "radam/lr",
    "radam/rho_t",
    "radam/rect",
    "stability/loss",
    "stability/grad_norm",
    "stability/incidents",
)


class InstabilityMonitor(Callback):
    """Watch every optimizer step, log what it sees, and keep an incident file.

    Logged to all loggers every `log_every_n_steps`, and at each event, at the step that Lightning's
    own rows use:

    | key | meaning |
    |---|---|
    | `radam/lr` | learning rate of the update, the largest of the groups; not at events |
    | `radam/rho_t` | length of the approximated moving average, in steps; not at events |
    | `radam/rect` | rectification r_t, 0 before the first adaptive step; not at events |
    | `stability/loss` | training loss, averaged over accumulated micro-batches |
    | `stability/grad_norm` | global gradient norm, unscaled, before clipping |
    | `stability/incidents` | count of warnings and critical events so far |

    Each event is a line of `incidents.jsonl` and one on the console; a critical one is also a W&B
    alert. On a GPU the numbers arrive a few steps late, so that no step waits for them.

    Args:
        dirpath: Folder of the incident file; None is the trainer's log folder.
        window: Steps that the baseline of the loss remembers, >= 64.
        log_every_n_steps: Steps between two rows; None is the trainer's `log_every_n_steps`.

    Raises:
        ValueError: If `window` is too short or `log_every_n_steps` is below 1.

    Example:
        >>> InstabilityMonitor(window=128).state_dict()
        {'detector': {'step': -1, 'recent': [], 'rejected': []}, 'incidents': 0}
    """

    def __init__(
        self,
        dirpath: str | None = None,
        window: int = 128,
        log_every_n_steps: int | None = None,
    ) -> None:
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ValueError(
                f"log_every_n_steps={log_every_n_steps!r} must be at least 1; "
                "None takes the trainer's"
            )
        self.dirpath = dirpath
        self.log_every_n_steps = log_every_n_steps
        self.incidents = 0
        self._detector = InstabilityDetector(window)
        self._every = 1
        self._ring: SignalRing | None = None
        self._log_file: IncidentLog | None = None
        self._begin_step()

    def _begin_step(self) -> None:
        self._loss: Tensor | None = None
        self._micro_batches = 0
        self._grad_norm: Tensor | None = None

    # Lightning's hooks ------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the ring and the incident file, and define the W&B metrics."""
        self._every = self.log_every_n_steps or max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        self._ring = SignalRing(pl_module.device)
        self._scalars: dict[int, dict[str, float]] = {}
        self._seen_step = trainer.global_step
        self._begin_step()
        folder = self.dirpath or trainer.log_dir or trainer.default_root_dir
        self._log_file = IncidentLog(Path(folder) / "incidents.jsonl")
        for run in wandb_runs(trainer.loggers):
            define_metrics(run, _KEYS)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the norm of the gradients: unscaled already, not yet clipped."""
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self._grad_norm = torch.nn.utils.get_total_norm(gradients)
        if trainer.global_step % self._every == 0:
            # The scheduler moves on before `on_train_batch_end`; this update's lr is known here.
            self._scalars[trainer.global_step] = radam_scalars(optimizer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Gather the micro-batches' losses; after an optimizer step, pass its numbers on."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            loss = loss.detach()
            self._loss = loss if self._loss is None else self._loss + loss
            self._micro_batches += 1
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        if self._ring is not None and self._loss is not None:
            # Lightning has divided each loss by the accumulation factor.
            mean = self._loss * (trainer.accumulate_grad_batches / self._micro_batches)
            self._ring.push(trainer.global_step - 1, mean, self._grad_norm)
        self._begin_step()
        self._read(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch up, so that a checkpoint of this epoch holds all of it."""
        self._read(trainer, wait=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep what is still on its way from the device."""
        self._read(trainer, wait=True)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values: the detector's baseline and the count of incidents."""
        return {"detector": self._detector.state_dict(), "incidents": self.incidents}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped."""
        self._detector.load_state_dict(state_dict["detector"])
        self.incidents = state_dict["incidents"]

    # What it does with the numbers ------------------------------------------------------------

    def _read(self, trainer: Trainer, *, wait: bool = False) -> None:
        if self._ring is None:
            return
        for signal in self._ring.pop(wait=wait):
            events = self._detector.update(signal.loss, signal.grad_norm, step=signal.step)
            for event in events:
                self._report(trainer, event, signal)
            scalars = self._scalars.pop(signal.step, {})
            if scalars or events:
                self._log_row(trainer, signal, scalars)

    def _report(self, trainer: Trainer, event: Event, signal: Signal) -> None:
        if event.severity != "info":
            self.incidents += 1
        if not trainer.is_global_zero or self._log_file is None:
            return
        self._log_file.append(
            asdict(event)
            | {"loss": signal.loss, "grad_norm": signal.grad_norm}
            | {"epoch": trainer.current_epoch}
        )
        _log.warning("step %d: %s", event.step, event.message)
        if event.severity == "critical":
            for run in wandb_runs(trainer.loggers):
                title = f"Training is unstable: {event.kind}"
                alert(run, title, f"step {event.step}: {event.message}")

    def _log_row(self, trainer: Trainer, signal: Signal, scalars: dict[str, float]) -> None:
        row = scalars | {
            "stability/loss": signal.loss,
            "stability/incidents": float(self.incidents),
        }
        if signal.grad_norm is not None:
            row["stability/grad_norm"] = signal.grad_norm
        for logger in trainer.loggers:
            logger.log_metrics(row, step=signal.step)
