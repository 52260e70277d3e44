"""The template: what it makes, that it works, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_radam.competition.project import make_project, questions
from lightning_radam.errors import InputError
from tests.conftest import error_line, run_command

FILES = {
    ".copier-answers.yml",
    ".gitignore",
    "README.md",
    "configs/base.yaml",
    "pyproject.toml",
    "tests/test_project.py",
    "{package}/__init__.py",
    "{package}/__main__.py",
    "{package}/data.py",
    "{package}/model.py",
    "{package}/settings.py",
    "{package}/train.py",
}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "answers",
    [
        {},
        {"slug": "2026-cats-and-dogs", "pretrained": False, "folds": 3, "tracking": "csv"},
        {
            "id_column": 'the "id"',
            "target_column": "étiquette {{ slug }}",
            "train_images": "data/it's here/{id}.jpg",
            "test_images": "data/test/{id}/0.png",
            "horizontal_flip": False,
        },
    ],
    ids=["defaults", "digits first", "awkward names"],
)
def test_it_makes_exactly_these_files_and_they_are_clean(
    tmp_path: Path, answers: dict[str, object]
) -> None:
    project = tmp_path / "My_Competition"
    make_project(project, answers)
    package = {"2026-cats-and-dogs": "comp_2026_cats_and_dogs"}.get(
        str(answers.get("slug")), "my_competition"
    )
    assert files(project) == {name.format(package=package) for name in FILES}
    for path in project.rglob("*"):
        if path.is_file() and path.name not in ("settings.py", ".copier-answers.yml"):
            assert "{{" not in path.read_text(), f"{path} has braces left"
    # A quoted quote may be written in two ways, and the formatter prefers the other one.
    quotes = ["--exclude=settings.py"] if '"' in str(answers.get("id_column")) else []
    for command in (["check"], ["format", "--check", *quotes]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", "."]
        done = subprocess.run(ruff, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    yaml.safe_load((project / "configs/base.yaml").read_text())
    for name, value in answers.items():
        if name.endswith(("_column", "_images")):
            constant = {"id_column": "ID", "target_column": "TARGET"}.get(name, name.upper())
            settings: dict[str, object] = {"__file__": str(project / package / "settings.py")}
            exec((project / package / "settings.py").read_text(), settings)
            assert settings[constant] == value


def test_its_own_tests_pass(tmp_path: Path) -> None:
    project = tmp_path / "shapes"
    make_project(project, {"image_size": 32})
    done = run_command("-m", "pytest", "-q", "-W", "error::UserWarning", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"slug": "../escape"}, "slug=../escape must be lower-case letters and digits"),
        ({"package": "class-1"}, "package=class-1 must be a Python name in lower case"),
        ({"folds": 1}, "folds=1 must be at least 2"),
        ({"image_size": "big"}, "image_size=big must be a whole number"),
        ({"lr": "fast"}, "lr=fast must be a number"),
        ({"pretrained": "maybe"}, "pretrained=maybe must be yes or no"),
        ({"train_images": "data/a.png"}, "train_images=data/a.png must contain {id}"),
        ({"tracking": "mlflow"}, "tracking=mlflow must be one of offline, online, csv"),
        ({"lr": 0}, "lr=0.0 must be above 0"),
    ],
)
def test_a_bad_answer_is_one_line_and_writes_nothing(
    tmp_path: Path, answers: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError) as error:
        make_project(tmp_path / "new", answers)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = run_command("new", str(tmp_path), "--defaults")
    assert error_line(done) == (
        f"error: {tmp_path} is not empty: choose a new folder, nothing was written"
    )
    assert files(tmp_path) == {"mine.txt"}


def test_new_takes_every_question_as_a_flag(tmp_path: Path) -> None:
    flags = [f"--{name.replace('_', '-')}" for name in questions()]
    help_text = run_command("new", "--help").stdout
    assert all(flag in help_text for flag in flags)
    project = tmp_path / "cats"
    done = run_command("new", str(project), "--backbone=resnet18", "--folds=4", "--pretrained=no")
    assert done.returncode == 0, done.stderr
    assert "made" in done.stdout
    config = yaml.safe_load((project / "configs/base.yaml").read_text())
    assert config["model"] == {"backbone": "resnet18", "pretrained": False}
    assert "N_FOLDS = 4\n" in (project / "cats/settings.py").read_text()


def test_an_unknown_backbone_makes_no_project(tmp_path: Path) -> None:
    done = run_command("new", str(tmp_path / "cats"), "--backbone=resnet19")
    assert error_line(done).startswith("error: backbone 'resnet19' is unknown to timm")
    assert "did you mean" in error_line(done)
    assert not (tmp_path / "cats").exists()
