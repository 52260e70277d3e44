"""One picture of a training: learning rate, rectification and losses, with incidents marked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lightning_radam.monitor.incidents import read_alarms

__all__ = ["draw_runs"]

_PANELS = (
    ("radam/lr", "learning rate"),
    ("radam/rect", "rectification $r_t$"),
    ("train_loss", "training loss"),
    ("val_loss", "validation loss"),
)
_LOG_SCALE = ("train_loss", "val_loss")


def draw_runs(folders: Mapping[str, Path], path: Path, title: str) -> None:
    """Draw the curves of several runs over their optimizer steps.

    Args:
        folders: Name of each run and its folder, with `metrics.csv` and maybe `incidents.jsonl`.
        path: The picture to write; its ending chooses the format.
        title: Above the picture.
    """
    figure = _figure(folders, title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _figure(folders: Mapping[str, Path], title: str) -> Figure:
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.2), sharex=True, layout="constrained")
    incidents = 0
    for name, folder in folders.items():
        metrics = pd.read_csv(folder / "metrics.csv")
        steps = [alarm["step"] for alarm in read_alarms(folder / "incidents.jsonl")]
        incidents += len(steps)
        for axis, (key, _) in zip(axes.flat, _PANELS, strict=True):
            if key not in metrics:
                continue
            curve = metrics.dropna(subset=key).sort_values("step")
            (line,) = axis.plot(curve["step"], curve[key], lw=1.4, alpha=0.85, label=name)
            for step in steps:
                axis.axvline(step, color=line.get_color(), ls=":", lw=1)
    for axis, (key, label) in zip(axes.flat, _PANELS, strict=True):
        axis.set_title(label, loc="left", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if key in _LOG_SCALE:
            axis.set_yscale("log")
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    axes[0, 0].legend(frameon=False, fontsize=9)
    count = "1 incident" if incidents == 1 else f"{incidents or 'no'} incidents"
    mark = f"{count}, each a dotted line" if incidents else count
    figure.suptitle(f"{title} ({mark})", x=0.01, ha="left")
    return figure
