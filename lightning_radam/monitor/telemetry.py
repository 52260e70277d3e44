"""RAdam's own instruments, read from the optimizer on the host."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from lightning_radam.rectification import r_t, rho_t

__all__ = ["radam_scalars"]


def radam_scalars(optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rate and the rectification of the coming update.

    Args:
        optimizer: Any optimizer; the rectification terms need one with `betas`.

    Returns:
        `radam/lr`, the largest learning rate of the groups; `radam/rho_t`, the length of the
        approximated simple moving average; and `radam/rect`, r_t in [0, 1], which is 0 as long as
        there is no adaptive step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.RAdam([weight], lr=0.5)
        >>> for _ in range(5):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        >>> {key: round(value, 3) for key, value in radam_scalars(optimizer).items()}
        {'radam/lr': 0.5, 'radam/rho_t': 5.994, 'radam/rect': 0.026}
    """
    group = optimizer.param_groups[0]
    scalars = {"radam/lr": max(float(group["lr"]) for group in optimizer.param_groups)}
    done = next((s["step"] for s in optimizer.state.values() if "step" in s), 0)
    # torch and RAdam keep `step` on the CPU, where reading it costs nothing; a run captured
    # into a CUDA graph does not, and is left without the two terms.
    on_host = not isinstance(done, torch.Tensor) or done.device.type == "cpu"
    if "betas" in group and on_host:
        beta2 = float(group["betas"][1])
        scalars["radam/rho_t"] = rho_t(int(done) + 1, beta2)
        scalars["radam/rect"] = r_t(int(done) + 1, beta2)
    return scalars
