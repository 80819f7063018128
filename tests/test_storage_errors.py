"""Full disks, read-only disks, data that go: a clear error, and nothing that is finished is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tar_members, write_tar

from cachekd import trainer
from cachekd.cache import LogitCache, verify_files
from cachekd.cache.status import dump_status
from cachekd.config import DumpConfig, TrainConfig
from cachekd.dump import dump
from cachekd.errors import CachekdError
from cachekd.run_folder import CHECKPOINTS
from cachekd.train import train


@pytest.fixture
def data(tmp_path) -> Path:
    write_tar(tmp_path / "data" / "0.tar", tar_members(30))
    write_tar(tmp_path / "data" / "1.tar", [(f"z{name}", content) for name, content in tar_members(30)])
    return tmp_path / "data"


def settings(teacher: Path, data: Path, out: Path, **changes) -> DumpConfig:
    values = {"teacher": str(teacher), "data": str(data), "out": out, "batch_size": 1, "shard_samples": 10}
    return DumpConfig(**values | {"calibration_tokens": 40} | changes)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 96 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed write's file may still be open


def test_a_full_disk_stops_the_dump_and_what_is_finished_stays(
    tmp_path, teacher_path, data, small_disk, monkeypatch
):
    monkeypatch.setattr("cachekd.dump.refuse_small_disk", lambda *_: None)  # as if others filled it meanwhile
    config = settings(teacher_path, data, small_disk / "c", tail="none")
    with pytest.raises(CachekdError, match="a file cannot be written") as caught:
        dump(config)
    assert "No space left on device" in str(caught.value)
    assert "run the same command again" in str(caught.value)
    status = dump_status(small_disk / "c")
    assert 0 < status.shards < status.all_shards == 6
    assert not list(small_disk.rglob(".*.tmp-*"))
    finished = files_of(small_disk / "c")
    subprocess.run(["mount", "-o", "remount,size=10M", str(small_disk)], check=True)
    assert dump(config).finished
    again = files_of(small_disk / "c")
    assert {name: again[name] for name in finished} == finished
    assert verify_files(small_disk / "c") == []
    dump(settings(teacher_path, data, tmp_path / "whole", tail="none"))
    assert files_of(tmp_path / "whole") == again


def test_a_disk_that_turns_read_only(teacher_path, data, small_disk):
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True)
    with pytest.raises(CachekdError, match="a file cannot be written") as caught:
        dump(settings(teacher_path, data, small_disk / "c"))
    assert "Read-only file system" in str(caught.value)
    assert "choose an --out" in str(caught.value)


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_data_that_vanish_are_never_a_smaller_cache(tmp_path, teacher_path, data, on_error):
    config = settings(teacher_path, data, tmp_path / "c", on_error=on_error)
    hidden = tmp_path / "elsewhere.tar"

    def take_away(phase: str, total: int | None, samples: int, tokens: int) -> None:
        if phase == "dump" and not hidden.exists():
            shutil.move(data / "1.tar", hidden)

    with pytest.raises(CachekdError) as caught:
        dump(config, take_away)
    assert str(data / "1.tar") in str(caught.value)
    with pytest.raises(CachekdError, match="did not finish"):
        LogitCache(tmp_path / "c")
    shutil.move(hidden, data / "1.tar")
    assert dump(config).samples == 60
    dump(settings(teacher_path, data, tmp_path / "whole", on_error=on_error))
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "c")


def test_images_that_all_vanish_stop_even_a_dump_that_skips(tmp_path, teacher_path):
    from test_samples import write_llava_json

    path = write_llava_json(tmp_path / "json", 40)
    config = settings(teacher_path, path, tmp_path / "c", on_error="skip", batch_size=2, shard_samples=20)

    def take_away(phase: str, total: int | None, samples: int, tokens: int) -> None:
        if phase == "dump" and samples == 0:
            for image in (tmp_path / "json").rglob("*.png"):
                image.unlink()

    with pytest.raises(CachekdError, match="samples in a row are bad"):
        dump(config, take_away)


def training(student: Path, data: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        student=str(student), data=str(data), out=out, batch_size=1, lambda_align=0, lambda_vsd=0,
        save_steps=2, training={"max_steps": 6},
    )  # fmt: skip


@pytest.mark.parametrize(("kilobytes", "step"), [(400, 0), (1100, 2), (1300, 2)])
def test_a_full_disk_while_a_checkpoint_is_saved(student_path, data, small_disk, tmp_path, kilobytes, step):
    """While the weights are written, the processor, the optimizer's state: all say it in other ways."""
    remount = ["mount", "-o", f"remount,size={kilobytes}k", str(small_disk)]
    subprocess.run(remount, check=True)
    config, checkpoints = training(student_path, data, small_disk / "run"), small_disk / "run" / CHECKPOINTS
    with pytest.raises(CachekdError, match="a checkpoint could not be saved: the disk is full") as caught:
        train(config)
    assert str(checkpoints / f"checkpoint-{step + 2}") in str(caught.value.where)
    assert caught.value.__cause__ is not None
    if step:
        assert "checkpoint-2 stays, and the same command goes on from step 2" in str(caught.value.fix)
        assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    else:
        assert "the same command begins anew" in str(caught.value.fix)
        assert not (small_disk / "run").exists()
    subprocess.run([*remount[:2], "remount,size=10M", str(small_disk)], check=True)
    assert train(config).resumed_from == step
    train(training(student_path, data, tmp_path / "whole"))
    student = "model.safetensors"
    assert (small_disk / "run" / student).read_bytes() == (tmp_path / "whole" / student).read_bytes()


def test_no_room_for_a_checkpoints_processor(student_path, data, tmp_path, monkeypatch):
    """The same where nothing can be mounted."""
    saved, save = [], trainer.save_processor

    def out_of_room(encoder: Any, folder: Path) -> None:
        saved.append(folder)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(encoder, folder)

    monkeypatch.setattr(trainer, "save_processor", out_of_room)
    config = training(student_path, data, tmp_path / "run")
    with pytest.raises(CachekdError, match=r"No space left on device[\s\S]*goes on from step 2"):
        train(config)
    assert train(config).resumed_from == 2


def test_what_is_no_disks_fault_goes_on_as_it_is(student_path, data, tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("NCCL: a process has gone")

    monkeypatch.setattr(trainer, "save_processor", fail)
    with pytest.raises(RuntimeError, match="NCCL"):
        train(training(student_path, data, tmp_path / "run"))


def test_bad_samples_are_left_out_counted_and_named(tmp_path, teacher_path):
    members = tar_members(30)
    for place in (8, 40):
        members[place] = (members[place][0], b"no image")
    write_tar(tmp_path / "data" / "0.tar", members)
    config = settings(teacher_path, tmp_path / "data", tmp_path / "c", on_error="skip")
    summary = dump(config)
    assert (summary.samples, summary.skipped) == (28, 2)
    cache = LogitCache(tmp_path / "c")
    lines = (tmp_path / "c" / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for place, line in zip((8, 40), lines, strict=True):
        key = members[place][0].split(".")[0]
        assert f'"key": "{key}"' in line
        assert "cannot be read" in line
        assert key not in cache
    assert cache.manifest.skipped.samples == 2
    with pytest.raises(CachekdError, match="cannot be read"):
        dump(config.model_copy(update={"on_error": "stop", "out": tmp_path / "d"}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tail": "bytes=8"}, "setting tail"),
        ({"top_k": 9}, "setting top_k"),
        ({"limit": 50}, "data set"),
        ({"shuffle_seed": 1}, "data set"),
        ({"dtype": "bfloat16"}, "teacher's dtype"),
    ],
)
def test_going_on_with_other_settings_is_refused_with_old_and_new(
    tmp_path, teacher_path, data, changes, says
):
    config = settings(teacher_path, data, tmp_path / "c")
    dump(config)
    before = files_of(tmp_path / "c")
    with pytest.raises(CachekdError, match=f"was made with a different {says}") as caught:
        dump(config.model_copy(update=changes))
    old, new = str(caught.value.expected), str(caught.value.found)
    assert old != new
    assert says in old
    assert files_of(tmp_path / "c") == before


def test_going_on_with_another_teacher_is_refused(tmp_path, teacher_path, data):
    from tiny import save_vlm, tiny_processor

    config = settings(teacher_path, data, tmp_path / "c")
    dump(config)
    other = save_vlm(tmp_path / "other", tiny_processor(), seed=77)
    with pytest.raises(CachekdError, match="a different teacher's weights"):
        dump(config.model_copy(update={"teacher": str(other)}))
    moved = tmp_path / "moved"
    shutil.copytree(teacher_path, moved)
    assert dump(config.model_copy(update={"teacher": str(moved)})).finished  # where it lies does not matter
