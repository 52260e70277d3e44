"""RAdam's own instruments: rectification, spread of the adaptive lr, gradients, health of updates.

What needs the tensors is computed from a fixed random sample of their coordinates. The sample
leaves the device with the step's other numbers, and the statistics are made on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_radam.monitor.signals import local
from lightning_radam.rectification import adaptive_variance, is_rectified, r_t, rho_t

__all__ = ["Sampler", "Telemetry", "Trend", "log_histogram", "radam_scalars", "top", "wasserstein"]

_PER_TENSOR = 128  # coordinates; of larger tensors, a random choice
_VANISHED = -20.0  # ln|g|, the paper's mark
_LOWEST, _HIGHEST = -40, 10  # ln|g|: ends of the histogram; an exact 0 counts as e^-40
_TOP_LAYERS = 3


# Known on the host ----------------------------------------------------------------------------


def radam_scalars(optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rate and the rectification of the coming update.

    Args:
        optimizer: Any optimizer; the rectification terms need one with `betas`.

    Returns:
        `radam/lr`, the largest learning rate of the groups; `radam/rho_t`, the length of the
        approximated simple moving average; `radam/rect`, r_t in [0, 1], which is 0 as long as
        there is no adaptive step; `radam/lr_rect`, their product lr r_t; and
        `radam/spread_theory`, the standard deviation of the adaptive learning rate in units of
        one over the gradient's, from rho_t = 4 on, where it begins to exist. What would have to be
        fetched from a device is left out.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.RAdam([weight], lr=0.5)
        >>> for _ in range(5):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        >>> scalars = radam_scalars(optimizer)
        >>> {key: round(scalars[key], 3) for key in ("radam/lr", "radam/rho_t", "radam/rect")}
        {'radam/lr': 0.5, 'radam/rho_t': 5.994, 'radam/rect': 0.026}
    """
    scalars: dict[str, float] = {}
    lrs = [group["lr"] for group in optimizer.param_groups]
    if all(map(_on_host, lrs)):
        scalars["radam/lr"] = max(map(float, lrs))
    update, beta2 = next_update(optimizer), _beta2(optimizer)
    if update is not None and beta2 is not None:
        rho, rect = rho_t(update, beta2), r_t(update, beta2)
        scalars |= {"radam/rho_t": rho, "radam/rect": rect}
        if "radam/lr" in scalars:
            scalars["radam/lr_rect"] = scalars["radam/lr"] * rect
        if rho > 4:
            scalars["radam/spread_theory"] = math.sqrt(adaptive_variance(rho))
    return scalars


def next_update(optimizer: Optimizer) -> int | None:
    """Return the number of the coming update, from 1; None if the count is on a device."""
    done = next((s["step"] for s in optimizer.state.values() if "step" in s), 0)
    # torch and RAdam keep `step` on the CPU, unless the run is captured into a CUDA graph.
    return int(done) + 1 if _on_host(done) else None


def _on_host(value: object) -> bool:
    return not isinstance(value, Tensor) or value.device.type == "cpu"


def _beta2(optimizer: Optimizer) -> float | None:
    betas = optimizer.param_groups[0].get("betas")
    return None if betas is None else float(betas[1])


class Trend:
    """Follow a loss: how far it fluctuates, how far it has risen, how long ago it was best.

    Example:
        >>> trend = Trend()
        >>> for loss in (3.0, 2.0, 1.0, 2.0):
        ...     trend.update(loss)
        >>> {key: round(value, 3) for key, value in trend.scalars().items()}
        {'fluctuation': 0.226, 'rise': 0.0, 'steps_since_best': 0.0}
    """

    _WEIGHT = 2 / 21  # of the newest value: an average over 20

    def __init__(self) -> None:
        self.mean = self.variance = self.best = math.nan
        self.rise = 0.0
        self.steps_since_best = 0

    def update(self, value: float) -> None:
        """Take in the next value; one that is not finite is passed over."""
        if not math.isfinite(value):
            return
        if math.isnan(self.mean):
            self.mean, self.variance, self.best = value, 0.0, value
            return
        self.mean += self._WEIGHT * (value - self.mean)
        self.variance += self._WEIGHT * ((value - self.mean) ** 2 - self.variance)
        self.steps_since_best += 1
        if self.mean < self.best:
            self.best, self.steps_since_best = self.mean, 0
        self.rise = max(self.rise, self.mean - self.best)

    def scalars(self) -> dict[str, float]:
        """Return what is known of the average over 20 values; nothing before the first.

        Returns:
            `fluctuation`, the values' standard deviation around it as a share of it; `rise`, the
            most that it has been above its best so far; `steps_since_best`.
        """
        if math.isnan(self.mean):
            return {}
        return {
            "fluctuation": math.sqrt(self.variance) / max(abs(self.mean), 1e-12),
            "rise": self.rise,
            "steps_since_best": float(self.steps_since_best),
        }

    def state_dict(self) -> dict[str, float]:
        """Return plain values."""
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from the values of `state_dict`."""
        vars(self).update(state)


# Sampled on the device ------------------------------------------------------------------------


class Sampler:
    """Read the same randomly chosen coordinates of a list of tensors, again and again.

    Args:
        like: Tensors of the shapes to come, on their devices; of DTensors, this rank's parts.
        seed: Of the choice.

    Attributes:
        weight: How many coordinates each one stands for.
        tensor_of: Which tensor each one is from, by its number.
    """

    def __init__(self, like: Sequence[Tensor], seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = [local(tensor.detach()).numel() for tensor in like]
        chosen = [
            torch.randint(size, (_PER_TENSOR,), generator=generator)
            if size > _PER_TENSOR
            else torch.arange(size)
            for size in sizes
        ]
        counts = torch.tensor([len(index) for index in chosen])
        self.weight = (torch.tensor(sizes) / counts.clamp(min=1)).repeat_interleave(counts)
        self.tensor_of = torch.arange(len(sizes)).repeat_interleave(counts)
        self._chosen = [index.to(tensor.device) for index, tensor in zip(chosen, like, strict=True)]

    def __len__(self) -> int:
        return len(self.weight)

    @torch.no_grad()
    def read(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the coordinates' values as one float32 vector; NaN where there is no tensor."""
        return torch.cat(
            [
                torch.full(index.shape, torch.nan, device=index.device)
                if tensor is None or tensor.is_sparse
                else _real(local(tensor.detach()).take(index))
                for tensor, index in zip(tensors, self._chosen, strict=True)
            ]
        )


def _real(values: Tensor) -> Tensor:
    return (values.abs() if values.is_complex() else values).float()


class Telemetry:
    """The instruments that need gradients, moments and weights.

    Around an update, `before` and `after` read the sample on the device; `read` makes the numbers
    of it on the host.

    Args:
        optimizer: Any; some instruments need Adam's `betas`, `eps` and `exp_avg_sq`.
        names: The parameters' names, as a person knows them.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> optimizer = torch.optim.RAdam([weight], lr=0.1)
        >>> telemetry = Telemetry(optimizer, {weight: "layer.weight"})
        >>> weight.grad = torch.ones(4)
        >>> before = telemetry.before()
        >>> optimizer.step()
        >>> scalars = telemetry.read(1, torch.cat([before, telemetry.after()]))
        >>> [round(scalars[f"stability/{key}"], 3) for key in ("log_grad_median", "update_ratio")]
        [0.0, 0.111]
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
        self._optimizer = optimizer
        params = [p for group in optimizer.param_groups for p in group["params"]]
        # Of a model on several devices, what is on the first.
        self._params = [p for p in params if p.device == params[0].device]
        self._names = [names.get(p, f"parameter {i}") for i, p in enumerate(self._params)]
        self._matrix = torch.tensor([p.ndim > 1 for p in self._params])
        self._sampler = Sampler(self._params)
        self._handover = _handover(_beta2(optimizer))
        self._last_momentum_step = math.nan
        self._jump: dict[str, float] = {}  # once known, in every row
        self.first: Tensor | None = None  # ln|g| at the first step that was read
        self.histogram: dict[int, float] = {}

    def is_due(self, update: int | None) -> bool:
        """Whether the handover to adaptive steps is to be seen at this update."""
        return update is not None and update in self._handover

    def before(self) -> Tensor:
        """Sample the gradients and the weights."""
        weights = self._sampler.read(self._params)
        return torch.cat([self._sampler.read([p.grad for p in self._params]), weights])

    def after(self) -> Tensor:
        """Sample the second moments and the weights."""
        states = [self._optimizer.state.get(p, {}) for p in self._params]
        moments = self._sampler.read([state.get("exp_avg_sq") for state in states])
        return torch.cat([moments, self._sampler.read(self._params)])

    def read(self, update: int | None, sample: Tensor) -> dict[str, float]:
        """Make the numbers of a sample.

        Args:
            update: Number of the update, from 1; None if unknown.
            sample: `before` and `after`, on the host.

        Returns:
            By key, as `InstabilityMonitor` describes them.
        """
        gradient, start, moment, end = sample.split(len(self._sampler))
        return {
            **self._of_gradients(gradient),
            **self._of_moments(update, gradient, moment),
            **self._of_updates(update, start, end),
        }

    def _of_gradients(self, gradient: Tensor) -> dict[str, float]:
        logs = gradient.abs().log().clamp(min=_LOWEST)
        seen = logs.isfinite()
        if not seen.any():
            return {}
        weight = self._sampler.weight
        if self.first is None or len(self.first) != len(logs):  # of another model
            self.first = logs
        both = seen & self.first.isfinite()
        self.histogram = log_histogram(logs[seen], weight[seen])
        return {
            "stability/log_grad_median": _median(logs[seen], weight[seen]),
            "stability/grad_vanished": _mean((logs[seen] < _VANISHED).float(), weight[seen]),
            "stability/log_grad_shift": wasserstein(logs[both], self.first[both], weight[both]),
        }

    def _of_moments(self, update: int | None, gradient: Tensor, moment: Tensor) -> dict[str, float]:
        group = self._optimizer.param_groups[0]
        beta2, eps = _beta2(self._optimizer), group.get("eps")
        seen = gradient.isfinite() & (moment > 0)
        if beta2 is None or eps is None or not seen.any():
            return {}
        eps = max(float(eps), 1e-15)  # its square must not be 0 in float32
        lag = self._by_tensor(gradient.square() / moment.clamp(min=eps**2), seen).sqrt()
        numbers = self._worst("lag", lag)
        if numbers:
            numbers["stability/lag"] = max(numbers.values())
        if update is not None:
            root = math.sqrt(1 - beta2**update)
            log_psi = math.log(root) - (moment[seen].sqrt() + eps).log()
            numbers["radam/spread"] = _std(log_psi, self._sampler.weight[seen])
        return numbers

    def _of_updates(self, update: int | None, start: Tensor, end: Tensor) -> dict[str, float]:
        weight = self._sampler.weight
        step, size = (end - start).square(), end.square()
        if not bool((step + size).isfinite().all()) or not bool(size.any()):
            return {}
        length = math.sqrt(float((step * weight).sum()))
        numbers = {"stability/update_ratio": length / math.sqrt(float((size * weight).sum()))}
        everything = torch.ones_like(step, dtype=torch.bool)
        ratios = (self._by_tensor(step, everything) / self._by_tensor(size, everything)).sqrt()
        ratios = ratios.where(self._matrix, torch.nan)  # biases begin at 0 and tell nothing
        numbers |= self._worst("update_ratio", ratios)
        if update == self._handover.start:
            self._last_momentum_step = length
        elif self.is_due(update) and self._last_momentum_step > 0:
            self._jump = {"radam/handover_jump": length / self._last_momentum_step}
        return numbers | self._jump

    def _by_tensor(self, values: Tensor, seen: Tensor) -> Tensor:
        """Mean of the seen values of each tensor; NaN where none was."""
        index = self._sampler.tensor_of[seen]
        sums = torch.zeros(len(self._params)).index_add_(0, index, values[seen])
        return sums / torch.zeros(len(self._params)).index_add_(0, index, seen[seen].float())

    def _worst(self, key: str, values: Tensor) -> dict[str, float]:
        """The layers where a value is largest, of those where it is known."""
        named = zip(self._names, values.tolist(), strict=True)
        known = {name: value for name, value in named if math.isfinite(value)}
        return {f"layers/{key}/{name}": value for name, value in top(known).items()}


def _handover(beta2: float | None) -> range:
    """The last update of momentum and the first adaptive one; empty if there is no such pair."""
    if beta2 is None or beta2 < 0.7:  # RAdam never becomes adaptive up to 2/3
        return range(0)
    first = next(step for step in count(1) if is_rectified(step, beta2))
    return range(first - 1, first + 1)


# Statistics of a weighted sample --------------------------------------------------------------


def top(values: Mapping[str, float]) -> dict[str, float]:
    """Return the three largest values, the largest first; NaN is larger than anything.

    Example:
        >>> top({"a": 1.0, "b": 5.0, "c": float("nan"), "d": 2.0})
        {'c': nan, 'b': 5.0, 'd': 2.0}
    """

    def size(name: str) -> float:
        return math.inf if math.isnan(values[name]) else values[name]

    return {name: values[name] for name in sorted(values, key=size, reverse=True)[:_TOP_LAYERS]}


def wasserstein(a: Tensor, b: Tensor, weight: Tensor) -> float:
    """Return the 1-Wasserstein distance of two samples with the same weights.

    It is the area between the two distribution functions.

    Example:
        >>> wasserstein(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 4.0]), torch.ones(2))
        2.5
    """
    values, order = torch.cat([a, b]).sort()
    share = weight.double() / weight.double().sum()
    gap = torch.cat([share, -share])[order].cumsum(0)[:-1]
    return float((gap.abs() * values.double().diff()).sum())


def log_histogram(logs: Tensor, weight: Tensor) -> dict[int, float]:
    """Return the share of coordinates by floor(ln|g|), from -40 to 9; the ends take in the rest.

    Example:
        >>> log_histogram(torch.tensor([-20.5, -1.2, -1.9, 12.0]), torch.ones(4))
        {-21: 0.25, -2: 0.5, 9: 0.25}
    """
    bins = (logs.floor().long().clamp(_LOWEST, _HIGHEST - 1) - _LOWEST).flatten()
    shares = torch.bincount(bins, weight.double(), minlength=_HIGHEST - _LOWEST) / weight.sum()
    return {_LOWEST + i: share for i, share in enumerate(shares.tolist()) if share}


def _mean(values: Tensor, weight: Tensor) -> float:
    return float((values * weight).sum() / weight.sum())


def _std(values: Tensor, weight: Tensor) -> float:
    return math.sqrt(_mean((values - _mean(values, weight)).square(), weight))


def _median(values: Tensor, weight: Tensor) -> float:
    ordered, order = values.sort()
    below = weight[order].double().cumsum(0)
    return float(ordered[int(torch.searchsorted(below, below[-1] / 2))])
