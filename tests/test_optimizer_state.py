"""State: moving between optimizers, pickling, loading, growing; and what a step may meet."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re

import pytest
import torch
from torch import nn

from lightning_radam.optimizer import RAdam

DECOUPLED = {"decoupled_weight_decay": True}
SETTINGS = {"lr": 0.02, "weight_decay": 0.1}


def params(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for shape in [(3, 4), (4,), ()]
    ]


def train(parameters, optimizer, steps, seed=1):
    """Steps `range(steps)` on gradients that depend on the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(seed + 1000 * step)
        for param in parameters:
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()


def values(parameters):
    return [param.detach().clone() for param in parameters]


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def ours(parameters, **settings):
    return RAdam(parameters, **(SETTINGS | settings))


def torch_radam(parameters):
    return torch.optim.RAdam(parameters, **SETTINGS, **DECOUPLED)


def saved(optimizer):
    """The state after a trip through a file, as checkpoints make it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("switches", [(3,), (10,), (3, 8, 12)], ids=str)
@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"capturable": True}], ids=str)
def test_a_run_moves_between_torch_radam_and_this_one(switches, kernel):
    whole = params()
    train(whole, torch_radam(whole), range(15))

    mixed = params()
    optimizer = torch_radam(mixed)
    for start, stop in zip((0, *switches), (*switches, 15), strict=True):
        train(mixed, optimizer, range(start, stop))
        state = saved(optimizer)
        if isinstance(optimizer, RAdam):
            for group in state["param_groups"]:
                group["capturable"] = False  # torch refuses it on a CPU.
            optimizer = torch_radam(mixed)
        else:
            optimizer = ours(mixed, **kernel)
        optimizer.load_state_dict(state)
    assert_same(values(mixed), values(whole))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_run_moves_from_adamw_and_back(fused, amsgrad):
    """The moments and the steps go on; a twin of the authors' formula checks the numbers."""

    def adamw(parameters):
        return torch.optim.AdamW(parameters, **SETTINGS, fused=fused, amsgrad=amsgrad)

    moved = params()
    first = adamw(moved)
    train(moved, first, range(10))
    state = saved(first)
    before = values(moved)

    second = ours(moved)
    second.load_state_dict(copy.deepcopy(state))
    assert second.param_groups[0]["variant"] == "torch"
    assert second.param_groups[0]["amsgrad"] is amsgrad
    train(moved, second, range(10, 11))
    param, old, restored = moved[0], before[0], state["state"][0]
    generator = torch.Generator().manual_seed(1 + 1000 * 10)
    grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
    t, rho_inf = 11, 2 / (1 - 0.999) - 1
    m = 0.9 * restored["exp_avg"] + 0.1 * grad
    v = 0.999 * restored["exp_avg_sq"] + 0.001 * grad**2
    if amsgrad:
        v = torch.maximum(v, restored["max_exp_avg_sq"])
    rho = rho_inf - 2 * t * 0.999**t / (1 - 0.999**t)
    r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    step = r * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-8)
    assert_same(param.detach(), old * (1 - 0.02 * 0.1) - 0.02 * step)

    third = adamw(moved)
    third.load_state_dict(saved(second))
    train(moved, third, range(11, 13))
    assert all(state["step"] == 13 for state in third.state.values())


def test_the_state_is_torch_radams():
    """Same names, same kinds: step on the CPU in float32, moments like the parameters."""
    mine, theirs = params(), params()
    optimizer, reference = ours(mine), torch_radam(theirs)
    train(mine, optimizer, range(3))
    train(theirs, reference, range(3))
    torch.testing.assert_close(
        optimizer.state_dict()["state"], reference.state_dict()["state"], rtol=1e-12, atol=0
    )


def test_amsgrad_adds_the_name_of_adam():
    parameters = params()
    optimizer = ours(parameters, amsgrad=True)
    train(parameters, optimizer, range(2))
    names = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert all(set(state) == names for state in optimizer.state.values())


def test_settings_that_a_foreign_state_lacks_stay_those_of_the_group():
    first, second = params(), params(seed=1)
    theirs = torch.optim.AdamW([{"params": first}, {"params": second}], lr=0.5)
    mine = RAdam([{"params": first, "variant": "keras"}, {"params": second}], variant="liu2019")
    mine.load_state_dict(theirs.state_dict())
    assert [group["variant"] for group in mine.param_groups] == ["keras", "liu2019"]
    assert [group["lr"] for group in mine.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike_and_alone(copier):
    original = params()
    optimizer = ours(original, variant="keras", amsgrad=True)
    train(original, optimizer, range(7))
    clone = copier(optimizer)
    train(original, optimizer, range(7, 12))
    copied = clone.param_groups[0]["params"]
    train(copied, clone, range(7, 12))
    assert_same(values(copied), values(original))


def test_state_of_an_old_version_loads():
    """Steps were numbers once, and groups know nothing of later settings."""
    new, old = params(), params()
    optimizer, loaded = ours(new), ours(old)
    train(new, optimizer, range(8))
    state = copy.deepcopy(optimizer.state_dict())
    for param_state in state["state"].values():
        param_state["step"] = int(param_state["step"])
    state["param_groups"] = [
        {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "params")}
        for group in state["param_groups"]
    ]
    with torch.no_grad():
        for target, source in zip(old, new, strict=True):
            target.copy_(source)
    loaded.load_state_dict(state)
    train(old, loaded, range(8, 11))
    train(new, optimizer, range(8, 11))
    assert_same(values(old), values(new))


def test_a_group_added_in_mid_training_starts_at_its_own_step_one():
    first, second = params(), params(seed=5)
    optimizer = ours(first)
    train(first, optimizer, range(8))
    optimizer.add_param_group({"params": second, "lr": 0.1, "variant": "keras"})
    train([*first, *second], optimizer, range(8, 16))

    alone = params(seed=5)
    grads = []
    for step in range(8, 16):  # The gradients that `second` was given after `first`.
        generator = torch.Generator().manual_seed(1 + 1000 * step)
        drawn = [
            torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in [*first, *second]
        ]
        grads.append(drawn[len(first) :])
    fresh = ours(alone, lr=0.1, variant="keras")
    for row in grads:
        for param, grad in zip(alone, row, strict=True):
            param.grad = grad
        fresh.step()
    assert_same(values(second), values(alone))


def test_closure_is_evaluated_with_gradients():
    weight = nn.Parameter(torch.tensor(3.0))
    optimizer = RAdam([weight], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = weight**2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert weight.item() < 3.0


def test_named_parameters_keep_their_names():
    model = nn.Linear(2, 2)
    optimizer = RAdam(model.named_parameters())
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"capturable": True}], ids=str)
def test_step_leaves_gradients_alone(kernel):
    parameters = params()
    optimizer = ours(parameters, decoupled_weight_decay=False, maximize=True, **kernel)
    for step in range(8):
        grads = [torch.full_like(p, 0.1 * step) for p in parameters]
        for param, grad in zip(parameters, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        assert_same([p.grad for p in parameters], grads)


LAYOUTS = {
    "transposed gradient": lambda p, g: (p, g.t().contiguous().t()),
    "transposed parameter": lambda p, g: (p.t().contiguous().t(), g),
    "both transposed": lambda p, g: (p.t().contiguous().t(), g.t().contiguous().t()),
    "every other column": lambda p, g: (p.repeat_interleave(2, 1)[:, ::2], g),
    "expanded gradient": lambda p, g: (p, g[:, :1].expand_as(g)),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kernel", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_memory_layouts_do_not_mix_elements(layout, kernel):
    """PyTorch's fused CPU kernel walks all tensors in the order of memory, alike or not."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    straight = nn.Parameter(start.clone())
    odd = nn.Parameter(layout(start.clone(), start)[0])
    other = nn.Parameter(start.clone())
    reference = torch_radam([straight])
    optimizer = ours([odd, other], **kernel)
    for _ in range(10):
        grad = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        grad = layout(start, grad)[1]
        straight.grad = grad.contiguous()
        odd.grad, other.grad = grad, grad.contiguous()
        reference.step()
        optimizer.step()
    assert_same(odd.detach(), straight.detach())
    assert_same(other.detach(), straight.detach())


def test_a_checkpoint_of_another_memory_layout_goes_on():
    """Saved contiguous, resumed as channels_last: the moments must follow their elements."""
    whole = nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    grads = torch.randn(10, 4, 3, 2, 2, dtype=torch.float64)
    optimizer = ours([whole])
    for i, grad in enumerate(grads):
        if i == 5:
            state = copy.deepcopy(optimizer.state_dict())
            resumed = nn.Parameter(whole.detach().clone(memory_format=torch.channels_last))
        whole.grad = grad
        optimizer.step()
    second = ours([resumed])
    second.load_state_dict(state)
    for grad in grads[5:]:
        resumed.grad = grad.to(memory_format=torch.channels_last)
        second.step()
    assert_same(resumed.detach(), whole.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("variant", ["torch", "liu2019", "keras"])
def test_low_precision_parameters(dtype, variant):
    low, high = params(dtype), params(torch.float64)
    with torch.no_grad():
        for a, b in zip(low, high, strict=True):
            b.copy_(a)
    first, second = ours(low, variant=variant, eps=1e-4), ours(high, variant=variant, eps=1e-4)
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(low, high, strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(dtype)
            b.grad = a.grad.double()
        first.step()
        second.step()
    tolerance = 12 * torch.finfo(dtype).eps
    for a, b in zip(low, high, strict=True):
        torch.testing.assert_close(a.detach().double(), b.detach(), rtol=tolerance, atol=tolerance)


def test_mixed_dtypes_and_complex_in_one_group():
    def make():
        generator = torch.Generator().manual_seed(0)
        return [
            nn.Parameter(torch.randn(4, generator=generator, dtype=dtype))
            for dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128)
        ]

    mine, theirs = make(), make()
    train(mine, ours(mine), range(12))
    train(theirs, torch_radam(theirs), range(12))
    torch.testing.assert_close(values(mine), values(theirs))


def test_huge_gradients_before_rectification():
    """The momentum step hides in Adam's kernel behind an enormous eps; it must stay exact."""
    mine = [nn.Parameter(torch.zeros(3))]
    theirs = [nn.Parameter(torch.zeros(3))]
    first = RAdam(mine, lr=1e-3, eps=0.0)
    second = torch.optim.RAdam(theirs, lr=1e-3, eps=1e-30)
    for _ in range(5):
        for parameters, optimizer in ((mine, first), (theirs, second)):
            parameters[0].grad = torch.tensor([0.0, 1e-20, 1e12])
            optimizer.step()
    torch.testing.assert_close(values(mine), values(theirs), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradients_stay_in_their_element(value):
    parameters = [nn.Parameter(torch.ones(20))]
    optimizer = RAdam(parameters)
    for _ in range(8):
        parameters[0].grad = torch.ones(20)
        parameters[0].grad[7] = value
        optimizer.step()
    finite = parameters[0].detach().isfinite()
    assert finite.sum() == 19
    assert not finite[7]


def test_empty_parameters_and_groups():
    empty = nn.Parameter(torch.zeros(0, 3))
    optimizer = RAdam([{"params": [empty]}, {"params": []}])
    empty.grad = torch.zeros(0, 3)
    optimizer.step()
    optimizer.load_state_dict(saved(optimizer))
    optimizer.step()
    assert optimizer.state[empty]["step"] == 2


def test_nothing_of_the_parameters_size_is_allocated():
    param = nn.Parameter(torch.randn(1000, 1000))
    param.grad = torch.randn(1000, 1000)
    optimizer = RAdam([param], weight_decay=0.1)
    for _ in range(7):
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            optimizer.step()
        if optimizer.state[param]["step"] > 1:  # The first step allocates the state.
            events = profile.events()
            assert sum(max(event.cpu_memory_usage, 0) for event in events) < 1000


def test_grad_scaler_unscales_clips_and_skips():
    parameters = params(torch.float32)
    reference = params(torch.float32)
    optimizer, plain = ours(parameters), ours(reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    for step in range(10):
        overflow = step == 4
        generator = torch.Generator().manual_seed(step)
        for param, twin in zip(parameters, reference, strict=True):
            grad = torch.randn(param.shape, generator=generator)
            twin.grad = grad
            param.grad = grad * scaler.get_scale() * (math.inf if overflow else 1.0)
        scaler.scale(torch.zeros(()))  # Tells the scaler the device.
        scaler.unscale_(optimizer)
        if not overflow:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            nn.utils.clip_grad_norm_(reference, 1.0)
            plain.step()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(values(parameters), values(reference))
    assert scaler.get_scale() == 4.0
    assert all(state["step"] == 9 for state in optimizer.state.values())
    assert not hasattr(optimizer, "_step_supports_amp_scaling")  # Lightning then refuses clipping.


def test_hooks_and_repr():
    parameters = params()
    optimizer = ours(parameters)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(parameters, optimizer, range(1))
    assert calls == ["before", "after"]
    assert "variant: torch" in repr(optimizer)


BAD = [
    ({"lr": -1}, ValueError, "Invalid learning rate: -1; it must be 0 or more, for example lr="),
    ({"lr": math.nan}, ValueError, "Invalid learning rate: nan; it must be 0 or more"),
    ({"lr": math.inf}, ValueError, "Invalid learning rate: inf"),
    ({"lr": "1e-3"}, TypeError, "Invalid learning rate: '1e-3', a str; it must be a number 0 or"),
    ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element, but has shape (2,)."),
    ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: -1.0"),
    ({"betas": (0.9,)}, ValueError, "Invalid betas: (0.9,); they must be two numbers, like (0.9,"),
    ({"betas": 0.9}, ValueError, "Invalid betas: 0.9"),
    (
        {"betas": (0.9, 1.0)},
        ValueError,
        "Invalid beta parameter at index 1: 1.0; it must be in [0, 1), for example (0.9, 0.999).",
    ),
    ({"eps": -1e-8}, ValueError, "Invalid epsilon value: -1e-08; it must be 0 or more, for exa"),
    ({"weight_decay": None}, TypeError, "Invalid weight_decay value: None, a NoneType"),
    (
        {"variant": "adam"},
        ValueError,
        "Invalid variant: 'adam'; it must be one of 'torch', 'liu2019', 'keras'.",
    ),
    ({"amsgrad": "yes"}, TypeError, "Invalid amsgrad: 'yes'; it must be True or False."),
    ({"fused": 1}, TypeError, "Invalid fused: 1; it must be True, False or None."),
    ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` tog"),
    ({"fused": True, "capturable": True}, RuntimeError, "`fused` and `capturable` cannot be `Tr"),
]


@pytest.mark.parametrize(("settings", "error", "message"), BAD, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize(
    "give",
    [
        lambda settings: RAdam(params(), **settings),
        lambda settings: RAdam([{"params": params(), **settings}]),
        lambda settings: RAdam(params()).add_param_group({"params": params(), **settings}),
    ],
    ids=["constructor", "group", "added group"],
)
def test_bad_values(settings, error, message, give):
    with pytest.raises(error, match=re.escape(message)):
        give(settings)


def test_unknown_words():
    with pytest.raises(TypeError, match="unexpected keyword argument 'weigth_decay'"):
        RAdam(params(), weigth_decay=0.1)
    message = "Unknown setting 'weigth_decay' in a parameter group; did you mean 'weight_decay'?"
    with pytest.raises(ValueError, match=re.escape(message)):
        RAdam([{"params": params(), "weigth_decay": 0.1}])
    RAdam([{"params": params(), "name": "head", "lr_scale": 0.1}])  # Labels of others pass.


def test_demanded_kernels_that_do_not_exist():
    param = nn.Parameter(torch.zeros(2, device="meta"))
    param.grad = torch.zeros(2, device="meta")
    message = (
        "fused=True, but there is no fused kernel for Parameter on meta. Leave fused=None: it "
        "takes the fastest kernel there is."
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        RAdam([param], fused=True).step()


def test_compiled_step_is_right():
    mine, theirs = params(), params()
    optimizer = ours(mine)
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(8):
        generator = torch.Generator().manual_seed(i)
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=a.dtype)
            b.grad = a.grad.clone()
        step()
    reference = torch_radam(theirs)
    for i in range(8):
        generator = torch.Generator().manual_seed(i)
        for b in theirs:
            b.grad = torch.randn(b.shape, generator=generator, dtype=b.dtype)
        reference.step()
    assert_same(values(mine), values(theirs))
