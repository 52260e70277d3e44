"""Which parameters decay, and how fast each layer learns."""

import pytest
import timm
import timm.optim
import torch
from torch import nn

from lightning_radam.param_groups import parameter_groups


def names(module: nn.Module, params: list[nn.Parameter]) -> set[str]:
    by_id = {id(param): name for name, param in module.named_parameters()}
    return {by_id[id(param)] for param in params}


def test_biases_norms_and_frozen_parameters() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LayerNorm((2, 4, 4)), nn.Linear(2, 2)
    )
    net[3].weight.requires_grad_(False)
    decaying, others = parameter_groups(net, lr=0.1, weight_decay=0.05)
    assert (decaying["lr"], decaying["weight_decay"]) == (0.1, 0.05)
    assert names(net, decaying["params"]) == {"0.weight"}
    assert (others["lr"], others["weight_decay"]) == (0.1, 0.0)
    # The weight of this LayerNorm has three dimensions, and is a norm all the same.
    assert names(net, others["params"]) == {
        "0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "3.bias",
    }  # fmt: skip


def test_an_empty_group_is_left_out() -> None:
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), lr=0.1, weight_decay=0.1)) == 1


class Wrapper(nn.Module):
    """A timm model inside another module, as in a LightningModule."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = timm.create_model(name, pretrained=False, num_classes=3)
        self.extra = nn.Linear(2, 2)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_vit"])
def test_layer_wise_lrs_are_timms_but_in_lr(name: str) -> None:
    wrapper = Wrapper(name)
    groups = parameter_groups(wrapper, lr=0.1, weight_decay=0.05, layer_decay=0.5)
    lrs = {id(p): group["lr"] for group in groups for p in group["params"]}
    theirs = timm.optim.param_groups_layer_decay(wrapper.net, layer_decay=0.5)
    for group in theirs:
        for param in group["params"]:
            assert lrs[id(param)] == pytest.approx(0.1 * group["lr_scale"])
    assert len({group["lr"] for group in groups}) > 3
    assert lrs[id(wrapper.extra.weight)] == 0.1
    assert sum(len(group["params"]) for group in groups) == len(list(wrapper.parameters()))


def test_what_a_timm_model_exempts_from_decay_is_exempt() -> None:
    wrapper = Wrapper("test_vit")
    _, others = parameter_groups(wrapper, lr=0.1, weight_decay=0.05)
    assert names(wrapper, others["params"]) >= {"net.pos_embed", "net.cls_token"}


def test_the_head_has_a_pace_of_its_own() -> None:
    wrapper = Wrapper("test_convnext")
    groups = parameter_groups(wrapper, lr=0.1, layer_decay=0.5, head_lr_multiplier=10)
    fastest = [group for group in groups if group["lr"] == pytest.approx(1.0)]
    found = names(wrapper, [param for group in fastest for param in group["params"]])
    assert found == {"net.head.fc.weight", "net.head.fc.bias"}
    assert groups[0] is fastest[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_decay": 0.0}, r"layer_decay=0.0 must lie in \(0, 1\]; 1 is no layer-wise decay"),
        ({"layer_decay": 1.5}, "layer_decay=1.5 must lie in"),
        ({"head_lr_multiplier": 0.0}, "head_lr_multiplier=0.0 must be above 0; 1 is off"),
        ({"layer_decay": 0.9}, "need a timm model, .* and Linear holds none: leave both at 1"),
    ],
)
def test_bad_values_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(nn.Linear(2, 2), lr=0.1, **settings)


def test_the_groups_step() -> None:
    net = timm.create_model("test_convnext", pretrained=False, num_classes=3)
    before = {name: param.detach().clone() for name, param in net.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(net, lr=1.0, layer_decay=0.1))
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    moved = {name: (before[name] - p).mean().item() for name, p in net.named_parameters()}
    assert moved["head.fc.bias"] == pytest.approx(1.0)
    assert 0 <= moved["stem.0.bias"] < 1e-6
