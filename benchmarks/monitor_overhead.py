"""What watching costs: the same training step bare, with our monitor, with Lightning's.

    python -m benchmarks.monitor_overhead                  # under four minutes on two cores
    python -m benchmarks.monitor_overhead --device cuda    # adds the proof that no step waits

One training, in which every round has a bare step, two watched by `InstabilityMonitor`, without and
with a row of telemetry, and one watched by Lightning's `SpikeDetection`, in a new order each round:
all meet the same caches, the same memory and the same neighbours on the machine. A step's time is
from one batch's start to the next one's. Two numbers are printed for each: the median over the
rounds of its step's time over the bare step's of the same round, and the median time inside its
hooks, which is far less noisy. A run has one row in 50 steps; that is what the bars are about.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import tempfile
import time
import warnings
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.optimizer_step import hardware
from lightning_radam import InstabilityMonitor, RAdam

BARE, LIGHTNINGS = "bare", "Lightning's SpikeDetection"
OURS, ROWS, RUN = "a step without a row", "a step with a row", "InstabilityMonitor, as in a run"
BAR = {"cpu": 0.02, "cuda": 0.01}
WARM_UP_ROUNDS = 4
ROW_EVERY = 50  # the trainer's default
_PER_STEP = (
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class Images(Dataset):
    def __init__(self, size: int, images: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(images, 3, size, size, generator=generator)

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index % len(self.images)], index % 10


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        import timm

        self.model = timm.create_model("resnet18", num_classes=10)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return RAdam(self.parameters(), lr=1e-4)


class Turns(Callback):
    """Give every step to one contender, and keep the times."""

    def __init__(self, contenders: dict[str, Callback | None], seconds: float, device: str) -> None:
        self.contenders, self.seconds, self.device = contenders, seconds, device
        self.steps: dict[str, list[float]] = defaultdict(list)
        self.hooks: dict[str, list[float]] = defaultdict(list)
        self._order: list[str] = []
        self._shuffled = random.Random(0)
        self._who: str | None = None
        self._rounds = -WARM_UP_ROUNDS
        self._in_hooks = 0.0
        for name in _PER_STEP:
            setattr(self, name, self._forward(name))

    def _forward(self, name: str) -> Any:
        def hook(trainer: Trainer, module: LightningModule, *args: Any) -> None:
            if name == "on_train_batch_start":
                self._next(trainer)
            callback = self.contenders[self._who]
            if callback is None:
                return
            if self.device == "cuda" and self._who in (OURS, ROWS):
                torch.cuda.set_sync_debug_mode("error")
            began = time.perf_counter()
            getattr(callback, name)(trainer, module, *args)
            self._in_hooks += time.perf_counter() - began
            if self.device == "cuda" and name != "on_before_optimizer_step":
                torch.cuda.set_sync_debug_mode("default")  # the optimizer's step is watched too

        return hook

    def _next(self, trainer: Trainer) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._who is not None and self._rounds >= 0:
            self.steps[self._who].append(now - self._began)
            self.hooks[self._who].append(self._in_hooks)
        if not self._order:
            self._order = self._shuffled.sample(list(self.contenders), len(self.contenders))
            self._rounds += 1
            if self._rounds == 1:
                self._end = now + self.seconds
            if self._rounds > 1 and now > self._end:
                trainer.should_stop = True
        self._who = self._order.pop()
        self._in_hooks = 0.0
        self._began = time.perf_counter()

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        for callback in filter(None, self.contenders.values()):
            callback.setup(trainer, module, stage)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for callback in filter(None, self.contenders.values()):
            callback.on_train_start(trainer, module)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        for callback in filter(None, self.contenders.values()):
            callback.on_train_end(trainer, module)


def measure(device: str, size: int, batch_size: int, seconds: float) -> dict[str, dict[str, float]]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            BARE: None,
            OURS: InstabilityMonitor(f"{folder}/ours", log_every_n_steps=10**9),
            ROWS: InstabilityMonitor(f"{folder}/rows", log_every_n_steps=1),
            LIGHTNINGS: SpikeDetection(exclude_batches_path=f"{folder}/skip_batches.json"),
        }
        turns = Turns(contenders, seconds, device)
        trainer = Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=CSVLogger(folder),
            callbacks=[turns],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(), DataLoader(Images(size), batch_size=batch_size))
    rounds = min(map(len, turns.steps.values()))
    bare = turns.steps[BARE][:rounds]
    rows = {}
    for who in contenders:
        steps = turns.steps[who][:rounds]
        ratios = [step / other for step, other in zip(steps, bare, strict=True)]
        low, _, high = quantiles(ratios, n=4)
        rows[who] = {
            "median_ms": 1e3 * median(steps),
            "overhead": median(ratios) - 1,
            "overhead_25%": low - 1,
            "overhead_75%": high - 1,
            "hooks_ms": 1e3 * median(turns.hooks[who]),
            "hooks_share": median(turns.hooks[who]) / median(bare),
            "rounds": rounds,
        }
    rows[RUN] = {
        key: value + (rows[ROWS][key] - value) / ROW_EVERY for key, value in rows[OURS].items()
    }
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = [
        "| | step, ms | over bare (quartiles) | in its hooks, ms | of a step |",
        "|---|---:|---:|---:|---:|",
    ]
    for who, row in rows.items():
        lines.append(
            f"| {who} | {row['median_ms']:.1f} | {row['overhead']:+.2%} "
            f"({row['overhead_25%']:+.1%} to {row['overhead_75%']:+.1%}) "
            f"| {row['hooks_ms']:.3f} | {row['hooks_share']:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", type=int, default=64, help="side of the images, in pixels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=200.0, help="of timing")
    parser.add_argument("--json", type=Path, default=Path("build/monitor_overhead.json"))
    args = parser.parse_args()

    rows = measure(args.device, args.size, args.batch_size, args.seconds)
    packages = {name: version(name) for name in ("torch", "lightning", "timm")}
    settings = {"model": "resnet18", "size": args.size, "batch_size": args.batch_size}
    print(f"{hardware(args.device)}; {packages}; {settings}\n\n{table(rows)}\n")
    bar = BAR[args.device]
    bars = {
        f"{what} at most {bar:.0%}: {rows[RUN][key]:.2%}": rows[RUN][key] <= bar
        for what, key in (("paired steps", "overhead"), ("time in the hooks", "hooks_share"))
    }
    for text, met in bars.items():
        print(f"- {'met' if met else 'NOT met'}: {text}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    report = {"hardware": hardware(args.device), "versions": packages, "settings": settings}
    args.json.write_text(json.dumps(report | {"rows": rows, "bars": bars}, indent=2) + "\n")


if __name__ == "__main__":
    main()
