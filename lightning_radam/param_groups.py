"""Parameter groups: which parameters decay, and how fast each layer learns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["parameter_groups"]

_NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norm, which have no public common base
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def parameter_groups(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    head_lr_multiplier: float = 1.0,
) -> list[dict[str, Any]]:
    """Divide the trainable parameters into groups of one learning rate and one weight decay.

    Biases, the parameters of norms, all vectors and scalars, and what a timm model names in
    `no_weight_decay()` do not decay. Frozen parameters are left out.

    With `layer_decay` q < 1, layer k of K (as timm counts them from the stem; the head is layer K)
    learns at `lr * q^(K - k)`. timm's own `param_groups_layer_decay` writes the factor as
    `lr_scale`, which torch's optimizers ignore; here it is in `lr`.

    Args:
        module: The module to train; it may hold timm models at any depth.
        lr: Peak learning rate of what is no layer of a timm model, and of its head, > 0.
        weight_decay: Decay of the weights, >= 0.
        layer_decay: Factor from one layer of a timm model to the one below, in (0, 1]; 1 is off.
        head_lr_multiplier: Factor on the learning rate of timm classifiers, > 0; 1 is off.

    Returns:
        Groups with `params`, `lr` and `weight_decay`, fastest first; none is empty.

    Raises:
        ValueError: If a value lies outside its range, or a factor is given and there is no timm
            model to apply it to.

    Example:
        >>> groups = parameter_groups(nn.Linear(3, 2), lr=0.1, weight_decay=0.05)
        >>> for group in groups:
        ...     print(group["lr"], group["weight_decay"], [tuple(p.shape) for p in group["params"]])
        0.1 0.05 [(2, 3)]
        0.1 0.0 [(2,)]
    """
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(
            f"layer_decay={layer_decay!r} must lie in (0, 1]; 1 is no layer-wise decay"
        )
    if not head_lr_multiplier > 0.0:
        raise ValueError(f"head_lr_multiplier={head_lr_multiplier!r} must be above 0; 1 is off")
    models = list(_timm_models(module))
    if not models and (layer_decay != 1.0 or head_lr_multiplier != 1.0):
        raise ValueError(
            f"layer_decay and head_lr_multiplier need a timm model, which names its layers, and "
            f"{type(module).__name__} holds none: leave both at 1"
        )
    scale: dict[nn.Parameter, float] = {}
    undecayed = set(_undecayed(module))
    for model in models:
        if layer_decay != 1.0:
            scale |= _layer_scales(model, layer_decay)
        for param in _head(model):
            scale[param] = head_lr_multiplier
        names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
        undecayed |= {param for name, param in model.named_parameters() if name in names}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for param in module.parameters():
        if param.requires_grad:
            key = (scale.get(param, 1.0), param not in undecayed)
            groups.setdefault(key, []).append(param)
    return [
        {"params": params, "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0}
        for (factor, decays), params in sorted(
            groups.items(), key=lambda item: item[0], reverse=True
        )
    ]


def _undecayed(module: nn.Module) -> Iterator[nn.Parameter]:
    for part in module.modules():
        for name, param in part.named_parameters(recurse=False):
            if isinstance(part, _NORMS) or param.ndim <= 1 or name.endswith("bias"):
                yield param


def _timm_models(module: nn.Module) -> Iterator[Any]:
    """Find the outermost modules that can name their layers, which is what timm's models do."""
    if hasattr(module, "group_matcher") and hasattr(module, "get_classifier"):
        yield module
        return
    for child in module.children():
        yield from _timm_models(child)


def _head(model: Any) -> list[nn.Parameter]:
    classifier = model.get_classifier()
    # A distilled model has a tuple of two.
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    return [param for part in parts for param in part.parameters()]


def _layer_scales(model: Any, layer_decay: float) -> dict[nn.Parameter, float]:
    from timm.models import group_parameters  # whoever holds a timm model has loaded timm

    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    named = dict(model.named_parameters())
    return {named[name]: layer_decay ** (last - layer) for name, layer in layers.items()}
