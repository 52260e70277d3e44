"""RAdam's instruments against plain formulas."""

import math

import pytest
import torch
from torch import nn

from lightning_radam import RAdam
from lightning_radam.monitor.telemetry import (
    Sampler,
    Telemetry,
    Trend,
    log_histogram,
    radam_scalars,
    top,
    wasserstein,
)
from lightning_radam.rectification import adaptive_variance, is_rectified, r_t, rho_t


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))


def watched(optimizer: type[torch.optim.Optimizer], steps: int) -> tuple[nn.Module, list[dict]]:
    """Train a few steps with an instrument; the layers are small enough to be read whole."""
    model = net()
    optimizer = optimizer(model.parameters(), lr=0.01)
    telemetry = Telemetry(optimizer, {p: name for name, p in model.named_parameters()})
    rows = []
    for step in range(1, steps + 1):
        for param in model.parameters():
            generator = torch.Generator().manual_seed(step)
            param.grad = torch.randn(param.shape, generator=generator) * 2.0**-step
        before, weights = telemetry.before(), flat(model)
        optimizer.step()
        length = float((flat(model) - weights).norm())
        row = telemetry.read(step, torch.cat([before, telemetry.after()]))
        rows.append(row | {"length": length})
    return model, rows


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_scalars_follow_the_count_of_updates() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = RAdam([{"params": [weight]}], lr=0.5, betas=(0.9, 0.99))
    for update in range(1, 20):
        scalars = radam_scalars(optimizer)
        rho, rect = rho_t(update, 0.99), r_t(update, 0.99)
        assert scalars["radam/rho_t"] == rho
        assert scalars["radam/rect"] == rect
        assert scalars["radam/lr_rect"] == 0.5 * rect
        if rho > 4:
            spread = math.sqrt(adaptive_variance(rho))
            assert scalars["radam/spread_theory"] == pytest.approx(spread)
        else:
            assert "radam/spread_theory" not in scalars
        weight.grad = torch.ones(1)
        optimizer.step()


def test_an_optimizer_without_betas_has_an_lr() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.1, 0.3)]
    assert radam_scalars(torch.optim.SGD(groups)) == {"radam/lr": 0.3}


def test_the_handover_is_the_first_adaptive_step_over_the_last_of_momentum() -> None:
    _, rows = watched(RAdam, 8)
    first = next(t for t in range(1, 100) if is_rectified(t, 0.999))
    assert first == 6
    assert not any("radam/handover_jump" in row for row in rows[: first - 1])
    jump = rows[first - 1]["length"] / rows[first - 2]["length"]
    assert rows[first - 1]["radam/handover_jump"] == pytest.approx(jump, rel=1e-3)
    assert rows[first]["radam/handover_jump"] == pytest.approx(jump, rel=1e-3)


def test_gradients_are_described_by_their_logarithms() -> None:
    model, rows = watched(RAdam, 3)
    logs = torch.cat([p.grad.flatten() for p in model.parameters()]).abs().log()
    median = float(logs.quantile(0.5, interpolation="lower"))
    assert rows[2]["stability/log_grad_median"] == pytest.approx(median)
    assert rows[0]["stability/log_grad_shift"] == 0
    assert rows[0]["stability/grad_vanished"] == 0
    _, rows = watched(RAdam, 40)
    assert rows[-1]["stability/grad_vanished"] > 0.9  # 2^-40 is e^-27.7
    # Each step halves the gradients: the distribution moves by ln 2 a step, up to the sampling.
    assert rows[-1]["stability/log_grad_shift"] == pytest.approx(39 * math.log(2), rel=0.05)


def test_lag_and_spread_are_those_of_the_second_moment() -> None:
    model = net()
    optimizer = RAdam(model.parameters(), lr=0.01, betas=(0.9, 0.99))
    telemetry = Telemetry(optimizer, {p: name for name, p in model.named_parameters()})
    for step in range(1, 31):
        for param in model.parameters():
            param.grad = torch.full_like(param, 10.0 if step == 30 and param.ndim == 2 else 1.0)
            param.grad[0] *= 3
        before = telemetry.before()
        optimizer.step()
    row = telemetry.read(30, torch.cat([before, telemetry.after()]))
    v = optimizer.state[model[0].weight]["exp_avg_sq"]
    lag = (model[0].weight.grad.square() / v).mean().sqrt()
    assert row["layers/lag/0.weight"] == pytest.approx(float(lag), rel=1e-4)
    assert row["stability/lag"] == pytest.approx(float(lag), rel=1e-4)
    assert lag > 2.3  # a jump of ten is far above the mark
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in model.parameters()])
    log_psi = 0.5 * math.log(1 - 0.99**30) - (moments.sqrt() + 1e-8).log()
    assert row["radam/spread"] == pytest.approx(float(log_psi.std(correction=0)), rel=1e-4)


def test_the_update_is_compared_with_the_weights() -> None:
    model, rows = watched(RAdam, 1)
    ratio = rows[0]["length"] / float(flat(model).norm())
    assert rows[0]["stability/update_ratio"] == pytest.approx(ratio, rel=1e-4)
    layers = {key for key in rows[0] if key.startswith("layers/update_ratio/")}
    assert layers == {"layers/update_ratio/0.weight", "layers/update_ratio/1.weight"}


def test_without_moments_the_rest_is_there() -> None:
    _, rows = watched(torch.optim.SGD, 7)
    keys = set(rows[-1])
    assert {"stability/update_ratio", "stability/log_grad_median"} <= keys
    assert not keys & {"stability/lag", "radam/spread", "radam/handover_jump"}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_coordinate_spoils_no_number(bad: float) -> None:
    model = net()
    optimizer = RAdam(model.parameters())
    telemetry = Telemetry(optimizer, {})
    for step in (1, 2):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        model[0].weight.grad[0, 0] = bad if step == 2 else 1.0
        model[1].bias.grad = None
        before = telemetry.before()
        if step == 1:
            optimizer.step()
        row = telemetry.read(step, torch.cat([before, telemetry.after()]))
        assert all(map(math.isfinite, row.values())), row
    assert "layers/lag/parameter 0" in row


def test_gradients_beyond_float32_spoil_no_number() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = RAdam([weight])
    telemetry = Telemetry(optimizer, {})
    for step, scale in ((1, 1.0), (2, 3e38)):
        weight.grad = torch.full((4,), scale)
        before = telemetry.before()
        if step == 1:
            optimizer.step()
        row = telemetry.read(step, torch.cat([before, telemetry.after()]))
    assert "stability/lag" not in row
    assert row["stability/log_grad_median"] == pytest.approx(math.log(3e38), rel=1e-5)


def test_an_empty_group_and_complex_parameters_are_no_trouble() -> None:
    weight = nn.Parameter(torch.ones(4, dtype=torch.complex64))
    optimizer = torch.optim.AdamW([{"params": []}, {"params": [weight]}])
    telemetry = Telemetry(optimizer, {weight: "w"})
    weight.grad = torch.full((4,), 3 + 4j)
    before = telemetry.before()
    optimizer.step()
    row = telemetry.read(1, torch.cat([before, telemetry.after()]))
    assert row["stability/log_grad_median"] == pytest.approx(math.log(5))


def test_the_first_gradients_of_another_model_are_no_reference() -> None:
    model = net()
    telemetry = Telemetry(RAdam(model.parameters()), {})
    telemetry.first = torch.zeros(3)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    row = telemetry.read(1, torch.cat([telemetry.before(), telemetry.after()]))
    assert row["stability/log_grad_shift"] == 0


def test_large_tensors_are_sampled_and_weighted() -> None:
    large, small = torch.randn(300, 400), torch.randn(3)
    sampler = Sampler([large, small])
    assert len(sampler) == 128 + 3
    assert float(sampler.weight.sum()) == pytest.approx(120_003)
    assert sampler.weight[-3:].tolist() == [1.0, 1.0, 1.0]
    values = sampler.read([large, small])
    assert torch.equal(values[-3:], small)
    assert torch.isin(values[:-3], large).all()
    # The same coordinates each time, whatever the memory looks like.
    assert torch.equal(values, sampler.read([large.T.contiguous().T, small]))
    assert sampler.read([None, small])[:-3].isnan().all()


def test_an_estimate_from_a_sample_is_near() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(100, 100, generator=generator) * scale for scale in (1.0, 10.0) * 4]
    sampler = Sampler(tensors)
    mean_square = (sampler.read(tensors).square() * sampler.weight).sum() / sampler.weight.sum()
    assert float(mean_square) == pytest.approx(50.5, rel=0.2)


def test_wasserstein_of_a_shift_is_the_shift() -> None:
    a = torch.randn(500, generator=torch.Generator().manual_seed(1))
    weight = torch.ones(500)
    assert wasserstein(a, a, weight) == 0
    assert wasserstein(a, a + 3, weight) == pytest.approx(3, rel=1e-5)
    ordered = (a.sort().values - (2 * a.flip(0)).sort().values).abs().mean()
    assert wasserstein(a, 2 * a.flip(0), weight) == pytest.approx(float(ordered), rel=1e-5)


def test_the_histogram_holds_every_coordinate() -> None:
    logs = torch.tensor([-45.0, -40.0, -39.5, 0.0, 9.9, 30.0])
    shares = log_histogram(logs, torch.tensor([1.0, 1, 1, 1, 1, 5]))
    assert shares == pytest.approx({-40: 0.3, 0: 0.1, 9: 0.6})


def test_the_worst_come_first_and_nan_is_the_worst() -> None:
    assert list(top({"a": 1.0, "b": math.nan, "c": math.inf, "d": 3.0})) == ["b", "c", "d"]
    assert top({}) == {}


def test_a_trend_knows_its_best_and_its_rise() -> None:
    trend = Trend()
    assert trend.scalars() == {}
    for value in [*[1.0] * 50, math.nan, *[3.0] * 100]:
        trend.update(value)
    scalars = trend.scalars()
    assert scalars["steps_since_best"] == 149.0
    assert scalars["rise"] == pytest.approx(2, abs=1e-3)
    resumed = Trend()
    resumed.load_state_dict(trend.state_dict())
    for each in (trend, resumed):
        each.update(0.5)
    assert resumed.scalars() == trend.scalars()


def test_fluctuation_is_a_share_of_the_level() -> None:
    generator = torch.Generator().manual_seed(0)
    small, large = Trend(), Trend()
    for noise in torch.randn(2000, generator=generator).tolist():
        small.update(5 + 0.1 * noise)
        large.update(5 + 1.0 * noise)
    assert small.scalars()["fluctuation"] == pytest.approx(0.02, rel=0.4)
    assert large.scalars()["fluctuation"] == pytest.approx(0.2, rel=0.4)
