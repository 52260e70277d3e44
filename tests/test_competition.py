"""What a competitor should not have to edit: tables, folds, predictions, blends, submissions."""

from pathlib import Path

import pandas as pd
import pytest

from lightning_radam.competition import blend
from lightning_radam.competition.backbone import check_backbone, create_backbone
from lightning_radam.competition.folds import fold_summary, make_folds, read_folds, write_folds
from lightning_radam.competition.predictions import (
    accuracy,
    most_likely,
    pool,
    read_predictions,
    write_predictions,
)
from lightning_radam.competition.runs import experiment_flags, run_flags
from lightning_radam.competition.submission import check_submission, write_submission
from lightning_radam.competition.tables import image_paths, read_table
from lightning_radam.errors import InputError

SPLIT = {"id_column": "id", "target_column": "label", "seed": 0}


def table(rows: int = 60, classes: str = "abc") -> pd.DataFrame:
    """Rows 000, 001, ...: labels in turn, two rows to a group."""
    return pd.DataFrame(
        {
            "id": [f"{i:03d}" for i in range(rows)],
            "label": [classes[i % len(classes)] for i in range(rows)],
            "patient": [f"p{i // 2}" for i in range(rows)],
        }
    )


# Tables ---------------------------------------------------------------------------------------


def test_ids_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "train.csv"
    path.write_text("id,label,age\n007,1,30\nNA,2,\n")
    read = read_table(path, "id", "label")
    assert read["id"].tolist() == ["007", "NA"]
    assert read["label"].tolist() == ["1", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\n1,a\n", "has no column 'id'; it has 'image', 'label': name the right one"),
        ("id,label\n1,a\n,b\n", "has no id in line 3 (1 such rows): fill them in"),
        ("id,label\n1,a\n2,\n", "has no label in line 3 (1 such rows)"),
        ("id,label\n1,a\n1,b\n", "has the id '1' more than once (1 repeated rows)"),
        ("id,label\n", "has no rows"),
        ("", "is not a CSV table: No columns to parse from file"),
        (None, "does not exist: put the competition's table there"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "train.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        read_table(path, "id", "label")
    assert str(error.value).startswith(f"{path} ")
    assert message in str(error.value)


def test_missing_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "b.png").touch()
    assert image_paths(tmp_path, "{id}.png", ["b"]) == [tmp_path / "b.png"]
    with pytest.raises(InputError) as error:
        image_paths(tmp_path, "{id}.png", ["b", "a", "c"])
    assert str(error.value).startswith(
        f"2 of 3 images are missing, the first is {tmp_path / 'a.png'} (id 'a'): unpack them"
    )
    with pytest.raises(InputError, match=r"image pattern 'x.png' must contain \{id\}"):
        image_paths(tmp_path, "x.png", ["b"])


# Folds ----------------------------------------------------------------------------------------


def test_folds_hold_each_label_in_equal_shares() -> None:
    train = table()
    folds = make_folds(train, n_folds=5, **SPLIT)
    assert folds["id"].tolist() == train["id"].tolist()
    assert (pd.crosstab(folds["fold"], train["label"]) == 4).all(axis=None)
    assert fold_summary(folds, train, "label").loc["rows", "rows"] == 60
    assert folds.equals(make_folds(train, n_folds=5, **SPLIT))


def test_a_group_never_lies_in_two_folds() -> None:
    train = table()
    folds = make_folds(train, n_folds=5, group_column="patient", **SPLIT)
    assert folds.groupby(train["patient"])["fold"].nunique().eq(1).all()
    assert pd.crosstab(folds["fold"], train["label"]).min(axis=None) >= 3


@pytest.mark.parametrize(
    ("train", "settings", "message"),
    [
        (table(), {"n_folds": 1}, "folds=1 must be at least 2"),
        (table(), {"n_folds": 21}, "folds=21 is more than the 20 rows of the most frequent label"),
        (
            pd.concat([table(), pd.DataFrame({"id": ["x"], "label": ["z"]})]),
            {"n_folds": 5},
            "label 'z' of column 'label' is in only one row: no fold could both train and validate",
        ),
        (
            table().assign(patient="p"),
            {"n_folds": 2, "group_column": "patient"},
            "folds=2 is more than the 1 groups of column 'patient': use 1 folds or fewer",
        ),
    ],
)
def test_impossible_splits_are_refused(
    train: pd.DataFrame, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError) as error:
        make_folds(train, **SPLIT, **settings)
    assert message in str(error.value)


def test_a_fold_table_is_never_overwritten_by_another(tmp_path: Path) -> None:
    path = tmp_path / "folds.csv"
    train = table()
    folds = make_folds(train, n_folds=5, **SPLIT)
    assert write_folds(path, folds) == write_folds(path, folds)
    before = path.read_bytes()
    with pytest.raises(InputError, match="holds another split, and runs may rest on it"):
        write_folds(path, make_folds(train, n_folds=4, **SPLIT))
    assert path.read_bytes() == before
    assert read_folds(path, train, "id").equals(folds)
    with pytest.raises(InputError, match="differ in 1 ids, such as '059': the data has changed"):
        read_folds(path, train[:-1], "id")
    with pytest.raises(InputError, match="run the verb `folds` first"):
        read_folds(tmp_path / "none.csv", train, "id")


# Predictions ----------------------------------------------------------------------------------


def predictions(ids: str, probabilities: list[float]) -> pd.DataFrame:
    """Class `yes` with the given probabilities, `no` with the rest."""
    return pd.DataFrame(
        {"no": [1 - p for p in probabilities], "yes": probabilities},
        index=pd.Index(list(ids), name="id"),
    )


def test_predictions_survive_the_disk_and_appear_whole(tmp_path: Path) -> None:
    path = tmp_path / "oof.csv"
    write_predictions(path, "id", ["01", "02"], ["no", "yes"], [[0.1, 0.9], [0.25, 0.75]])
    assert [p.name for p in tmp_path.iterdir()] == ["oof.csv"]
    read = read_predictions(path, "id")
    assert read.index.tolist() == ["01", "02"]
    assert read["yes"].tolist() == [0.9, 0.75]
    with pytest.raises(InputError, match="does not exist: train that fold first"):
        read_predictions(tmp_path / "none.csv", "id")


def test_pooling_needs_each_id_exactly_once() -> None:
    one, two = predictions("ca", [0.9, 0.2]), predictions("b", [0.6])
    pooled = pool([one, two], ["a", "b", "c"])
    assert pooled["yes"].tolist() == [0.2, 0.6, 0.9]
    truth = pd.Series({"a": "no", "b": "no", "c": "yes"})
    assert accuracy(pooled, truth) == pytest.approx(2 / 3)
    assert most_likely(pooled).tolist() == ["no", "yes", "yes"]
    with pytest.raises(InputError, match="id 'c' was predicted by more than one fold"):
        pool([one, one, two], ["a", "b", "c"])
    with pytest.raises(InputError, match="1 ids are in the training table or in the pred"):
        pool([one, two], ["a", "b", "c", "d"])


def test_blends_join_on_id() -> None:
    mean = blend.mean([predictions("ab", [0.0, 1.0]), predictions("ba", [0.5, 0.5])])
    assert mean["yes"].to_dict() == {"a": 0.25, "b": 0.75}
    with pytest.raises(InputError, match="must have the same ids and classes; 2 rows of"):
        blend.mean([predictions("ab", [0.0, 1.0]), predictions("ac", [0.5, 0.5])])


# Submissions ----------------------------------------------------------------------------------


def test_a_submission_has_the_samples_rows_in_its_order(tmp_path: Path) -> None:
    sample = tmp_path / "sample.csv"
    sample.write_text("id,label\n03,0\n01,0\n02,0\n")
    path = tmp_path / "submission.csv"
    answers = pd.Series({"01": "a", "02": "b", "03": "c"})
    write_submission(path, answers, sample, "label")
    assert path.read_text() == "id,label\n03,c\n01,a\n02,b\n"
    with pytest.raises(InputError, match=r"1 ids of the sample are missing, such as '02'$"):
        write_submission(path, answers.drop("02"), sample, "label")
    with pytest.raises(InputError, match=r"columns \['id', 'target'\], the sample has \['id', 'la"):
        write_submission(path, answers, sample, "target")
    assert path.read_text() == "id,label\n03,c\n01,a\n02,b\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sample.csv", "submission.csv"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("abx", "1 ids of the sample are missing, such as 'c'; 1 ids are not in it, such as 'x'"),
        ("acb", "not in the sample's order; they first differ in row 2: 'c' instead of 'b'"),
        ("abcx", "1 ids are not in it, such as 'x'"),
    ],
)
def test_what_differs_is_said(ids: str, message: str) -> None:
    sample = pd.DataFrame({"id": list("abc"), "label": "0"})
    with pytest.raises(InputError) as error:
        check_submission(pd.DataFrame({"id": list(ids), "label": "1"}), sample)
    assert message in str(error.value)


def test_repeated_rows_and_empty_cells_are_refused() -> None:
    sample = pd.DataFrame({"id": list("abc"), "label": "0"})
    twice = pd.DataFrame({"id": list("abcc"), "label": "1"})
    with pytest.raises(InputError, match="has 4 rows, the sample 3; the id 'c' comes twice"):
        check_submission(twice, sample)
    with pytest.raises(InputError, match="empty cells in column 'label'"):
        check_submission(sample.assign(label=["1", None, "2"]), sample)


# Backbones and runs ---------------------------------------------------------------------------


def test_an_unknown_backbone_gets_the_nearest_names() -> None:
    check_backbone("resnet18.a1_in1k")
    with pytest.raises(InputError, match=r"backbone 'resnt18' is unknown to timm .* resnet18"):
        check_backbone("resnt18")
    with pytest.raises(InputError, match=r"timm\.list_models\(\) names them all"):
        check_backbone("zzzzzzzz")
    assert create_backbone("test_resnet", num_classes=3, pretrained=False).num_classes == 3


def test_missing_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"'resnet18' could not be loaded .*model.pretrained to f"):
        create_backbone("resnet18", num_classes=3, pretrained=True)


def test_an_experiment_reads_base_first(tmp_path: Path) -> None:
    for name in ("base", "big"):
        (tmp_path / f"{name}.yaml").touch()
    assert experiment_flags(tmp_path, "base") == [f"--config={tmp_path / 'base.yaml'}"]
    assert experiment_flags(tmp_path, "big") == [
        f"--config={tmp_path / 'base.yaml'}",
        f"--config={tmp_path / 'big.yaml'}",
    ]
    with pytest.raises(InputError, match=r"experiment 'bug' has no .*; there are: base, big"):
        experiment_flags(tmp_path, "bug")


def test_tracking_is_one_of_three_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"project": "p", "experiment": "base", "fold": 0}
    assert "WandbLogger" not in "".join(run_flags(tmp_path, tracking="csv", **settings))
    assert "WandbLogger" in "".join(run_flags(tmp_path, tracking="offline", **settings))
    with pytest.raises(InputError, match="tracking='wandb' must be 'offline', 'online' or 'csv'"):
        run_flags(tmp_path, tracking="wandb", **settings)
    monkeypatch.setattr("lightning_radam.competition.runs.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'lightning-radam\[wandb\]', or choose"):
        run_flags(tmp_path, tracking="offline", **settings)
