"""Full disks, read-only disks, data that go: a clear error, and nothing that is finished is lost."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from cachekd.atomic import write_file
from cachekd.cache import LogitCache, verify_files
from cachekd.cache.build import dump_status
from cachekd.config import DumpConfig, TrainConfig
from cachekd.dump import dump
from cachekd.errors import CachekdError, FailedWrite
from cachekd.train import train, trainer
from cachekd.train.estimate import estimate_training
from cachekd.train.folder import CHECKPOINTS, PART
from cachekd.train.open import open_run
from cachekd.train.run import size_of
from cachekd.train.size import RunSize, require_room
from caches import copied
from tiny import tar_members, write_tar

SIZES = int(os.environ.get("CACHEKD_DISKS", "6"))  # of full disks, for each kind of run


def write_samples(folder: Path) -> Path:
    write_tar(folder / "0.tar", tar_members(30))
    write_tar(folder / "1.tar", [(f"z{name}", content) for name, content in tar_members(30)])
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return write_samples(tmp_path / "data")


def settings(teacher: Path, data: Path, out: Path, **changes) -> DumpConfig:
    values = {"teacher": str(teacher), "data": str(data), "out": out, "batch_size": 1, "shard_samples": 10}
    return DumpConfig(**values | {"calibration_tokens": 40} | changes)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_stops_the_dump_and_what_is_finished_stays(
    tmp_path, teacher_path, data, small_disk, monkeypatch
):
    monkeypatch.setattr(
        "cachekd.dump.run.refuse_small_disk", lambda *_, **__: None
    )  # others fill it meanwhile
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
    from tiny import write_llava_json

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
def test_a_full_disk_while_a_checkpoint_is_saved(
    student_path, data, small_disk, tmp_path, kilobytes, step, unchecked
):
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


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """As if others had filled the disk since the run began."""
    monkeypatch.setattr("cachekd.train.run.require_room", lambda *_: None)


class Fill(TrainerCallback):
    """Leaves so many bytes of a disk free when training ends (or logs), or has it turn read-only."""

    def __init__(self, disk: Path, leaving: int | None, event: str = "on_train_end") -> None:
        self.disk, self.leaving = disk, leaving
        setattr(self, event, self.fill)

    def fill(self, args, state, control, **kwargs):
        if state.global_step < 3:
            return
        if self.leaving is None:
            subprocess.run(["mount", "-o", "remount,ro", str(self.disk)], check=True)
        elif (more := shutil.disk_usage(self.disk).free - self.leaving) > 0:
            (self.disk / "others").write_bytes(bytes(more))


def again_with_room(config: TrainConfig, disk: Path, whole: Path) -> int:
    """The same command with room goes on to what an undisturbed run ends with; says from which step."""
    subprocess.run(["mount", "-o", "remount,rw,size=20M", str(disk)], check=True)
    (disk / "others").unlink(missing_ok=True)
    summary = train(config)
    for file in whole.rglob("*.safetensors"):
        assert (config.out / file.relative_to(whole)).read_bytes() == file.read_bytes()
    assert not (config.out / PART).exists()
    return summary.resumed_from


def students(out: Path) -> dict[str, int]:
    """Weights in a run's own folder, whole: a cut file of safetensors cannot be opened."""
    found = {}
    for path in [*out.glob("*.safetensors"), *out.glob("adapter/*.safetensors")]:
        found[path.name] = len(load_file(path))
    return found


LORA = {"lora": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}}


def whole_run(student: Path, data: Path, out: Path, **changes: Any) -> Path:
    train(training(student, data, out).model_copy(update=changes))
    return out


def failure_of(config: TrainConfig, filling: TrainerCallback) -> CachekdError | None:
    """What a run says; None: there was room for it all."""
    try:
        train(config, [filling])
    except CachekdError as error:
        return error
    return None


def sweep(
    config: TrainConfig, disk: Path, whole: Path, sizes: Iterable[int | None], event: str = "on_train_end"
) -> set[str]:
    """A run on a disk that leaves so many bytes in the middle: it fails as a message, what was whole stays,
    and it ends as if nothing had happened. Returns the problems."""
    problems = set()
    for leaving in sizes:
        subprocess.run(["mount", "-o", "remount,rw,size=20M", str(disk)], check=True)
        failed = failure_of(config, Fill(disk, leaving, event))
        if failed is None:
            (disk / "others").unlink(missing_ok=True)
        else:
            problems.add(failed.problem)
            (named,) = re.findall(r"goes on from step (\d+)", str(failed.fix))
            steps = {path.parent.name for path in config.out.rglob("trainer_state.json")}
            assert f"checkpoint-{named}" in steps
            assert not (config.out / PART).exists() or leaving is None
            students(config.out)
            assert again_with_room(config, disk, whole) == int(named)
        shutil.rmtree(config.out)
    return problems


def test_a_full_disk_while_the_student_is_saved(student_path, data, small_disk, tmp_path, unchecked):
    whole = whole_run(student_path, data, tmp_path / "whole")
    config = training(student_path, data, small_disk / "run")
    assert sweep(config, small_disk, whole, (0, 100_000, 250_000)) == {
        "the student is trained, but the run could not be finished"
    }


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, LORA])
@pytest.mark.parametrize("event", ["on_train_end", "on_step_end"])
def test_a_full_disk_at_each_write(
    student_path, data, small_disk, tmp_path, unchecked, monkeypatch, changes, event
):
    """At sizes from nothing to more than what is written next, and read-only: while a checkpoint is saved,
    and while the student is. Which file is the one that fails follows from the size, and is not looked at."""
    changes = changes | {"training": {"max_steps": 6, "report_to": ["tensorboard"]}}
    whole = whole_run(student_path, data, tmp_path / "whole", **changes)
    config = training(student_path, data, small_disk / "run").model_copy(update=changes)
    # A kernel makes a disk read-only whatever is open there; `mount` does not while the lock is.
    monkeypatch.setattr("cachekd.train.folder.alone", lambda *_: nullcontext())
    most = 700_000 if event == "on_train_end" else 1_300_000
    problems = sweep(config, small_disk, whole, [None, *range(0, most, most // SIZES)], event)
    assert problems


@pytest.mark.parametrize("changes", [{}, LORA, {"save_steps": 0}, {"trainable": ("projector",)}])
def test_the_room_that_is_asked_for_is_what_a_run_takes(student_path, data, tmp_path, changes):
    """Never less than it is, and little more."""
    config = training(student_path, data, tmp_path / "run").model_copy(update=changes)
    taken: list[int] = []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for path in Path(args.output_dir).glob("checkpoint-*"):
                taken.append(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))

    opened = open_run(config, tmp_path / "none", lambda _: None)
    size = size_of(config, opened)
    train(config, [Watch()])
    student = sum(path.stat().st_size for path in config.out.rglob("*") if path.is_file())
    assert student <= size.student <= 1.1 * student + 100_000
    assert bool(taken) == bool(size.checkpoints)
    for one in taken:
        assert one <= size.checkpoint <= 1.1 * one + 200_000
    assert (size.kept, size.checkpoints) == ((2, 3) if config.save_steps else (0, 0))
    assert estimate_training(config).disk == size


def test_a_run_that_has_no_room_is_refused_with_the_numbers(student_path, data, small_disk, monkeypatch):
    def loaded(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("cachekd.train.open.load_student", loaded)
    config = training(student_path, data, small_disk / "run")
    with pytest.raises(CachekdError, match="the disk is too small for what the run saves") as caught:
        train(config)
    assert re.search(r"the student with 0\.\d MB, and up to 3 checkpoints at a time", str(caught.value))
    assert "found: 0.1 MB are free\n" in str(caught.value)  # the lock is not the run's
    assert not config.out.exists()


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_no_room_is_mended_by_what_the_run_has(tmp_path, kept):
    with pytest.raises(CachekdError) as caught:
        require_room(RunSize(10**18, 10, kept, kept and kept + 1), tmp_path / "run")
    assert ("save_total_limit: 1" in str(caught.value)) == (kept > 1)
    assert ("--save-steps 0" in str(caught.value)) == (kept > 0)


@pytest.mark.parametrize("out", ["/proc/x", "/proc/x/y", "/sys/x", "/dev/null/x"])
def test_a_place_where_nothing_can_be_made_is_refused_at_once(student_path, data, out, monkeypatch):
    monkeypatch.setattr("cachekd.train.run.open_run", lambda *_: 1 / 0)
    with pytest.raises(FailedWrite, match="a file cannot be written"):
        train(training(student_path, data, Path(out)))
    with pytest.raises(FailedWrite):
        write_file(Path(out) / "report.html", b"x")


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher_path) -> Path:
    """A finished dump, beside its data."""
    folder = tmp_path_factory.mktemp("whole")
    assert dump(settings(teacher_path, write_samples(folder / "data"), folder / "c")).samples == 60
    return folder / "c"


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
    tmp_path, teacher_path, whole, changes, says
):
    data = whole.with_name("data")
    config = settings(teacher_path, data, copied(whole, tmp_path / "c"))
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
