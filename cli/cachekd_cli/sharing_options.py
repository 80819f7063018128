"""What `push` and `pull` share."""

from __future__ import annotations

from typing import Annotated

import typer

Timeout = Annotated[
    float,
    typer.Option(
        min=1,
        metavar="SECONDS",
        help="Give up when no byte came or went for so long; what is finished stays.",
    ),
]
