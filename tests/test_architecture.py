"""The house: imports run downward, one public door, nothing heavy behind it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_radam

PACKAGE = Path(lightning_radam.__file__).parent

# A module may import modules of the floors below its own, and of its own floor only where listed
# to its right in the same line.
FLOORS = [
    ["errors", "rectification", "monitor.detectors", "monitor.incidents"],
    [
        "optimizer",
        "schedule",
        "param_groups",
        "monitor.telemetry",
        "monitor.reactions",
        "monitor.signals",
    ],
    ["configure", "preflight", "tracking.wandb", "tracking.curves"],
    ["monitor.callback"],
    ["cli"],
    [
        "competition.demo",
        "competition.project",
        "competition.runs",
        "competition.folds",
        "competition.submission",
        "competition.predictions",
        "competition.blend",
        "competition.backbone",
        "competition.tables",
    ],
    ["__main__"],
]
FRAMEWORKS = {
    "torch": 1,
    "lightning": 2,
    "wandb": 2,
    "matplotlib": 2,
    "jsonargparse": 4,
    "pandas": 2,
    "sklearn": 5,
    "timm": 5,
    "copier": 5,
}
# Imported inside a function only: whoever gets there has loaded it already.
LAZY = {("param_groups", "timm")}


def modules() -> dict[str, Path]:
    """All modules but the package files, by their name below `lightning_radam`."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and "_template" not in path.parts
    }


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module or "")
    return found


def floor(module: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if module in names)


def test_every_module_has_a_floor() -> None:
    assert sorted(modules()) == sorted(name for names in FLOORS for name in names)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_downward(module: str) -> None:
    own = floor(module)
    for name in imports(modules()[module]):
        top, _, rest = name.partition(".")
        if top == "lightning_radam" and rest:
            target = rest if rest in modules() else None
            assert target, f"{module} imports the package {name}, not a module"
            beside = floor(target) == own
            right = beside and FLOORS[own].index(target) > FLOORS[own].index(module)
            assert floor(target) < own or right, f"{module} must not import {target}"
        elif top in FRAMEWORKS and (module, top) not in LAZY:
            assert own >= FRAMEWORKS[top], f"{module} must not know {top}"


def test_the_door() -> None:
    names = [
        "InstabilityMonitor",
        "RAdam",
        "RAdamCLI",
        "RAdamConfig",
        "WarmupDecayLR",
        "configure_radam",
    ]
    assert lightning_radam.__all__ == names
    for name in names:
        assert getattr(lightning_radam, name).__name__ == name
    assert set(names) <= set(dir(lightning_radam))
    with pytest.raises(AttributeError, match="no attribute 'Radam'"):
        lightning_radam.Radam  # noqa: B018


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running `code`."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    optional = {"wandb", "timm", "sklearn", "pandas", "copier", "wandb_workspaces"}
    assert not loaded_by("import lightning_radam") & {*optional, "torch", "lightning"}
    assert "lightning" not in loaded_by("from lightning_radam import RAdam, WarmupDecayLR")
    assert not loaded_by("from lightning_radam import *") & optional
