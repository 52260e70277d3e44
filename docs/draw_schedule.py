"""Draw docs/schedule.png: `python docs/draw_schedule.py docs/schedule.png`."""

import sys

import matplotlib.pyplot as plt

from lightning_radam.schedule import warmup_decay

STEPS = 1000
CURVES = {
    "linear, warm-up 10% (the default)": {},
    "cosine": {"decay": "cosine"},
    "constant after the warm-up": {"decay": "constant"},
    "linear, min_lr at a fifth of the peak": {"min_lr": 0.2},
    "total_steps fixed at a fifth of the run": {"total_steps": STEPS // 5, "min_lr": 0.01},
}

figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
for label, settings in CURVES.items():
    run = {"base_lr": 1.0, "total_steps": STEPS, **settings}
    lrs = [warmup_decay(step, **run) for step in range(1, STEPS + 1)]
    axis.plot(range(1, STEPS + 1), lrs, label=label, ls="--" if "total_steps" in settings else "-")
axis.set_xlabel("optimizer update of a run of 1,000")
axis.set_ylabel("learning rate / peak")
axis.spines[["top", "right"]].set_visible(False)
axis.grid(alpha=0.25)
figure.legend(loc="outside right center", frameon=False)
figure.savefig(sys.argv[1], dpi=110)
