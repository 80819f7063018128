"""What mkdocs makes while it builds the site: the references of the command line and of the files."""

from __future__ import annotations

import json
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from cachekd.schemas import SCHEMAS
from cachekd_cli.main import app

_FILES = """# Files and settings

Every file that cachekd reads or writes in JSON or YAML has a JSON Schema, in `schemas/` and from
`cachekd schema NAME`. With it an editor completes and checks a `--config` file. Here is what each file holds.
`required` stands where there is no default.
"""


def cli_reference() -> str:
    """Markdown over every command, by Typer's own generator."""
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="cachekd")
    return get_docs_for_click(obj=command, ctx=context, name="cachekd", title="Command line")


def file_reference() -> str:
    """Markdown over every schema: a table of its fields."""
    return "\n".join([_FILES, *(_section(name, model) for name, model in SCHEMAS.items())])


def _section(name: str, model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    about = schema["description"].split("\n\n")[0]
    lines = [f"## {name}", "", about, "", "| field | default | what it is |", "| --- | --- | --- |"]
    for field, facts in schema["properties"].items():
        default = (
            "required" if field in schema.get("required", ()) else f"`{json.dumps(facts.get('default'))}`"
        )
        lines.append(f"| `{field}` | {default} | {_cell(facts.get('description', ''))} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that no file holds."""
    files.append(File.generated(config, "reference/cli.md", content=cli_reference()))
    files.append(File.generated(config, "reference/files.md", content=file_reference()))
    return files
