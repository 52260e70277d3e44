"""timm backbones, with errors that a person can act on."""

from __future__ import annotations

import difflib

import timm
from torch import nn

from lightning_radam.errors import InputError

__all__ = ["check_backbone", "create_backbone"]


def check_backbone(name: str) -> None:
    """Raise InputError, with the nearest names, unless timm knows the backbone."""
    if timm.is_model(name.split(".")[0]):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}" if near else "timm.list_models() names them all"
    raise InputError(f"backbone {name!r} is unknown to timm {timm.__version__}: {hint}")


def create_backbone(name: str, *, num_classes: int, pretrained: bool) -> nn.Module:
    """Build a timm backbone with a fresh head.

    Args:
        name: Any of `timm.list_models()`.
        num_classes: Outputs of the head, >= 1.
        pretrained: Start from timm's weights, which a first use downloads.

    Raises:
        InputError: If timm does not know the name, or the weights cannot be had.
    """
    check_backbone(name)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"the pretrained weights of {name!r} could not be loaded ({reason}): go online once, "
            "or set model.pretrained to false"
        ) from None
    return model
