"""The command `lightning-radam`: `new` makes a project, `demo` shows the whole way."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_radam.errors import InputError, one_line_errors

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb.

    Args:
        argv: The arguments; None takes the command line's.

    Raises:
        SystemExit: With code 2 on bad input, after one line that says what to do.
    """
    with one_line_errors():
        _require_competition_extra()
        args = _parser().parse_args(argv)
        args.run(args)


def _parser() -> argparse.ArgumentParser:
    from lightning_radam.competition.project import questions

    parser = argparse.ArgumentParser(prog="lightning-radam", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    new = verbs.add_parser("new", help="make a competition project from the template")
    new.add_argument("name", type=Path, help="the project's folder, new or empty")
    new.add_argument("--defaults", action="store_true", help="ask nothing, take the defaults")
    for name, question in questions().items():
        flag = f"--{name.replace('_', '-')}"
        new.add_argument(flag, dest=f"answer_{name}", help=question["help"])
    new.set_defaults(run=_new)

    demo = verbs.add_parser("demo", help="from an empty folder to a scored submission")
    demo.add_argument("--dir", type=Path, default=Path("demo"), help="where (default: demo)")
    demo.add_argument(
        "--tracking",
        choices=("offline", "csv"),
        help="offline: Weights & Biases without an account, the default where it is installed",
    )
    demo.set_defaults(run=_demo)
    return parser


def _new(args: argparse.Namespace) -> None:
    from lightning_radam.competition.project import make_project, questions

    given = {name: getattr(args, f"answer_{name}") for name in questions()}
    answers = {name: value for name, value in given.items() if value is not None}
    if "backbone" in answers:
        from lightning_radam.competition.backbone import check_backbone

        check_backbone(answers["backbone"])
    make_project(args.name, answers, ask=not args.defaults and sys.stdin.isatty())
    print(
        f"made {args.name}: put the competition's files into {args.name}/data, then see README.md"
    )


def _demo(args: argparse.Namespace) -> None:
    from lightning_radam.competition.demo import run_demo

    run_demo(args.dir, args.tracking or ("offline" if find_spec("wandb") else "csv"))


def _require_competition_extra() -> None:
    missing = [name for name in ("copier", "timm", "sklearn", "pandas") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"this command needs {', '.join(missing)}: pip install 'lightning-radam[competition]'"
        )


if __name__ == "__main__":
    main()
