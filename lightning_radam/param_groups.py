"""Parameter groups: which parameters decay."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["weight_decay_groups"]


def weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay and those that do not.

    Biases and the parameters of norms, which are vectors or scalars, do not decay. Frozen
    parameters are left out, and so is a group that would be empty.

    Args:
        module: The module to train.
        weight_decay: The decay of the weights, >= 0.

    Returns:
        One or two parameter groups, the decaying one first.

    Example:
        >>> groups = weight_decay_groups(nn.Linear(3, 2), weight_decay=0.05)
        >>> [(g["weight_decay"], [tuple(p.shape) for p in g["params"]]) for g in groups]
        [(0.05, [(2, 3)]), (0.0, [(2,)])]
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
