"""The app: every command by its place in `--help`. Torch is loaded only when a command runs."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, Any

import typer

import cachekd
from cachekd.errors import BadSample, CachekdError
from cachekd_cli import (
    check,
    compare,
    convert,
    demo,
    derive,
    dump,
    evaluate,
    init,
    inspect,
    peek,
    run,
    share,
    train,
    verify,
)
from cachekd_cli.console import errors, print_error, say
from cachekd_cli.help import HelpCommand, HelpGroup
from cachekd_cli.options import expands_paths
from cachekd_cli.signals import terminate_like_interrupt

app = typer.Typer(
    name="cachekd",
    help="Offline logit caching for Switch-KD: distil a large vision-language model into a small one.",
    epilog="Start with: cachekd demo --quick",
    cls=HelpGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# In the order in which one meets them.
PANELS: dict[str, dict[str, Callable[..., Any]]] = {
    "Distil": {
        "init": init.init_command,
        "convert": convert.convert_command,
        "check": check.check_command,
        "dump": dump.dump_command,
        "train": train.train_command,
        "eval": evaluate.eval_command,
        "report": evaluate.report_command,
        "run": run.run_command,
        "compare": compare.compare_command,
        "demo": demo.demo_command,
    },
    "Look into a cache": {
        "status": verify.status_command,
        "verify": verify.verify_command,
        "inspect": inspect.inspect_command,
        "peek": peek.peek_command,
    },
    "Make other caches of it": {
        "merge": derive.merge_command,
        "select": derive.select_command,
        "recompress": derive.recompress_command,
        "export": derive.export_command,
    },
    "Share it": {
        "push": share.push_command,
        "pull": share.pull_command,
        "bind": share.bind_command,
        "schema": inspect.schema_command,
    },
}


def show_versions(asked: bool) -> None:
    """Print our version, and those of the libraries that decide what a cache holds; none is imported."""
    if not asked:
        return
    others = [f"{name} {version(name)}" for name in ("torch", "transformers", "zarr")]
    print(f"cachekd {cachekd.__version__}\n{', '.join(others)}, Python {platform.python_version()}")
    raise typer.Exit


for panel, commands in PANELS.items():
    for name, command in commands.items():
        app.command(name, cls=HelpCommand, rich_help_panel=panel)(expands_paths(command))


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show versions, and stop.", callback=show_versions, is_eager=True),
    ] = False,
) -> None:
    """Take the options that stand before any command."""


def main() -> None:
    """Entry point: a CachekdError is a message and exit code 2, never a traceback."""
    terminate_like_interrupt()
    try:
        app()
    except CachekdError as error:
        print_error(error)
        if isinstance(error, BadSample) and sys.argv[1:2] in (["dump"], ["train"], ["eval"]):
            say("  or: --on-error skip leaves such samples out, counted and named", errors)
        sys.exit(2)


if __name__ == "__main__":
    main()
