"""The verbs: `python -m PACKAGE folds | train | oof | predict | submit`."""

import argparse
from pathlib import Path

from lightning_radam.competition import blend, predictions
from lightning_radam.competition.folds import (
    fold_summary,
    make_folds,
    read_folds,
    write_folds,
)
from lightning_radam.competition.submission import write_submission
from lightning_radam.competition.tables import image_paths, read_table
from lightning_radam.errors import InputError, one_line_errors

from . import settings


def read_train():
    return read_table(settings.TRAIN_CSV, settings.ID, settings.TARGET)


def fold_dir(experiment: str, fold: int) -> Path:
    return settings.RUNS / experiment / f"fold{fold}"


def folds(args: argparse.Namespace) -> None:
    """Split the training rows once, and check that every image is there."""
    train = read_train()
    image_paths(settings.ROOT, settings.TRAIN_IMAGES, train[settings.ID].tolist())
    table = make_folds(
        train,
        id_column=settings.ID,
        target_column=settings.TARGET,
        n_folds=settings.N_FOLDS,
        seed=settings.FOLD_SEED,
    )
    sha256 = write_folds(settings.FOLDS_CSV, table)
    print(fold_summary(table, train, settings.TARGET).to_string())
    print(f"{settings.FOLDS_CSV.name}: {len(table)} rows, sha256 {sha256[:12]}")


def train(args: argparse.Namespace) -> None:
    """Train the folds that are not done, and predict what each of them held out."""
    from .train import train_fold

    read_folds(settings.FOLDS_CSV, read_train(), settings.ID)
    wanted = range(settings.N_FOLDS) if args.fold is None else [args.fold]
    for fold in wanted:
        train_fold(args.experiment, fold, fold_dir(args.experiment, fold), args.anew, args.override)


def oof(args: argparse.Namespace) -> None:
    """Score the out-of-fold predictions: per fold, and pooled over all training rows."""
    train = read_train()
    truth = train.set_index(settings.ID)[settings.TARGET]
    tables = [
        predictions.read_predictions(fold_dir(args.experiment, fold) / "oof.csv", settings.ID)
        for fold in range(settings.N_FOLDS)
    ]
    pooled = predictions.pool(tables, truth.index)
    pooled.to_csv(settings.RUNS / args.experiment / "oof.csv")
    for fold, table in enumerate(tables):
        print(f"fold {fold}: accuracy {predictions.accuracy(table, truth):.4f}")
    print(f"pooled: accuracy {predictions.accuracy(pooled, truth):.4f} of {len(pooled)} rows")


def predict(args: argparse.Namespace) -> None:
    """Predict the test images with every fold's model, and blend."""
    from .train import predict_fold

    sample = read_table(settings.SAMPLE_SUBMISSION, settings.ID)
    ids = sample[settings.ID].tolist()
    tables = []
    for fold in range(settings.N_FOLDS):
        path = fold_dir(args.experiment, fold) / "test.csv"
        predict_fold(path, ids)
        tables.append(predictions.read_predictions(path, settings.ID))
    blend.mean(tables).to_csv(settings.RUNS / args.experiment / "test.csv")
    print(f"predicted {len(ids)} test images with {len(tables)} folds")


def submit(args: argparse.Namespace) -> None:
    """Write the submission, if it matches the sample."""
    table = predictions.read_predictions(settings.RUNS / args.experiment / "test.csv", settings.ID)
    answers = predictions.most_likely(table)
    write_submission(settings.SUBMISSION_CSV, answers, settings.SAMPLE_SUBMISSION, settings.TARGET)
    print(f"{settings.SUBMISSION_CSV}: {len(answers)} rows, same ids and columns as the sample")


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb in (folds, train, oof, predict, submit):
        command = verbs.add_parser(verb.__name__, help=verb.__doc__, description=verb.__doc__)
        command.set_defaults(run=verb)
        if verb is not folds:
            command.add_argument("experiment", nargs="?", default="base", help="configs/NAME.yaml")
        if verb is train:
            command.add_argument("--fold", type=int, choices=range(settings.N_FOLDS))
            command.add_argument("--anew", action="store_true", help="train finished folds again")
    args, args.override = parser.parse_known_args()
    with one_line_errors():
        if args.override and args.run is not train:
            raise InputError(f"unknown argument {args.override[0]}: see --help")
        args.run(args)


if __name__ == "__main__":
    main()
