"""However the parameters are split, ordered or updated, they end up the same."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_radam.optimizer import RAdam

SHAPES = [(), (3,), (17,), (2, 5), (4, 3, 2), (0,)]
STEPS = 12

kernels = st.sampled_from(
    [
        {},
        {"fused": True},
        {"foreach": True},
        {"fused": False},
        {"fused": False, "foreach": False},
        {"capturable": True},
    ]
)
hyperparameters = st.fixed_dictionaries(
    {
        "lr": st.floats(0, 0.1),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.999)),
        "eps": st.floats(1e-10, 1e-2),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "variant": st.sampled_from(["torch", "liu2019", "keras"]),
        "decoupled_weight_decay": st.booleans(),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)
# present[step][parameter]: whether the parameter has a gradient in that step.
present = st.lists(
    st.lists(st.booleans(), min_size=len(SHAPES), max_size=len(SHAPES)),
    min_size=STEPS,
    max_size=STEPS,
)


def run(split, present, *, rebuild_at=None, **hyper):
    """Train with parameter i in group split[i]; return the parameters in their own order."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in SHAPES
    ]

    def make():
        groups = [[p for p, g in zip(params, split, strict=True) if g == n] for n in range(3)]
        return RAdam([{"params": group} for group in groups if group], **hyper)

    optimizer = make()
    for step, row in enumerate(present):
        if step == rebuild_at:
            saved, optimizer = optimizer.state_dict(), make()
            optimizer.load_state_dict(saved)
        for param, has_grad in zip(params, row, strict=True):
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = grad if has_grad else None
        optimizer.step()
    return [param.detach() for param in params]


@settings(max_examples=60, deadline=None)
@given(
    split=st.lists(st.integers(0, 2), min_size=len(SHAPES), max_size=len(SHAPES)),
    present=present,
    kernel=kernels,
    hyper=hyperparameters,
    rebuild_at=st.none() | st.integers(0, STEPS - 1),
)
def test_split_order_kernel_and_reload_do_not_matter(split, present, kernel, hyper, rebuild_at):
    together = run([0] * len(SHAPES), present, fused=False, foreach=False, **hyper)
    otherwise = run(split, present, rebuild_at=rebuild_at, **hyper, **kernel)
    torch.testing.assert_close(otherwise, together, rtol=1e-10, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(present=present, hyper=hyperparameters)
def test_a_parameter_does_not_notice_its_neighbours(present, hyper):
    """Without gradients in some steps, each parameter is where it would be on its own."""
    together = run([0] * len(SHAPES), present, **hyper)
    for index in range(len(SHAPES)):
        alone = [[has and i == index for i, has in enumerate(row)] for row in present]
        single = run([0] * len(SHAPES), alone, **hyper)
        torch.testing.assert_close(together[index], single[index], rtol=1e-10, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(hyper=hyperparameters, kernel=kernels, dropped=st.sets(st.integers(1, STEPS - 1)))
def test_a_dropped_update_never_happened(hyper, kernel, dropped):
    def train(drop):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(5, generator=generator, dtype=torch.float64))
        optimizer = RAdam([param], **hyper, **kernel)
        for step in range(STEPS):
            param.grad = torch.randn(5, generator=generator, dtype=torch.float64)
            if step in dropped and drop == "skip":
                continue
            if step in dropped:
                param.grad[0] = torch.nan
            optimizer.found_inf = torch.tensor(float(step in dropped))
            optimizer.step()
        return param.detach(), optimizer.state_dict()["state"]

    torch.testing.assert_close(train("flag"), train("skip"), rtol=0, atol=0)
