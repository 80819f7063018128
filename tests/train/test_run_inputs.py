"""A run that is gone on with reads the cache and the binding that it began with."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cachekd.cache import LogitCache, Manifest
from cachekd.cache.compare import identity
from cachekd.check.bind import Binding, bind
from cachekd.config import TrainConfig
from cachekd.data import open_samples
from cachekd.errors import CachekdError
from cachekd.train import train
from cachekd.train.folder import STARTED_FILE
from caches import copied, dump_cache, repack, reseal
from runs import CutShort
from tiny import tar_members, write_tar


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, teacher_path: Path, data_path: Path) -> Path:
    return dump_cache(tmp_path_factory.mktemp("caches") / "made", teacher_path, data_path, tail="none")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, teacher_path: Path, data_path: Path) -> Path:
    out = tmp_path_factory.mktemp("caches") / "other"
    return dump_cache(out, teacher_path, data_path, tail="none", top_k=16)


@pytest.fixture
def config(tmp_path, student_path, data_path, made) -> TrainConfig:
    return TrainConfig(
        student=str(student_path),
        data=str(data_path),
        cache=copied(made, tmp_path / "cache"),
        out=tmp_path / "run",
        batch_size=6,
        lambda_vsd=0,
        save_steps=1,
    )


def cut(config: TrainConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(config, [CutShort(1)])


def put(config: TrainConfig, cache: Path) -> None:
    """Another cache in the first one's place."""
    shutil.rmtree(str(config.cache))
    copied(cache, Path(str(config.cache)))


def less_tail(targets):
    """As another machine might round."""
    return replace(targets, tail_logmass=targets.tail_logmass - 1 / 16)


def test_another_cache_at_the_same_path_is_refused(config, other):
    before = identity(Manifest.load(Path(str(config.cache))))
    cut(config)
    noted = (config.out / STARTED_FILE).read_bytes()
    put(config, other)
    now = identity(Manifest.load(Path(str(config.cache))))
    with pytest.raises(CachekdError, match="begun with another cache") as caught:
        train(config)
    told = str(caught.value)
    assert f"expected: content with sha256 {before}" in told
    assert f"found: sha256 {now}" in told
    assert str(config.cache) in told
    assert (config.out / STARTED_FILE).read_bytes() == noted  # the next try is refused as well


def test_a_cache_of_which_a_shard_was_made_again_elsewhere_is_gone_on_with(config):
    cache = Path(str(config.cache))
    begun = Manifest.load(cache)
    cut(config)
    repack(cache, 1, less_tail)
    assert Manifest.load(cache).sha256 != begun.sha256
    assert train(config).resumed_from == 1


def test_another_binding_at_the_same_path_is_refused(config, tmp_path):
    path, cache = tmp_path / "binding.json", LogitCache(str(config.cache))
    bind(cache, open_samples(config.data)).write(path, cache, config.data)
    whole = path.read_bytes()
    config = config.model_copy(update={"binding": path, "missing": "ce-only"})
    cut(config)
    reseal(path, lambda values: values["unbound"].append("s003"))
    with pytest.raises(CachekdError, match="begun with another binding"):
        train(config)
    path.write_bytes(whole)
    reseal(path, lambda values: values.update(data="elsewhere"))  # the same samples, by another name
    assert train(config).resumed_from == 1


@pytest.fixture
def plain(tmp_path, student_path) -> TrainConfig:
    """L_CE alone, from data and a student that can be changed."""
    data, student = tmp_path / "data", tmp_path / "student"
    write_tar(data / "0.tar", tar_members(12))
    shutil.copytree(student_path, student)
    settings = {"student": str(student), "data": str(data), "out": tmp_path / "run", "batch_size": 6}
    return TrainConfig(**settings, lambda_align=0, lambda_vsd=0, save_steps=1)


@pytest.mark.parametrize("change", ["keys", "content", "fewer"])
def test_other_data_at_the_same_path_are_refused(plain, change):
    cut(plain)
    members = tar_members(12, start=1 if change == "keys" else 0)
    if change == "content":
        members = [(name, body.replace(b"what", b"which")) for name, body in members]
        assert members != tar_members(12)
    write_tar(Path(plain.data) / "0.tar", members[:-2] if change == "fewer" else members)
    with pytest.raises(CachekdError, match="begun with another data at") as caught:
        train(plain)
    assert plain.data in str(caught.value)
    write_tar(Path(plain.data) / "0.tar", tar_members(12))
    assert train(plain).resumed_from == 1


def test_another_student_at_the_same_path_is_refused(plain):
    cut(plain)
    weights = Path(plain.student) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CachekdError, match="begun with another student"):
        train(plain)
    weights.write_bytes(whole)
    assert train(plain).resumed_from == 1


def test_another_live_teacher_at_the_same_path_is_refused(plain, tmp_path, teacher_path):
    teacher = shutil.copytree(teacher_path, tmp_path / "teacher")
    live = {"teacher": str(teacher), "live_teacher": True, "lambda_align": 1.0}
    config = plain.model_copy(update=live)
    cut(config)
    weights = teacher / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CachekdError, match="begun with another teacher"):
        train(config)


def test_another_number_of_processes_is_refused(plain):
    cut(plain)
    noted = json.loads((plain.out / STARTED_FILE).read_text())
    assert noted["processes"] == 1
    (plain.out / STARTED_FILE).write_text(json.dumps(noted | {"processes": 2}))
    with pytest.raises(CachekdError, match="another number of processes") as caught:
        train(plain)
    assert "expected: 2 processes" in str(caught.value)
    assert "found: 1" in str(caught.value)
    assert "--num_processes 2" in str(caught.value)
    (plain.out / STARTED_FILE).write_text(json.dumps(noted))
    assert train(plain).resumed_from == 1


def test_what_a_cache_is_known_again_by(made, tmp_path):
    """All but the bytes of what the teacher can make again."""
    manifest = Manifest.load(made)
    other = {"sha256": "0" * 64, "bytes": 5, "entries": 7, "fidelity": None}
    for change, same in (
        (other, True),
        ({"samples_sha256": "0" * 64}, False),
        ({"tokens": 1}, False),
        ({"span": None}, False),
    ):
        shard = manifest.shards[0].model_copy(update=change)
        changed = manifest.model_copy(update={"shards": [shard, *manifest.shards[1:]]})
        assert (identity(changed) == identity(manifest)) is same, change
    cut_shards = [info.model_copy(update={"span": None}) for info in manifest.shards]
    cut_cache = manifest.model_copy(update={"shards": cut_shards})
    other_bytes = [cut_shards[0].model_copy(update=other), *cut_shards[1:]]
    assert identity(manifest.model_copy(update={"shards": other_bytes})) != identity(cut_cache)
    again = Binding(cache_sha256="x", data="d", keys={"a": "b"}, unbound=["c"])
    assert again.identity == again.model_copy(update={"cache_sha256": "y"}).identity
    assert again.identity != again.model_copy(update={"keys": {"a": "z"}}).identity


@pytest.mark.parametrize("text", ["", "{", "3", "\udc80", "{}"])
def test_a_damaged_record_of_what_began_is_named(plain, text):
    plain.out.mkdir()
    (plain.out / STARTED_FILE).write_text(text, errors="surrogateescape")
    with pytest.raises(CachekdError, match="cannot be read") as caught:
        train(plain)
    assert str(plain.out / STARTED_FILE) in str(caught.value)
    assert [path.name for path in plain.out.iterdir()] == [STARTED_FILE]


@pytest.mark.parametrize("name", ["inputs", "processes", "seed"])
def test_what_a_run_did_not_note_is_not_guessed(plain, name):
    cut(plain)
    noted = json.loads((plain.out / STARTED_FILE).read_text())
    del noted[name]
    (plain.out / STARTED_FILE).write_text(json.dumps(noted))
    with pytest.raises(CachekdError, match="cannot be read") as caught:
        train(plain)
    assert caught.value.found == f"it lacks {name}"
