"""Streaming detectors: numbers in, events out. Plain Python, no framework."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

__all__ = ["Event", "InstabilityDetector", "Kind", "Severity"]

Severity = Literal["info", "warning", "critical"]
Kind = Literal[
    "non_finite",
    "spike",
    "plateau",
    "divergence",
    "gradient_explosion",
    "gradient_collapse",
    "outlier_batch",
    "stalled",
]

# The baseline of a stream.
_MIN_HISTORY = 64  # below this, a median and a spread say little
_OUTLIER_Z = 6.0  # a larger value does not enter the baseline
_Q97 = 1.881  # the quantile .97 of a normal distribution
_MAX_REJECTED = 32  # in a row: then the level itself has moved, and the baseline follows
_LOSS_FLOOR = 0.002  # least spread of the loss, as a share of its median and of its first median
_LOG_NORM_FLOOR = 0.03  # least spread of ln(gradient norm)

# The sums, which tell a run of bad steps from a single one; `docs/detectors.md` has what else was
# tried. One step adds 9 at most, of the 10 that make a warning.
_WARNING, _CRITICAL = 10.0, 20.0
_PLATEAU = 9.0
_LEAST_Z, _PLATEAU_CLIP, _CLIP, _FAR_CLIP = -4.0, 3.0, 4.0, 6.0
_ALLOWANCE, _PLATEAU_ALLOWANCE = 1.5, 0.75  # taken off each step, so that noise does not add up
_WEIGHT, _WEIGHT_ALONE = 1.6, 2.0  # of a step in S, with and without a gradient norm
_PERSISTENCE = 0.25  # autocorrelation of z of the gradient norm in a healthy run
_CEILING = 1.25  # times the highest limit: the sums forget an incident soon after its end
_LASTING = 12  # steps above 0 from which a risen loss is a plateau and no longer a spike

# What one step shows.
_SPIKE_RATIO, _SPIKE_Z = 2.0, 6.0
_LOG_EXPLOSION, _EXPLOSION_Z = math.log(10.0), 6.0

# What many steps show.
_AVERAGED = 100  # steps in the moving average of the loss
_DIVERGENCE_SHARE, _DIVERGENCE_Z = 0.1, 6.0
_PROGRESS_Z = 0.1  # a fall of the average that counts as progress; its own noise is 0.07
_STALLED = 1000  # steps without progress, and a quarter of all: progress slows down by nature
_LOG_VANISHED = -20.0  # e^-20 is 2e-9, below Adam's eps
_LOG_COLLAPSE = math.log(1e4)  # fall against the first step
_COLLAPSED = 8  # steps in a row

# One unusual loss.
_OUTLIER_RATE = 5e-4  # share of the steps that are to count as outlier batches
_LEAST_OUTLIER = 3.0
_TAIL_STEP = 0.5  # how far each of them moves the limit


@dataclass(frozen=True)
class Event:
    """Something that happened at one optimizer step.

    Args:
        kind: What; `InstabilityDetector` says what each kind means.
        severity: "info", "warning" or "critical".
        step: The optimizer step, counted from 0 as Lightning's loggers do.
        value: The loss or the gradient norm that was seen.
        score: How unusual it is, on the scale of the rule that fired (`docs/detectors.md`);
            infinite for a non-finite value.
        message: One line for a person.
    """

    kind: Kind
    severity: Severity
    step: int
    value: float
    score: float
    message: str


class InstabilityDetector:
    """Watch the loss, and the gradient norm where there is one, for trouble.

    Each stream, x = loss and y = ln(gradient norm), is compared with its own last `window` values:
    z = (value - m) / s, with their median m and spread
    s = max(1.4826 MAD, (Q.97 - m) / 1.881, a floor); a loss above its median is compared by ratio.
    Only finite values with z <= 6 enter this baseline, or 32 in a row that did not: trouble cannot
    hide trouble. Two sums tell a run of bad steps from a single one:

        S = max(0, S + w (clip(z) - 1.5))        P = max(0, P + clip(zx) - 0.75)

    with z = (zx + zy') / sqrt 2 and w = 1.6, zy' being what is new in zy; without a norm z = zx and
    w = 2. `clip` is to -4..3 in P, to -4..6 in S, or to -4..4 for a loss alone such as this run has
    shown before.

    | kind | severity | when |
    |---|---|---|
    | `non_finite` | critical | the loss or the gradient norm is NaN or infinite |
    | `gradient_explosion` | warning | the gradient norm is above `grad_norm_limit` |
    | `spike` | warning | S > 10, or a loss above twice its median with zx > 6 |
    | `spike` | critical | S > 20 |
    | `plateau` | warning | P > 9, and P has been above 0 for 12 steps |
    | `divergence` | critical | the mean loss of 100 steps is above its best by max(10%, 6 s) |
    | `gradient_collapse` | warning | the gradient has vanished for 8 steps, the loss has not |
    | `outlier_batch` | info | a single loss as high as 5 of 10000 are |
    | `stalled` | info | that mean has not fallen for 1000 steps and a quarter of all steps |

    What one step shows is reported at each such step, what lasts is reported once, when it begins.
    All but `non_finite` and `gradient_collapse` need 64 steps of history.

    Args:
        window: Number of past steps that the baselines remember, >= 64.

    Raises:
        ValueError: If `window` is too short.

    Example:
        >>> detector = InstabilityDetector()
        >>> for step in range(100):
        ...     assert detector.update(2.0 + 0.01 * (step % 7), grad_norm=3.1) == []
        >>> [event.kind for event in detector.update(float("nan"), 3.1)]
        ['non_finite']
        >>> detector.update(5.0, 3.1)[0].message
        'loss 5 is 2.5 times its median of 2.03'
        >>> detector.update(2.0, 38.0)[0].message
        'gradient norm 38 is 12 times its median of 3.1'
    """

    def __init__(self, window: int = 128) -> None:
        if window < _MIN_HISTORY:
            raise ValueError(
                f"window={window!r} must be at least {_MIN_HISTORY} steps: "
                "a median of fewer says little"
            )
        self.window = window
        self._step = -1
        self._grace = 0
        self._loss = _Baseline(window, relative_floor=_LOSS_FLOOR, skewed=True)
        self._log_norm = _Baseline(window, absolute_floor=_LOG_NORM_FLOOR)
        self._instability = _Sum()
        self._rise = _Sum()
        self._memory = _Memory()
        self._average = _Average()
        self._collapse = _Collapse()
        self._tail = _Tail()
        self._alarms = {name: _Alarm() for name in _ALARMS}

    @property
    def score(self) -> float:
        """The instability S after the last step, 0 to 25: a warning above 10, critical above 20."""
        return self._instability.value

    @property
    def grad_norm_limit(self) -> float:
        """The norm above which the next step is an explosion; infinite while there is no baseline.

        exp(m + max(ln 10, 6 s)): ten times the median, or more where the norm is wild by nature.
        """
        if not self._log_norm.known:
            return math.inf
        median, spread = self._log_norm.centre_and_spread()
        return math.exp(min(median + _explosion(spread), 700.0))

    def start_grace(self, steps: int = 50) -> None:
        """Expect a bumpy start, as after a resume: the sums stay at 0, nothing is a divergence.

        What a single step shows is still reported, and the baselines go on learning.

        Args:
            steps: How many of the next steps, >= 0.

        Raises:
            ValueError: If `steps` is negative.
        """
        if steps < 0:
            raise ValueError(f"steps={steps!r} must be at least 0; 0 ends a grace")
        self._grace = steps

    def update(
        self, loss: float, grad_norm: float | None = None, *, step: int | None = None
    ) -> list[Event]:
        """Take in one optimizer step.

        Args:
            loss: The loss, averaged over the micro-batches of the step.
            grad_norm: Global norm of the gradient before clipping, if known.
            step: Number of the step, from 0; None is the one after the last.

        Returns:
            What happened at this step; mostly nothing.
        """
        self._step = self._step + 1 if step is None else step
        log_norm = None if grad_norm is None else _log(grad_norm)
        x, y = self._loss.read(loss), self._log_norm.read(log_norm)
        self._add_up(x, y)
        events = [
            *self._non_finite("loss", loss),
            *self._non_finite("gradient norm", grad_norm),
            *self._explosion(y),
            *self._spike(x, y),
            *self._plateau(x),
            *self._vanished(loss, log_norm),
            *self._averaged(loss, x),
        ]
        self._grace = max(0, self._grace - 1)
        return events or list(self._outlier(x))

    def state_dict(self) -> dict[str, Any]:
        """Return plain values from which a run goes on as if it had not stopped."""
        return {
            "step": self._step,
            "grace": self._grace,
            "loss": self._loss.state_dict(),
            "log_norm": self._log_norm.state_dict(),
            "alarms": {name: alarm.on for name, alarm in self._alarms.items()},
            **{name: asdict(getattr(self, f"_{name}")) for name in _PARTS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the values of `state_dict`; those of a longer window are cut to this one's."""
        self._step = state["step"]
        self._grace = state["grace"]
        self._loss.load_state_dict(state["loss"])
        self._log_norm.load_state_dict(state["log_norm"])
        self._alarms = {name: _Alarm(on) for name, on in state["alarms"].items()}
        for name, part in _PARTS.items():
            setattr(self, f"_{name}", part(**state[name]))

    # The rules ----------------------------------------------------------------------------------

    def _event(
        self, kind: Kind, severity: Severity, value: float, score: float, message: str
    ) -> Event:
        return Event(kind, severity, self._step, value, score, message)

    def _non_finite(self, name: str, value: float | None) -> Iterator[Event]:
        if value is not None and not math.isfinite(value):
            yield self._event("non_finite", "critical", value, math.inf, f"{name} is {value}")

    def _add_up(self, x: _Reading | None, y: _Reading | None) -> None:
        if self._grace:
            self._instability, self._rise = _Sum(), _Sum()
            return
        if x is not None:
            self._rise.add(_clip(x.z, _PLATEAU_CLIP) - _PLATEAU_ALLOWANCE, _CEILING * _PLATEAU)
        if y is not None:
            fresh = self._memory.fresh(y.z)
            z = (x.z + fresh) / math.sqrt(2) if x is not None else fresh
            step = _WEIGHT * (_clip(z, _FAR_CLIP) - _ALLOWANCE)
        elif x is not None:
            # A loss has far outliers that are data: what this run has seen before counts less.
            clip = _FAR_CLIP if x.z > self._tail.limit else _CLIP
            step = _WEIGHT_ALONE * (_clip(x.z, clip) - _ALLOWANCE)
        else:
            return
        self._instability.add(step, _CEILING * _CRITICAL)

    def _plateau(self, x: _Reading | None) -> Iterator[Event]:
        p = self._rise.value if self._rise.steps >= _LASTING else 0.0
        if self._alarms["plateau"].rings(p, _PLATEAU) and x is not None:
            message = (
                f"loss {x.value:.4g} stays above its median, for {self._rise.steps} steps now; "
                f"the median is {x.median:.4g}"
            )
            yield self._event("plateau", "warning", x.value, p, message)

    def _spike(self, x: _Reading | None, y: _Reading | None) -> Iterator[Event]:
        s = self._instability.value
        begins = self._alarms["spike"].rings(s, _WARNING)
        worsens = self._alarms["critical"].rings(s, _CRITICAL)
        severity: Severity = "critical" if worsens else "warning"
        if x is not None and x.z > _SPIKE_Z and x.value > _SPIKE_RATIO * x.median > 0:
            ratio = x.value / x.median
            message = f"loss {x.value:.4g} is {ratio:.2g} times its median of {x.median:.4g}"
            self._alarms["spike"].on = True  # the sum may follow, and says nothing new
            yield self._event("spike", severity, x.value, x.z, message)
        elif begins or worsens:
            seen = [f"loss {x.value:.4g} (median {x.median:.4g})"] if x else []
            if y is not None:
                norm, usual = math.exp(y.value), math.exp(y.median)
                seen.append(f"gradient norm {norm:.4g} (median {usual:.4g})")
            message = f"instability {s:.3g}: {', '.join(seen)}"
            value = x.value if x else norm
            yield self._event("spike", severity, value, s, message)

    def _explosion(self, y: _Reading | None) -> Iterator[Event]:
        if y is not None and y.value - y.median > _explosion(y.spread):
            norm, median = math.exp(y.value), math.exp(y.median)
            message = (
                f"gradient norm {norm:.4g} is {norm / median:.2g} times its median of {median:.4g}"
            )
            yield self._event("gradient_explosion", "warning", norm, y.z, message)

    def _vanished(self, loss: float, log_norm: float | None) -> Iterator[Event]:
        if log_norm is None or not (log_norm < math.inf and math.isfinite(loss)):
            return
        self._collapse.add(loss, log_norm)
        if self._collapse.steps == _COLLAPSED:
            norm = math.exp(log_norm)
            message = (
                f"gradient norm {norm:.4g} has all but vanished for {_COLLAPSED} steps, "
                f"while the loss is {loss:.4g}"
            )
            yield self._event("gradient_collapse", "warning", norm, -log_norm, message)

    def _averaged(self, loss: float, x: _Reading | None) -> Iterator[Event]:
        if x is None:
            return
        average = self._average
        # One wild step counts as twice the median at most, so that only many move the average.
        average.add(min(loss, x.median + max(abs(x.median), 10 * x.spread)), x.spread)
        excess = 0.0 if self._grace else average.excess
        if self._alarms["divergence"].rings(excess, 1.0):
            message = (
                f"mean loss of {_AVERAGED} steps is {average.mean:.4g}, "
                f"its best was {average.best:.4g}"
            )
            yield self._event("divergence", "critical", average.mean, excess, message)
        if self._alarms["stalled"].rings(average.idle / max(_STALLED, average.steps / 4), 1.0):
            message = f"mean loss has not fallen for {average.idle} steps: it is {average.mean:.4g}"
            yield self._event("stalled", "info", average.mean, float(average.idle), message)

    def _outlier(self, x: _Reading | None) -> Iterator[Event]:
        if x is not None and not self._alarms["spike"].on and self._tail.holds(x.z):
            message = (
                f"loss {x.value:.4g} is {x.z:.2g} spreads above its median of {x.median:.4g}: "
                "an unusual batch?"
            )
            yield self._event("outlier_batch", "info", x.value, x.z, message)


class _Reading(NamedTuple):
    """A finite value, the baseline that it met, and its distance from it."""

    value: float
    median: float
    spread: float
    z: float


class _Baseline:
    """Median and robust spread of the last `window` values that were not outliers."""

    def __init__(
        self,
        window: int,
        *,
        absolute_floor: float = 1e-8,
        relative_floor: float = 0.0,
        skewed: bool = False,
    ) -> None:
        self._window = window
        self._skewed = skewed
        self._absolute_floor = absolute_floor
        self._relative_floor = relative_floor
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []
        self._rejected: list[float] = []
        self._first = 0.0

    @property
    def known(self) -> bool:
        """Whether there is enough history to compare with."""
        return len(self._recent) >= _MIN_HISTORY

    def read(self, value: float | None) -> _Reading | None:
        """Compare a value with the ones before it, then let it in; None if either is unknown."""
        if value is None or not math.isfinite(value):
            return None
        reading = None
        if self.known:
            median, spread = self.centre_and_spread()
            reading = _Reading(value, median, spread, self._distance(value, median, spread))
        if reading is not None and reading.z > _OUTLIER_Z:
            self._rejected.append(value)
            if len(self._rejected) == _MAX_REJECTED:
                self._let_in(self._rejected)
        else:
            self._let_in([value])
        return reading

    def centre_and_spread(self) -> tuple[float, float]:
        """Return the median and the spread, the wider of MAD and upper tail, above the floor."""
        ordered = self._ordered
        median = _quantile(ordered, 0.5)
        tail = (_quantile(ordered, 0.97) - median) / _Q97
        # The first median is the unit of the loss: when a model has learnt its data by heart and
        # the loss is near 0, a batch with one hard sample is 1000 times the median, and harmless.
        relative = self._relative_floor * max(abs(median), self._first)
        return median, max(1.4826 * _mad(ordered, median), tail, relative, self._absolute_floor)

    def _distance(self, value: float, median: float, spread: float) -> float:
        """Return z; for a loss above its median by ratio, so that both agree at the quantile .97.

        A small loss has a long upper tail: with a median of .001 and a spread of .01, .1 is usual.
        Where the spread is a small part of the median, this is (value - median) / spread.
        """
        if self._skewed and value > median > 0:
            return _Q97 * math.log(value / median) / math.log1p(_Q97 * spread / median)
        return (value - median) / spread

    def _let_in(self, values: list[float]) -> None:
        self._rejected = []
        for value in values:
            self._recent.append(value)
            insort(self._ordered, value)
            if len(self._recent) == _MIN_HISTORY:
                self._first = self._first or abs(_quantile(self._ordered, 0.5))
            if len(self._recent) > self._window:
                del self._ordered[bisect_left(self._ordered, self._recent.popleft())]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "recent": list(self._recent),
            "rejected": list(self._rejected),
            "first": self._first,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the values of `state_dict`."""
        self._recent = deque(state["recent"][-self._window :])
        self._ordered = sorted(self._recent)
        self._rejected = list(state["rejected"])
        self._first = float(state["first"])


@dataclass
class _Sum:
    """A clipped cumulative sum, and for how many steps it has been above 0."""

    value: float = 0.0
    steps: int = 0

    def add(self, step: float, ceiling: float) -> None:
        """Add a step's score, between 0 and a ceiling."""
        self.value = max(0.0, min(ceiling, self.value + step))
        self.steps = self.steps + 1 if self.value > 0 else 0


@dataclass
class _Memory:
    """What the last step says about z of the gradient norm, whose noise lasts for some steps."""

    last: float = 0.0

    def fresh(self, z: float) -> float:
        """Return what is new in z: the innovation of a first-order autoregression, of spread 1."""
        fresh = (z - _PERSISTENCE * self.last) / math.sqrt(1 - _PERSISTENCE**2)
        self.last = z
        return fresh


@dataclass
class _Alarm:
    """Rings once when a limit is passed, and not again before half of it was reached."""

    on: bool = False

    def rings(self, value: float, limit: float) -> bool:
        before, self.on = self.on, value > (limit / 2 if self.on else limit)
        return self.on and not before


@dataclass
class _Average:
    """The moving average of the loss, its best, and how long ago it made progress."""

    steps: int = 0
    mean: float = 0.0
    best: float = math.inf
    best_spread: float = 0.0
    milestone: float = math.inf
    idle: int = 0

    def add(self, loss: float, spread: float) -> None:
        """Take in a loss, and the spread that it has around its median."""
        self.steps += 1
        self.mean += (loss - self.mean) / min(self.steps, _AVERAGED)
        if self.steps < _AVERAGED:
            return
        if self.mean < self.best:
            self.best, self.best_spread = self.mean, spread
        self.idle += 1
        if self.mean < self.milestone - _PROGRESS_Z * spread:
            self.milestone, self.idle = self.mean, 0

    @property
    def excess(self) -> float:
        """Distance above the best as a share of what is allowed."""
        if self.steps < _AVERAGED:
            return 0.0
        # The spread of then: a run that diverges has a wide one.
        allowed = max(_DIVERGENCE_SHARE * abs(self.best), _DIVERGENCE_Z * self.best_spread)
        return (self.mean - self.best) / allowed


@dataclass
class _Collapse:
    """Counts the steps in a row at which the gradient is next to nothing, but the loss is not."""

    first_loss: float | None = None
    first_log_norm: float = 0.0
    steps: int = 0

    def add(self, loss: float, log_norm: float) -> None:
        """Take in a step; the first is the measure of the others."""
        if self.first_loss is None:
            self.first_loss, self.first_log_norm = loss, log_norm
        # A model that has learnt its data by heart loses gradient and loss in proportion.
        learnt = 0.0
        if loss == 0:
            learnt = math.inf
        elif 0 < loss < self.first_loss:
            learnt = math.log(self.first_loss / loss)
        limit = max(self.first_log_norm - _LOG_COLLAPSE, _LOG_VANISHED)
        self.steps = self.steps + 1 if log_norm < limit - learnt else 0


@dataclass
class _Tail:
    """A limit for zx that keeps the rate of its own hits: up at each, down a little at each step.

    A tail fitted to a window of 128 would know five values of it, and real losses have no
    distribution that one could rely on.
    """

    limit: float = 5.0

    def holds(self, z: float) -> bool:
        """Return whether a score is beyond the limit, and move the limit."""
        hit = z > self.limit
        self.limit = max(_LEAST_OUTLIER, self.limit + _TAIL_STEP * (hit - _OUTLIER_RATE))
        return hit


_ALARMS = ("spike", "critical", "plateau", "divergence", "stalled")
_PARTS = {
    "instability": _Sum,
    "rise": _Sum,
    "memory": _Memory,
    "average": _Average,
    "collapse": _Collapse,
    "tail": _Tail,
}


def _log(value: float) -> float:
    """Return ln(value), which is -inf at 0; NaN and infinity stay what they are."""
    return math.log(value) if value > 0 else -math.inf if value == 0 else value


def _clip(z: float, highest: float) -> float:
    return max(_LEAST_Z, min(highest, z))


def _explosion(spread: float) -> float:
    """Return how far above its median ln(gradient norm) is an explosion."""
    return max(_LOG_EXPLOSION, _EXPLOSION_Z * spread)


def _quantile(ordered: list[float], q: float) -> float:
    """Return the value at share `q` of a sorted list (linear interpolation, as numpy's default)."""
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def _mad(ordered: list[float], median: float) -> float:
    """Return the median absolute deviation of a sorted list, without sorting the deviations.

    It is the least radius around the median that holds half of the values: `half` neighbours in the
    list, from `low` on. As `low` grows, the left end comes closer and the right one moves away.
    """
    half = (len(ordered) + 1) // 2
    low, high = 0, len(ordered) - half
    while low < high:
        middle = (low + high) // 2
        if median - ordered[middle] > ordered[middle + half - 1] - median:
            low = middle + 1
        else:
            high = middle
    radius = ordered[low + half - 1] - median
    return min(radius, median - ordered[low - 1]) if low else radius
