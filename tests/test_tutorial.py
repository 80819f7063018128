"""docs/tutorial.md as a user types it, from the first command to the last, over fewer pictures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from caches import ROOT

PAGE = (ROOT / "docs" / "tutorial.md").read_text()
COMMANDS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.S | re.M)
CODE = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)
RECIPE = "--config examples/easy_vqa/recipe.yaml"
FEWER = {"--images 1000": "--images 32 --test-images 8", RECIPE: f"{RECIPE} --epochs 2 --batch-size 8"}


def test_its_commands_are_there():
    assert [words for block in COMMANDS for words in re.findall(r"^(python|cachekd \w+)", block, re.M)] == [
        "python",
        "cachekd check",
        *2 * ["cachekd dump"],
        "cachekd peek",
        *2 * ["cachekd train"],
        "cachekd eval",
        "cachekd report",
    ]
    assert all(any(whole in block for block in COMMANDS) for whole in FEWER)


@pytest.mark.slow
def test_it_can_be_followed(tmp_path: Path):
    pytest.importorskip("easy_vqa")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = "\n".join(COMMANDS)
    for whole, fewer in FEWER.items():
        script = script.replace(whole, fewer)
    (tmp_path / "ask.py").write_text(CODE[0])
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    paths = f"{ROOT}{os.pathsep}{ROOT / 'cli'}"
    done = subprocess.run(
        ["bash", "-ec", f"{script}\npython ask.py"],
        cwd=tmp_path,
        env=os.environ | {"PATH": programs, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in ("they fit", "exact match", "what color is the shape?"):
        assert shown in done.stdout, shown
    assert (tmp_path / "runs" / "tutorial" / "switch-kd" / "report.html").exists()
