"""`--help` on a terminal of 80 columns."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from cachekd_cli.help import HelpCommand
from cachekd_cli.main import PANELS, app

WHOLE: Any = typer.main.get_command(app)
NAMES = sorted(WHOLE.commands)
WIDTH = 80


@pytest.fixture
def shown(request, monkeypatch):
    """The help of a command, or of `cachekd` itself, as it stands on the screen."""
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    result = CliRunner().invoke(app, [*request.param, "--help"])
    assert result.exit_code == 0
    return result.output


def in_one_line(text: str) -> str:
    return " ".join(text.split())


each_command = pytest.mark.parametrize(
    ("shown", "command"),
    [([], WHOLE), *(([name], WHOLE.commands[name]) for name in NAMES)],
    indirect=["shown"],
    ids=["cachekd", *NAMES],
)


@each_command
def test_no_line_is_too_long_and_no_word_is_cut(shown, command):
    assert max(map(len, shown.splitlines())) <= WIDTH
    assert "…" not in shown
    whole = in_one_line(shown)
    named = {
        word.rstrip(",")
        for line in shown.splitlines()
        if line.startswith("  -")
        for word in line.strip().split("  ")[0].split()
    }
    for parameter in command.params:
        if not getattr(parameter, "hidden", False):
            assert parameter.help, parameter.name
            assert in_one_line(parameter.help) in whole, parameter.name
            assert parameter.param_type_name == "argument" or named >= {
                *parameter.opts,
                *parameter.secondary_opts,
            }


@each_command
def test_every_paragraph_is_there_and_filled(shown, command):
    """Where the source has its line breaks is not seen."""
    text = shown.replace(" \\\n", "\n")
    for paragraph in command.help.split("\n\n"):
        assert in_one_line(paragraph) in in_one_line(text)
    body = shown.split("\n\n")[1 : 1 + len(command.help.strip().split("\n\n"))]
    for paragraph in body:
        lines = paragraph.splitlines()
        for line, following in pairwise(lines):
            if not paragraph.startswith("Example: "):
                assert len(f"{line} {following.split()[0]}") > WIDTH - 2, paragraph


@pytest.mark.parametrize(("shown", "name"), [([name], name) for name in NAMES], indirect=["shown"])
def test_an_example_can_be_pasted(shown, name):
    """A shell joins its lines again."""
    pasted = re.findall(r"^Example: ((?:.*\\\n)*.*)$", shown, re.M)
    written = re.findall(r"Example: (.+?)(?:\n\n|$)", WHOLE.commands[name].help, re.S)
    assert pasted
    assert [shlex.split(example.replace("\\\n", " ")) for example in pasted] == list(
        map(shlex.split, written)
    )


@pytest.mark.parametrize("shown", [[]], indirect=True)
def test_commands_stand_in_their_panels(shown):
    for panel, commands in PANELS.items():
        section = re.search(rf"^{panel}:\n((?:  .*\n)+)", shown, re.M)
        assert section is not None, panel
        assert re.findall(r"^  (\w+)", section[1], re.M) == list(commands)


@pytest.mark.parametrize("shown", [["train"]], indirect=True)
def test_what_belongs_to_the_data_stands_apart(shown):
    before, data = shown.split("\nData:\n")
    assert "--image-root" in data
    assert "--image-root" not in before


def test_a_name_that_is_too_long_has_a_line_of_its_own(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    small = typer.Typer(rich_markup_mode=None)

    @small.command(cls=HelpCommand)
    def command(
        a_setting_whose_name_is_rather_long: int = typer.Option(3, help="A number-of-things indeed. " * 3),
        short: list[str] = typer.Option([], help="Words."),
    ) -> None:
        """Do it."""

    lines = CliRunner().invoke(small, ["--help"]).output.splitlines()
    at = lines.index("  --a-setting-whose-name-is-rather-long <int>")
    assert lines[at + 1 : at + 3] == [
        " " * 28 + "A number-of-things indeed. A number-of-things",
        " " * 28 + "indeed. A number-of-things indeed. [default: 3]",
    ]
    assert "  --short <str>             Words." in lines
