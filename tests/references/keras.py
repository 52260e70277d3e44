"""keras-radam (CyberZHG/keras-radam, `keras_radam/optimizer_v2.py`), its schedule included."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def trajectory(
    x0: np.ndarray,
    grads: Iterable[np.ndarray],
    *,
    learning_rate: float = 1e-3,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-7,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    total_steps: int = 0,
    warmup_proportion: float = 0.1,
    min_lr: float = 0.0,
) -> np.ndarray:
    var = np.array(x0, dtype=np.float64)
    m = np.zeros_like(var)
    v = np.zeros_like(var)
    vhat = np.zeros_like(var)
    sma_inf = 2.0 / (1.0 - beta_2) - 1.0
    path = []
    for local_step, grad in enumerate(grads, start=1):
        lr_t = learning_rate
        if total_steps > 0:
            warmup_steps = total_steps * warmup_proportion
            decay_steps = max(total_steps - warmup_steps, 1)
            if local_step <= warmup_steps:
                lr_t = learning_rate * (local_step / warmup_steps)
            else:
                decay_rate = (min_lr - learning_rate) / decay_steps
                lr_t = learning_rate + decay_rate * min(local_step - warmup_steps, decay_steps)
        beta_1_power = beta_1**local_step
        beta_2_power = beta_2**local_step
        sma_t = sma_inf - 2.0 * local_step * beta_2_power / (1.0 - beta_2_power)
        m = beta_1 * m + (1.0 - beta_1) * grad
        v = beta_2 * v + (1.0 - beta_2) * np.square(grad)
        vhat = np.maximum(vhat, v)
        m_corr_t = m / (1.0 - beta_1_power)
        v_corr_t = np.sqrt((vhat if amsgrad else v) / (1.0 - beta_2_power))
        if sma_t >= 5.0:
            r_t = np.sqrt(
                (sma_t - 4.0) / (sma_inf - 4.0) * (sma_t - 2.0) / (sma_inf - 2.0) * sma_inf / sma_t
            )
            var_t = r_t * m_corr_t / (v_corr_t + epsilon)
        else:
            var_t = m_corr_t
        if weight_decay > 0.0:
            var_t = var_t + weight_decay * var
        var = var - lr_t * var_t
        path.append(var.copy())
    return np.array(path)
