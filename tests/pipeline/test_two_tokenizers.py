"""From check to pull, with a student of another tokenizer than the teacher's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.errors import CachekdError
from cachekd.evaluate import read_scores
from cachekd.paths import RUN_FILE
from cachekd_cli.main import app
from tokenizer_pairs import save_pair, write_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = save_pair(tmp_path_factory.mktemp("two"))
    write_data(folder / "data", 12)
    write_data(folder / "asked", 4, start=30)
    return folder


@pytest.fixture
def values(folder, tmp_path) -> dict:
    asked = str(folder / "asked" / "data.json")
    return {
        "out": str(tmp_path / "pipe"),
        "defaults": {
            "teacher": str(folder / "teacher"),
            "student": str(folder / "vicuna"),
            "data": str(folder / "data" / "data.json"),
            "train": {"batch_size": 6, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 0},
        },
        "steps": [
            {"step": "dump", "name": "cache", "batch_size": 4, "tail": "exact"},
            {"step": "train", "name": "dpt", "stage": "dpt", "align_vocabulary": "cells"},
            {"step": "train", "name": "dft", "stage": "dft", "align_vocabulary": "cells"},
            {"step": "eval", "name": "scores", "data": asked, "history": "full"},
            {"step": "report", "name": "page"},
        ],
    }


def invoke(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if isinstance(done.exception, CachekdError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def written(values: dict, folder: Path) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_a_pipeline_that_does_not_ask_for_it_is_refused_before_anything_runs(values, tmp_path):
    for step in values["steps"][1:3]:
        del step["align_vocabulary"]
    with pytest.raises(CachekdError, match="different tokenizers") as caught:
        invoke("run", written(values, tmp_path))
    assert "--align-vocabulary cells" in str(caught.value.fix)
    assert not (tmp_path / "pipe" / "cache").exists()


def test_from_check_to_pull(values, folder, tmp_path):
    """The pulled cache teaches a student without the teacher's files, data of other keys too."""
    pair = ["--teacher", folder / "teacher", "--student", folder / "vicuna"]
    rows = json.loads(invoke("check", *pair, "--data", folder / "data" / "data.json", "--json"))["rows"]
    assert not [row for row in rows if row["state"] == "refused"]

    invoke("run", written(values, tmp_path))
    out = tmp_path / "pipe"
    for name in ("dpt", "dft"):
        run = json.loads((out / name / RUN_FILE).read_text())
        assert run["across_tokenizers"]["aligned"]["share"] > 0.6
    (scores,) = read_scores(out / "dft")
    assert scores.models[0].kl > 0  # over cells
    assert list(out.rglob("*.html"))

    store = f"file://{tmp_path}/store/cache"
    invoke("push", out / "cache", store)
    invoke("pull", store, tmp_path / "pulled")
    (folder / "teacher").rename(folder / "gone")
    try:
        assert LogitCache(tmp_path / "pulled").vocabulary is not None
        renamed = folder / "data" / "renamed.json"
        records = json.loads((folder / "data" / "data.json").read_text())
        renamed.write_text(json.dumps([record | {"id": f"n-{record['id']}"} for record in records]))
        invoke("bind", tmp_path / "pulled", "--data", renamed, "--out", tmp_path / "binding.json")
        said = ["--student", folder / "chatml", "--data", renamed, "--out", tmp_path / "alone"]
        said += ["--lambda-vsd", 0]
        said += ["--cache", tmp_path / "pulled", "--binding", tmp_path / "binding.json", "--batch-size", 6]
        invoke("train", *said, "--align-vocabulary", "cells")
    finally:
        (folder / "gone").rename(folder / "teacher")
    run = json.loads((tmp_path / "alone" / RUN_FILE).read_text())
    assert run["across_tokenizers"]["aligned"]["share"] > 0.6
    assert {"ce", "align"} < run["log"][0].keys()
