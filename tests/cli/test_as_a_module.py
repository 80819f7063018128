"""`cachekd` as a module, by a shell that completes words, and without the demo's data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import cachekd


@pytest.fixture
def installed(tmp_path):
    """A PATH with the command as pip writes it, and no torch to import."""
    script = tmp_path / "bin" / "cachekd"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\nfrom cachekd_cli.main import main\nmain()\n")
    script.chmod(0o755)
    torch = tmp_path / "without" / "torch.py"
    torch.parent.mkdir()
    torch.write_text("raise AssertionError('torch is imported')")
    before = {name: os.environ.get(name, "") for name in ("PATH", "PYTHONPATH")}
    return os.environ | {
        "PATH": f"{script.parent}{os.pathsep}{before['PATH']}",
        "PYTHONPATH": f"{torch.parent}{os.pathsep}{before['PYTHONPATH']}",
    }


def run(words: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_as_a_module_is_the_command(installed, tmp_path):
    shown = run([sys.executable, "-m", "cachekd", "--version"], installed, tmp_path)
    assert shown.startswith(f"cachekd {cachekd.__version__}\n")
    assert run(["cachekd", "--version"], installed, tmp_path) == shown
    usage = run([sys.executable, "-m", "cachekd", "dump", "--help"], installed, tmp_path)
    assert "Usage: python -m cachekd dump [OPTIONS]" in usage


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["rec"], {"recompress"}),
        (["train", "--lambda"], {"--lambda-align", "--lambda-vsd"}),
        (["train", "--missing", ""], {"error", "skip", "ce-only"}),
        (["train", "--stage", "d"], {"dpt", "dft"}),
        (["compare", "--metric", "k"], {"kl"}),
        (["train", "--out", "run"], set()),  # bash goes on with files
    ],
)
def test_bash_completes_commands_options_and_choices(installed, tmp_path, typed, offered):
    """By what `--install-completion` writes, in a bash, where torch cannot be imported."""
    words = " ".join(f"'{word}'" for word in ["cachekd", *typed])
    script = (
        f'eval "$(cachekd --show-completion)"; COMP_WORDS=({words}); COMP_CWORD={len(typed)}; '
        '_cachekd_completion cachekd; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    # Without `exec` the shell is there to be found, as it is where somebody types.
    assert set(run(["bash", "-c", f"{script}; :"], installed, tmp_path).split()) == offered


def test_the_demo_without_its_data_says_what_to_install(installed, tmp_path):
    missing = tmp_path / "without" / "easy_vqa.py"
    missing.write_text("raise ImportError('not installed')")
    done = subprocess.run(["cachekd", "demo"], env=installed, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.split("\n")[0] == "error: the demo's data is not installed"
    assert "pip install 'cachekd[demo]'" in done.stderr
    assert not (tmp_path / "runs").exists()
