"""InstabilityMonitor: Lightning's hooks on one side, the monitor's parts on the other."""

from __future__ import annotations

import base64
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_radam.monitor.detectors import Event, InstabilityDetector
from lightning_radam.monitor.incidents import IncidentLog, RepeatFolder, sample_ids
from lightning_radam.monitor.reactions import (
    LearningRateCut,
    Reaction,
    RunningStatistics,
    Snapshots,
    UnstableTraining,
    drop_update,
    keep_update,
)
from lightning_radam.monitor.signals import SignalQueue, StepLoss, measure, owned_share
from lightning_radam.monitor.telemetry import Telemetry, Trend, next_update, radam_scalars, top
from lightning_radam.preflight import schedule_problems
from lightning_radam.tracking.wandb import alert, define_metrics, wandb_runs

__all__ = ["InstabilityMonitor"]

_log = logging.getLogger("lightning_radam")

_KEYS = (
    "radam/lr",
    "radam/lr_rect",
    "radam/rho_t",
    "radam/rect",
    "stability/loss",
    "stability/grad_norm",
    "stability/score",
    "stability/incidents",
    "stability/dropped_updates",
    "stability/lr_scale",
    "stability/fluctuation",
    "stability/rise",
    "stability/steps_since_best",
)
_KEYS_AT_TIMES = (
    "radam/spread",
    "radam/spread_theory",
    "radam/handover_jump",
    "stability/log_grad_median",
    "stability/grad_vanished",
    "stability/log_grad_shift",
    "stability/lag",
    "stability/update_ratio",
    "stability/gap",
    "stability/val_fluctuation",
    "stability/val_rise",
    "stability/val_steps_since_best",
)

_LARGEST = torch.finfo(torch.float32).max
# A GradScaler starts too high and halves itself at each infinity: 2^16 takes 16 of them.
_SCALER_PATIENCE = 20
# Updates dropped in a row from which on the weights, and no longer the batches, are suspected.
_LASTING_DROPS = 10


class InstabilityMonitor(Callback):
    """Watch every optimizer step, log what it sees, keep an incident file, and react.

    By default it logs everything and drops updates whose loss or gradient is not finite, on all
    ranks alike, before they reach the weights.

    Logged to all loggers every `log_every_n_steps`, and at each event, at the step that Lightning's
    own rows use. "now and then" are the keys that a row has only where they can be known:

    | key | meaning |
    |---|---|
    | `radam/lr` | learning rate of the update, the largest of the groups |
    | `radam/rho_t` | length of the approximated moving average, in steps |
    | `radam/rect` | rectification r_t, 0 before the first adaptive step |
    | `radam/lr_rect` | lr times r_t |
    | `radam/spread_theory` | standard deviation of the adaptive lr from rho_t; from rho_t = 4 on |
    | `radam/spread` | standard deviation of ln(adaptive lr) over sampled coordinates |
    | `radam/handover_jump` | length of the first adaptive update over the one before |
    | `stability/loss` | training loss, averaged over accumulated micro-batches and ranks |
    | `stability/grad_norm` | global gradient norm, unscaled, before clipping |
    | `stability/score` | the detector's instability: above 10 a warning, above 20 critical |
    | `stability/incidents` | count of warnings and critical events so far |
    | `stability/dropped_updates` | count of updates that did not reach the weights |
    | `stability/lr_scale` | what `lower_lr` multiplies the learning rate by at the moment |
    | `stability/fluctuation` | standard deviation around the loss' average over 20, as a share |
    | `stability/rise` | the most that this average has risen above its best so far |
    | `stability/steps_since_best` | steps since this average was best |
    | `stability/log_grad_median` | median of ln of the gradient's coordinates |
    | `stability/grad_vanished` | share of them below e^-20 |
    | `stability/log_grad_shift` | Wasserstein distance of their distribution to the first one's |
    | `stability/lag` | largest root mean g^2 / v of a layer; 2.3 and more announces a spike |
    | `stability/update_ratio` | length of the update over that of the weights |
    | `layers/grad_norm/NAME` | gradient norm, of the three layers where it is largest |
    | `layers/lag/NAME`, `layers/update_ratio/NAME` | the same of these two |
    | `stability/gap` | validation loss minus the training loss' average; at each validation |
    | `stability/val_fluctuation`, `val_rise`, `val_steps_since_best` | as above, of validations |

    A second optimizer's keys end in `_1`, and so on: each optimizer has a detector of its own.
    With several, steps count the updates of all of them, as `trainer.global_step` does.

    Each event is a line of `incidents.jsonl`. On the console a warning is one line, and repeats
    are folded; a critical one is also a W&B alert. On a GPU the numbers arrive some 8 to 16 steps
    late, so that no step waits for them; dropping an update needs no number on the host.

    In manual optimization the loss is what `self.manual_backward` gets, and the norm is that before
    `optimizer.step()`: of clipped gradients if you clip yourself.

    Args:
        dirpath: Folder of the incident file; None is the trainer's log folder.
        window: Steps that the baseline of the loss remembers, >= 64.
        log_every_n_steps: Steps between two rows; None is the trainer's `log_every_n_steps`.
        on_warning: Reaction to warnings. "log": none. "skip": drop updates whose gradient norm is
            above the detector's limit. "lower_lr": see `lr_factor`. "rollback": go back to the last
            good snapshot and on with the next batches. "stop": save a checkpoint, and end the
            process with exit code 3.
        on_critical: Reaction to critical events; all but "log" drop updates that are not finite.
            "skip" does nothing else. A dropped update is no reason for a rollback, ten in a row
            are.
        lr_factor: What "lower_lr" multiplies the learning rate by, in (0, 1).
        lr_floor: Least share of the scheduled learning rate, in (0, 1].
        lr_recovery_steps: Updates after which a cut is undone, >= 1.
        snapshot_every_n_steps: Steps between two snapshots for "rollback", >= 1; two are held in
            the host's memory.
        max_rollbacks: Rollbacks after which the next one stops the training instead, >= 0.
        val_loss: Name of the validation loss among the logged metrics.

    Attributes:
        incidents: Count of warnings and critical events so far.
        dropped_updates: Count of updates that did not reach the weights.
        rollbacks: Count of rollbacks.

    Raises:
        ValueError: If an argument is out of its range.
        UnstableTraining: In training, by the reaction "stop"; a `SystemExit`.

    Example:
        >>> monitor = InstabilityMonitor(on_warning="lower_lr", on_critical="rollback")
        >>> monitor.incidents, monitor.dropped_updates, monitor.rollbacks
        (0, 0, 0)
    """

    def __init__(
        self,
        dirpath: str | None = None,
        window: int = 128,
        log_every_n_steps: int | None = None,
        on_warning: Reaction = "log",
        on_critical: Reaction = "skip",
        lr_factor: float = 0.5,
        lr_floor: float = 0.1,
        lr_recovery_steps: int = 200,
        snapshot_every_n_steps: int = 100,
        max_rollbacks: int = 3,
        val_loss: str = "val_loss",
    ) -> None:
        if log_every_n_steps is not None and log_every_n_steps < 1:
            raise ValueError(
                f"log_every_n_steps={log_every_n_steps!r} must be at least 1; "
                "None takes the trainer's"
            )
        for name, reaction in (("on_warning", on_warning), ("on_critical", on_critical)):
            if reaction not in get_args(Reaction):
                known = ", ".join(map(repr, get_args(Reaction)))
                raise ValueError(f"{name}={reaction!r} must be one of {known}")
        if snapshot_every_n_steps < 1:
            raise ValueError(
                f"snapshot_every_n_steps={snapshot_every_n_steps!r} must be at least 1"
            )
        if max_rollbacks < 0:
            raise ValueError(f"max_rollbacks={max_rollbacks!r} must be at least 0; 0 stops at once")
        InstabilityDetector(window)  # says now if the window is too short
        self.dirpath = dirpath
        self.window = window
        self.log_every_n_steps = log_every_n_steps
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.max_rollbacks = max_rollbacks
        self.val_loss = val_loss
        self._reactions: dict[str, Reaction] = {"warning": on_warning, "critical": on_critical}
        self._lr_cut = LearningRateCut(lr_factor, lr_floor, lr_recovery_steps)
        self._forget()

    def _forget(self) -> None:
        """Start as if nothing had been trained yet."""
        self.incidents = self.dropped_updates = self.rollbacks = 0
        self._lr_cut.scale = 1.0
        self._streams: dict[int, _Stream] = {}
        self._validation = Trend()
        self._run: _Run | None = None

    # Lightning's hooks ------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier training, if this is the start of another."""
        if stage == "fit" and trainer.global_step == 0:
            self._forget()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the optimizers, the incident file and the W&B metrics."""
        self._close()
        every = self.log_every_n_steps or max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        folder = Path(self.dirpath or trainer.log_dir or trainer.default_root_dir)
        self._run = _Run(pl_module, folder, every)
        if "rollback" in self._reactions.values():
            self._run.snapshots = Snapshots(pl_module, trainer.optimizers, trainer.global_step)
        names: dict[Tensor, str] = {p: name for name, p in pl_module.named_parameters()}
        for index, optimizer in enumerate(trainer.optimizers):
            stream = self._streams.setdefault(index, _Stream(self.window))
            stream.begin(optimizer, names, pl_module.device, trainer.world_size)
            self._run.hooks += [
                optimizer.register_step_pre_hook(self._before_update),
                optimizer.register_step_post_hook(self._after_update),
            ]
        for run in wandb_runs(trainer.loggers):
            define_metrics(run, (*_KEYS, *_KEYS_AT_TIMES))
        if trainer.is_global_zero:  # the warning itself comes from the check in every trainer
            for problem in schedule_problems(trainer):
                incident = {"kind": "schedule", "severity": "warning", "step": trainer.global_step}
                self._run.log_file.append(incident | {"message": problem})

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note where the batch came from, should it turn out to be an incident."""
        if self._run is not None:
            self._run.start_batch(batch, batch_idx)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Gather the losses of the micro-batches."""
        if self._run is None:
            return
        scaler = _grad_scaler(trainer)
        if scaler is not None:
            loss = loss.detach() / scaler.scale(torch.ones((), device=loss.device))
        if pl_module.automatic_optimization:
            loss = loss.detach() * trainer.accumulate_grad_batches  # Lightning has divided by it
        self._run.loss.add(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradients, unscaled and not yet clipped, and drop the update if it is bad."""
        if self._run is None:
            return
        keep_update(optimizer)
        loss = self._run.loss.take()
        if loss is None:  # `training_step` returned None
            return
        index = [id(known) for known in trainer.optimizers].index(id(optimizer))
        stream, scaler = self._streams[index], _grad_scaler(trainer)
        params = stream.params()
        row = measure(loss, params, stream.share(params, loss.device))
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # Such an optimizer divides by the scale itself, later.
            row[1:] /= scaler.scale(torch.ones((), device=row.device))
        bad = ~(row[:2].abs() <= stream.limits.to(row.device)).all()  # NaN is not <= anything
        update, due = next_update(optimizer), trainer.global_step % self._run.every == 0
        sampled = trainer.is_global_zero and (due or stream.telemetry.is_due(update))
        step = _Step(
            number=trainer.global_step,
            stream=index,
            epoch=trainer.current_epoch,
            batch=self._run.batch,
            update=update,
            scalars=radam_scalars(optimizer),
            layers=len(params),
            has_gradient=any(param.grad is not None for param in params),
            scaled=scaler is not None,
            due=due,
            sampled=sampled,
        )
        sample = [stream.telemetry.before()] if sampled else []
        self._run.pending = step, [row, bad.float().reshape(1), *sample]
        if self._drops():
            drop_update(optimizer, params, bad, scaled=scaler is not None)
            self._run.statistics.settle(bad)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at the numbers that have arrived, and react."""
        if self._run is None:
            return
        self._push()  # a GradScaler may have left out `optimizer.step`
        self._react(trainer, self._read(trainer))
        snapshots, step = self._run.snapshots, trainer.global_step
        if snapshots is not None and step >= snapshots.step + self.snapshot_every_n_steps:
            snapshots.take(step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the validation loss with the training loss."""
        loss = trainer.callback_metrics.get(self.val_loss)
        if self._run is None or loss is None or trainer.sanity_checking:
            return
        self._validation.update(float(loss))
        row = {f"stability/val_{key}": x for key, x in self._validation.scalars().items()}
        train = self._streams[0].trend.mean
        if math.isfinite(train):
            row["stability/gap"] = float(loss) - train
        for logger in trainer.loggers:
            logger.log_metrics(row, step=max(0, trainer.global_step - 1))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Catch up, so that a checkpoint of this epoch holds all of it."""
        self._react(trainer, self._read(trainer, wait=True))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the optimizers."""
        self._read(trainer, wait=True)
        self._close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Keep what is still on its way from the device, if the device still answers."""
        try:
            self._read(trainer, wait=True)
        except RuntimeError as error:
            _log.warning("the last steps before the exception are lost: %s", error)
        self._close()

    def state_dict(self) -> dict[str, Any]:
        """Return counts and baselines: plain values, and one sample of gradients."""
        return {
            "incidents": self.incidents,
            "dropped_updates": self.dropped_updates,
            "rollbacks": self.rollbacks,
            "lr_scale": self._lr_cut.scale,
            "validation": self._validation.state_dict(),
            "streams": {index: stream.state_dict() for index, stream in self._streams.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped."""
        self.incidents = state_dict["incidents"]
        self.dropped_updates = state_dict["dropped_updates"]
        self.rollbacks = state_dict["rollbacks"]
        self._lr_cut.scale = state_dict["lr_scale"]
        self._validation.load_state_dict(state_dict["validation"])
        self._streams = {}
        for index, state in state_dict["streams"].items():
            self._streams[index] = _Stream(self.window)
            self._streams[index].load_state_dict(state)

    # Around the update ------------------------------------------------------------------------

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._lr_cut.apply(optimizer)

    def _after_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._lr_cut.undo(optimizer)
        self._lr_cut.recover()
        keep_update(optimizer)
        self._push()

    def _push(self) -> None:
        """Send the step's numbers on their way."""
        if self._run is None or self._run.pending is None:
            return
        (step, parts), self._run.pending = self._run.pending, None
        if step.sampled:
            parts.append(self._streams[step.stream].telemetry.after())
        self._run.queue.push(step, torch.cat(parts))

    def _drops(self) -> bool:
        """Whether updates are dropped at all."""
        return self._reactions["critical"] != "log" or self._reactions["warning"] == "skip"

    def _close(self) -> None:
        """Leave the optimizers as they were."""
        if self._run is None:
            return
        for hook in self._run.hooks:
            hook.remove()
        for stream in self._streams.values():
            self._lr_cut.undo(stream.optimizer)
            keep_update(stream.optimizer)
        for kind in self._run.repeats.kinds():
            _log.warning("%d more events not shown: %s", self._run.repeats.folded(kind), kind)
        self._run = None

    # What it does with the numbers ------------------------------------------------------------

    def _read(self, trainer: Trainer, *, wait: bool = False) -> list[tuple[Reaction, Event]]:
        """Take in the steps that have arrived, and return the reactions that they ask for."""
        if self._run is None:
            return []
        wishes = []
        for step, row in self._run.queue.pop(wait=wait):
            wishes += self._take_in(trainer, self._run, step, row)
        return wishes

    def _take_in(
        self, trainer: Trainer, run: _Run, step: _Step, row: Tensor
    ) -> list[tuple[Reaction, Event]]:
        stream = self._streams[step.stream]
        numbers, bad, sample = row.split([2 + step.layers, 1, len(row) - step.layers - 3])
        loss, grad_norm, *layer_norms = numbers.tolist()
        dropped = self._drops() and bool(bad)
        self.dropped_updates += dropped
        events = stream.take_in(step, loss, grad_norm, dropped)
        if self._reactions["warning"] == "skip":
            stream.limits[1].fill_(min(stream.detector.grad_norm_limit, _LARGEST))
        if not events and not step.due and not step.sampled:
            return []
        # Groups may have been added at the end since then.
        worst = top(dict(zip(stream.names(), layer_norms, strict=False)))
        wishes: list[tuple[Reaction, Event]] = []
        for event in events:
            wish = self._wish(run, event, dropped, stream.drops_in_a_row)
            if wish != "log":
                wishes.append((wish, event))
            if event.severity != "info":
                self.incidents += 1
                if run.snapshots is not None and not dropped:
                    run.snapshots.trouble()
            facts = {"loss": loss, "grad_norm": grad_norm, "dropped": dropped, "reaction": wish}
            self._report(trainer, run, step, event, facts | {"top_layers": worst})
        instruments = stream.telemetry.read(step.update, sample) if step.sampled else {}
        if events or step.due:
            measured = {"stability/loss": loss} | instruments
            measured |= {f"layers/grad_norm/{name}": x for name, x in worst.items()}
            if step.has_gradient:
                measured["stability/grad_norm"] = grad_norm
            self._log_row(trainer, step, stream, measured)
        return wishes

    def _log_row(
        self, trainer: Trainer, step: _Step, stream: _Stream, measured: dict[str, float]
    ) -> None:
        row = step.scalars | measured
        row |= {f"stability/{key}": x for key, x in stream.trend.scalars().items()}
        row |= {
            "stability/score": stream.detector.score,
            "stability/incidents": float(self.incidents),
            "stability/dropped_updates": float(self.dropped_updates),
            "stability/lr_scale": self._lr_cut.scale,
        }
        suffix = f"_{step.stream}" if step.stream else ""
        for logger in trainer.loggers:
            logger.log_metrics({key + suffix: x for key, x in row.items()}, step=step.number)

    def _wish(self, run: _Run, event: Event, dropped: bool, drops_in_a_row: int) -> Reaction:
        """Return the reaction that an event asks for, "log" if none."""
        if event.severity == "info" or event.step <= run.reacted_at:
            return "log"
        reaction = self._reactions[event.severity]
        if reaction == "rollback" and dropped and drops_in_a_row < _LASTING_DROPS:
            return "log"
        return reaction

    def _report(
        self, trainer: Trainer, run: _Run, step: _Step, event: Event, facts: dict[str, Any]
    ) -> None:
        if not trainer.is_global_zero:
            return
        kind = f"{event.severity} {event.kind}"
        news = run.repeats.is_news(kind, event.step)
        incident = asdict(event) | facts | step.facts()
        if news:  # some kilobytes, once for a flood
            histogram = self._streams[step.stream].telemetry.histogram
            incident |= step.batch.replay() | {"log_grad_histogram": histogram}
        run.log_file.append(incident)
        if not news:
            return
        missed = run.repeats.folded(kind)
        dropped = "; update dropped" if facts["dropped"] else ""
        repeats = f" ({missed} repeats before it not shown)" if missed else ""
        level = logging.INFO if event.severity == "info" else logging.WARNING
        _log.log(level, "step %d: %s%s%s", event.step, event.message, dropped, repeats)
        if event.severity == "critical":
            for wandb_run in wandb_runs(trainer.loggers):
                title = f"Training is unstable: {event.kind}"
                alert(wandb_run, title, f"step {event.step}: {event.message}")

    def _react(self, trainer: Trainer, wishes: list[tuple[Reaction, Event]]) -> None:
        """Do the strongest of what is wished."""
        if self._run is None:
            return
        wanted = dict(reversed(wishes))  # the first event of each reaction
        snapshots = self._run.snapshots
        if "stop" in wanted:
            self._stop(trainer, wanted["stop"].message)
        elif "rollback" in wanted and snapshots is not None:
            if self.rollbacks == self.max_rollbacks:
                tried = f"{self.rollbacks} rollbacks did not help: "
                self._stop(trainer, tried + wanted["rollback"].message)
            self.rollbacks += 1
            good = snapshots.restore()
            for stream in self._streams.values():
                stream.detector.start_grace()
            _log.warning(
                "rollback %d of %d: weights and optimizer are those of step %d again",
                self.rollbacks,
                self.max_rollbacks,
                good,
            )
        elif "lower_lr" in wanted:
            scale = self._lr_cut.cut()
            if self._run.repeats.is_news("lower_lr", trainer.global_step):
                _log.warning("learning rate lowered to %.3g of the schedule's", scale)
        else:
            return
        # What is still on its way has happened before this reaction, and asks for no other.
        self._run.reacted_at = trainer.global_step - 1

    def _stop(self, trainer: Trainer, message: str) -> None:
        if self._run is None:
            return
        path = self._run.log_file.path.with_name(f"unstable-step={trainer.global_step}.ckpt")
        trainer.save_checkpoint(path)
        message = f"training stopped after step {trainer.global_step - 1}: {message}; see {path}"
        _log.error(message)
        raise UnstableTraining(message)


@dataclass(frozen=True)
class _Batches:
    """Where a step's data and random numbers came from."""

    indices: list[int]
    ids: list[object]
    rng: dict[str, Tensor]

    def replay(self) -> dict[str, Any]:
        """Return what is needed to see the same data again."""
        states = {
            name: base64.b64encode(state.numpy().tobytes()).decode()
            for name, state in self.rng.items()
        }
        return {"seed": os.environ.get("PL_GLOBAL_SEED"), "rng_state": states}


@dataclass(frozen=True)
class _Step:
    """What the host knew when an optimizer step was made."""

    number: int
    stream: int
    epoch: int
    batch: _Batches
    update: int | None
    scalars: dict[str, float]
    layers: int
    has_gradient: bool
    scaled: bool
    due: bool
    sampled: bool

    def facts(self) -> dict[str, Any]:
        """Return what an incident keeps of it."""
        return {
            "epoch": self.epoch,
            "batch_idx": self.batch.indices,
            "sample_ids": self.batch.ids,
            "optimizer": self.stream,
            "lr": self.scalars.get("radam/lr"),
            "rect": self.scalars.get("radam/rect"),
        }


class _Stream:
    """What belongs to one optimizer: its detector, its instruments, its limits."""

    telemetry: Telemetry
    optimizer: Optimizer
    limits: Tensor  # of the loss and of the gradient norm, on the device

    def __init__(self, window: int) -> None:
        self.detector = InstabilityDetector(window)
        self.trend = Trend()
        self.drops_in_a_row = 0
        self._overflows = 0
        self._first_sample: Tensor | None = None

    def begin(
        self, optimizer: Optimizer, names: dict[Tensor, str], device: torch.device, ranks: int
    ) -> None:
        """Watch an optimizer."""
        self.optimizer, self._names, self._ranks = optimizer, names, ranks
        self.limits = torch.full((2,), _LARGEST, device=device)
        self.telemetry = Telemetry(optimizer, names)
        self.telemetry.first = self._first_sample
        self._share = torch.empty(0)

    def params(self) -> list[Tensor]:
        """Return the optimizer's parameters of the moment."""
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def names(self) -> list[str]:
        """Return the parameters' names in the module."""
        return [self._names.get(param, f"parameter {i}") for i, param in enumerate(self.params())]

    def share(self, params: list[Tensor], device: torch.device) -> Tensor | None:
        """Return what `measure` needs where there is more than one rank."""
        if self._ranks > 1 and len(self._share) != len(params):
            self._share = torch.tensor(owned_share(params, self._ranks)).to(device)
        return self._share if self._ranks > 1 else None

    def take_in(self, step: _Step, loss: float, grad_norm: float, dropped: bool) -> list[Event]:
        """Pass a step on to the detector."""
        self.drops_in_a_row = self.drops_in_a_row + 1 if dropped else 0
        self.trend.update(loss)
        overflow = step.scaled and math.isfinite(loss) and not math.isfinite(grad_norm)
        self._overflows = self._overflows + 1 if overflow else 0
        # What a GradScaler overflows by is its own business, as long as it ends.
        known = step.has_gradient and not 0 < self._overflows <= _SCALER_PATIENCE
        return self.detector.update(loss, grad_norm if known else None, step=step.number)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and the first sample of gradients."""
        return {
            "detector": self.detector.state_dict(),
            "trend": self.trend.state_dict(),
            "first_sample": self.telemetry.first,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, with some patience for the first steps."""
        self.detector.load_state_dict(state["detector"])
        self.detector.start_grace()
        self.trend.load_state_dict(state["trend"])
        self._first_sample = state["first_sample"]


class _Run:
    """What lives from the start of a training to its end."""

    def __init__(self, module: LightningModule, folder: Path, every: int) -> None:
        self.every = every
        self.queue: SignalQueue[_Step] = SignalQueue(module.device)
        self.loss = StepLoss()
        self.statistics = RunningStatistics(module)
        self.snapshots: Snapshots | None = None
        self.log_file = IncidentLog(folder / "incidents.jsonl")
        self.repeats = RepeatFolder()
        self.hooks: list[Any] = []
        self.pending: tuple[_Step, list[Tensor]] | None = None
        self.reacted_at = -1
        self.batch = _Batches([], [], {})
        self._device = module.device

    def start_batch(self, batch: object, index: int) -> None:
        """Note a batch; it belongs to the step before it if gradients accumulate."""
        self.loss.start_batch()
        if self.loss.is_empty:
            rng = {"cpu": torch.get_rng_state()}
            if self._device.type == "cuda":
                rng["cuda"] = torch.cuda.get_rng_state(self._device)
            self.batch = _Batches([], [], rng)
        self.batch.indices.append(index)
        ids = sample_ids(batch)
        if ids is not None:
            self.batch.ids.append(ids)


def _grad_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    return getattr(trainer.precision_plugin, "scaler", None)
