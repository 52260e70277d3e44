"""Streaming detectors: numbers in, events out. Plain Python, no framework."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Event", "InstabilityDetector", "Severity"]

Severity = Literal["info", "warning", "critical"]

_MIN_HISTORY = 64  # below this, a median and a spread say little
_OUTLIER_Z = 6.0  # a larger value does not enter the baseline
_SPIKE_Z = 10.0
_SPIKE_RATIO = 2.0
_MAX_REJECTED = 32  # in a row: then the level itself has moved, and the baseline follows


@dataclass(frozen=True)
class Event:
    """Something that happened at one optimizer step.

    Args:
        kind: "non_finite" or "spike".
        severity: "info", "warning" or "critical".
        step: The optimizer step, counted from 0 as Lightning's loggers do.
        value: What was seen.
        score: How unusual it is, in robust standard deviations; infinite for a non-finite value.
        message: One line for a person.
    """

    kind: str
    severity: Severity
    step: int
    value: float
    score: float
    message: str


class _Baseline:
    """Median and robust spread of the last `window` values that were not outliers."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.recent: deque[float] = deque()
        self.ordered: list[float] = []
        self.rejected: list[float] = []

    def centre_and_spread(self) -> tuple[float, float]:
        """Return the median and the spread: MAD or the upper tail, whichever is wider."""
        median = _quantile(self.ordered, 0.5)
        deviations = sorted(abs(x - median) for x in self.ordered)
        mad = 1.4826 * _quantile(deviations, 0.5)
        tail = (_quantile(self.ordered, 0.97) - median) / 1.881  # Q.97 of a normal is 1.881 sigma
        return median, max(mad, tail, 0.002 * abs(median), 1e-8)

    def score(self, value: float) -> float | None:
        """Return the value's distance above the median in spreads; None while history is short."""
        if len(self.recent) < _MIN_HISTORY:
            return None
        median, spread = self.centre_and_spread()
        return (value - median) / spread

    def add(self, value: float, score: float | None) -> None:
        """Take in a finite value, unless it is an outlier that has not come to stay."""
        if score is not None and score > _OUTLIER_Z:
            self.rejected.append(value)
            if len(self.rejected) < _MAX_REJECTED:
                return
            accepted, self.rejected = self.rejected, []
        else:
            accepted, self.rejected = [value], []
        for item in accepted:
            self.recent.append(item)
            insort(self.ordered, item)
            if len(self.recent) > self.window:
                del self.ordered[bisect_left(self.ordered, self.recent.popleft())]


class InstabilityDetector:
    """Watch the loss, and the gradient norm where there is one, for trouble.

    A non-finite value is critical at once. A loss is a spike when it lies more than ten robust
    standard deviations above the median of the last `window` steps and above twice that median.
    The baseline takes in neither non-finite values nor outliers, so trouble cannot hide trouble.

    Args:
        window: Number of past steps that the baseline remembers, >= 64.

    Raises:
        ValueError: If `window` is too short.

    Example:
        >>> detector = InstabilityDetector()
        >>> for step in range(100):
        ...     assert detector.update(2.0 + 0.01 * (step % 7)) == []
        >>> [event.kind for event in detector.update(float("nan"))]
        ['non_finite']
        >>> detector.update(5.0)[0].message
        'loss 5 is 2.5 times its median of 2.03'
    """

    def __init__(self, window: int = 128) -> None:
        if window < _MIN_HISTORY:
            raise ValueError(
                f"window={window!r} must be at least {_MIN_HISTORY} steps: "
                "a median of fewer says little"
            )
        self.window = window
        self._step = -1
        self._loss = _Baseline(window)

    def update(
        self, loss: float, grad_norm: float | None = None, *, step: int | None = None
    ) -> list[Event]:
        """Take in one optimizer step.

        Args:
            loss: The loss, averaged over the micro-batches of the step.
            grad_norm: Global norm of the gradient before clipping, if known.
            step: Number of the step; None is the one after the last.

        Returns:
            What happened at this step; mostly nothing.
        """
        self._step = self._step + 1 if step is None else step
        events = [
            self._event("non_finite", "critical", value, math.inf, f"{name} is {value}")
            for name, value in (("loss", loss), ("gradient norm", grad_norm))
            if value is not None and not math.isfinite(value)
        ]
        if math.isfinite(loss):
            events += self._spike(loss)
        return events

    def _spike(self, loss: float) -> list[Event]:
        score = self._loss.score(loss)
        events = []
        if score is not None and score > _SPIKE_Z:
            median, _ = self._loss.centre_and_spread()
            if median > 0 and loss > _SPIKE_RATIO * median:
                message = f"loss {loss:.4g} is {loss / median:.2g} times its median of {median:.4g}"
                events.append(self._event("spike", "warning", loss, score, message))
        self._loss.add(loss, score)
        return events

    def _event(
        self, kind: str, severity: Severity, value: float, score: float, message: str
    ) -> Event:
        return Event(kind, severity, self._step, value, score, message)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values from which a run goes on as if it had not stopped."""
        return {
            "step": self._step,
            "recent": list(self._loss.recent),
            "rejected": list(self._loss.rejected),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the values of `state_dict`."""
        self._step = state["step"]
        self._loss = _Baseline(self.window)
        self._loss.recent.extend(state["recent"][-self.window :])
        self._loss.ordered = sorted(self._loss.recent)
        self._loss.rejected = list(state["rejected"])


def _quantile(ordered: list[float], q: float) -> float:
    """Return the value at share `q` of a sorted list (linear interpolation, as numpy's default)."""
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])
