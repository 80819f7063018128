"""`cachekd schema`: the JSON Schema of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cachekd.errors import CachekdError
from cachekd_cli.console import say


def schema_command(
    name: Annotated[str | None, typer.Argument(help="Of what; without it, all names are listed.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this file instead.")] = None,
) -> None:
    """Print the JSON Schema of a file that cachekd reads or writes.

    Example: cachekd schema manifest --out manifest.schema.json
    """
    from cachekd.atomic import write_file
    from cachekd.schemas import SCHEMAS, schema_text

    if name is None:
        for known, model in SCHEMAS.items():
            first = (model.__doc__ or "").split("\n")[0]
            say(f"{known:10}{first}")
        return
    if name not in SCHEMAS:
        raise CachekdError(f"there is no schema {name!r}", expected=f"one of {', '.join(SCHEMAS)}")
    if out is None:
        print(schema_text(name), end="")
    else:
        write_file(out, schema_text(name).encode())
