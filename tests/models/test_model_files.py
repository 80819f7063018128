"""A model's files are opened once, and its weights hashed once, by whatever process."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from cachekd.config import EvalConfig, TrainConfig
from cachekd.data import Limits
from cachekd.evaluate.run import evaluate
from cachekd.models import ModelFiles, loading, model_files, processors
from cachekd.models import weights as file_hashes
from cachekd.models.weights import RememberedHash, hash_files
from cachekd.train import train
from caches import dump_cache
from tiny import checked


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The files whose every byte is read for a hash, by their folder; with a memory of the test's own."""
    found, real = [], file_hashes.read_and_hash

    def noted(files):
        found.append(files[0].parent.name)
        return real(files)

    monkeypatch.setattr(file_hashes, "read_and_hash", noted)
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", 0)  # tests are quick
    monkeypatch.setenv("CACHEKD_HOME", str(tmp_path / "home"))
    return found


@pytest.fixture
def weights(tmp_path: Path) -> list[Path]:
    files = [tmp_path / "model" / name for name in ("1.safetensors", "2.safetensors")]
    files[0].parent.mkdir()
    for file in files:
        file.write_bytes(file.name.encode() * 1000)
    return files


def whole(files: list[Path]) -> str:
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def remembered(tmp_path: Path) -> Path:
    [file] = (tmp_path / "home" / "hashes").iterdir()
    return file


def test_files_are_hashed_once(weights, read):
    assert [hash_files(weights) for _ in range(3)] == [whole(weights)] * 3
    assert read == ["model"]
    assert hash_files(weights[:1]) == whole(weights[:1])  # another list is another hash
    assert len(read) == 2


@pytest.mark.parametrize("change", ["same size", "same size and time", "renamed over", "longer"])
def test_a_file_that_changed_is_hashed_again(weights, read, change):
    hash_files(weights)
    file, content = weights[1], weights[1].read_bytes()
    before = file.stat()
    if change == "renamed over":
        other = file.with_name("new")
        other.write_bytes(content[::-1])
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(file)
    else:
        file.write_bytes(content + b"x" if change == "longer" else content[::-1])
    if change == "same size and time":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hash_files(weights) == whole(weights)
    assert len(read) == 2


def test_a_file_that_was_just_written_is_not_remembered(weights, read, monkeypatch):
    """It may change again within the clock's step of its file system."""
    monkeypatch.undo()
    monkeypatch.setenv("CACHEKD_HOME", str(weights[0].parent.parent / "home"))
    assert hash_files(weights) == whole(weights)
    assert not (weights[0].parent.parent / "home").exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(weights, read, tmp_path, monkeypatch):
    real = file_hashes.read_and_hash

    def changed(files):
        found = real(files)
        files[0].write_bytes(b"other")
        return found

    monkeypatch.setattr(file_hashes, "read_and_hash", changed)
    hash_files(weights)
    assert not (tmp_path / "home").exists()


def flipped(text: bytes) -> bytes:
    """Another hash, in the right form."""
    at = text.index(b'"content": "') + 12
    return text[:at] + (b"0" if text[at : at + 1] != b"0" else b"1") + text[at + 1 :]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda text: text[:-40], lambda _: b"\xff[3]", flipped])
def test_a_damaged_memory_is_not_believed(weights, read, tmp_path, damage: Callable[[bytes], bytes]):
    hash_files(weights)
    file = remembered(tmp_path)
    whole_memory = file.read_bytes()
    file.write_bytes(damage(whole_memory))
    assert hash_files(weights) == whole(weights)
    assert len(read) == 2
    assert file.read_bytes() == whole_memory  # mended


def test_a_memory_of_other_files_is_not_believed(weights, read, tmp_path):
    hash_files(weights)
    file = remembered(tmp_path)
    known = RememberedHash.read(file)
    states = [known.files[0], known.files[1].model_copy(update={"inode": 7})]
    file.write_bytes(RememberedHash(files=states, content="0" * 64).to_json())
    assert hash_files(weights) == whole(weights)


def test_hashing_can_be_forced(weights, read, monkeypatch):
    hash_files(weights)
    monkeypatch.setenv("CACHEKD_HASH_AGAIN", "1")
    hash_files(weights)
    assert len(read) == 2


@pytest.mark.parametrize("home", ["model/1.safetensors/home", "/proc/cachekd", "x" * 300])
def test_a_memory_that_cannot_be_written_is_done_without(weights, read, tmp_path, monkeypatch, home):
    monkeypatch.setenv("CACHEKD_HOME", str(tmp_path / home))
    assert [hash_files(weights), hash_files(weights)] == [whole(weights)] * 2
    assert len(read) == 2


def test_a_user_without_a_home_has_no_memory(weights, read, monkeypatch):
    for name in ("CACHEKD_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home(_cls):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(no_home))
    assert hash_files(weights) == whole(weights)


def test_processes_share_one_memory(weights, read, tmp_path):
    """All begin at once, and none of them reads what another has half written."""
    forked = multiprocessing.get_context("fork")
    begin, found = forked.Barrier(4), forked.Queue()

    def work():
        begin.wait()
        for _ in range(20):
            found.put(hash_files(weights))

    workers = [forked.Process(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    assert {found.get(timeout=60) for _ in range(80)} == {whole(weights)}
    for worker in workers:
        worker.join()
    assert not read  # in this process
    hash_files(weights)
    assert not read
    assert RememberedHash.read(remembered(tmp_path)).content == whole(weights)


def test_what_takes_long_says_how_far_it_is(weights, caplog, monkeypatch):
    monkeypatch.setattr(file_hashes, "_SAID_EVERY", -1.0)
    file_hashes.read_and_hash(weights)
    assert caplog.messages[-1] == f"hashing {weights[0].parent}: 0.0 of 0.0 GB"


def test_dumps_and_runs_hash_a_model_once(teacher_path, student_path, data_path, tmp_path, read):
    """The teacher, too, by whatever process: each call opens its files anew."""
    for number in range(2):
        dump_cache(tmp_path / f"c{number}", teacher_path, data_path)
    config = TrainConfig(
        student=str(student_path),
        teacher=str(teacher_path),
        data=str(data_path),
        cache=tmp_path / "c0",
        out=tmp_path / "r0",
        batch_size=6,
    )
    train(config)
    train(config.model_copy(update={"out": tmp_path / "r1"}))
    assert sorted(read) == sorted([teacher_path.name, student_path.name])


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often a config or a processor was read, by model."""
    found: Counter[tuple[str, str]] = Counter()

    def noted(module, name):
        real = getattr(module, name)

        def call(path, *rest):
            found[name, Path(path).name] += 1
            return real(path, *rest)

        monkeypatch.setattr(module, name, call)

    for module in (loading, processors, model_files):
        noted(module, "load_config")
    for module in (processors, model_files):
        noted(module, "processor_of")
    return found


def once(*paths: Path) -> dict[tuple[str, str], int]:
    return {(name, path.name): 1 for name in ("load_config", "processor_of") for path in paths}


def test_a_dump_opens_its_teacher_once(teacher_path, data_path, tmp_path, opened):
    dump_cache(tmp_path / "c", teacher_path, data_path)
    assert opened == once(teacher_path)


@pytest.mark.parametrize("live", [False, True])
def test_a_run_opens_its_models_once(
    live, teacher_path, student_path, data_path, cache_path, tmp_path, opened
):
    settings = {"student": str(student_path), "teacher": str(teacher_path), "data": str(data_path)}
    settings |= {"live_teacher": True} if live else {"cache": cache_path}
    train(TrainConfig(**settings, out=tmp_path / "run", batch_size=6, eval_data=str(data_path)))
    assert opened == once(teacher_path, student_path)


def test_an_evaluation_opens_its_models_once(teacher_path, student_path, data_path, opened):
    evaluate(EvalConfig(models=[str(student_path)], teacher=str(teacher_path), data=str(data_path)))
    assert opened == once(teacher_path, student_path)


def test_a_check_opens_its_models_once(teacher_path, student_path, data_path, cache_path, opened):
    checked(str(teacher_path), str(student_path), str(data_path), cache=cache_path, forward=True)
    assert opened == once(teacher_path, student_path)


def test_a_loaded_model_has_a_config_of_its_own(student_path):
    """It may be trained and changed; the files are what they were."""
    files = ModelFiles(student_path)
    before = files.config_sha256
    model = files.load(dtype=loading.torch.float32, device="cpu")
    model.config.text_config.vocab_size += 1
    assert ModelFiles(student_path).config_sha256 == before
    assert model.config is not files.config
    assert files.config.text_config.vocab_size == model.config.text_config.vocab_size - 1


def test_other_limits_leave_the_files_opened(student_path, opened):
    files = ModelFiles(student_path)
    shorter = files.within(Limits(max_tokens=7))
    assert (files.encoder.limits.max_tokens, shorter.encoder.limits.max_tokens) == (None, 7)
    assert files.within(Limits()).config is files.config
    assert shorter.processor is files.processor
    assert opened == once(student_path)


def test_models_are_known_by_what_is_read_of_them(student_path, tmp_path):
    """The weights alone, as a manifest has them; or everything, as a run notes."""
    copied = shutil.copytree(student_path, tmp_path / "copied")
    (copied / "README.md").write_text("Another.")
    one, other = ModelFiles(student_path), ModelFiles(copied)
    assert (one.weights, one.content) == (other.weights, other.content)
    assert one.weights == whole([student_path / "model.safetensors"])
    template = copied / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    changed = ModelFiles(copied)
    assert changed.weights == one.weights
    assert changed.content != one.content
