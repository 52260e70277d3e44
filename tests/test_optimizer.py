"""RAdam against its three references, on every kernel, and its errors."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_radam.optimizer import RAdam
from lightning_radam.schedule import WarmupDecayLR
from tests.references import keras, liu2019, pytorch

GOLDEN = json.loads((Path(__file__).parent / "golden" / "keras_radam.json").read_text())["cases"]
KERNELS = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "single": {"fused": False, "foreach": False},
    "capturable": {"capturable": True},
}
# rho_6 is 5.0 to the last bit: torch waits for update 7.
AT_FIVE = 0.8397685748659791

all_kernels = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def problem(steps: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A parameter and gradients whose sizes span ten decades."""
    rng = np.random.default_rng(seed)
    x0 = rng.standard_normal((5, 7))
    scale = 10 ** rng.uniform(-8, 2, size=(5, 7))
    return x0, rng.standard_normal((steps, 5, 7)) * scale


def run(x0, grads, scheduler=None, **settings) -> np.ndarray:
    """The parameter after every update."""
    param = torch.nn.Parameter(torch.tensor(x0, dtype=torch.float64))
    optimizer = RAdam([param], **settings)
    schedule = scheduler(optimizer) if scheduler else None
    path = []
    for grad in grads:
        param.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        if schedule:
            schedule.step()
        path.append(param.detach().numpy().copy())
    return np.array(path)


def assert_equal(ours, reference):
    np.testing.assert_allclose(ours, reference, rtol=1e-12, atol=1e-14)


COMMON = [
    {},
    {"lr": 0.03, "weight_decay": 0.1},
    {"lr": 0.03, "eps": 1e-3, "weight_decay": 0.1},
    {"lr": 0.03, "betas": (0.8, 0.9)},
    {"lr": 0.03, "betas": (0.0, 0.5), "weight_decay": 0.1},
    {"lr": 0.03, "betas": (0.9, AT_FIVE), "weight_decay": 0.1},
    {"lr": 0.0, "weight_decay": 0.1},
    {"lr": torch.tensor(0.03, dtype=torch.float64), "weight_decay": 0.1},
    {"lr": torch.tensor([0.03], dtype=torch.float64)},
]


@all_kernels
class TestReferences:
    @pytest.mark.parametrize("settings", COMMON, ids=str)
    @pytest.mark.parametrize("decoupled", [True, False])
    @pytest.mark.parametrize("maximize", [True, False])
    def test_torch(self, settings, decoupled, maximize, kernel):
        settings = settings | {"decoupled_weight_decay": decoupled, "maximize": maximize}
        x0, grads = problem()
        reference = pytorch.trajectory(x0, grads, **plain(settings))
        assert_equal(run(x0, grads, **settings, **kernel), reference)

    @pytest.mark.parametrize("settings", COMMON, ids=str)
    def test_liu2019(self, settings, kernel):
        x0, grads = problem()
        reference = liu2019.trajectory(x0, grads, **plain(settings))
        assert_equal(run(x0, grads, variant="liu2019", **settings, **kernel), reference)

    @pytest.mark.parametrize("settings", COMMON, ids=str)
    @pytest.mark.parametrize("amsgrad", [True, False])
    def test_keras(self, settings, amsgrad, kernel):
        x0, grads = problem()
        reference = keras.trajectory(x0, grads, amsgrad=amsgrad, **keras_words(settings))
        ours = run(x0, grads, variant="keras", amsgrad=amsgrad, **settings, **kernel)
        assert_equal(ours, reference)

    @pytest.mark.parametrize("name", GOLDEN)
    def test_keras_golden(self, name, kernel):
        case = GOLDEN[name]
        ours = run_keras(case["x0"], case["grads"], **case["kwargs"], **kernel)
        assert np.abs(ours - np.array(case["trajectory"])).max() <= 1e-12


@pytest.mark.parametrize("name", GOLDEN)
def test_keras_twin_golden(name):
    case = GOLDEN[name]
    twin = keras.trajectory(case["x0"], np.array(case["grads"]), **case["kwargs"])
    assert np.abs(twin - np.array(case["trajectory"])).max() <= 1e-12


@pytest.mark.parametrize("proportion", [0.0, 0.1, 0.3125, 1.0])
@pytest.mark.parametrize("beta_2", [0.5, 0.875, 0.9990234375])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03125])
def test_keras_schedule(proportion, beta_2, weight_decay):
    """Fractional warm-up, none, nothing else; and training past the end of the schedule."""
    kwargs = {
        "learning_rate": 0.0078125,
        "beta_1": 0.875,
        "beta_2": beta_2,
        "weight_decay": weight_decay,
        "total_steps": 50,
        "warmup_proportion": proportion,
        "min_lr": 2**-16,
    }
    x0, grads = problem(steps=60)
    reference = keras.trajectory(x0, grads, **kwargs)
    assert np.abs(run_keras(x0, grads, **kwargs) - reference).max() <= 1e-12


def test_the_references_differ_by_more_than_the_tolerance():
    """On gradients near 1e-3, where only the place of eps differs: the tests can tell."""
    x0, grads = problem()
    grads = np.sign(grads) * 1e-3
    settings = {"lr": 1e-3, "eps": 1e-8}
    torch_path = run(x0, grads, **settings)
    for variant in ("liu2019", "keras"):
        assert np.abs(run(x0, grads, variant=variant, **settings) - torch_path).max() > 1e-9


def plain(settings):
    return {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in settings.items()}


def keras_words(settings):
    settings = plain({"eps": 1e-8} | settings)
    beta_1, beta_2 = settings.pop("betas", (0.9, 0.999))
    names = {"lr": "learning_rate", "eps": "epsilon"}
    return {names.get(k, k): v for k, v in settings.items()} | {"beta_1": beta_1, "beta_2": beta_2}


def run_keras(
    x0,
    grads,
    *,
    learning_rate,
    beta_1,
    beta_2,
    epsilon=1e-7,
    total_steps=0,
    warmup_proportion=0.1,
    min_lr=0.0,
    **settings,
):
    def scheduler(optimizer):
        return WarmupDecayLR(optimizer, total_steps, warmup_proportion, min_lr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Past the end of the schedule.
        return run(
            x0,
            grads,
            scheduler if total_steps else None,
            variant="keras",
            lr=learning_rate,
            betas=(beta_1, beta_2),
            eps=epsilon,
            **settings,
        )
