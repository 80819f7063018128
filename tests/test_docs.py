"""What the documentation says can be typed, run and found."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny import MARKED_TEMPLATE, tiny_processor
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from cachekd.vlm import load_config, load_model, load_processor
from cachekd_cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "examples").glob("*/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def commands_in(page: Path) -> list[str]:
    """Every `cachekd ...` of a page's code: indented blocks, fenced ones, and inline."""
    text = page.read_text().replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.S))
    lines = [line for line in text.split("\n") if line.startswith("    ")] + fenced.split("\n")
    lines += re.findall(r"`([^`\n]+)`", text)
    lines = [line.strip().removeprefix("$ ").split(" #")[0] for line in lines]
    return [line for line in lines if re.match(r"cachekd [a-z]+\b", line)]


def options_of(command: Any) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_and_option_in_the_documentation_exists(page):
    command = typer.main.get_command(app)
    for line in commands_in(page):
        words = shlex.split(line.replace("|", " "))
        assert words[1] in command.commands, line
        known = {
            name
            for param in command.commands[words[1]].params
            for name in (*param.opts, *param.secondary_opts)
        }
        for word in words[2:]:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in {*known, "--help"}, line


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
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "walkthrough.md").read_text(), re.S)
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


def test_every_message_of_the_troubleshooting_page_is_one_that_the_code_gives():
    source = "".join(
        path.read_text() for folder in ("cachekd", "cli") for path in (ROOT / folder).rglob("*.py")
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that go over several lines
    messages = re.findall(r"^## (.+)$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    assert len(messages) >= 15
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in source, message
