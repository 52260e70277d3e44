"""The rules of other projects, for `benchmarks.detectors`: written anew from what they compute.

Each takes one optimizer step (loss, gradient norm or None) and says whether it would act on it:
raise, skip the update, or clip it. Where a run would end, it goes on here with the next step, so
that a rule can be wrong or right more than once.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean
from typing import Protocol

from lightning_radam.monitor.detectors import InstabilityDetector

__all__ = ["OURS", "RULES", "Rule"]

OURS = "lightning-radam"


class Rule(Protocol):
    """A detector of instabilities."""

    def update(self, loss: float, grad_norm: float | None) -> bool:
        """Take in one step; return whether it raises an alarm."""


class Ours:
    """An alarm is an event of severity warning or critical."""

    def __init__(self) -> None:
        self.detector = InstabilityDetector()

    def update(self, loss: float, grad_norm: float | None) -> bool:
        return any(event.severity != "info" for event in self.detector.update(loss, grad_norm))


class LightningSpikeDetection:
    """Lightning 2.6.6, `fabric/utilities/spike.py`: |x - mean10| >= 2 |mean10| and x > the last."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=10)
        self.last = math.inf

    def update(self, loss: float, grad_norm: float | None) -> bool:
        if self.recent and self.is_spike(loss):
            return True
        self.recent.append(loss)
        self.last = loss
        return False

    def is_spike(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        mean = fmean(self.recent)
        return loss > self.last and abs(loss - mean) >= abs(2 * mean)


class LlmFoundryKillLossSpike:
    """llm-foundry: 5 losses in a row at twice mean100 or more, or half of the last 100 above 10."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=100)
        self.outliers = 0
        self.steps = 0

    def update(self, loss: float, grad_norm: float | None) -> bool:
        alarm = len(self.recent) == 100 and (self.is_spike(loss) or self.is_high())
        self.recent.append(loss)
        self.steps += 1
        return alarm

    def is_spike(self, loss: float) -> bool:
        self.outliers = self.outliers + 1 if loss >= 2 * fmean(self.recent) else 0
        return self.outliers > 4

    def is_high(self) -> bool:
        return self.steps >= 200 and sum(x > 10 for x in self.recent) >= 50


class OlmoSkipStep:
    """OLMo-core's SkipStepOptimizer: |z| > 6 of loss or norm, over the last 128, all kept."""

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=128)
        self.norms: deque[float] = deque(maxlen=128)

    def update(self, loss: float, grad_norm: float | None) -> bool:
        known = len(self.losses) >= 63  # 64 with the latest
        calm = not known or self.usual(self.losses, loss)
        if grad_norm is not None:
            calm &= not known or self.usual(self.norms, grad_norm)
            self.norms.append(grad_norm)
        self.losses.append(loss)
        return not calm

    @staticmethod
    def usual(past: deque[float], value: float) -> bool:
        mean = fmean(past)
        std = math.sqrt(sum((x - mean) ** 2 for x in past) / (len(past) - 1))
        # Multiplied out, for a spread of 0; a comparison with NaN is false, as it is in theirs.
        return abs(value - mean) <= 6 * std


class ZClip:
    """ZClip: mean and variance of the norm by EMA .97 after 25 steps, z > 2.5 is clipped."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def update(self, loss: float, grad_norm: float | None) -> bool:
        if grad_norm is None:
            return False
        if len(self.first) < 25:
            self.first.append(grad_norm)
            if len(self.first) == 25:
                self.mean = fmean(self.first)
                self.variance = fmean((g - self.mean) ** 2 for g in self.first)
            return False
        std = math.sqrt(self.variance)
        z = (grad_norm - self.mean) / (std + 1e-6)
        if clips := z > 2.5:
            grad_norm = self.mean + 2.5 * std / (z / 2.5)
        self.mean = 0.97 * self.mean + 0.03 * grad_norm
        self.variance = 0.97 * self.variance + 0.03 * (grad_norm - self.mean) ** 2
        return clips


class AxlearnDropNorm:
    """AXLearn's drop_norm_by_grad_norm_ema: norm >= 20 EMA.99; what is dropped stays out of it."""

    def __init__(self) -> None:
        self.mean = 1.0
        self.count = 0

    def update(self, loss: float, grad_norm: float | None) -> bool:
        if grad_norm is None:
            return False
        if not grad_norm < 20 * self.mean:
            return True
        decay = 0.99 * (1 - 0.99**self.count) / (1 - 0.99 ** (self.count + 1))
        self.mean = decay * self.mean + (1 - decay) * grad_norm
        self.count += 1
        return False


class LlmcOutlier:
    """llm.c's outlier_detector.h: z > 6 over 128 values and the latest, skipped twice in a row."""

    def __init__(self) -> None:
        self.loss, self.norm = LlmcWindow(), LlmcWindow()

    def update(self, loss: float, grad_norm: float | None) -> bool:
        alarm = self.loss.add(loss)
        if grad_norm is not None:
            alarm |= self.norm.add(grad_norm)
        return alarm


class LlmcWindow:
    """Running sums, as there: a NaN never leaves them."""

    def __init__(self) -> None:
        self.values: deque[float] = deque()
        self.sum = self.squares = 0.0
        self.skipped = 0

    def add(self, value: float) -> bool:
        self.enter(value)
        if len(self.values) <= 128:
            return False
        oldest = self.values.popleft()
        self.leave(oldest)
        mean = self.sum / 128
        variance = self.squares / 128 - mean * mean
        alarm = variance > 0 and (value - mean) / math.sqrt(variance) > 6
        self.skipped = self.skipped + 1 if alarm else 0
        if alarm and self.skipped < 3:
            self.leave(self.values.pop())
            self.values.appendleft(oldest)
            self.sum += oldest
            self.squares += oldest * oldest
        return alarm

    def enter(self, value: float) -> None:
        self.values.append(value)
        self.sum += value
        self.squares += value * value

    def leave(self, value: float) -> None:
        self.sum -= value
        self.squares -= value * value


RULES: dict[str, type[Rule]] = {
    OURS: Ours,
    "Lightning SpikeDetection": LightningSpikeDetection,
    "llm-foundry KillLossSpike": LlmFoundryKillLossSpike,
    "OLMo-core SkipStep": OlmoSkipStep,
    "ZClip": ZClip,
    "AXLearn drop_norm": AxlearnDropNorm,
    "llm.c outlier detector": LlmcOutlier,
}
