"""Every command that writes, onto a disk that is full or cannot be written: a message, nothing half there.

Training and dumping, which take long and go on: tests/dump/test_storage_errors.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cachekd.atomic import is_temporary
from cachekd.cache import LogitCache, verify_files
from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.train import train
from cachekd_cli.main import app
from caches import select_samples
from tiny import tar_members, write_tar

# What each command is given; {disk} is the disk.
COMMANDS = {
    "report": "report {run} --out {disk}/new/page.html",
    "eval": "eval {run} --data {data} --no-blind --out {disk}/scores",
    "peek": "peek {cache} --data {data} --html {disk}/peek.html",
    "inspect": "inspect {cache} --html {disk}/inspect.html",
    "bind": "bind {cache} --data {data} --out {disk}/new/binding.json",
    "select": "select {cache} --keys {keys} --out {disk}/some",
    "merge": "merge {first} {others} --out {disk}/all",
    "recompress": "recompress {cache} {disk}/small --top-k 8",
    "parquet": "export {cache} {disk}/parquet --to parquet",
    "webdataset": "export {cache} {disk}/tars --data {data} --to webdataset",
    "push": "push {cache} file://{disk}/pushed",
    "pull": "pull file://{cache} {disk}/pulled",
    "train": "train --student {student} --data {data} --lambda-align 0 --lambda-vsd 0 --out {disk}/run",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, student_path, cache_path, data_path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("full")
    write_tar(folder / "few" / "0.tar", tar_members(6))
    settings = {"lambda_align": 0, "lambda_vsd": 0, "save_steps": 0, "batch_size": 6}
    train(TrainConfig(student=str(student_path), data=str(folder / "few"), out=folder / "run", **settings))
    keys = list(LogitCache(cache_path))
    (folder / "keys").write_text(keys[0])
    select_samples(cache_path, folder / "first", keys[:1])
    select_samples(cache_path, folder / "others", keys[1:])
    made = {name: folder / name for name in ("run", "keys", "first", "others")}
    return {"cache": cache_path, "data": data_path, "student": student_path, **made}


@pytest.fixture
def full_disk(small_disk) -> Path:
    """One of 4 kB: folders can be made, but no file written."""
    (small_disk / "ballast").write_bytes(bytes(4096))
    remount(small_disk, "size=4k")
    return small_disk


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def refused(name: str, places: dict[str, Path], disk: Path) -> CachekdError:
    result = run(name, places, disk)
    error = result.exception
    assert isinstance(error, CachekdError), (result.output, error)
    said = str(error)
    assert any(text in said for text in ("No space left", "Read-only", "no room", "too small")), said
    assert str(disk) in said
    assert error.fix is not None
    return error


def run(name: str, places: dict[str, Path], disk: Path) -> Result:
    return CliRunner().invoke(app, [part.format(**places, disk=disk) for part in COMMANDS[name].split()])


def files(disk: Path) -> list[Path]:
    return [path for path in disk.rglob("*") if path.is_file()]


@pytest.mark.parametrize("how", ["size=4k", "ro"])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_cannot_be_written_is_said_and_nothing_is_left(name, how, places, full_disk):
    remount(full_disk, how)
    refused(name, places, full_disk)
    assert files(full_disk) == [full_disk / "ballast"]


@pytest.mark.parametrize("name", ["report", "peek", "inspect", "select", "merge", "recompress", "webdataset"])
def test_what_does_not_fit_as_a_whole_leaves_nothing(name, places, full_disk):
    remount(full_disk, "size=20k")
    refused(name, places, full_disk)
    assert files(full_disk) == [full_disk / "ballast"]


@pytest.mark.parametrize("name", ["push", "pull"])
def test_what_goes_on_keeps_what_is_whole(name, places, full_disk):
    remount(full_disk, "size=24k")
    refused(name, places, full_disk)
    assert not [path for path in files(full_disk) if is_temporary(path)]
    remount(full_disk, "size=1m")
    assert run(name, places, full_disk).exit_code == 0
    assert verify_files(full_disk / f"{name}ed") == []
