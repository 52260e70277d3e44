"""The time and memory of one optimizer step: this RAdam, AdamW(fused) and every other RAdam.

    python -m benchmarks.optimizer_step                    # everything, compiled ones included
    python -m benchmarks.optimizer_step --no-compiled      # about two minutes on two cores
    python -m benchmarks.optimizer_step --device cuda      # adds the proof that no step waits

All optimizers step the same parameters with the same gradients, one after the other in every
round, in a new order each round, so that warm caches and what else the machine does hit all alike.
A time is the median over the rounds, a ratio that of two medians, its spread that of the rounds.
Prints one table a set of shapes, says which bars are met, and writes everything as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

from lightning_radam.optimizer import RAdam

MODELS = ("resnet18", "resnet50", "convnext_tiny", "vit_small_patch16_224")
SMALL = "2000 x 64"
OURS, ADAMW, COMPILED = "lightning-radam", "AdamW(fused)", "torch RAdam, compiled"
FLOOR = "copying as many bytes"
CLOSE_RACE = 5  # These two differ by less than the noise of a step: so many turns a round.
WARM_UP_STEPS = 8  # Past the rectification (update 6), so that the timed steps are the usual ones.
SETTINGS = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

Step = Callable[[], object]


def shapes_of(name: str) -> list[tuple[int, ...]]:
    if name == SMALL:
        return [(64,)] * 2000
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    return [tuple(p.shape) for p in model.parameters()]


def contenders(params: list[Tensor], *, compiled: bool) -> Iterator[tuple[str, Step]]:
    import optimi
    import pytorch_optimizer
    import timm.optim

    torch_radam, decoupled = torch.optim.RAdam, {"decoupled_weight_decay": True}
    yield OURS, RAdam(params, **SETTINGS).step
    yield ADAMW, torch.optim.AdamW(params, fused=True, **SETTINGS).step
    yield "torch RAdam", torch_radam(params, **SETTINGS, **decoupled).step
    yield "torch RAdam, foreach", torch_radam(params, foreach=True, **SETTINGS, **decoupled).step
    if compiled:
        yield COMPILED, torch.compile(torch_radam(params, **SETTINGS, **decoupled).step)
    yield "torch-optimi", optimi.RAdam(params, **SETTINGS, decouple_wd=True).step
    yield "pytorch-optimizer", pytorch_optimizer.RAdam(params, **SETTINGS).step
    yield "timm (RAdamLegacy)", timm.optim.RAdamLegacy(params, **SETTINGS).step
    yield FLOOR, copying(params)


def copying(params: list[Tensor]) -> Step:
    """Move what any Adam must at least move: read p, g, m, v, write p, m, v. Here 3.5 copies."""
    source = torch.zeros(7 * sum(p.numel() for p in params) // 2, device=params[0].device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def seconds(step: Step, device: str) -> float:
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def peak_extra_bytes(step: Step, device: str) -> int:
    """The most memory that one step holds on top of what it found."""
    if device != "cpu":
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        step()
        return torch.accelerator.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step()
    # The public tables sum allocations up; only the raw events have their order in time.
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def assert_no_sync(step: Step) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def measure(name: str, device: str, budget: float, compiled: bool) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(shape, generator=generator).to(device).requires_grad_()
        for shape in shapes_of(name)
    ]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(device) * 1e-3
    steps = dict(contenders(params, compiled=compiled and name != SMALL))
    for step in steps.values():
        for _ in range(WARM_UP_STEPS):
            step()
    if device == "cuda":
        assert_no_sync(steps[OURS])

    times: dict[str, list[float]] = {who: [] for who in steps}
    shuffled = random.Random(0)
    end = time.perf_counter() + budget
    while len(times[OURS]) < 15 or time.perf_counter() < end:
        turns = [*steps, *[OURS, ADAMW] * (CLOSE_RACE - 1)]
        shuffled.shuffle(turns)
        spent: defaultdict[str, list[float]] = defaultdict(list)
        for who in turns:
            spent[who].append(seconds(steps[who], device))
        for who in steps:
            times[who].append(median(spent[who]))

    size = sum(p.numel() * p.element_size() for p in params)
    rows = {}
    for who in steps:
        ratios = quantiles(
            (other / ours for other, ours in zip(times[who], times[OURS], strict=True)), n=10
        )
        rows[who] = {
            "median_ms": 1e3 * median(times[who]),
            "times_ours": median(times[who]) / median(times[OURS]),
            "times_ours_10%": ratios[0],
            "times_ours_90%": ratios[-1],
            "extra_memory": 0.0 if who == FLOOR else peak_extra_bytes(steps[who], device) / size,
            "rounds": len(times[who]),
        }
    return rows


def table(name: str, rows: dict[str, dict[str, float]]) -> str:
    lines = [
        f"| {name} | median ms | times ours (10% to 90% of rounds) | extra memory / parameters |",
        "|---|---:|---:|---:|",
    ]
    for who, row in rows.items():
        memory = "" if who == FLOOR else f"{row['extra_memory']:.2%}"
        lines.append(
            f"| {who} | {row['median_ms']:.2f} | {row['times_ours']:.2f} "
            f"({row['times_ours_10%']:.2f} to {row['times_ours_90%']:.2f}) | {memory} |"
        )
    return "\n".join(lines)


def bars(name: str, rows: dict[str, dict[str, float]]) -> list[tuple[str, bool]]:
    """What this RAdam must reach on a set of shapes, and whether it does."""
    to_adamw = 1 / rows[ADAMW]["times_ours"]
    limit = 1.15 if name == SMALL else 1.05
    verdicts = [
        (f"at most {limit} times AdamW(fused): {to_adamw:.3f}", to_adamw <= limit),
        (
            f"extra memory under 1% of the parameters: {rows[OURS]['extra_memory']:.3%}",
            rows[OURS]["extra_memory"] < 0.01,
        ),
    ]
    if name != SMALL:
        rest = {w: r["times_ours"] for w, r in rows.items() if w not in (OURS, ADAMW, FLOOR)}
        eager = {who: times for who, times in rest.items() if who != COMPILED}
        for label, others in (("RAdam", rest), ("RAdam without a compiler", eager)):
            fastest = min(others, key=others.__getitem__)
            text = f"at least 2 times faster than the fastest other {label}, {fastest}"
            verdicts.append((f"{text}: {others[fastest]:.2f}", others[fastest] >= 2))
    return verdicts


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else platform.processor()
    return f"{torch.get_num_threads()} cores, CPU, {name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=[*MODELS, SMALL], choices=[*MODELS, SMALL])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing, per set of shapes")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, default=Path("build/optimizer_step.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*Profiler")

    packages = ("torch", "timm", "torch-optimi", "pytorch-optimizer")
    report: dict[str, object] = {
        "hardware": hardware(args.device),
        "versions": {package: version(package) for package in packages},
        "settings": SETTINGS,
    }
    print(f"{report['hardware']}; {report['versions']}\n")
    for name in args.shapes:
        torch.compiler.reset()
        rows = measure(name, args.device, args.seconds, args.compiled)
        verdicts = bars(name, rows)
        report[name] = {"optimizers": rows, "bars": dict(verdicts)}
        print(table(name, rows), "\n")
        for text, met in verdicts:
            print(f"- {'met' if met else 'NOT met'}: {text}")
        print(flush=True)
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
