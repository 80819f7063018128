"""A cache and whatever copy of its data there is: found by key or by content, and trained on in any order."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.check.bind import Binding, bind, bound_cache
from cachekd.config import TrainConfig
from cachekd.data import open_samples, sample_from_llava
from cachekd.errors import CachekdError
from cachekd.train import train
from cachekd.train.open import make_trainer
from cachekd_cli.main import app
from caches import copied, reseal
from tiny import conversation, noise_image, png_bytes, tar_members, write_tar

# `cache_path` is a dump of these: s000 to s011, noise images, 1 to 3 turns.
KEYS = [f"s{index:03d}" for index in range(12)]


def record(index: int, key: str, image: str) -> dict[str, Any]:
    return {"id": key, "image": image, "conversations": conversation(index, 1 + index % 3)}


def write_json(folder: Path, records: list[dict[str, Any]]) -> Path:
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def as_json(tmp_path: Path) -> Path:
    """The same samples in another container and folder, backwards, under other keys, as BMP."""
    records = []
    for index in reversed(range(12)):
        name = f"images/{index % 3}/{index}.bmp"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(index).save(tmp_path / name)
        records.append(record(index, f"coco/{index}", name))
    return write_json(tmp_path, records)


def as_jpeg(index: int) -> bytes:
    stream = io.BytesIO()
    noise_image(index).save(stream, format="JPEG")
    return stream.getvalue()


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A copy that time has passed over; s010 and s011 are gone from it."""
    members = dict(tar_members(10))
    members["s001.jpg"] = as_jpeg(1)  # encoded again
    del members["s001.png"]
    members["s002.json"] = json.dumps({"conversations": conversation(5)}).encode()  # another text
    members["s003.png"] = b"not a png"
    for part in ("png", "json"):
        members[f"renamed.{part}"] = members.pop(f"s004.{part}")
        members[f"copy.{part}"] = members[f"s005.{part}"]
        members[f"s006.{part}"], members[f"s007.{part}"] = members[f"s007.{part}"], members[f"s006.{part}"]
    members["new.png"], members["new.json"] = png_bytes(noise_image(99)), members["s000.json"]
    return write_tar(
        tmp_path / "mixed" / "0.tar", sorted(members.items(), key=lambda item: item[0].split(".")[0])
    )


def test_the_same_data_matches_by_key(cache_path, data_path):
    seen: list[int] = []
    report = bind(LogitCache(cache_path), open_samples(data_path), progress=seen.append)
    assert (report.matched, report.unbound, report.moved, report.missing) == (12, [], {}, [])
    assert sum(seen) == 12


def test_another_container_order_and_keys_match_by_content(cache_path, as_json):
    report = bind(LogitCache(cache_path), open_samples(as_json))
    assert report.moved == {f"coco/{index}": KEYS[index] for index in range(12)}
    assert (report.matched, report.unbound, report.missing) == (0, [], [])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_is_accounted_for(cache_path, mixed, workers):
    samples = open_samples(mixed)
    report = bind(LogitCache(cache_path), samples, workers=workers)
    assert report.matched == 4  # s000, s005, s008, s009
    assert report.moved == {"renamed": "s004", "copy": "s005", "s006": "s007", "s007": "s006"}
    assert report.changed == ["s001", "s002"]
    assert report.unknown == ["new"]
    assert [*report.unreadable] == ["s003"]
    assert "cannot be read" in report.unreadable["s003"]
    assert report.missing == ["s003", "s010", "s011"]
    assert report.matched + len(report.moved) + len(report.unbound) == len(samples)


def test_equal_samples_of_a_cache_are_told_apart_by_key(teacher_path, tmp_path):
    """A copy that comes first in the data must not take the place of the sample that has the key."""
    from caches import dump_cache

    twice = [(name.replace("s000", key), content) for key in ("a", "b") for name, content in tar_members(1)]
    data = write_tar(tmp_path / "data" / "0.tar", [*twice, *tar_members(3)[2:]])
    cache = LogitCache(dump_cache(tmp_path / "cache", teacher_path, data, tail="none"))
    moved = [(name.replace("a.", "0."), content) for name, content in twice]
    report = bind(cache, open_samples(write_tar(tmp_path / "other" / "0.tar", moved)))
    assert (report.matched, report.moved, report.missing) == (1, {"0": "a"}, ["s001", "s002"])
    both = [(f"{'xy'[name[0] == 'b']}{name[1:]}", content) for name, content in twice]
    report = bind(cache, open_samples(write_tar(tmp_path / "both" / "0.tar", both)))
    assert (report.moved, report.missing) == ({"x": "a", "y": "b"}, ["s001", "s002"])


def test_a_hash_may_end_in_zeros(teacher_path, tmp_path):
    """One in 256 does. The same sample matches by key, a renamed one by content."""
    from caches import dump_cache

    def turns(number: int) -> list[dict[str, str]]:
        return [{"from": "human", "value": f"what is {number}?"}, {"from": "gpt", "value": "red"}]

    def content_hash(number: int) -> bytes:
        return sample_from_llava("a", turns(number), (), origin="test").content_hash

    zero = {"conversations": turns(next(n for n in range(2**16) if content_hash(n).endswith(b"\0")))}
    plain = [{"id": f"b{index}", "conversations": conversation(index)[2:]} for index in range(3)]
    data = write_json(tmp_path, [{**zero, "id": "a"}, *plain])
    cache = LogitCache(dump_cache(tmp_path / "cache", teacher_path, data, tail="none"))
    report = bind(cache, open_samples(data))
    assert (report.matched, report.moved, report.unbound) == (4, {}, [])
    other = write_json(tmp_path, [*plain, {**zero, "id": "z"}])
    report = bind(cache, open_samples(other))
    assert (report.matched, report.moved, report.unbound, report.missing) == (3, {"z": "a"}, [], [])


def settings(out: Path, student: Path, teacher: Path, cache: Path, data: Path, **more: Any) -> TrainConfig:
    return TrainConfig(
        student=str(student), teacher=str(teacher), cache=cache, data=data, out=out, batch_size=4, **more
    )


@pytest.fixture
def models(student_path: Path, teacher_path: Path, cache_path: Path) -> tuple[Path, Path, Path]:
    return student_path, teacher_path, cache_path


def targets_by_content(config: TrainConfig, scratch: Path) -> dict[bytes, torch.Tensor]:
    """What training is told of every sample, as the Trainer's data set gives it."""
    examples = make_trainer(config, scratch).train_dataset
    return {
        (example := examples[index]).encoded.content_hash: example.targets.everywhere()
        for index in range(len(examples))
    }


def test_training_takes_any_order_part_and_container(models, data_path, tmp_path):
    """The same keys: no binding is needed."""
    whole = targets_by_content(settings(tmp_path / "run", *models, data_path), tmp_path / "t")
    records = []
    for index in (9, 2, 11, 0):
        Image.Image.save(noise_image(index), tmp_path / f"{index}.tiff")
        records.append(record(index, KEYS[index], f"{index}.tiff"))
    part = targets_by_content(
        settings(tmp_path / "run", *models, write_json(tmp_path, records)), tmp_path / "t"
    )
    assert len(part) == 4
    for content, targets in part.items():
        assert torch.equal(targets, whole[content])


def test_training_with_a_binding_sees_the_same_teacher(models, data_path, as_json, tmp_path):
    whole = targets_by_content(settings(tmp_path / "run", *models, data_path), tmp_path / "t")
    config = settings(tmp_path / "run", *models, as_json)
    with pytest.raises(CachekdError, match=r"12 are missing[\s\S]*cachekd bind"):
        make_trainer(config, tmp_path / "t")
    binding = tmp_path / "binding.json"
    done = CliRunner().invoke(app, ["bind", str(models[2]), "--data", str(as_json), "-o", str(binding)])
    assert done.exit_code == 0, done.output
    assert "train --binding" in done.stdout
    bound = targets_by_content(config.model_copy(update={"binding": binding}), tmp_path / "t")
    assert bound.keys() == whole.keys()
    assert all(torch.equal(bound[content], whole[content]) for content in whole)


def test_a_binding_hides_nothing(models, mixed, tmp_path):
    """Samples that the cache lacks stop the training, or train by L_CE alone: never another's logits."""
    cache, samples = LogitCache(models[2]), open_samples(mixed)
    binding = tmp_path / "binding.json"
    report = bind(cache, samples)
    del report.unreadable["s003"]  # that one stops any training
    report.write(binding, cache, str(mixed))
    keys = [*open_samples(mixed).keys]
    good = [key for key in keys if key != "s003"]
    bound = bound_cache(cache, Binding.read(binding), str(binding))
    assert {key for key in keys if key not in bound} == {"new", "s001", "s002"}
    assert torch.equal(bound["renamed"].everywhere(), cache["s004"].everywhere())
    assert "s001" in cache  # another, and the cache itself is as it was
    config = settings(tmp_path / "run", *models, mixed, binding=binding)
    with pytest.raises(CachekdError, match=r"3 are missing, the first is 'new'"):
        make_trainer(config, tmp_path / "t")
    trainer = make_trainer(config.model_copy(update={"missing": "ce-only"}), tmp_path / "t")
    examples = {key: trainer.train_dataset[keys.index(key)] for key in good}
    assert {key for key, example in examples.items() if example.targets is None} == {"new", "s001", "s002"}
    assert trainer.train_dataset.uncovered() == 3
    assert torch.equal(examples["s006"].targets.everywhere(), cache["s007"].everywhere())


def test_a_run_with_a_binding_says_so(models, as_json, tmp_path):
    cache = LogitCache(models[2])
    bind(cache, open_samples(as_json)).write(tmp_path / "binding.json", cache, str(as_json))
    config = settings(tmp_path / "run", *models, as_json, binding=tmp_path / "binding.json", lambda_vsd=0)
    assert train(config).uncovered == 0
    record = json.loads((tmp_path / "run" / "cachekd_run.json").read_text())
    assert record["config"]["binding"] == str(tmp_path / "binding.json")


def test_a_binding_of_another_cache_or_a_changed_one_is_refused(models, as_json, tmp_path):
    cache, binding = LogitCache(models[2]), tmp_path / "binding.json"
    bind(cache, open_samples(as_json)).write(binding, cache, str(as_json))
    other = copied(models[2], tmp_path / "other")
    reseal(other / "manifest.json", lambda values: values["teacher"].update(name="another"))
    config = settings(tmp_path / "run", models[0], models[1], other, as_json, binding=binding)
    with pytest.raises(CachekdError, match=r"for another cache[\s\S]*run `cachekd bind`"):
        make_trainer(config, tmp_path / "t")
    binding.write_text(binding.read_text().replace('"s001"', '"s002"'))
    with pytest.raises(CachekdError, match="changed after it was written"):
        make_trainer(config.model_copy(update={"cache": str(models[2])}), tmp_path / "t")
    with pytest.raises(CachekdError, match="cannot be read"):
        make_trainer(config.model_copy(update={"binding": tmp_path / "none.json"}), tmp_path / "t")


def test_the_data_may_change_after_the_binding(models, as_json, tmp_path):
    """The binding says which sample is meant; what is in it is checked again, at every step."""
    cache, binding = LogitCache(models[2]), tmp_path / "binding.json"
    bind(cache, open_samples(as_json)).write(binding, cache, str(as_json))
    (tmp_path / "images" / "2" / "5.bmp").write_bytes(as_jpeg(5))
    trainer = make_trainer(settings(tmp_path / "run", *models, as_json, binding=binding), tmp_path / "t")
    trainer.train_dataset[0]
    with pytest.raises(CachekdError, match=r"text or image differs[\s\S]*'coco/5'"):
        trainer.train_dataset[6]


def test_the_command_says_all_with_an_exit_code(cache_path, data_path, mixed, tmp_path):
    def invoke(*arguments: object) -> Any:
        return CliRunner().invoke(app, ["bind", str(cache_path), *map(str, arguments)])

    assert invoke("--data", data_path).exit_code == 0
    done = invoke("--data", mixed, "--json", "--out", tmp_path / "b.json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert (found["matched"], found["unknown"], found["missing"]) == (4, ["new"], ["s003", "s010", "s011"])
    assert Binding.read(tmp_path / "b.json").unbound == ["s001", "s002", "new", "s003"]
    done = invoke("--data", mixed)
    assert done.exit_code == 1
    for text in (
        "renamed is s004",
        "changed",
        "encoded again",
        "4 samples of the data",
        "--out binding.json",
    ):
        assert text in " ".join(done.stdout.split()), text
    assert "exists already" in str(invoke("--data", mixed, "--out", tmp_path / "b.json").exception)
    assert isinstance(invoke("--data", tmp_path / "nothing").exception, CachekdError)


# ---- looked at through a binding


@pytest.fixture
def bound(cache_path, mixed, tmp_path) -> tuple[Path, list[str]]:
    """A binding's file, and the options that name it beside its data."""
    path = tmp_path / "binding.json"
    CliRunner().invoke(app, ["bind", str(cache_path), "--data", str(mixed), "--out", str(path)])
    return path, ["--data", str(mixed), "--binding", str(path), "--json"]


def test_verify_asks_the_teacher_under_the_datas_keys(bound, cache_path, mixed, teacher_path):
    command = ["verify", str(cache_path), "--teacher", str(teacher_path)]
    done = CliRunner().invoke(app, [*command, *bound[1]])
    assert done.exit_code == 0, done.output
    asked = json.loads(done.stdout)["teacher"]
    # s000, s004 as `renamed`, s005 as itself or `copy`, s006 and s007 as each other, s008, s009.
    assert (asked["samples"], asked["absent"], asked["mismatches"]) == (7, 5, [])
    without = CliRunner().invoke(app, [*command, "--data", str(mixed), "--json"])
    assert {bad["key"] for bad in json.loads(without.stdout)["teacher"]["mismatches"]} >= {"s006", "s007"}


def test_verify_refuses_a_binding_that_it_would_not_use(bound, cache_path):
    path, _ = bound
    result = CliRunner().invoke(app, ["verify", str(cache_path), "--binding", str(path)])
    assert isinstance(result.exception, CachekdError)
    assert "--binding is for asking the teacher again" in str(result.exception)


@pytest.mark.parametrize(("key", "theirs"), [("renamed", "s004"), ("copy", "s005"), ("s006", "s007")])
def test_peek_shows_a_sample_under_the_datas_key(bound, cache_path, key, theirs):
    done = CliRunner().invoke(app, ["peek", str(cache_path), key, *bound[1]])
    assert done.exit_code == 0, done.exception
    (sample,) = json.loads(done.stdout)
    cache = LogitCache(cache_path)
    assert [token["id"] for token in sample["tokens"]] == cache[theirs].token_ids.tolist()
    assert sample["key"] == key
    assert sample["messages"]


def test_the_most_surprising_are_found_under_the_datas_keys(bound, cache_path):
    options = [*bound[1], "--order", "surprising", "--samples", "99"]
    done = CliRunner().invoke(app, ["peek", str(cache_path), *options])
    assert done.exit_code == 0, done.exception
    keys = {sample["key"] for sample in json.loads(done.stdout)}
    assert keys == {"s000", "renamed", "copy", "s005", "s006", "s007", "s008", "s009"}


def test_what_is_exported_has_the_datas_keys(cache_path, as_json, tmp_path):
    path = tmp_path / "binding.json"
    CliRunner().invoke(app, ["bind", str(cache_path), "--data", str(as_json), "--out", str(path)])
    data = ["--data", str(as_json), "--binding", str(path)]
    command = ["export", str(cache_path), str(tmp_path / "tars"), "--to", "webdataset"]
    assert isinstance(CliRunner().invoke(app, [*command, *data[:2]]).exception, CachekdError)
    done = CliRunner().invoke(app, [*command, *data, "--json"])
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["samples"] == 12
    tars = open_samples(tmp_path / "tars")
    assert sorted(tars.keys) == sorted(f"coco/{index}" for index in range(12))
    for index in range(12):
        there = tars.keys.index(f"coco/{index}")
        assert tars[there].content_hash == LogitCache(cache_path).sample_hash(KEYS[index])
    table = ["export", str(cache_path), str(tmp_path / "table"), "--to", "parquet", "--binding", str(path)]
    assert CliRunner().invoke(app, table).exit_code == 0
    rows = pq.read_table(tmp_path / "table" / "data").to_pylist()
    hashes = {row["key"]: row["content_hash"] for row in rows}
    assert {hashes[f"coco/{index}"] for index in range(12)} == {hashes[key] for key in KEYS}


def test_what_the_bound_data_lack_is_not_left_out_of_an_export(bound, cache_path, tmp_path):
    command = ["export", str(cache_path), str(tmp_path / "tars"), "--to", "webdataset"]
    result = CliRunner().invoke(app, [*command, *bound[1]])
    assert isinstance(result.exception, CachekdError)
    assert "the data lack samples of the cache" in str(result.exception)
    assert not (tmp_path / "tars").exists()
