"""The app: one file per command, imported light; torch is loaded only when a command runs."""

from __future__ import annotations

import sys

import typer

from cachekd.errors import CachekdError
from cachekd_cli import (
    check,
    convert,
    demo,
    dump,
    evaluate,
    inspect,
    merge,
    peek,
    report,
    run,
    select,
    status,
    train,
    verify,
)
from cachekd_cli.console import print_error
from cachekd_cli.signals import terminate_like_interrupt

app = typer.Typer(
    name="cachekd",
    help="Offline logit caching for Switch-KD: distil a large vision-language model into a small one.",
    epilog="Start with: cachekd demo",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("check")(check.check_command)
app.command("dump")(dump.dump_command)
app.command("status")(status.status_command)
app.command("verify")(verify.verify_command)
app.command("inspect")(inspect.inspect_command)
app.command("peek")(peek.peek_command)
app.command("merge")(merge.merge_command)
app.command("select")(select.select_command)
app.command("train")(train.train_command)
app.command("eval")(evaluate.eval_command)
app.command("report")(report.report_command)
app.command("run")(run.run_command)
app.command("convert")(convert.convert_command)
app.command("demo")(demo.demo_command)


def main() -> None:
    """Entry point: a CachekdError is a message and exit code 2, never a traceback."""
    terminate_like_interrupt()
    try:
        app()
    except CachekdError as error:
        print_error(error)
        sys.exit(2)


if __name__ == "__main__":
    main()
