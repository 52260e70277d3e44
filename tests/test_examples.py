"""Every example and every configuration runs, on real digits, and learns."""

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT

# Lightning's remarks on what the examples leave at its defaults.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
]
CONFIGS = ROOT / "configs"
MINIMAL = f"--config={CONFIGS}/minimal.yaml"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an example in this process and return what it printed."""

    def run_script(script: str, *words: str) -> str:
        path = ROOT / "examples" / script
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        monkeypatch.syspath_prepend(path.parent)
        runpy.run_path(str(path), run_name="__main__")
        return capfd.readouterr().out

    return run_script


def logged_accuracy(folder: Path) -> float:
    """The last validation accuracy in the CSV logs of a folder."""
    (metrics,) = folder.rglob("metrics.csv")
    return float(pd.read_csv(metrics)["val_accuracy"].dropna().iloc[-1])


@pytest.mark.parametrize("script", ["lightning_module.py", "fabric.py"])
def test_scripts_learn_the_digits(run: Callable[..., str], script: str) -> None:
    printed = re.search(r"validation accuracy (\d\.\d+)", run(script))
    assert printed is not None
    assert float(printed[1]) > 0.96


@pytest.mark.parametrize(
    ("script", "config", "least"),
    [("cli.py", "minimal", 0.95), ("vision.py", "vision", 0.85)],
)
def test_configurations_learn_the_digits(
    run: Callable[..., str], tmp_path: Path, script: str, config: str, least: float
) -> None:
    run(script, "fit", f"--config={CONFIGS}/{config}.yaml")
    assert logged_accuracy(tmp_path) > least


def test_debug_lies_on_top_of_another_configuration(
    run: Callable[..., str], tmp_path: Path
) -> None:
    run("cli.py", "fit", MINIMAL, f"--config={CONFIGS}/debug.yaml")
    (saved,) = tmp_path.rglob("config.yaml")
    config = yaml.safe_load(saved.read_text())
    assert (config["radam"]["lr"], config["radam"]["decay"]) == (0.01, "constant")
    assert config["trainer"]["max_steps"] == 20


def test_a_run_of_the_sweep(tmp_path: Path) -> None:
    """One trial, with the command line that W&B's agent would make of it."""
    sweep = yaml.safe_load((CONFIGS / "sweep.yaml").read_text())
    assert sweep["program"] == "examples/cli.py"
    assert (ROOT / sweep["program"]).is_file()
    trial = {"radam.lr": 1e-05, "radam.warmup_proportion": 0.05, "radam.betas": "[0.9, 0.99]"}
    assert trial.keys() == sweep["parameters"].keys()
    # ${args} becomes --name=value with the value as Python prints it, such as 1e-05.
    flags = [f"--{name}={value}" for name, value in trial.items()]
    words = [word.replace("configs/", f"{CONFIGS}/") for word in sweep["command"][3:]]
    position = words.index("${args}")
    words[position : position + 1] = flags
    # In a process of its own: W&B's state lasts as long as its process.
    script = str(ROOT / sweep["program"])
    extra = ["--trainer.logger.offline=true", "--trainer.max_epochs=1"]
    subprocess.run([sys.executable, script, *words, *extra], cwd=tmp_path, check=True)
    (saved,) = tmp_path.rglob("config.yaml")
    radam = yaml.safe_load(saved.read_text())["radam"]
    assert (radam["lr"], radam["warmup_proportion"], radam["betas"]) == (1e-05, 0.05, [0.9, 0.99])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_in_a_configuration_has_its_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    choices = [line for line in lines if re.match(r"\s*[\w.]+: \S", line)]
    bare = [line for line in choices if "#" not in line]
    allowed = ("program:", "method:", "goal:", "distribution:", "max:", "values:")
    assert [line for line in bare if not line.strip().startswith(allowed)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_examples_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--optimizer=lightning_radam.RAdam", "--optimizer.lr=0.01"],
            "",
        ),
        (
            [
                "--optimizer=lightning_radam.RAdam",
                "--lr_scheduler=lightning_radam.WarmupDecayLR",
                "--lr_scheduler.total_steps=23",
                "--trainer.callbacks+=lightning_radam.InstabilityMonitor",
            ],
            "WarmupDecayLR counts optimizer updates, but the trainer would step it once per epoch",
        ),
    ],
    ids=["optimizer", "scheduler and monitor"],
)
def test_stock_lightning_cli_takes_our_classes(
    tmp_path: Path, flags: list[str], expected: str
) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        "from lightning.pytorch.cli import LightningCLI\n"
        "from cli import Digits, DigitsData\n"
        "LightningCLI(Digits, DigitsData, seed_everything_default=0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "fit", "--trainer.max_epochs=1", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stderr
    assert ("WarmupDecayLR" in done.stderr) == bool(expected)
