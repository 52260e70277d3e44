"""The schedule, against values worked out by hand and by exact fractions."""

import copy
import warnings
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_radam.schedule import WarmupDecayLR, warmup_decay

# update:       1     2     3     4     5     6     7     8     9 (one too many)
BY_HAND = {
    "half warm-up": (8, 0.5, 0.0, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    "floor of .2": (8, 0.5, 0.2, [0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
    "no warm-up": (4, 0.0, 0.0, [0.75, 0.5, 0.25, 0.0, 0.0]),
    "only warm-up": (4, 1.0, 0.1, [0.25, 0.5, 0.75, 1.0, 0.1]),
    # w = 2.5: update 3 lies half a step into a decay of 7.5 steps.
    "fractional": (10, 0.25, 0.0, [0.4, 0.8, 14 / 15, 12 / 15, 10 / 15, 8 / 15, 6 / 15, 4 / 15]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case: str) -> None:
    total_steps, warmup_proportion, min_lr, expected = BY_HAND[case]
    lrs = [
        warmup_decay(
            t,
            base_lr=1.0,
            total_steps=total_steps,
            warmup_proportion=warmup_proportion,
            min_lr=min_lr,
        )
        for t in range(1, len(expected) + 1)
    ]
    assert lrs == pytest.approx(expected, rel=1e-15, abs=1e-15)


@given(
    total_steps=st.integers(1, 5000),
    warmup=st.fractions(0, 1, max_denominator=64),
    step=st.integers(1, 6000),
)
def test_agrees_with_exact_arithmetic(total_steps: int, warmup: Fraction, step: int) -> None:
    lr, min_lr = Fraction(1, 128), Fraction(1, 65536)
    w = total_steps * warmup
    decay_steps = max(total_steps - w, 1)
    exact = (
        lr * step / w
        if step <= w
        else lr + (min_lr - lr) / decay_steps * min(step - w, decay_steps)
    )
    # Only where w is a float exactly do both sides ask the same question at step == w.
    if Fraction(float(warmup)) == warmup:
        got = warmup_decay(
            step,
            base_lr=float(lr),
            total_steps=total_steps,
            warmup_proportion=float(warmup),
            min_lr=float(min_lr),
        )
        assert got == pytest.approx(float(exact), rel=1e-12, abs=1e-17)


def make(total_steps: int = 8, lrs: tuple[float, ...] = (1.0,), **settings: Any) -> WarmupDecayLR:
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in lrs]
    return WarmupDecayLR(torch.optim.SGD(groups, lr=0.1), total_steps, **settings)


def advance(scheduler: WarmupDecayLR, steps: int) -> list[float]:
    """The learning rates that the next `steps` updates use."""
    lrs = []
    for _ in range(steps):
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return lrs


def test_the_adapter_follows_the_function_and_keeps_each_groups_peak() -> None:
    scheduler = make(lrs=(1.0, 0.5), warmup_proportion=0.5)
    assert scheduler.get_last_lr() == [0.25, 0.125]
    assert advance(scheduler, 8) == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("stop", [0, 2, 4, 7, 8])
@pytest.mark.parametrize("new_length", [8, 16])
def test_a_resumed_run_has_the_lrs_of_an_uninterrupted_one(stop: int, new_length: int) -> None:
    first = make(8, warmup_proportion=0.5)
    advance(first, stop)
    state = copy.deepcopy(first.state_dict())
    assert state == {"last_epoch": stop}
    whole = make(new_length, warmup_proportion=0.5)
    resumed = make(new_length, warmup_proportion=0.5)
    resumed.load_state_dict(state)
    expected = advance(whole, new_length)[stop:]
    assert advance(resumed, new_length - stop) == expected


def test_an_extended_run_does_not_train_at_zero() -> None:
    finished = make(8)
    advance(finished, 8)
    extended = make(16)
    extended.load_state_dict(finished.state_dict())
    # w = 1.6, d = 14.4: update 9 lies 7.4 steps into the decay.
    assert extended.get_last_lr() == pytest.approx([1 - 7.4 / 14.4])


def test_a_spent_schedule_stays_at_min_lr_and_says_so_once() -> None:
    scheduler = make(4, min_lr=0.125)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(scheduler, 4)
    message = "4 steps are spent: update 5 and every further one trains at min_lr=0.125"
    with pytest.warns(UserWarning, match=message) as seen:
        assert advance(scheduler, 3) == [0.125, 0.125, 0.125]
    assert len(seen) == 1


def test_a_tensor_lr_keeps_its_identity() -> None:
    lr = torch.tensor(1.0)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=lr, foreach=False)
    scheduler = WarmupDecayLR(optimizer, 4, warmup_proportion=0.5)
    assert lr.item() == 0.5
    scheduler.load_state_dict({"last_epoch": 1})
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"total_steps": 0}, "total_steps=0 must be a whole number of optimizer updates, >= 1"),
        ({"total_steps": 2.5}, "total_steps=2.5 must be a whole number"),
        ({"total_steps": True}, "total_steps=True must be a whole number"),
        (
            {"warmup_proportion": 500},
            r"warmup_proportion=500 must lie in \[0, 1\]: it is a share of total_steps; for a n",
        ),
        ({"warmup_proportion": -0.1}, "warmup_proportion=-0.1 must lie in"),
        ({"min_lr": -1e-5}, "min_lr=-1e-05 must be a finite learning rate, >= 0"),
        ({"min_lr": float("nan")}, "min_lr=nan must be"),
    ],
)
def test_bad_values_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**{"total_steps": 8, **settings})


# Other shapes and the other way to say the warm-up -------------------------------------------

SHAPES = {
    # update:                       1    2    3     4     5     6     7     8
    "cosine": ({"decay": "cosine"}, [0.5, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067, 0.0]),
    "cosine, floor": ({"decay": "cosine", "min_lr": 0.5}, [0.5, 1, 0.967, 0.875, 0.75, 0.625]),
    "constant": ({"decay": "constant", "min_lr": 0.5}, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    "warm-up in updates": ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0]),
    "no warm-up": ({"warmup_steps": 0}, [0.875, 0.75, 0.625, 0.5]),
}


@pytest.mark.parametrize("case", SHAPES)
def test_other_shapes_by_hand(case: str) -> None:
    settings, expected = SHAPES[case]
    scheduler = make(8, **{"warmup_proportion": 0.25, **settings})
    assert advance(scheduler, len(expected)) == pytest.approx(expected, abs=5e-4)


def test_a_constant_schedule_is_never_spent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert advance(make(4, decay="constant"), 8)[-1] == 1.0


def test_a_group_whose_peak_lies_below_min_lr_stays_at_its_peak() -> None:
    scheduler = make(4, lrs=(1.0, 0.1), warmup_proportion=0.0, min_lr=0.2)
    advance(scheduler, 4)
    assert scheduler.get_last_lr() == pytest.approx([0.2, 0.1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "cosin"}, "decay='cosin' must be one of 'linear', 'cosine', 'constant'"),
        ({"warmup_steps": 9}, "warmup_steps=9 must lie between 0 and total_steps=8"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must lie between 0 and total_steps=8"),
    ],
)
def test_bad_shapes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(8, **settings)


def test_the_function_names_its_own_mistakes() -> None:
    with pytest.raises(ValueError, match="step=0 must be 1 or more: updates are counted from 1"):
        warmup_decay(0, base_lr=1.0, total_steps=4)
    with pytest.raises(ValueError, match="decay='exponential' must be one of"):
        warmup_decay(3, base_lr=1.0, total_steps=4, decay="exponential")
