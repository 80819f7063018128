"""`cachekd demo`: the whole job on real data, on a CPU, in a few minutes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

import typer

import cachekd
from cachekd.config.base import option_name
from cachekd.errors import CachekdError
from cachekd_cli import dump, evaluate, train
from cachekd_cli.console import console, quiet_libraries, say, table

EXAMPLE = Path(cachekd.__file__).parents[1] / "examples" / "easy_vqa"
IMAGES = 1000  # of the 4,000 for training


def demo_command(
    out: Annotated[Path, typer.Option(help="A new folder; with a number added where it exists.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the data order.")] = 0,
) -> None:
    """Dump, train, evaluate and report on easy-VQA: a CE-only student against a Switch-KD student.

    Both go on from one starting student, which knows captions and was never asked about a picture,
    and see the same data in the same order, for the same steps.

    Example: cachekd demo --seed 1
    """
    from cachekd.config import DumpConfig, EvalConfig, ReportConfig, TrainConfig, read_config

    check_example()
    quiet_libraries()
    out = new_folder(out)
    teacher, student = str(EXAMPLE / "teacher"), str(EXAMPLE / "student")
    data: dict[str, Any] = {"data": out / "train", "limit": IMAGES}
    stages = Stages()

    with stages.run("prepare", f"python examples/easy_vqa/prepare.py --out {out}"):
        subprocess.run([sys.executable, str(EXAMPLE / "prepare.py"), "--out", str(out)], check=True)
    settings = {"teacher": teacher, **data, "out": out / "cache", "batch_size": 64}
    with stages.run("dump", f"cachekd dump {as_typed(settings)}"):
        dump.print_summary(dump.run_dump(read_config(None, DumpConfig, settings)))
    common: dict[str, Any] = {"student": student, **data, "seed": seed}
    runs: dict[str, dict[str, Any]] = {
        "ce": {"lambda_align": 0.0, "lambda_vsd": 0.0},
        "switch-kd": {"teacher": teacher, "cache": out / "cache"},
    }
    for name, options in runs.items():
        settings = {**common, **options, "out": out / name}
        typed = f"cachekd train --config {EXAMPLE / 'recipe.yaml'} {as_typed(settings)}"
        with stages.run(f"train {name}", typed):
            config = read_config(EXAMPLE / "recipe.yaml", TrainConfig, settings)
            train.print_summary(train.run_train(config, description=name))
    paths = [str(out / name) for name in runs]
    tested = {"data": out / "test", "teacher": teacher, "prior_data": out / "questions.json"}
    with stages.run("eval", f"cachekd eval {' '.join(paths)} {as_typed(tested)}"):
        asked = read_config(None, EvalConfig, {"models": paths, **tested})
        evaluate.print_scores(evaluate.run_eval(asked))
    ce, switch_kd = paths
    with stages.run("report", f"cachekd report {switch_kd} --baseline {ce}"):
        page = evaluate.run_report(ReportConfig(run=switch_kd, baselines=[ce]))
    stages.print()
    evaluate.print_page(page)


def as_typed(settings: dict[str, Any]) -> str:
    """Write settings as options."""
    return " ".join(f"{option_name(name)} {value}" for name, value in settings.items())


def check_example() -> None:
    """Refuse to run without the demo's files: they are in the repository, not in the installed package."""
    if not (EXAMPLE / "teacher" / "config.json").exists():
        raise CachekdError(
            "the demo's files are not here",
            where=str(EXAMPLE),
            expected="a clone of the repository, installed with `make demo` or `pip install -e '.[demo]'`",
        )
    try:
        import easy_vqa  # noqa: F401
    except ImportError:
        raise CachekdError("the demo's data is not installed", fix="pip install 'cachekd[demo]'") from None


def new_folder(out: Path) -> Path:
    """Make `out`, or `out-2`, `out-3`, ...: earlier demos, and those that run now, stay as they are."""
    from cachekd.atomic import make_folder

    make_folder(out.parent)
    numbered = (out.with_name(f"{out.name}-{number}") for number in count(2))
    return next(path for path in chain([out], numbered) if _is_made(path))


def _is_made(path: Path) -> bool:
    from cachekd.errors import cannot_write

    try:
        path.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise cannot_write(path, error) from None
    return True


class Stages:
    """Announces each stage with the command that does the same, and remembers how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def run(self, name: str, command: str) -> Iterator[None]:
        """Announce the block, and time it."""
        console.rule(f"[bold]{name}", align="left")
        say(f"$ {command}", style="dim")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def print(self) -> None:
        """Print the wall times."""
        total = sum(self.seconds.values())
        rows = [(name, f"{seconds:.1f} s") for name, seconds in [*self.seconds.items(), ("total", total)]]
        console.print(table("wall time", ("stage", "time"), rows))
