"""The authors' RAdam (LiyuanLucasLiu/RAdam, `radam/radam.py`, degenerated_to_sgd=False)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def trajectory(
    x0: np.ndarray,
    grads: Iterable[np.ndarray],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> np.ndarray:
    beta1, beta2 = betas
    p = np.array(x0, dtype=np.float64)
    exp_avg = np.zeros_like(p)
    exp_avg_sq = np.zeros_like(p)
    n_sma_max = 2 / (1 - beta2) - 1
    path = []
    for step, grad in enumerate(grads, start=1):
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
        exp_avg = beta1 * exp_avg + (1 - beta1) * grad
        beta2_t = beta2**step
        n_sma = n_sma_max - 2 * step * beta2_t / (1 - beta2_t)
        if n_sma >= 5:
            step_size = np.sqrt(
                (1 - beta2_t)
                * (n_sma - 4)
                / (n_sma_max - 4)
                * (n_sma - 2)
                / n_sma
                * n_sma_max
                / (n_sma_max - 2)
            ) / (1 - beta1**step)
            p = p - weight_decay * lr * p
            p = p - step_size * lr * exp_avg / (np.sqrt(exp_avg_sq) + eps)
        path.append(p.copy())
    return np.array(path)
