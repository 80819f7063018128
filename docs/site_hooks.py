"""What mkdocs makes while it builds the site: the command line's reference, from the app itself."""

from __future__ import annotations

from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from cachekd_cli.main import app


def cli_reference() -> str:
    """Markdown over every command, by Typer's own generator."""
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="cachekd")
    return get_docs_for_click(obj=command, ctx=context, name="cachekd", title="Command line")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file holds."""
    files.append(File.generated(config, "reference/cli.md", content=cli_reference()))
    return files
