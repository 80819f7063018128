"""What a dump must not take for the same, or for sound: found by reading the code with fresh eyes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cachekd.atomic import commit, commit_first, is_temporary, remove_stale
from cachekd.config import DumpConfig
from cachekd.data import open_samples
from cachekd.data.sample import unique_keys
from cachekd.dump import dump
from cachekd.errors import CachekdError
from cachekd.models import ModelFiles
from tiny import noise_image, tar_members, write_llava_json, write_tar


def settings(teacher: Path, data: Path | str, out: Path, **changes) -> DumpConfig:
    values = {"teacher": str(teacher), "data": str(data), "out": out, "batch_size": 2, "shard_samples": 10}
    return DumpConfig(**values | {"calibration_tokens": 40} | changes)


@pytest.fixture
def data(tmp_path) -> Path:
    write_tar(tmp_path / "data" / "0.tar", tar_members(40))
    return tmp_path / "data"


@pytest.mark.parametrize(("batch_size", "gone_after"), [(1, 15), (1, 1), (2, 27)])
def test_images_that_vanish_in_the_middle_are_not_skipped_samples(
    tmp_path, teacher_path, batch_size, gone_after
):
    path = write_llava_json(tmp_path / "json", 60)
    config = settings(teacher_path, path, tmp_path / "c", on_error="skip", batch_size=batch_size)
    hidden, seen = tmp_path / "hidden", [0]

    def take_away(phase: str, total: int | None, samples: int, tokens: int) -> None:
        seen[0] += samples * (phase == "dump")
        if seen[0] >= gone_after and not hidden.exists():
            hidden.mkdir()
            for image in (tmp_path / "json").rglob("*.png"):
                shutil.move(image, hidden / image.name)

    images = {image.name: image for image in (tmp_path / "json").rglob("*.png")}
    with pytest.raises(CachekdError, match="the data have probably gone"):
        dump(config, take_away)
    for name, place in images.items():
        shutil.move(hidden / name, place)
    summary = dump(config)
    assert (summary.finished, summary.samples, summary.skipped) == (True, 60, 0)


def test_a_sketch_that_is_gone_is_not_fitted_anew_under_finished_shards(tmp_path, teacher_path, data):
    config = settings(teacher_path, data, tmp_path / "c")
    dump(config)
    (tmp_path / "c" / "sketch.zarr.zip").unlink()
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(CachekdError, match="the tail sketch is missing"):
        dump(config)


def test_other_data_under_the_same_keys_are_other_data(tmp_path, teacher_path):
    from datasets import Dataset

    for name, answer in (("a", "red"), ("b", "blue")):
        turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": answer}]
        rows = [{"image": noise_image(number), "conversations": turns} for number in range(12)]
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    config = settings(teacher_path, tmp_path / "a.parquet", tmp_path / "c")
    assert open_samples(tmp_path / "a.parquet").keys == open_samples(tmp_path / "b.parquet").keys
    dump(config)
    with pytest.raises(CachekdError, match="a different content of the data set"):
        dump(config.model_copy(update={"data": str(tmp_path / "b.parquet")}))


@pytest.mark.parametrize("changes", [{"shard_samples": 20}, {"tail": "none", "disk_budget": 10**9}])
def test_settings_that_the_plan_has_decided_are_compared(tmp_path, teacher_path, data, changes):
    first = {"disk_budget": changes["disk_budget"]} if "disk_budget" in changes else {}
    config = settings(teacher_path, data, tmp_path / "c", **first)
    dump(config)
    with pytest.raises(CachekdError, match="was made with a different"):
        dump(config.model_copy(update=changes))


def test_what_a_kill_left_on_another_machine_is_no_content(tmp_path, teacher_path, data):
    out = tmp_path / "c"
    (out / "dump").mkdir(parents=True)
    left = out / "dump" / ".plan.json.tmp-elsewhere.4026-17-abcd"
    left.write_text("{")
    assert dump(settings(teacher_path, data, out)).finished
    assert left.exists()  # perhaps somebody is writing it


def test_temporary_files_of_dead_processes_are_removed_and_others_are_not(tmp_path):
    import subprocess
    import sys

    code = (
        "import os, sys; from pathlib import Path; from cachekd.atomic import commit\n"
        "os.fsync = lambda _: os._exit(9)\n"
        "commit(Path(sys.argv[1]), b'x')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")], check=False)
    (dead,) = tmp_path.iterdir()
    assert is_temporary(dead)
    mine = tmp_path / dead.name.replace(dead.name.split("-")[-2], str(1), 1)
    mine.write_text("pid 1 is alive")
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]


def test_the_first_one_wins(tmp_path):
    assert commit_first(tmp_path / "a", b"first")
    assert not commit_first(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    commit(tmp_path / "a", b"third")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_keys_with_line_breaks_are_refused_at_once():
    with pytest.raises(CachekdError, match="has a line break"):
        unique_keys(["a", "b\nc"], "data.json")


def test_weights_in_bin_files_are_weights(tmp_path, teacher_path):
    folder = shutil.copytree(teacher_path, tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    found = []
    with pytest.raises(CachekdError, match="has no weights"):
        assert ModelFiles(folder).weights
    for factor in (1.0, 1.3):
        scaled = {name: value * factor for name, value in weights.items()}
        torch.save(scaled, folder / "pytorch_model.bin")
        found.append(ModelFiles(folder).weights)
    assert found[0] != found[1]
