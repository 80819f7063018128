"""`cachekd demo`: the whole job on real data, on a CPU, in a few minutes."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

import typer

import cachekd
from cachekd.config.base import option_name
from cachekd.errors import CachekdError
from cachekd_cli import dump, evaluate, train
from cachekd_cli.console import console, quiet_libraries, say, table

# In the wheel the example's files lie beside this one (pyproject.toml), in a checkout where they are kept.
PACKAGED = Path(__file__).parent / "easy_vqa"
EXAMPLE = PACKAGED if PACKAGED.exists() else Path(cachekd.__file__).parents[1] / "examples" / "easy_vqa"
IMAGES = 1000  # of the 4,000 for training


@dataclass(frozen=True)
class Size:
    """How much is read, trained and asked.

    Attributes:
        images: of which the students learn.
        prepare: options of prepare.py, which by default writes all of easy-VQA.
        train: settings in the place of the recipe's.
    """

    images: int
    prepare: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


WHOLE = Size(IMAGES)
QUICK = Size(64, {"images": 64, "test_images": 25}, {"epochs": 4.0, "logging_steps": 2})  # eight steps


def demo_command(
    out: Annotated[Path, typer.Option(help="A new folder; with a number added where it exists.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of the data order.")] = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="In half a minute: 64 pictures, eight steps, 25 pictures to ask about. It shows that all of "
            "it runs here, not which student is better.",
        ),
    ] = False,
) -> None:
    """Dump, train, evaluate and report on easy-VQA: a CE-only student against a Switch-KD student.

    Both go on from one starting student, which knows captions and was never asked about a picture,
    and see the same data in the same order, for the same steps. It takes some five minutes on two cores.

    Example: cachekd demo --quick
    """
    from cachekd.config import DumpConfig, EvalConfig, ReportConfig, TrainConfig, read_config

    require_data()
    quiet_libraries()
    size = QUICK if quick else WHOLE
    out = new_folder(out)
    teacher, student = str(EXAMPLE / "teacher"), str(EXAMPLE / "student")
    data: dict[str, Any] = {"data": out / "train", "limit": size.images}
    stages = Stages()

    prepare = [str(EXAMPLE / "prepare.py"), *words({"out": out, **size.prepare})]
    with stages.run("prepare", ["python", *prepare]):
        subprocess.run([sys.executable, *prepare], check=True)
    settings = {"teacher": teacher, **data, "out": out / "cache", "batch_size": 64}
    with stages.run("dump", ["cachekd", "dump", *words(settings)]):
        dump.print_summary(dump.run_dump(read_config(None, DumpConfig, settings)))
    common: dict[str, Any] = {"student": student, **data, "seed": seed, **size.train}
    runs: dict[str, dict[str, Any]] = {
        "ce": {"lambda_align": 0.0, "lambda_vsd": 0.0},
        "switch-kd": {"teacher": teacher, "cache": out / "cache"},
    }
    recipe = EXAMPLE / "recipe.yaml"
    for name, options in runs.items():
        settings = {**common, **options, "out": out / name}
        with stages.run(f"train {name}", ["cachekd", "train", *words({"config": recipe, **settings})]):
            config = read_config(recipe, TrainConfig, settings)
            train.print_summary(train.run_train(config, description=name))
    paths = [str(out / name) for name in runs]
    tested = {"data": out / "test", "teacher": teacher, "prior_data": out / "questions.json"}
    with stages.run("eval", ["cachekd", "eval", *paths, *words(tested)]):
        asked = read_config(None, EvalConfig, {"models": paths, **tested})
        evaluate.print_scores(evaluate.run_eval(asked))
    ce, switch_kd = paths
    with stages.run("report", ["cachekd", "report", switch_kd, "--baseline", ce]):
        page = evaluate.run_report(ReportConfig(run=switch_kd, baselines=[ce]))
    stages.print()
    evaluate.print_page(page)
    if quick:
        say("So few steps show that all of it runs here. What they are worth: cachekd demo")


def words(settings: dict[str, Any]) -> list[str]:
    """Write settings as options."""
    return [word for name, value in settings.items() for word in (option_name(name), str(value))]


def require_data() -> None:
    """Refuse to run without the data set, which a package of its own carries."""
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
    def run(self, name: str, command: list[str]) -> Iterator[None]:
        """Announce the block, and time it."""
        console.rule(f"[bold]{name}", align="left")
        say(f"$ {shlex.join(command)}", style="dim")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def print(self) -> None:
        """Print the wall times."""
        total = sum(self.seconds.values())
        rows = [(name, f"{seconds:.1f} s") for name, seconds in [*self.seconds.items(), ("total", total)]]
        console.print(table("wall time", ("stage", "time"), rows))
