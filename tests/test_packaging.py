"""What `pip install cachekd` puts on a user's disk, and what the repository says about itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import cachekd
from caches import ROOT

LEFT = ("__pycache__", "*.egg-info", ".git", ".venv", ".*_cache", ".hypothesis", "build", "dist", "runs")
DEMO = ("data.py", "prepare.py", "recipe.yaml", "student", "teacher")


def build(checkout: Path, out: Path) -> tuple[Path, Path]:
    """The wheel and the sdist of a checkout, by the build backend alone."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def lived_in(tmp_path_factory):
    """A copy of the checkout in which somebody has worked."""
    checkout = tmp_path_factory.mktemp("checkout") / "cachekd"
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(*LEFT))
    for path in (
        "runs/demo/cache/manifest.json",
        "benchmarks/runs/figures.json",
        "examples/easy_vqa/runs/curve/scores.json",
        "cachekd/__pycache__/paths.cpython-311.pyc",
        "build/site/index.html",
        "dist/cachekd-0.0.1.tar.gz",
        ".venv/bin/python",
    ):
        (checkout / path).parent.mkdir(parents=True, exist_ok=True)
        (checkout / path).write_text("not ours")
    return checkout


@pytest.fixture(scope="module")
def built(lived_in, tmp_path_factory):
    return build(lived_in, tmp_path_factory.mktemp("built"))


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder.parent)) for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_the_library_the_command_and_the_demo(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        for path in DEMO:
            for name in files_of(ROOT / "examples" / "easy_vqa" / path):
                part = name if "/" in name else path
                packed = archive.read(f"cachekd_cli/easy_vqa/{part}")
                assert packed == (ROOT / "examples" / "easy_vqa" / part).read_bytes(), part
    ours = files_of(ROOT / "cachekd") | files_of(ROOT / "cli" / "cachekd_cli")
    ours = {name for name in ours if "__pycache__" not in name}
    assert {"cachekd/__main__.py", "cachekd/py.typed", "cachekd_cli/py.typed"} <= ours
    assert {name for name in names if not name.startswith("cachekd_cli/easy_vqa/")} == ours


def test_the_wheel_says_how_it_is_started_and_what_it_needs(built):
    with zipfile.ZipFile(built[0]) as archive:
        told = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        assert "cachekd = cachekd_cli.main:main" in archive.read(told["entry_points.txt"]).decode()
        metadata = archive.read(told["METADATA"]).decode()
    assert f"Version: {cachekd.__version__}" in metadata
    assert "Requires-Dist: easy-vqa==1.0; extra == 'demo'" in metadata
    assert "Project-URL" not in metadata  # until there is an address


def test_what_was_made_in_a_checkout_is_in_no_archive(built):
    with zipfile.ZipFile(built[0]) as archive:
        names = archive.namelist()
    with tarfile.open(built[1]) as archive:
        names += archive.getnames()
        for name in ("Makefile", "CITATION.cff", "tests/conftest.py", "examples/easy_vqa/pipeline.yaml"):
            assert archive.getmember(f"cachekd-{cachekd.__version__}/{name}").isfile()
    parts = {part for name in names for part in Path(name).parts}
    assert parts & {"runs", "build", "dist", "__pycache__", ".venv"} == set()


def test_a_build_elsewhere_and_later_gives_the_same_bytes(built, tmp_path):
    for first, second in zip(built, build(ROOT, tmp_path), strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name


def test_every_place_that_says_the_version_says_the_same():
    said = {
        "pyproject.toml": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "CITATION.cff": yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"],
    }
    assert set(said.values()) == {cachekd.__version__}
    assert f"version = {{{cachekd.__version__}}}" in (ROOT / "docs/reference/citing.md").read_text()


def test_the_citation_has_what_the_format_asks_for_and_the_page_cites_the_same_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    page = (ROOT / "docs/reference/citing.md").read_text()
    assert paper["title"] in page
    assert paper["url"] in page
    names = " and ".join(f"{who['family-names']}, {who['given-names']}" for who in paper["authors"])
    assert names in " ".join(page.split())


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_an_issue_form_is_one(path):
    """As GitHub wants it: else the form is left out without a word."""
    form: dict[str, Any] = yaml.safe_load(path.read_text())
    assert all(isinstance(form[name], str) for name in ("name", "description"))
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(set(ids)) == len(ids) >= 1
    for field in form["body"]:
        assert field["type"] in {"markdown", "input", "textarea", "dropdown", "checkboxes"}
        assert field["attributes"].get("value" if field["type"] == "markdown" else "label")
        for option in field["attributes"].get("options", []):
            assert isinstance(option, str) == (field["type"] == "dropdown"), option
