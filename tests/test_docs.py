"""What the documentation says can be typed, run and found."""

from __future__ import annotations

import ast
import dataclasses
import os
import pydoc
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from cachekd.models import load_config, load_model, load_processor
from cachekd.models.families import FAMILIES
from cachekd_cli.main import app
from caches import ROOT
from tiny import MARKED_TEMPLATE, tiny_processor

OUTSIDE = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "examples").glob("*/README.md")),
]
PAGES = [*OUTSIDE, *sorted((ROOT / "docs").rglob("*.md"))]


def commands_in(page: Path) -> list[str]:
    """Every `cachekd ...` of a page's code: indented blocks, fenced ones, and inline."""
    text = page.read_text().replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.S))
    lines = [line for line in text.split("\n") if line.startswith("    ")] + fenced.split("\n")
    lines += re.findall(r"`([^`\n]+)`", text)
    lines = [line.strip().removeprefix("$ ").split(" #")[0] for line in lines]
    return [line for line in lines if re.match(r"cachekd [a-z]+\b", line)]


def diffs_in(page: Path) -> str:
    return "".join(re.findall(r"```diff\n(.*?)```", page.read_text(), re.S))


def prose(page: Path) -> str:
    """A page without its diffs, whose files, names and tests are only there once they are applied."""
    return re.sub(r"```diff\n.*?```", "", page.read_text(), flags=re.S)


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


COMMANDS: Any = typer.main.get_command(app)
SOURCES = {
    path: path.read_text()
    for folder in ("cachekd", "cli", "tests", "benchmarks", "examples", "schemas")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
# What a page's diff adds may be named beside it.
EXTENSIONS = [page for page in PAGES if diffs_in(page)]
NEW_FILE = re.compile(r"^--- /dev/null\n\+\+\+ b/(.+)\n@@.+\n((?:\+.*\n)+)", re.M)
SOURCES |= {
    ROOT / path: re.sub(r"^\+", "", lines, flags=re.M)
    for page in EXTENSIONS
    for path, lines in NEW_FILE.findall(diffs_in(page))
}
WORDS = {word for source in SOURCES.values() for word in re.findall(r"\w+", source)}
# Options of other programs, and a setting that only accelerate knows.
OTHERS = {
    "--local-dir": "hf's",
    "--served-model-name": "vLLM's",
    "--model-impl": "vLLM's",
    "--outfile": "llama.cpp's",
    "--outtype": "llama.cpp's",
    "--mmproj": "llama.cpp's",
    "--help": "every command's",
    "--multi_gpu": "accelerate's",
    "--no-deps": "pip's",
    "--num_processes": "accelerate's",
    "--signal": "Slurm's",
    "--strict": "mkdocs'",
    **dict.fromkeys(("--model", "--model_args", "--tasks"), "lmms-eval's"),
    "img_size": "VLMEvalKit's",
    "reshard_after_forward": "accelerate's, of FSDP",
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("name", sorted(COMMANDS.commands))
def test_every_example_in_a_help_text_can_be_typed(name):
    examples = re.findall(r"Example: (.+?)(?:\n\n|$)", COMMANDS.commands[name].help, re.S)
    assert examples
    require_commands([example.replace("\n", " ") for example in examples])
    for example in examples:  # what is required is there, and every value is one that the option takes
        COMMANDS.commands[name].make_context(name, shlex.split(example)[2:], resilient_parsing=False)


@each_page
def test_every_command_and_option_in_the_documentation_exists(page):
    require_commands(commands_in(page))


def require_commands(lines: list[str]) -> None:
    for line in lines:
        words = shlex.split(line.replace("|", " "))
        assert words[1] in COMMANDS.commands, line
        known = options_of(COMMANDS.commands[words[1]])
        for word in words[2:]:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in {*known, "--help"}, line


@each_page
def test_every_option_is_one_of_a_command_or_of_a_script(page):
    known = set.union(*map(options_of, COMMANDS.commands.values())) | options_of(COMMANDS) | OTHERS.keys()
    for source in SOURCES.values():
        known |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]", prose(page))) - known == set()


@each_page
def test_every_test_exists(page):
    text = prose(page)
    tests = {path.name: set(re.findall(r"^def (test_\w+)", text, re.M)) for path, text in SOURCES.items()}
    for file, name in re.findall(r"(test_\w+\.py)(?:::(test_\w+))?", text):
        assert file in tests, file
        assert not name or name in tests[file], f"{file}::{name}"
    everywhere = set.union(*tests.values())
    for name in re.findall(r"(?<![\w:])(test_\w+)(?!\w|\.py)", text):
        assert name in everywhere, name


@each_page
def test_every_file_of_the_repository_exists(page):
    """In backticks, from the repository's root; '*' may stand for a part of a name."""
    folders = "cachekd|cli|tests|docs|examples|schemas|benchmarks"
    for path in re.findall(rf"`((?:{folders})/[\w./*-]+)`", prose(page)):
        assert list(ROOT.glob(path.rstrip("/"))), path


@pytest.mark.parametrize("page", OUTSIDE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_outside_the_site_leads_somewhere(page):
    """To a file, and to a heading of it; those of the site itself mkdocs checks."""
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text())
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors_of(target), f"{path}#{anchor}"


def anchors_of(page: Path) -> set[str]:
    """A heading's words in lower case, joined by '-'."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_name_in_python_exists(page):
    text = prose(page)
    for name in re.findall(r"(?<![\w/.-])cachekd(?:\.[A-Za-z_]\w*)+", text):
        assert pydoc.locate(name) is not None, name
    classes = {node.name: node for node in our_classes()}
    for name, member in re.findall(r"`([A-Z]\w+)\.([a-z_]\w*)(?:\(.*?\))?`", text):
        if name in classes:
            members = {getattr(part, "name", None) for part in classes[name].body}
            assert member in members | fields_of(classes[name]), f"{name}.{member}"


@cache
def our_classes() -> list[ast.ClassDef]:
    trees = [ast.parse(text) for path, text in SOURCES.items() if path.is_relative_to(ROOT / "cachekd")]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def fields_of(node: ast.ClassDef) -> set[str]:
    """Annotated ones, and those that its methods set."""
    targets = [n.target for n in ast.walk(node) if isinstance(n, ast.AnnAssign)]
    targets += [target for n in ast.walk(node) if isinstance(n, ast.Assign) for target in n.targets]
    return {getattr(target, "id", getattr(target, "attr", "")) for target in targets}


@each_page
def test_every_setting_is_one_that_something_reads(page):
    """What looks like one, `top_k` or `save_steps: 0`, is the Trainer's, or a word of the code."""
    known = WORDS | {field.name for field in dataclasses.fields(TrainingArguments)} | OTHERS.keys()
    for name in re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)(?:`|: )", prose(page)):
        assert name in known, name


def copied(to: Path, *folders: str) -> Path:
    shutil.copy(ROOT / "pyproject.toml", to)
    for folder in folders:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def apply(diff: str, folder: Path) -> None:
    command = ["git", "apply", "--whitespace=nowarn", "-"]
    outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}  # in no repository
    done = subprocess.run(command, input=diff, cwd=folder, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_is_a_page_on_every_extension():
    assert {page.stem for page in EXTENSIONS} == {
        "adding-a-family",
        "adding-a-loss",
        "adding-a-data-source",
        "adding-a-tail-codec",
    }


def test_the_extensions_can_be_made_to_the_code_as_it_is_one_after_the_other(tmp_path):
    folder = copied(tmp_path, "cachekd", "tests")
    for page in EXTENSIONS:
        apply(diffs_in(page), folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", EXTENSIONS, ids=lambda page: page.stem)
def test_an_extension_passes_the_tests_that_its_page_names(page, tmp_path):
    """The page's diff, and then its commands, in a copy of the repository."""
    folder = copied(tmp_path, "cachekd", "cli", "tests", "docs", "schemas")
    apply(diffs_in(page), folder)
    (commands,) = re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)
    assert "pytest" in commands
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'cli'}",
    }
    shell = ["bash", "-ec", commands]
    done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^(?!.*failed).*\d+ passed", done.stdout, re.M)


def test_the_documentation_shows_the_main_commands():
    shown = {line.split()[1] for page in PAGES for line in commands_in(page)}
    assert {"dump", "train", "eval", "report", "verify"} <= shown


def test_the_walkthroughs_student_is_one_that_can_be_loaded(tmp_path, monkeypatch):
    """The code block itself runs, with small models where the hub's names stand."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_processor().tokenizer
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    siglip = SiglipModel(SiglipConfig(vision_config=vision, text_config=text | {"vocab_size": 100}))
    siglip.save_pretrained("vision")
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained("vision")
    qwen = Qwen2ForCausalLM(Qwen2Config(**text, num_key_value_heads=2, vocab_size=320))
    qwen.save_pretrained("text")
    tokenizer.save_pretrained("text")
    Path("chat_template.jinja").write_text(MARKED_TEMPLATE)
    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / "paper-pair.md").read_text(), re.S
    )
    code = code.replace("google/siglip-so400m-patch14-384", "vision").replace(
        "Qwen/Qwen2.5-0.5B-Instruct", "text"
    )
    exec(code, {})
    assert load_config("models/student").model_type == "llava"
    assert load_processor("models/student").image_token == "<image>"
    student = load_model("models/student", dtype=torch.float32, device=torch.device("cpu"))
    for part, source in (
        (student.model.vision_tower, siglip.vision_model),
        (student.model.language_model, qwen.model),
    ):
        for name, weight in source.state_dict().items():
            assert torch.equal(part.state_dict()[name], weight), name


def test_the_page_on_serving_has_the_class_of_every_family():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (ROOT / "docs" / "how-to" / "serve.md").read_text(), re.M)
    classes = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    assert dict(rows) == {model_type: classes[model_type] for model_type in FAMILIES}


def test_every_message_of_the_troubleshooting_page_is_one_that_the_code_gives():
    source = "".join(
        path.read_text() for folder in ("cachekd", "cli") for path in (ROOT / folder).rglob("*.py")
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go over several lines
    messages = re.findall(r"^## (.+)$", (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text(), re.M)
    assert len(messages) >= 15
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in source, message
