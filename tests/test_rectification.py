"""The functions of the paper, against tables, their definitions and the optimizers' own numbers."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from lightning_radam.rectification import (
    adaptive_variance,
    adaptive_variance_first_order,
    is_rectified,
    r_t,
    rho_inf,
    rho_t,
)


@pytest.mark.parametrize(
    ("beta2", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.875, 15.0), (0.99, 199.0), (0.999, 1999.0)]
)
def test_rho_inf(beta2, expected):
    assert rho_inf(beta2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("beta2", "step", "expected"),
    [  # By hand: rho_1 = 1, rho_2 = (1 + 3b) / (1 + b).
        (0.5, 1, 1.0),
        (0.5, 2, 5 / 3),
        (0.75, 2, 13 / 7),
        (0.999, 2, 3.997 / 1.999),
        (0.999, 10**6, 1999.0),
    ],
)
def test_rho_t(beta2, step, expected):
    assert rho_t(step, beta2) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("step", [1, 5, 6, 50, 500])
def test_rho_t_is_the_window_with_the_same_centre_of_mass(beta2, step):
    """Section 4.1: the moving average weighs gradients as a window of length rho_t would."""
    weights = (1 - beta2) * beta2 ** np.arange(step)  # of the newest gradient first
    mean_age = (weights * np.arange(1, step + 1)).sum() / weights.sum()
    assert rho_t(step, beta2) == pytest.approx(2 * mean_age - 1, rel=1e-9)


@pytest.mark.parametrize(
    ("beta2", "first"),
    [(0.5, None), (0.66, None), (0.7, 10), (0.8, 7), (0.875, 6), (0.99, 6), (0.999, 6)],
)
@pytest.mark.parametrize("variant", ["torch", "liu2019", "keras"])
def test_first_rectified_update(beta2, first, variant):
    rectified = (step for step in range(1, 2000) if is_rectified(step, beta2, variant))
    assert next(rectified, None) == first


@pytest.mark.parametrize(
    ("variant", "rectified"), [("torch", False), ("liu2019", True), ("keras", True)]
)
def test_at_exactly_five_torch_waits(variant, rectified):
    assert rho_t(6, 0.8397685748659791) == 5.0
    assert is_rectified(6, 0.8397685748659791, variant) is rectified


@pytest.mark.parametrize(
    ("beta2", "table"),
    [
        (0.999, {1: 0.0, 4: 0.0, 6: 0.026, 556: 0.5, 2737: 0.9, 5654: 0.99}),
        (0.99, {4: 0.0, 6: 0.082, 61: 0.504, 277: 0.901, 567: 0.99}),
        (0.5, {1: 0.0, 10: 0.0, 10**6: 0.0}),
    ],
)
def test_r_t(beta2, table):
    assert {step: round(r_t(step, beta2), 3) for step in table} == table


@pytest.mark.parametrize("step", [6, 20, 1000])
def test_r_t_makes_the_first_order_variance_that_of_the_longest_window(step):
    def spread(rho):
        return math.sqrt(rho / ((rho - 2) * (rho - 4)))

    assert r_t(step, 0.999) == pytest.approx(spread(rho_inf(0.999)) / spread(rho_t(step, 0.999)))


@pytest.mark.parametrize("rho", [4.5, 5.0, 7.3, 20.0, 101.0, 103.0, 1999.0])
@pytest.mark.parametrize("sigma", [1.0, 0.1])
def test_adaptive_variance_against_integration(rho, sigma):
    """1 / psi^2 is sigma^2 / rho times a chi-squared variable with rho degrees of freedom."""
    log_x = np.linspace(math.log(rho) - 90 / math.sqrt(rho), math.log(rho) + 20, 4_000_001)
    log_density = rho / 2 * log_x - np.exp(log_x) / 2
    density = np.exp(log_density - log_density.max())
    psi = np.exp(-log_x / 2) * math.sqrt(rho) / sigma
    mean = (psi * density).sum() / density.sum()
    variance = ((psi - mean) ** 2 * density).sum() / density.sum()
    assert adaptive_variance(rho, sigma) == pytest.approx(variance, rel=1e-6)


@pytest.mark.parametrize(
    ("rho", "worst"), [(5.0, 2.31), (20.0, 0.15), (100.0, 0.024), (1e4, 2.4e-4), (1e6, 3e-6)]
)
def test_first_order_is_poor_for_short_windows(rho, worst):
    error = adaptive_variance_first_order(rho) / adaptive_variance(rho) - 1
    assert 0 < error < worst


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rho_inf(1.0), r"beta2=1\.0 must lie in \[0, 1\); the usual value is 0\.999\."),
        (lambda: rho_inf(math.nan), r"beta2=nan must lie in \[0, 1\)"),
        (lambda: rho_t(0, 0.9), r"step=0 must be 1 or more: updates are counted from 1\."),
        (lambda: r_t(-1, 0.9), r"step=-1 must be 1 or more"),
        (
            lambda: is_rectified(1, 0.9, "adam"),
            r"variant='adam' must be one of torch, liu2019, keras\.",
        ),
        (lambda: adaptive_variance(4.0), r"rho=4\.0 must be above 4: the variance .* diverges"),
        (lambda: adaptive_variance_first_order(math.nan), r"rho=nan must be above 4"),
        (lambda: adaptive_variance(5.0, 0.0), r"sigma=0\.0 must be above 0; it is a standard"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_it_needs_no_framework():
    code = (
        "import sys, lightning_radam.rectification as r; r.r_t(6, .999);"
        "sys.exit(bool({'torch', 'numpy', 'lightning'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
