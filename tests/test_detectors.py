"""The detector: what it must see, what it must not, and that nothing blinds it."""

import json
import math
import random

import pytest

from lightning_radam.monitor.detectors import InstabilityDetector


def healthy(steps: int, seed: int = 0) -> list[float]:
    """A falling loss with noise."""
    noise = random.Random(seed)
    return [2.0 / (1 + 0.001 * t) + noise.gauss(0, 0.05) for t in range(steps)]


def fed(losses: list[float], window: int = 128) -> InstabilityDetector:
    detector = InstabilityDetector(window)
    for loss in losses:
        assert [e for e in detector.update(loss) if e.severity != "info"] == []
    return detector


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_silent(seed: int) -> None:
    fed(healthy(3000, seed))


def test_a_loss_at_two_and_a_half_times_the_median_is_a_spike_at_that_step() -> None:
    detector = fed([2.0 + 0.01 * (t % 7) for t in range(200)])
    (event,) = detector.update(5.075)
    assert (event.kind, event.severity, event.step) == ("spike", "warning", 200)
    assert event.message == "loss 5.075 is 2.5 times its median of 2.03"
    assert event.score > 10


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient norm"])
def test_every_non_finite_value_is_critical_at_its_step(bad: float, place: str) -> None:
    detector = InstabilityDetector()
    loss, norm = (bad, 1.0) if place == "loss" else (1.0, bad)
    (event,) = detector.update(loss, norm)
    assert (event.kind, event.severity, event.step) == ("non_finite", "critical", 0)
    assert event.message == f"{place} is {bad}"


def test_a_nan_blinds_it_for_no_step() -> None:
    detector = fed(healthy(300))
    assert [e.kind for e in detector.update(math.nan)] == ["non_finite"]
    assert [e.kind for e in detector.update(8.0)] == ["spike"]
    assert [e.kind for e in detector.update(math.inf, math.nan)] == ["non_finite"] * 2
    assert [e.kind for e in detector.update(8.0)] == ["spike"]
    assert detector.update(1.5) == []


def test_spikes_do_not_mask_later_smaller_ones() -> None:
    detector = fed(healthy(300))
    assert [len(detector.update(loss)) for loss in (10.0, 5.0, 6.0)] == [1, 1, 1]


def test_a_level_that_has_come_to_stay_becomes_the_baseline() -> None:
    detector = fed(healthy(300))
    alarms = [bool(detector.update(8.0 + 0.01 * (t % 5))) for t in range(200)]
    assert alarms[0]
    assert not any(alarms[150:])


def test_a_loss_around_zero_raises_no_alarm() -> None:
    noise = random.Random(1)
    fed([noise.gauss(0, 1) for _ in range(400)])


def test_resumed_equals_uninterrupted() -> None:
    losses = [*healthy(150), 9.0, math.nan, *healthy(40, seed=2), 7.0, 0.5]
    whole, first = InstabilityDetector(), InstabilityDetector()
    expected = [whole.update(loss) for loss in losses]
    seen = [first.update(loss) for loss in losses[:152]]
    resumed = InstabilityDetector()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    seen += [resumed.update(loss) for loss in losses[152:]]
    # A NaN is not equal to itself, so the events are compared as text.
    assert repr(seen) == repr(expected)


def test_a_short_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window=10 must be at least 64 steps"):
        InstabilityDetector(10)
