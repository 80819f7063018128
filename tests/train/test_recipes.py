"""The recipes of docs/how-to/24-gb.md, each run as it stands there, with tiny models for its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from cachekd.cache import Manifest
from cachekd.config import DumpConfig, TrainConfig
from cachekd.dump import dump
from cachekd.paths import RUN_FILE
from cachekd.train import train
from caches import SMALL, dump_cache
from runs import losses
from tiny import save_vlm, tiny_processor

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "24-gb.md"
RECIPES = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.S)
DUMPS = [recipe for recipe in RECIPES if "student" not in yaml.safe_load(recipe)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory, student_path, data_path) -> dict[str, str]:
    """A teacher whose widths the kernels of 4 bits take, and its cache."""
    folder = tmp_path_factory.mktemp("recipes")
    teacher = save_vlm(folder / "teacher", tiny_processor(), text_width=64, vision_layers=3, seed=1)
    cache = dump_cache(folder / "cache", teacher, data_path)
    return {
        "student": str(student_path),
        "teacher": str(teacher),
        "data": str(data_path),
        "cache": str(cache),
    }


def test_they_are_there():
    assert (len(RECIPES), len(DUMPS)) == (3, 1)


def test_the_parts_of_a_table_add_up_to_its_peak():
    tables = re.findall(r"\| what is in memory \| GB \|\n\| --- \| --- \|\n((?:\|.*\n)+)", DOCS.read_text())
    assert len(tables) == 2
    for rows in tables:
        *parts, peak = (float(row.split("|")[-2]) for row in rows.splitlines())
        assert len(parts) >= 4
        assert sum(parts) == pytest.approx(peak, abs=0.1)


@pytest.mark.parametrize(
    "recipe", [one for one in RECIPES if one not in DUMPS], ids=lambda text: yaml.safe_load(text)["out"]
)
def test_a_recipe_runs(tmp_path, paths, recipe):
    wanted = yaml.safe_load(recipe)
    if "teacher_quantization" in wanted:
        pytest.importorskip("bitsandbytes")
    paths = paths | {"out": tmp_path / "run"}
    assert paths.keys() <= wanted.keys()
    # What a GPU has by default, and a step of more than the tiny data's 12 samples.
    config = TrainConfig(**wanted | paths, dtype="bfloat16", epochs=4, logging_steps=1)
    train(config)
    run = json.loads((config.out / RUN_FILE).read_text())
    assert {name: run["config"][name] for name in wanted.keys() - paths.keys()} == {
        name: value for name, value in wanted.items() if name not in paths
    }
    found = losses(config.out)
    assert len(found) == 4
    assert all(value > 0 for row in found for value in row)


@pytest.mark.parametrize("recipe", DUMPS, ids=lambda text: yaml.safe_load(text)["out"])
def test_a_dump_runs(tmp_path, paths, recipe):
    places = {"teacher": paths["teacher"], "data": paths["data"], "out": tmp_path / "cache"}
    assert dump(DumpConfig(**SMALL | yaml.safe_load(recipe) | places)).finished
    found, whole = (Manifest.load(cache) for cache in (places["out"], paths["cache"]))
    assert found.shards == whole.shards
