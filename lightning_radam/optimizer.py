"""RAdam on PyTorch's fused Adam kernels.

RAdam is Adam with other scalars: once rectified, its learning rate is multiplied by r_t; before
that, its denominator is a constant. So PyTorch's fused kernels compute it in one pass over memory,
without temporaries, at the speed of AdamW(fused=True).

Source: Liu et al. 2019, "On the Variance of the Adaptive Learning Rate and Beyond",
arXiv:1908.03265, algorithm 2; the three references are PyTorch's `torch.optim.RAdam`, the authors'
LiyuanLucasLiu/RAdam `radam/radam.py` and CyberZHG/keras-radam `keras_radam/optimizer_v2.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

# PyTorch has no public list of the devices that have these kernels.
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices as foreach_devices
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices as fused_devices

from lightning_radam.rectification import Variant, is_rectified, r_t, rho_inf

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["RAdam"]

Group: TypeAlias = dict[str, Any]
# A parameter's step, value, gradient, first, second and (amsgrad) largest second moment.
Row: TypeAlias = list[Tensor]
# One number on the host, one on the device, or one on the device for each tensor. (Any of them
# fits the same torch._foreach function, but PyTorch declares an overload for each.)
Scalar: TypeAlias = Any

# Adam divides by sqrt(v) + eps. Beside an eps of 2^90 the root of any float32 vanishes, and since
# it is a power of two, (lr * 2^90) * m / 2^90 is lr * m to the last bit: the momentum step. (In
# float32 while lr * m < 2^38; in float64, to the last bit while sqrt(v) < 2^36.)
_DROWNING = 2.0**90

_PLAIN = (Tensor, torch.nn.Parameter)


class RAdam(Optimizer):
    r"""Rectified Adam, on PyTorch's fused Adam kernels.

    Update t of a parameter w with gradient g (`eps` and the rest as in `variant="torch"`):

    .. math::
        m &= \beta_1 m + (1 - \beta_1) g                                                    \\
        v &= \beta_2 v + (1 - \beta_2) g^2                                                  \\
        w &= w - lr \cdot wd \cdot w                                                        \\
        w &= w - lr \frac{m}{1 - \beta_1^t} \cdot
             r_t \frac{\sqrt{1 - \beta_2^t}}{\sqrt{v} + eps}       \quad (\rho_t > 5)     \\
        w &= w - lr \frac{m}{1 - \beta_1^t}                        \quad (\rho_t \le 5)

    with rho_t and r_t of `lightning_radam.rectification`.

    Differs from torch.optim.RAdam: weight decay is decoupled unless told otherwise, `variant` and
    `amsgrad` are new, the fused kernels are used where the device has them (2 to 5 times faster,
    no temporaries), and `differentiable` is left out. State and step counts are the same, so
    `state_dict` goes back and forth with torch.optim.RAdam and AdamW in mid-training.

    Args:
        params: parameters, named parameters or parameter groups; a group may have its own value of
            every argument below.
        lr: learning rate, 0 or more; a tensor of one element is read where it lies.
        betas: decay of the averages of the gradient and of its square, each in [0, 1).
        eps: added to the denominator, 0 or more, in units of the gradient.
        weight_decay: strength of the weight decay, 0 or more.
        variant: the reference that is followed to the last bits. `"torch"`: torch.optim.RAdam.
            `"liu2019"`: the authors' code, which before rectification (here rho_t >= 5) updates the
            averages but not the parameter. `"keras"`: keras-radam, rectified from rho_t >= 5, eps
            added after bias correction, to sqrt(v / (1 - beta2^t)); its own default is eps=1e-7.
        decoupled_weight_decay: decay the parameter by lr * weight_decay (AdamW) instead of adding
            weight_decay * w to the gradient (L2).
        amsgrad: divide by the largest v so far. The references know it only in `"keras"`.
        maximize: ascend.
        fused: True demands the fused kernels, False excludes them, None takes them where they are.
        foreach: the same for the foreach kernels, which are second choice; where there are neither,
            tensors are updated one at a time.
        capturable: keep the step count on the device, so that `step` can be captured in a CUDA
            graph. Slower outside of one; takes the foreach kernels.

    Attributes:
        found_inf: None, or a float32 tensor of one element. Where it is 1, `step` drops the update:
            parameters, averages and step counts stay as they are. Fused kernels read it on the
            device; the step counts are put right at the next `step` or `state_dict`, once it has
            arrived on the host, so nobody waits for it. The other kernels read it at once.

    Raises:
        ValueError, TypeError: a setting is out of its range or of another type.
        RuntimeError: two settings exclude each other; in `step`, a gradient is sparse, or fused
            kernels are demanded for a device without them.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> optimizer = RAdam([weight], lr=0.1)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     loss = (weight**2).sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> bool(loss < 0.01)
        True

    Source:
        Liu et al. 2019, arXiv:1908.03265, algorithm 2.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        variant: Variant = "torch",
        decoupled_weight_decay: bool = True,
        amsgrad: bool = False,
        maximize: bool = False,
        fused: bool | None = None,
        foreach: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults: Group = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "variant": variant,
            "decoupled_weight_decay": decoupled_weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "fused": fused,
            "foreach": foreach,
            "capturable": capturable,
        }
        _check(defaults)
        super().__init__(params, defaults)
        # Step counts, the flag that may take one back, and the event of its arrival on the host.
        self._undecided: list[tuple[list[Tensor], Tensor, torch.Event]] = []

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group; its settings are checked like the constructor's."""
        if isinstance(param_group, dict):
            _check_names(param_group, self.defaults)
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by unpickling and by load_state_dict. The groups may come from torch.optim.RAdam or
        # AdamW, which know less, and the steps from where these kept them.
        before = self.__dict__.get("param_groups") or repeat({})
        super().__setstate__(state)
        self._undecided = []
        for group, own in zip(self.param_groups, before, strict=False):
            for name, default in self.defaults.items():
                group.setdefault(name, own.get(name, default))
            for param in group["params"]:
                param_state = self.state.get(param, {})
                if "step" in param_state:
                    param_state["step"] = torch.as_tensor(
                        param_state["step"], dtype=torch.float32, device=_step_device(param, group)
                    )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the gradients anew and returns the loss.

        Returns:
            The closure's loss, if there is a closure.
        """
        self._refuse_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._settle()
        for group in self.param_groups:
            for step, rows in self._buckets(group):
                self._update(rows, step, group)
        return loss

    def _refuse_capture(self) -> None:
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if capturing and not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                "step() is being captured in a CUDA graph, but capturable=False: every replay "
                "would use the r_t of this step. Set capturable=True."
            )

    def state_dict(self) -> dict[str, Any]:
        """The state, under the names of torch.optim.RAdam."""
        self._settle()
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return super().__getstate__()

    def _buckets(self, group: Group) -> list[tuple[int, list[Row]]]:
        """Sort the parameters that have a gradient by what one kernel call must have in common.

        They can be at different steps, since a parameter without a gradient does not advance, and
        each step has scalars of its own. Under `capturable` the steps lie on the device and all
        count as 0, unread.

        This loop is all the work per parameter on the host: for small tensors, it is the cost.
        """
        buckets: defaultdict[tuple[Any, ...], list[Row]] = defaultdict(list)
        amsgrad, capturable = group["amsgrad"], group["capturable"]
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise _sparse_error(param, grad)
            state = self.state[param]
            if "step" not in state or amsgrad:
                _complete(state, param, group)
            row = [state["step"], param, grad, state["exp_avg"], state["exp_avg_sq"]]
            if amsgrad:
                row.append(state["max_exp_avg_sq"])
            step = 0 if capturable else int(row[0]) + 1
            buckets[step, type(param), param.device, param.dtype].append(row)
        return [(step, rows) for (step, *_), rows in buckets.items()]

    def _update(self, rows: list[Row], step: int, group: Group) -> None:
        """Update parameters that are alike in type, device, dtype and step."""
        param = rows[0][1]
        if type(param) not in _PLAIN:
            rows = [_local(row) for row in rows]
        if param.is_complex():
            rows = [[row[0], *map(torch.view_as_real, row[1:])] for row in rows]
        for fused, chosen in _kernel_calls(rows, group):
            steps, *tensors = map(list, zip(*chosen, strict=True))
            if fused:
                _advance(steps)
                _update_fused(*tensors, step=step, group=group, found_inf=self.found_inf)
                self._take_back(steps)
            elif self.found_inf is None or not self.found_inf.item():
                _advance(steps)
                scalars = (
                    _device_scalars(steps, group)
                    if group["capturable"]
                    else _host_scalars(step, param.device, group)
                )
                _update_foreach(*tensors, scalars=scalars, group=group)

    def _take_back(self, steps: list[Tensor]) -> None:
        """Undo the count of an update that `found_inf` drops, as soon as the host can know."""
        if self.found_inf is None:
            return
        flag = self.found_inf.reshape(())
        if flag.is_cpu:
            torch._foreach_add_(steps, flag, alpha=-1)
            return
        arriving = flag.to("cpu", non_blocking=True)
        arrival = torch.accelerator.current_stream(flag.device).record_event()
        self._undecided.append((steps, arriving, arrival))

    def _settle(self) -> None:
        """Undo the counts of earlier updates that were dropped on the device."""
        for steps, flag, arrival in self._undecided:
            arrival.synchronize()
            torch._foreach_add_(steps, flag, alpha=-1)
        self._undecided.clear()


def _step_device(param: Tensor, group: Group) -> torch.device:
    # A step on the device would have to be read back to know r_t. Only a graph needs it there.
    return param.device if group["capturable"] else torch.device("cpu")


def _complete(state: dict[str, Any], param: Tensor, group: Group) -> None:
    """Create what is missing of a parameter's state."""
    for name in ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]:
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    if "step" not in state:
        device = _step_device(param, group)
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)


def _local(row: Row) -> Row:
    """This process' shards of DTensors: the update is elementwise, so no rank needs another's."""
    if not hasattr(row[1], "to_local"):
        return row
    step, param, grad, *moments = (cast("DTensor", tensor) for tensor in row)
    grad = grad.redistribute(placements=param.placements)
    return [step, *(tensor.to_local() for tensor in (param, grad, *moments))]


def _advance(steps: list[Tensor]) -> None:
    # The number 1 would be made a tensor for each step: seven times slower on a CPU.
    torch._foreach_add_(steps, torch.ones((), device=steps[0].device), alpha=1)


def _kernel_calls(rows: list[Row], group: Group) -> list[tuple[bool, list[Row]]]:
    """Divide the rows into calls: whether of a fused kernel, and of which rows."""
    param = rows[0][1]
    device, plain = param.device.type, type(param) in _PLAIN
    if group["fused"] is not False and not group["foreach"] and not group["capturable"]:
        if plain and device in fused_devices():
            odd = [row for row in rows if not _same_layout(row)]
            if not odd:
                return [(True, rows)]
            even = [row for row in rows if _same_layout(row)]
            return [(True, even)] * bool(even) + [(False, [row]) for row in odd]
        if group["fused"]:
            raise RuntimeError(
                f"fused=True, but there is no fused kernel for {type(param).__name__} on {device}. "
                "Leave fused=None: it takes the fastest kernel there is."
            )
    if group["foreach"] or (group["foreach"] is None and plain and device in foreach_devices()):
        return [(False, rows)]
    return [(False, [row]) for row in rows]


def _same_layout(row: Row) -> bool:
    """Whether a fused kernel may walk these tensors in step.

    On a CPU it does not look: a transposed gradient would update the wrong elements.
    """
    _, param, grad, exp_avg, exp_avg_sq = row[:5]
    if (  # True for most, and half as dear as comparing strides.
        param.is_contiguous()
        and grad.is_contiguous()
        and exp_avg.is_contiguous()
        and exp_avg_sq.is_contiguous()
        and (len(row) == 5 or row[5].is_contiguous())
    ):
        return True
    strides = param.stride()
    return all(tensor.stride() == strides for tensor in row[2:])


def _update_fused(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor] | None = None,
    *,
    step: int,
    group: Group,
    found_inf: Tensor | None,
) -> None:
    beta1, beta2 = group["betas"]
    device = params[0].device
    lr, eps, weight_decay = _lr(group, device), group["eps"], group["weight_decay"]
    if is_rectified(step, beta2, group["variant"]):
        factor = r_t(step, beta2)
        if group["variant"] != "keras":  # The kernel adds eps after bias correction.
            eps /= math.sqrt(1 - beta2**step)
    elif group["variant"] == "liu2019":
        factor, eps = 0.0, 1.0
    else:
        factor = eps = _DROWNING
    update = torch._fused_adam_
    if group["decoupled_weight_decay"]:
        update = torch._fused_adamw_
        # The kernel multiplies it by the learning rate, which carries the factor.
        weight_decay = weight_decay / factor if factor else 0.0
    # The kernel wants each tensor's step on the device. They share one.
    device_step = torch.full((), step, dtype=torch.float32, device=device)
    update(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs or [],
        [device_step] * len(params),
        amsgrad=group["amsgrad"],
        lr=lr * factor,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        maximize=group["maximize"],
        found_inf=None if found_inf is None else _sent(found_inf, device),
    )


def _update_foreach(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor] | None = None,
    *,
    scalars: _Scalars,
    group: Group,
) -> None:
    beta1, beta2 = group["betas"]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        torch._foreach_mul_(params, scalars.decay)
    elif group["weight_decay"]:
        grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    if max_exp_avg_sqs is not None:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
        exp_avg_sqs = max_exp_avg_sqs
    factors = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(factors, scalars.eps)
    torch._foreach_div_(factors, scalars.adaptive)
    torch._foreach_reciprocal_(factors)
    torch._foreach_add_(factors, scalars.momentum)
    torch._foreach_addcmul_(params, exp_avgs, factors)


class _Scalars(NamedTuple):
    """The numbers of one update: w = decay w + (adaptive / (sqrt(v) + eps) + momentum) m."""

    decay: Scalar
    adaptive: Scalar
    eps: Scalar
    momentum: Scalar


def _host_scalars(step: int, device: torch.device, group: Group) -> _Scalars:
    beta1, beta2 = group["betas"]
    lr, eps, variant = _lr(group, device), group["eps"], group["variant"]
    root = math.sqrt(1 - beta2**step)
    step_size = lr / (1 - beta1**step)
    decay = 1 - lr * group["weight_decay"]
    if is_rectified(step, beta2, variant):
        eps = eps * root if variant == "keras" else eps
        return _Scalars(decay, -step_size * r_t(step, beta2) * root, eps, 0.0)
    if variant == "liu2019":
        return _Scalars(1.0, 0.0, 1.0, 0.0)
    return _Scalars(decay, 0.0, 1.0, -step_size)


def _device_scalars(steps: Sequence[Tensor], group: Group) -> _Scalars:
    """`_host_scalars` where the steps cannot be read: both phases are computed, one is selected."""
    beta1, beta2 = group["betas"]
    variant = group["variant"]
    t = torch.stack(list(steps)).double()
    lr = _lr(group, t.device) * torch.ones_like(t)
    power = beta2**t
    longest = rho_inf(beta2)
    rho = longest - 2 * t * power / (1 - power)
    rectified = rho > 5 if variant == "torch" else rho >= 5
    rect = ((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)).sqrt()
    root = (1 - power).sqrt()
    step_size = lr / (1 - beta1**t)
    eps = group["eps"] * (root if variant == "keras" else torch.ones_like(t))
    moves = rectified if variant == "liu2019" else torch.ones_like(rectified)
    scalars = _Scalars(
        decay=torch.where(moves, 1 - lr * group["weight_decay"], 1.0),
        adaptive=torch.where(rectified, -step_size * rect * root, 0.0),
        eps=torch.where(rectified, eps, 1.0),
        momentum=torch.where(moves & ~rectified, -step_size, 0.0),
    )
    return _Scalars(*(scalar.unbind() for scalar in scalars))


def _lr(group: Group, device: torch.device) -> Any:
    """The learning rate as a number, or as a scalar on the device if reading it would wait."""
    lr = group["lr"]
    if not isinstance(lr, Tensor):
        return lr
    if lr.is_cpu or device.type == "cpu":
        return lr.item()
    return _sent(lr.reshape(()), device)


def _sent(scalar: Tensor, device: torch.device) -> Tensor:
    # The fused kernels take float32. On its way to a CPU, a scalar must be waited for.
    return scalar.to(device, torch.float32, non_blocking=device.type != "cpu")


def _sparse_error(param: Tensor, grad: Tensor) -> RuntimeError:
    return RuntimeError(
        f"RAdam does not support sparse gradients: a parameter of shape {tuple(param.shape)} has "
        f"one of layout {grad.layout}. Use sparse=False in nn.Embedding, or give that parameter "
        "to torch.optim.SparseAdam."
    )


def _check_names(group: Group, known: Group) -> None:
    """Refuse a misspelt setting of a group; names like nothing known are the user's labels."""
    for name in group:
        if name not in known and (close := get_close_matches(name, known, n=1, cutoff=0.8)):
            raise ValueError(
                f"Unknown setting {name!r} in a parameter group; did you mean {close[0]!r}?"
            )


def _check(group: Group) -> None:
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, but has shape {tuple(lr.shape)}.")
    _check_range("learning rate", lr, math.inf, "0 or more, for example lr=1e-3")
    _check_range("epsilon value", group["eps"], math.inf, "0 or more, for example eps=1e-8")
    if not (isinstance(betas, tuple | list) and len(betas) == 2):
        raise ValueError(f"Invalid betas: {betas!r}; they must be two numbers, like (0.9, 0.999).")
    for index, beta in enumerate(betas):
        _check_range(
            f"beta parameter at index {index}", beta, 1.0, "in [0, 1), for example (0.9, 0.999)"
        )
    _check_range(
        "weight_decay value", group["weight_decay"], math.inf, "0 or more, for example 0.01"
    )
    if group["variant"] not in get_args(Variant):
        raise ValueError(
            f"Invalid variant: {group['variant']!r}; it must be one of "
            f"{', '.join(map(repr, get_args(Variant)))}."
        )
    for name in ("decoupled_weight_decay", "amsgrad", "maximize", "capturable"):
        if not isinstance(group[name], bool):
            raise TypeError(f"Invalid {name}: {group[name]!r}; it must be True or False.")
    for name in ("fused", "foreach"):
        if group[name] is not None and not isinstance(group[name], bool):
            raise TypeError(f"Invalid {name}: {group[name]!r}; it must be True, False or None.")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together; leave one at None.")
    if group["fused"] and group["capturable"]:
        raise RuntimeError(
            "`fused` and `capturable` cannot be `True` together: a fused kernel takes r_t from the "
            "host, where a captured graph cannot change it. Leave fused=None."
        )


def _check_range(name: str, value: Any, below: float, range_: str) -> None:
    try:
        ok = 0.0 <= value < below
    except TypeError:
        raise TypeError(
            f"Invalid {name}: {value!r}, a {type(value).__name__}; it must be a number {range_}."
        ) from None
    if not ok:
        raise ValueError(f"Invalid {name}: {value}; it must be {range_}.")
