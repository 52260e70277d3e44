"""What detectors of instabilities see, miss, and see wrongly: ours beside those of six projects.

    python -m benchmarks.detectors                       # about a minute
    python -m benchmarks.detectors --extra runs/         # with traces of one's own runs
    python -m benchmarks.detectors --json detectors.json

Every rule runs once through every healthy trace. At some steps it is copied, and each copy goes on
with the same trace and one trouble grafted onto it: a real spike at full, 1/8 or 1/32 size, one
outlier, a plateau, a drift, a NaN. `--extra` takes CSV files of step,loss,grad_norm: those named
healthy_* are healthy, of the others it says at which step each rule first raised an alarm.

A spike of the given size adds `size * (loss - loss before)` to the loss and multiplies the gradient
norm by `1 + size * (norm / norm before - 1)`.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, pstdev, quantiles

from benchmarks.detector_anchors import OURS, RULES, Rule

Step = tuple[float, float | None]
Trace = list[Step]

FOLD = 50  # Alarms that are no further apart are one episode.
AFTER = 100  # Healthy steps after a trouble, in which an alarm is a false one.
SETTLING = 12  # Steps after a spike that still belong to it.
FIRST = 600  # No trouble is grafted before this step.
QUIET = 0.06  # nats; the noise of a step below which a trace is a quiet one
DATA = Path("../shared/data/loss_traces")


def read_trace(path: Path) -> Trace:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        return [
            (float(row["loss"]), float(row["grad_norm"]) if row["grad_norm"] else None)
            for row in csv.DictReader(file)
        ]


# The troubles -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spike:
    """A real spike: what it adds to the loss, and by what it multiplies the norm."""

    added: list[float]
    factors: list[float]

    @classmethod
    def of(cls, trace: Trace, before: int) -> Spike:
        """Measure a spike against the first `before` steps of its excerpt."""
        losses = [loss for loss, _ in trace]
        norms = [norm or 0.0 for _, norm in trace]
        loss, norm = fmean(losses[:before]), math.exp(fmean(map(math.log, norms[:before])))
        return cls([x - loss for x in losses], [g / norm for g in norms])


@dataclass(frozen=True)
class Local:
    """The trace around a graft: median and spread of the loss before it, and a random number."""

    median: float
    spread: float
    chance: float


@dataclass(frozen=True)
class Trouble:
    """How a stretch of a trace is changed, and in which steps of it an alarm is right.

    Each window needs an alarm, and an alarm outside of them is a false one. The stretch lasts for
    `steps`; what a rule says before step `counted` does not count.
    """

    change: Callable[[int, Step, Local], Step]
    windows: list[range]
    steps: int
    counted: int = 0


def spike(source: Spike, size: float, start: int = 0) -> Callable[[int, Step, Local], Step]:
    def change(i: int, step: Step, local: Local) -> Step:
        if not 0 <= i - start < len(source.added):
            return step
        loss, norm = step
        factor = 1 + size * (source.factors[i - start] - 1)
        return loss + size * source.added[i - start], None if norm is None else norm * factor

    return change


def outlier(i: int, step: Step, local: Local) -> Step:
    above = local.median + (6 + 4 * local.chance) * local.spread
    return (above, step[1]) if i == 0 else step


def doubled(i: int, step: Step, local: Local) -> Step:
    return (2.5 * local.median, step[1]) if i == 0 else step


def plateau(i: int, step: Step, local: Local) -> Step:
    return step[0] + 3 * local.spread, step[1]


def drift(i: int, step: Step, local: Local) -> Step:
    return step[0] + 0.0015 * i, step[1]


NANS = [i for i in range(10) if i % 3 != 1]
LASTING = 200


def nan_burst(i: int, step: Step, local: Local) -> Step:
    return (math.nan, None if step[1] is None else math.nan) if i in NANS else step


def nan_then(source: Spike, start: int) -> Callable[[int, Step, Local], Step]:
    later = spike(source, 1.0, start)
    return lambda i, step, local: nan_burst(0, step, local) if i == 0 else later(i, step, local)


def troubles(spikes: dict[str, Spike]) -> dict[str, Trouble]:
    found = {}
    for name, source in spikes.items():
        window = range(len(source.added) + SETTLING)
        for label, size in (("full", 1.0), ("1/8", 1 / 8), ("1/32", 1 / 32)):
            change = spike(source, size)
            found[f"{name}, {label} size"] = Trouble(change, [window], len(window) + AFTER)
    bloom = spikes["BLOOM"]
    after_nan = range(20, 20 + len(bloom.added) + SETTLING)
    return found | {
        "2.5 times the median": Trouble(doubled, [range(1)], AFTER),
        "outlier of 6 to 10 sigma": Trouble(outlier, [], AFTER),
        "plateau at +3 sigma": Trouble(plateau, [range(LASTING)], LASTING),
        "drift of .0015 a step": Trouble(drift, [range(LASTING)], LASTING),
        "NaN burst": Trouble(nan_burst, [range(i, i + 1) for i in NANS], AFTER),
        "NaN, then BLOOM": Trouble(nan_then(bloom, 20), [after_nan], AFTER, counted=1),
    }


# Measuring ----------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What one rule did about one kind of trouble."""

    seen: list[bool] = field(default_factory=list)
    delays: list[int] = field(default_factory=list)
    right: int = 0
    wrong: int = 0

    def add(self, trouble: Trouble, alarms: list[int]) -> None:
        alarms = [i for i in alarms if i >= trouble.counted]
        for window in trouble.windows:
            inside = [i for i in alarms if i in window]
            self.seen.append(bool(inside))
            self.delays += [i - window.start for i in inside[:1]]
        right = sum(any(i in window for window in trouble.windows) for i in alarms)
        self.right += right
        self.wrong += len(alarms) - right

    def row(self) -> dict[str, float | None]:
        alarms = self.right + self.wrong
        spread = quantiles(self.delays, n=10, method="inclusive") if len(self.delays) > 1 else None
        return {
            "recall": fmean(self.seen) if self.seen else None,
            "precision": self.right / alarms if alarms else None,
            "median_delay": median(self.delays) if self.delays else None,
            "p90_delay": spread[-1] if spread else None,
            "false_alarm_steps": self.wrong,
        }


def play(rule: Rule, steps: Trace) -> list[int]:
    return [i for i, (loss, norm) in enumerate(steps) if rule.update(loss, norm)]


def episodes(alarms: list[int]) -> int:
    return sum(i == 0 or step - alarms[i - 1] > FOLD for i, step in enumerate(alarms))


def blind_steps(rule: Rule, steps: Trace) -> int | None:
    """Steps after a NaN at which a threefold loss changes nothing; None if it never does.

    A rule that acts on every step is as blind as one that acts on none, so what counts is whether
    its answer to six bad steps differs from that to six healthy ones.
    """

    def sees(rule: Rule, at: int) -> bool:
        healthy = steps[at : at + 6]
        bad = [(3 * x, None if g is None else 100 * g) for x, g in healthy]
        return bool(play(deepcopy(rule), bad)) != bool(play(deepcopy(rule), healthy))

    if not sees(rule, 0):
        return None
    rule = deepcopy(rule)
    norm = None if steps[0][1] is None else math.nan
    rule.update(math.nan, norm)
    blind = 0
    for at in range(1, LASTING):
        blind += not sees(rule, at)
        rule.update(*steps[at])
    return blind


@dataclass
class Healthy:
    """What a rule did on healthy traces: false alarm episodes per 10k steps, blindness by NaN."""

    rates: dict[str, float] = field(default_factory=dict)
    blind: list[int | None] = field(default_factory=list)

    def row(self) -> dict[str, float | None]:
        known = [steps for steps in self.blind if steps is not None]
        return {
            "median_false_alarms_per_10k": median(self.rates.values()),
            "worst_false_alarms_per_10k": max(self.rates.values()),
            "blind_steps_after_nan": median(known) if known else None,
        }


@dataclass
class Results:
    """All that was measured on one group of traces."""

    traces: list[str] = field(default_factory=list)
    tallies: defaultdict[str, dict[str, Tally]] = field(
        default_factory=lambda: defaultdict(lambda: {who: Tally() for who in RULES})
    )
    healthy: dict[str, Healthy] = field(default_factory=lambda: {who: Healthy() for who in RULES})

    def measure(self, name: str, trace: Trace, kinds: dict[str, Trouble], grafts: int) -> None:
        """Run every rule through a trace, and copies of it through every trouble."""
        self.traces.append(name)
        chance = random.Random(name)
        places = chance.sample(range(FIRST, len(trace) - LASTING), grafts)
        chances = {at: chance.random() for at in places}
        for who, rule_class in RULES.items():
            rule, alarms = rule_class(), []
            for at, step in enumerate(trace):
                if at in chances:
                    local = local_at(trace, at, chances[at])
                    for kind, trouble in kinds.items():
                        stretch = trace[at : at + trouble.steps]
                        changed = [trouble.change(i, s, local) for i, s in enumerate(stretch)]
                        self.tallies[kind][who].add(trouble, play(deepcopy(rule), changed))
                if at == places[0]:
                    self.healthy[who].blind.append(blind_steps(rule, trace[at : at + 2 * LASTING]))
                if rule.update(*step):
                    alarms.append(at)
            self.healthy[who].rates[name] = 1e4 * episodes(alarms) / len(trace)

    def table(self) -> dict[str, dict[str, dict[str, float | None]]]:
        rows = {kind: {who: t.row() for who, t in by.items()} for kind, by in self.tallies.items()}
        return {"healthy": {who: h.row() for who, h in self.healthy.items()}} | rows


def local_at(trace: Trace, at: int, chance: float) -> Local:
    losses = [loss for loss, _ in trace[at - 128 : at]]
    return Local(median(losses), pstdev(losses), chance)


def noise(trace: Trace) -> float:
    """The spread of the loss from one step to the next, over sqrt 2."""
    losses = [loss for loss, _ in trace[FIRST:]]
    return pstdev(b - a for a, b in pairwise(losses)) / math.sqrt(2)


def group_of(trace: Trace) -> str:
    if trace[0][1] is not None:
        return "loss and gradient norm"
    return "loss alone, quiet runs" if noise(trace) < QUIET else "loss alone, noisy runs"


def run(healthy: dict[str, Trace], spikes: dict[str, Spike], grafts: int) -> dict[str, Results]:
    kinds = troubles(spikes)
    groups: defaultdict[str, Results] = defaultdict(Results)
    for name, trace in healthy.items():
        alone: Trace = [(loss, None) for loss, _ in trace]
        for seen in (trace, alone) if trace[0][1] is not None else (trace,):
            print(f"{name}: {group_of(seen)}", file=sys.stderr)
            groups[group_of(seen)].measure(name, seen, kinds, grafts)
    return dict(groups)


def beaten(results: Results) -> list[str]:
    """The rows on which a rule sees more than ours and has fewer false alarms."""
    table = results.table()
    false_alarms = {who: fmean(rule.rates.values()) for who, rule in results.healthy.items()}
    return [
        f"{who}: {kind}"
        for kind, by in table.items()
        for who, row in by.items()
        if (row.get("recall") or 0) > (by[OURS].get("recall") or 0)
        and false_alarms[who] < false_alarms[OURS]
    ]


def first_alarms(trace: Trace) -> dict[str, int | None]:
    """The step of each rule's first alarm on a trace that is not healthy."""
    return {who: next(iter(play(rule(), trace)), None) for who, rule in RULES.items()}


# Printing -----------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}".removesuffix(".0")


def print_group(name: str, results: Results) -> None:
    table = results.table()
    grafts = len(next(iter(results.tallies.values()))[OURS].seen)
    print(f"\n### {name}: {len(results.traces)} traces, {grafts} grafts a row\n")
    print("| | " + " | ".join(RULES) + " |")
    print("|---|" + "---|" * len(RULES))
    for kind, by in table.items():
        if kind == "healthy":
            columns = {
                "false alarms per 10k steps, median (worst)": [
                    f"{number(row['median_false_alarms_per_10k'], 1)} "
                    f"({number(row['worst_false_alarms_per_10k'], 1)})"
                    for row in by.values()
                ],
                "blind steps after a NaN": [
                    number(row["blind_steps_after_nan"], 0) for row in by.values()
                ],
            }
        elif by[OURS]["recall"] is None:
            columns = {
                f"{kind}: false alarm steps": [
                    number(row["false_alarm_steps"], 0) for row in by.values()
                ]
            }
        else:
            columns = {kind: [cell(row) for row in by.values()]}
        for label, cells in columns.items():
            print(f"| {label} | " + " | ".join(cells) + " |")


def cell(row: dict[str, float | None]) -> str:
    """Recall / precision (median delay, 90th percentile)."""
    if not row["recall"]:
        return "0"
    delays = f"({number(row['median_delay'], 1)}, {number(row['p90_delay'], 1)})"
    return f"{number(row['recall'])} / {number(row['precision'])} {delays}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the loss traces")
    parser.add_argument("--extra", type=Path, help="folder of CSV traces of one's own runs")
    parser.add_argument("--grafts", type=int, default=40, help="grafts a trace and trouble")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()

    paths = sorted([*args.data.glob("gpt_*.csv.gz"), *args.data.glob("llmc_*.csv.gz")])
    sources = [args.data / "spike_bloom_176b.csv", args.data / "spike_104b_8738.csv"]
    if not paths or not all(path.is_file() for path in sources):
        parser.error(f"--data={args.data} must hold gpt_*.csv.gz or llmc_*.csv.gz, and spike_*.csv")
    extra = sorted(args.extra.glob("*.csv")) if args.extra else []
    healthy = {
        path.name.partition(".csv")[0]: read_trace(path)
        for path in [*paths, *extra]
        if path in paths or path.name.startswith("healthy_")
    }
    needed = FIRST + LASTING + args.grafts
    for name, trace in healthy.items():
        if len(trace) < needed:
            parser.error(f"{name} has {len(trace)} steps; a healthy trace needs {needed}")
    # BLOOM's rows from the tenth on come after a gap in its log.
    spikes = {
        "BLOOM": Spike.of(read_trace(sources[0])[:9], before=1),
        "104B": Spike.of(read_trace(sources[1]), before=2),
    }
    groups = run(healthy, spikes, args.grafts)
    for name, results in groups.items():
        print_group(name, results)
    lost = {name: beaten(results) for name, results in groups.items()}
    print("\nrows on which a rule has more recall and fewer false alarms than ours:", end=" ")
    print([f"{name}: {row}" for name, rows in lost.items() for row in rows] or "none")
    unhealthy = {
        path.stem: first_alarms(read_trace(path)) for path in extra if path.stem not in healthy
    }
    for name, firsts in unhealthy.items():
        print(f"{name}: first alarm at step", firsts)
    if args.json:
        found = {
            name: {"traces": results.traces, "rows": results.table()}
            for name, results in groups.items()
        }
        args.json.write_text(json.dumps({"groups": found, "first_alarms": unhealthy}, indent=2))


if __name__ == "__main__":
    main()
