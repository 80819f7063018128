"""How `--help` looks: plain lines for 80 columns, in which no name, path or number is cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from textwrap import wrap
from typing import Any

from typer.core import TyperCommand, TyperGroup

COLUMN = 24  # of names; a longer one has a line of its own
Rows = list[tuple[str, str]]


class HelpCommand(TyperCommand):
    """A command whose `--help` is written here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, text and options."""
        formatter.write(_page(self, ctx, formatter.width, _options(self, ctx)))


class HelpGroup(TyperGroup):
    """The same for the command that has the others."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write usage, text, options, and each panel's commands with the first paragraph of their help."""
        commands = [command for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))]
        panels = [
            (str(panel), [(str(one.name), _paragraphs(one.help)[0]) for one in inside])
            for panel, inside in groupby(commands, attrgetter("rich_help_panel"))
        ]
        formatter.write(_page(self, ctx, formatter.width, [*_options(self, ctx), *panels]))


def _page(
    command: HelpCommand | HelpGroup, ctx: Any, width: int, sections: Iterable[tuple[str, Rows]]
) -> str:
    usage = " ".join(["Usage:", ctx.command_path, *command.collect_usage_pieces(ctx)])
    parts = [_filled(usage, width, rest=" " * 7)]
    parts += [_paragraph(text, width) for text in _paragraphs(command.help)]
    parts += ["\n".join([f"{title}:", *_lines(rows, width)]) for title, rows in sections if rows]
    parts += [_paragraph(text, width) for text in _paragraphs(command.epilog)]
    return "\n\n".join(parts) + "\n"


def _options(command: HelpCommand | HelpGroup, ctx: Any) -> list[tuple[str, Rows]]:
    """Arguments, options, and each panel of options, in the order of their first ones."""
    sections: dict[str, Rows] = {}
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is not None:
            name, text = record
            usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
            title = getattr(parameter, "rich_help_panel", None) or usual
            # One at a time is typed, of a list too; the text says so, and it says a range.
            name = re.sub(r"<(?:list\[)?(\w+)(?: range)?\]?>$", r"<\1>", name)
            sections.setdefault(title, []).append((name, text))
    return list(sections.items())


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in (text or "").strip().split("\n\n") if paragraph]


def _paragraph(text: str, width: int) -> str:
    return _example(text, width) if text.startswith("Example: ") else _filled(text, width)


def _example(text: str, width: int) -> str:
    """A command that can be pasted as it stands: it is broken before options, as a shell wants it."""
    lines = [""]
    for piece in re.split(r" (?=--?[a-z])", text):
        if lines[-1] and len(f"{lines[-1]} {piece} \\") > width:
            lines.append(f"    {piece}")
        else:
            lines[-1] = f"{lines[-1]} {piece}".strip() if len(lines) == 1 else f"{lines[-1]} {piece}"
    return " \\\n".join(lines)


def _lines(rows: Rows, width: int) -> Iterator[str]:
    """Names, and beside each what it is."""
    column = min(COLUMN, max(len(name) for name, _ in rows))
    for name, text in rows:
        first, rest = f"  {name:{column}}  ", " " * (column + 4)
        if len(name) > column:
            yield f"  {name}"
            first = rest
        yield _filled(" ".join(text.split()), width, first, rest) if text else first.rstrip()


def _filled(text: str, width: int, first: str = "", rest: str = "") -> str:
    return "\n".join(
        wrap(
            text,
            width,
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )
