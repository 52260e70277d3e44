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
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

# PyTorch has no public list of the devices that have these kernels.
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices as foreach_devices
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices as fused_devices

from lightning_radam.rectification import Variant, is_rectified, r_t, rho_inf

__all__ = ["RAdam"]

Group: TypeAlias = dict[str, Any]
Kernel: TypeAlias = Literal["fused", "foreach", "single"]
# One number on the host, one on the device, or one on the device for each tensor. (Any of them
# fits the same torch._foreach function, but PyTorch declares an overload for each.)
Scalar: TypeAlias = Any

# Adam divides by sqrt(v) + eps. Beside an eps of 2^90 the root of any float32 vanishes, and since
# it is a power of two, (lr * 2^90) * m / 2^90 is lr * m to the last bit: the momentum step.
_DROWNING = 2.0**90

_PLAIN = (Tensor, torch.nn.Parameter)


class RAdam(Optimizer):
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

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group; its settings are checked like the constructor's."""
        if isinstance(param_group, dict):
            _check_names(param_group, self.defaults)
            _check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by unpickling and by load_state_dict. The groups may come from torch.optim.RAdam or
        # AdamW, which have no variant, and the steps from where these kept them.
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            for param in group["params"]:
                if param_state := self.state.get(param):
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
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (kernel, step, *_), rows in self._buckets(group).items():
                _UPDATES[kernel](_Bucket(*map(list, zip(*rows, strict=True))), step, group)
        return loss

    def _buckets(self, group: Group) -> dict[tuple[Any, ...], list[list[Tensor]]]:
        """Sort the parameters that have a gradient by what one kernel call has in common.

        Parameters can be at different steps, since one without a gradient does not advance; each
        step has scalars of its own. Under `capturable` the step is on the device and unread.
        """
        buckets: defaultdict[tuple[Any, ...], list[list[Tensor]]] = defaultdict(list)
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self.state[param]
            if "step" not in state or group["amsgrad"]:
                _complete(state, param, group)
            row = _row(param, state, group)
            step = None if group["capturable"] else int(state["step"]) + 1
            buckets[_kernel(row, group), step, param.device, param.dtype].append(row)
        return buckets


class _Bucket(NamedTuple):
    """The tensors of one kernel call: same device, dtype, step and group."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    max_exp_avg_sqs: list[Tensor] = []  # noqa: RUF012  (never written to)


def _step_device(param: Tensor, group: Group) -> torch.device:
    # A step on the device would have to be read back to know r_t. Only a graph needs it there.
    return param.device if group["capturable"] else torch.device("cpu")


def _complete(state: dict[str, Any], param: Tensor, group: Group) -> None:
    """Create what is missing of a parameter's state, under torch.optim.RAdam's names."""
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
    for name in names:
        if name not in state:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    if "step" not in state:
        device = _step_device(param, group)
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)


def _row(param: Tensor, state: dict[str, Any], group: Group) -> list[Tensor]:
    """One parameter's tensors, in `_Bucket`'s order, as plain real tensors of this process."""
    grad = param.grad
    assert grad is not None
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"RAdam does not support sparse gradients, and a parameter of shape "
            f"{tuple(param.shape)} has one of layout {grad.layout}. Use sparse=False in "
            "nn.Embedding, or give that parameter to torch.optim.SparseAdam."
        )
    row = [param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"]]
    if group["amsgrad"]:
        row.append(state["max_exp_avg_sq"])
    if type(param) not in _PLAIN:
        row = [_local(tensor) for tensor in row]
    if param.is_complex():
        row = [torch.view_as_real(t) if t.is_complex() else t for t in row]
    return row


def _local(tensor: Tensor) -> Tensor:
    """This process' shard of a DTensor: the update is elementwise, so no rank needs another's."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _kernel(row: list[Tensor], group: Group) -> Kernel:
    param = row[0]
    device = param.device.type
    plain = type(param) in _PLAIN
    if group["fused"] is not False and not group["foreach"] and not group["capturable"]:
        if plain and device in fused_devices():
            if _same_layout(row):
                return "fused"
        elif group["fused"]:
            raise RuntimeError(
                f"fused=True, but there is no fused kernel for {type(param).__name__} on "
                f"{device}. Use fused=None: it takes the fastest kernel there is."
            )
    if group["foreach"] or (group["foreach"] is None and plain and device in foreach_devices()):
        return "foreach"
    return "single"


def _same_layout(row: list[Tensor]) -> bool:
    """Whether the tensors lie in memory in the same order, as the fused kernels take for granted.

    On a CPU they do not look: a transposed gradient would update the wrong elements.
    """
    strides = row[0].stride()
    return all(tensor.stride() == strides for tensor in row if tensor is not row[4])


def _update_fused(bucket: _Bucket, step: int, group: Group) -> None:
    beta1, beta2 = group["betas"]
    lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.is_cpu else lr.reshape(())
    if is_rectified(step, beta2, group["variant"]):
        factor = r_t(step, beta2)
        if group["variant"] != "keras":
            eps /= math.sqrt(1 - beta2**step)
    elif group["variant"] == "liu2019":
        factor, eps = 0.0, 1.0
    else:
        factor = eps = _DROWNING
    if group["decoupled_weight_decay"]:
        update = torch._fused_adamw_
        # The kernel multiplies it by the learning rate, which has the factor in it.
        decay = decay / factor if factor else 0.0
    else:
        update = torch._fused_adam_
    _advance(bucket.steps)
    # The kernel wants each step on the device; one that all share is enough.
    device_step = torch.full((), step, dtype=torch.float32, device=bucket.params[0].device)
    update(
        bucket.params,
        bucket.grads,
        bucket.exp_avgs,
        bucket.exp_avg_sqs,
        bucket.max_exp_avg_sqs,
        [device_step] * len(bucket.params),
        amsgrad=group["amsgrad"],
        lr=lr * factor,
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        eps=eps,
        maximize=group["maximize"],
    )


def _update_foreach(bucket: _Bucket, step: int | None, group: Group) -> None:
    beta1, beta2 = group["betas"]
    params, grads, exp_avgs, exp_avg_sqs, steps, max_exp_avg_sqs = bucket
    _advance(steps)
    scalars = _device_scalars(steps, group) if step is None else _host_scalars(step, group)
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if group["decoupled_weight_decay"]:
        torch._foreach_mul_(params, scalars.decay)
    elif group["weight_decay"]:
        grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    if group["amsgrad"]:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
        exp_avg_sqs = max_exp_avg_sqs
    # params += exp_avgs * (adaptive / (sqrt(exp_avg_sqs) + eps) + momentum)
    factors = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(factors, scalars.eps)
    torch._foreach_div_(factors, scalars.adaptive)
    torch._foreach_reciprocal_(factors)
    torch._foreach_add_(factors, scalars.momentum)
    torch._foreach_addcmul_(params, exp_avgs, factors)


def _update_single(bucket: _Bucket, step: int | None, group: Group) -> None:
    for row in zip(*filter(None, bucket), strict=True):
        _update_foreach(_Bucket(*([tensor] for tensor in row)), step, group)


_UPDATES: dict[Kernel, Callable[[_Bucket, Any, Group], None]] = {
    "fused": _update_fused,
    "foreach": _update_foreach,
    "single": _update_single,
}


def _advance(steps: list[Tensor]) -> None:
    # On a CPU, adding the number 1 would make it a tensor once per step: seven times slower.
    torch._foreach_add_(steps, torch.ones((), device=steps[0].device), alpha=1)


class _Scalars(NamedTuple):
    """The numbers of one update: w = decay w + m (adaptive / (sqrt(v) + eps) + momentum)."""

    decay: Scalar
    adaptive: Scalar
    eps: Scalar
    momentum: Scalar


def _host_scalars(step: int, group: Group) -> _Scalars:
    beta1, beta2 = group["betas"]
    lr, eps, variant = group["lr"], group["eps"], group["variant"]
    if isinstance(lr, Tensor):
        lr = lr.item() if lr.is_cpu else lr.reshape(())
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
    eps, variant = group["eps"], group["variant"]
    t = torch.stack(list(steps)).double()
    lr = torch.as_tensor(group["lr"], dtype=t.dtype, device=t.device).reshape(())
    power = beta2**t
    longest = rho_inf(beta2)
    rho = longest - 2 * t * power / (1 - power)
    rectified = rho > 5 if variant == "torch" else rho >= 5
    rect = ((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)).sqrt()
    root = (1 - power).sqrt()
    step_size = lr / (1 - beta1**t)
    moves = rectified if variant == "liu2019" else torch.ones_like(rectified)
    return _Scalars(
        *(
            scalar.unbind()
            for scalar in (
                torch.where(moves, 1 - lr * group["weight_decay"], 1.0),
                torch.where(rectified, -step_size * rect * root, 0.0),
                torch.where(rectified, eps * (root if variant == "keras" else t.new_ones(())), 1.0),
                torch.where(rectified | ~moves, 0.0, -step_size),
            )
        )
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
