"""The rectification of Adam's adaptive learning rate, in plain Python.

RAdam asks how far the adaptive learning rate psi = 1 / sqrt(v_hat) can be trusted after t
gradients. It models v_hat as the average of rho_t independent squares, whose inverse square root
has a variance that can be written down. The optimizer scales its step by r_t so that this variance
is that of an infinitely long run; the monitor plots the same numbers.

Source: Liu et al. 2019, "On the Variance of the Adaptive Learning Rate and Beyond",
arXiv:1908.03265. Equation numbers are those of that paper.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

__all__ = [
    "Variant",
    "adaptive_variance",
    "adaptive_variance_first_order",
    "is_rectified",
    "r_t",
    "rho_inf",
    "rho_t",
]

Variant = Literal["torch", "liu2019", "keras"]
"""The reference whose update is followed: PyTorch's, the paper's authors' or keras-radam's."""


def rho_inf(beta2: float) -> float:
    """The longest length of the averaged window of squared gradients: 2 / (1 - beta2) - 1.

    Args:
        beta2: decay of the second moment, in [0, 1).

    Returns:
        A count of gradients. Up to 5 (beta2 <= 2/3) RAdam never becomes adaptive.

    Raises:
        ValueError: beta2 is outside [0, 1).

    Example:
        >>> rho_inf(0.875)
        15.0

    Source:
        Liu et al. 2019, section 4.1 and algorithm 2.
    """
    if not 0.0 <= beta2 < 1.0:
        raise ValueError(f"beta2={beta2!r} must lie in [0, 1); the usual value is 0.999.")
    return 2 / (1 - beta2) - 1


def rho_t(step: int, beta2: float) -> float:
    """The length of the averaged window after `step` gradients.

    rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)

    Args:
        step: the number of the update, counted from 1.
        beta2: decay of the second moment, in [0, 1).

    Returns:
        A count of gradients between 1 (the first update) and rho_inf.

    Raises:
        ValueError: step is below 1, or beta2 is outside [0, 1).

    Example:
        >>> [round(rho_t(step, 0.999), 3) for step in (1, 5, 6, 1000)]
        [1.0, 4.996, 5.994, 835.967]

    Source:
        Liu et al. 2019, section 4.1, the solution of equation 3, and algorithm 2.
    """
    longest = rho_inf(beta2)
    if step < 1:
        raise ValueError(f"step={step!r} must be 1 or more: updates are counted from 1.")
    power = beta2**step
    return longest - 2 * step * power / (1 - power)


def is_rectified(step: int, beta2: float, variant: Variant = "torch") -> bool:
    """Whether update `step` is adaptive: rho_t > 5 in torch, rho_t >= 5 elsewhere.

    Args:
        step: the number of the update, counted from 1.
        beta2: decay of the second moment, in [0, 1).
        variant: the reference whose threshold is used.

    Raises:
        ValueError: step, beta2 or variant is out of range.

    Example:
        >>> [is_rectified(step, 0.999) for step in (5, 6)]
        [False, True]

    Source:
        Liu et al. 2019, algorithm 2, has rho_t > 4; all three references take 5 instead, "more
        conservative since it's an approximated value" (the authors' code).
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant={variant!r} must be one of {', '.join(get_args(Variant))}.")
    length = rho_t(step, beta2)
    return length > 5 if variant == "torch" else length >= 5


def r_t(step: int, beta2: float) -> float:
    """The rectification: the factor on the adaptive learning rate at update `step`.

    r_t = sqrt( (rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t) )

    Args:
        step: the number of the update, counted from 1.
        beta2: decay of the second moment, in [0, 1).

    Returns:
        A factor in [0, 1]; 0.0 while rho_t <= 4, where the variance does not exist.

    Raises:
        ValueError: step is below 1, or beta2 is outside [0, 1).

    Example:
        >>> [round(r_t(step, 0.999), 3) for step in (4, 6, 556, 2737)]
        [0.0, 0.026, 0.5, 0.9]

    Source:
        Liu et al. 2019, section 4.2, from equation 4, and algorithm 2.
    """
    length, longest = rho_t(step, beta2), rho_inf(beta2)
    if length <= 4:
        return 0.0
    return math.sqrt(
        (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    )


def adaptive_variance(rho: float, sigma: float = 1.0) -> float:
    """The exact variance of the adaptive learning rate for a window of length rho.

    Var = tau^2 (rho / (rho - 2) - rho 2^(2 rho - 5) / pi * B(rho/2 - 1/2, rho/2 - 1/2)^2)
    with tau = 1 / sigma and B the beta function.

    Args:
        rho: length of the window, above 4.
        sigma: standard deviation of the gradient, above 0.

    Returns:
        A variance, in units of 1 / sigma^2.

    Raises:
        ValueError: rho is not above 4 (the variance diverges), or sigma is not above 0.

    Example:
        >>> round(adaptive_variance(5.0), 3), round(adaptive_variance(1999.0), 6)
        (0.252, 0.000251)

    Source:
        Liu et al. 2019, theorem 1, equation 1.
    """
    _check_window(rho, sigma)
    # Var = tau^2 rho / (rho - 2) (1 - c), c = Gamma(y + 1/2)^2 / (Gamma(y) Gamma(y + 1)), by the
    # duplication formula; the paper's power of two overflows near rho = 500.
    y = rho / 2 - 1
    if y < 50:
        log_c = 2 * math.lgamma(y + 0.5) - math.lgamma(y) - math.lgamma(y + 1)
    else:  # Stirling's series; the gamma functions would cancel.
        log_c = -1 / (4 * y) + 1 / (96 * y**3) - 1 / (320 * y**5)
    return -rho / (rho - 2) * math.expm1(log_c) / sigma**2


def adaptive_variance_first_order(rho: float, sigma: float = 1.0) -> float:
    """The first-order variance of the adaptive learning rate: rho / (2 (rho - 2)(rho - 4) sigma^2).

    It is what r_t is built on. Below rho of about 20 it is poor; use `adaptive_variance` there.

    Args:
        rho: length of the window, above 4.
        sigma: standard deviation of the gradient, above 0.

    Returns:
        A variance, in units of 1 / sigma^2.

    Raises:
        ValueError: rho is not above 4 (the variance diverges), or sigma is not above 0.

    Example:
        >>> round(adaptive_variance_first_order(5.0), 3)
        0.833

    Source:
        Liu et al. 2019, section 4.2, equation 4.
    """
    _check_window(rho, sigma)
    return rho / (2 * (rho - 2) * (rho - 4)) / sigma**2


def _check_window(rho: float, sigma: float) -> None:
    if not rho > 4:
        raise ValueError(
            f"rho={rho!r} must be above 4: the variance of the adaptive learning rate diverges "
            "there. Skip the updates before rectification."
        )
    if not sigma > 0:
        raise ValueError(f"sigma={sigma!r} must be above 0; it is a standard deviation.")
