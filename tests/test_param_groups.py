"""Which parameters decay."""

from torch import nn

from lightning_radam.param_groups import weight_decay_groups


def test_biases_norms_and_frozen_parameters() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    net[2].weight.requires_grad_(False)
    decaying, others = weight_decay_groups(net, 0.05)
    assert decaying == {"params": [net[0].weight], "weight_decay": 0.05}
    assert others["weight_decay"] == 0.0
    assert [id(p) for p in others["params"]] == [
        id(p) for p in (net[0].bias, net[1].weight, net[1].bias, net[2].bias)
    ]


def test_an_empty_group_is_left_out() -> None:
    assert len(weight_decay_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1
