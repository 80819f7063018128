"""A cache depends on what an encoder makes of text; tokenizer and template may be the same all the while."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from cachekd.cache import LogitCache, Manifest, overview
from cachekd.cache.derive import merge_caches
from cachekd.cache.sealed import is_canonical
from cachekd.check.text import check_text
from cachekd.config import TrainConfig
from cachekd.data import SampleEncoder, encode
from cachekd.errors import CachekdError
from cachekd.hub.push import dataset_card
from cachekd.models import ModelFiles, load_processor
from cachekd.models.fingerprint import CONVERSATION, encode_conversation, encoding_fingerprint
from cachekd.train import train
from caches import copied, dump_cache, reseal, write_data
from templates import SHAPES, shape_processor
from tiny import checked, save_vlm, tiny_processor
from tiny_families import FAMILIES

BOS = "<|system|>"


def bos_processor():
    """LLaVA 1.5's way: the template writes no BOS, the tokenizer adds it."""
    processor = tiny_processor()
    tokenizer = processor.tokenizer
    tokenizer.bos_token = BOS
    added = [(BOS, tokenizer.convert_tokens_to_ids(BOS))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=added)
    return processor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return tuple(
        save_vlm(folder / name, bos_processor(), seed=seed)
        for seed, name in enumerate(("teacher", "student"))
    )


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    return write_data(folder / "0", 6), write_data(folder / "1", 6, start=6)


@pytest.fixture(scope="module")
def silent(tmp_path_factory, models, halves) -> Path:
    """A cache by an encoder that let the tokenizer add nothing: the teacher never saw its BOS."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encode, "_special_tokens", lambda *_: {"add_special_tokens": False})
        return dump_cache(tmp_path_factory.mktemp("caches") / "silent", models[0], halves[0], tail="none")


@pytest.fixture(scope="module")
def right(tmp_path_factory, models, halves) -> Path:
    return dump_cache(tmp_path_factory.mktemp("caches") / "right", models[0], halves[1], tail="none")


def older(cache: Path, out: Path) -> Path:
    """As if from before there was such a fingerprint."""
    copied(cache, out)
    reseal(out / "manifest.json", lambda values: values["fingerprints"].pop("encoding"))
    shutil.rmtree(out / "dump")
    return out


def test_a_student_that_reads_other_tokens_is_refused(silent, right, models, halves, tmp_path):
    config = TrainConfig(
        student=str(models[1]), data=str(halves[0]), cache=silent, out=tmp_path / "run", lambda_vsd=0
    )
    with pytest.raises(CachekdError, match="different encoding of text than the student's") as caught:
        train(config)
    theirs = Manifest.load(silent).fingerprints.encoding
    ours = encoding_fingerprint(SampleEncoder(load_processor(str(models[1]))))
    assert theirs != ours
    assert f"expected: sha256 {theirs}" in str(caught.value)
    assert f"found: sha256 {ours}" in str(caught.value)
    assert Manifest.load(right).fingerprints.encoding == ours
    settings = {"data": str(halves[1]), "cache": right, "training": {"max_steps": 1}}
    assert train(TrainConfig(**config.model_dump() | settings)).steps == 1


def test_a_dump_is_not_gone_on_with_by_another_encoder(silent, right, models, halves, tmp_path):
    begun = copied(silent, tmp_path / "begun")
    for name in ("manifest.json", "shards/00000.zarr.zip", "dump/00000.json"):
        (begun / name).unlink()
    with pytest.raises(CachekdError, match="different encoding of a probe text"):
        dump_cache(begun, models[0], halves[0], tail="none")
    with pytest.raises(CachekdError, match="different encoding of a probe text"):
        merge_caches([silent, right], tmp_path / "merged")


def test_of_an_older_cache_the_encoding_is_not_known(silent, right, models, halves, tmp_path):
    old = older(silent, tmp_path / "old")
    assert is_canonical(old / "manifest.json")
    manifest = Manifest.load(old)
    assert manifest.fingerprints.encoding is None
    assert manifest.to_json() == (old / "manifest.json").read_bytes()
    check_text(LogitCache(old), ModelFiles(models[1]))
    assert merge_caches([right, old], tmp_path / "merged").fingerprints.encoding is None


def test_it_is_shown(right, models, halves):
    manifest = Manifest.load(right)
    found = manifest.fingerprints.encoding
    assert overview.fingerprints(manifest)["encoding"] == found
    assert found in dataset_card(manifest, "org/c", None)
    unknown = manifest.fingerprints.model_copy(update={"encoding": None})
    unknown_manifest = manifest.model_copy(update={"fingerprints": unknown})
    assert "encoding" not in overview.fingerprints(unknown_manifest)
    assert "encoding" not in json.dumps(unknown.model_dump())
    report = checked(str(models[0]), str(models[1]), str(halves[1]), cache=right)
    assert {row.name: row.state for row in report.rows}["encoding"] == "ok"


def test_the_pair_is_told_before_a_dump(models, halves, tmp_path):
    """Another kind of processor, with the same tokenizer and template, may ask for other special tokens."""
    student = shutil.copytree(models[1], tmp_path / "student")
    settings = json.loads((student / "tokenizer.json").read_text())
    settings["post_processor"] = None
    (student / "tokenizer.json").write_text(json.dumps(settings))
    report = checked(str(models[0]), str(student), str(halves[0]))
    rows = {row.name: row for row in report.rows}
    assert rows["encoding"].state == "note"
    assert "in different ways" in str(rows["encoding"].found)
    assert "--align-vocabulary cells" in str(rows["encoding"].fix)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_one(name):
    processor = FAMILIES[name].processor()
    ids, supervised = encode_conversation(SampleEncoder(processor))
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) not in ids
    text = processor.tokenizer.decode(ids[supervised])
    answers = [turn["content"][0]["text"] for turn in CONVERSATION if turn["role"] == "assistant"]
    assert all(answer in text for answer in (answers if name != "paligemma" else answers[:1]))
    assert encoding_fingerprint(SampleEncoder(processor)) == encoding_fingerprint(SampleEncoder(processor))


def test_a_template_that_takes_no_text_alone_has_none():
    wants = "{% if messages[0]['content'][0]['type'] == 'text' and messages[0]['content'][0]['text'] "
    wants += "!= 'question' %}{{ raise_exception('an image') }}{% endif %}"
    processor = tiny_processor()
    encoder = SampleEncoder(processor)
    assert encoding_fingerprint(encoder) is not None
    processor.chat_template = wants + processor.chat_template
    assert encoding_fingerprint(SampleEncoder(processor)) is None


def test_the_probe_has_not_changed():
    """Caches hold what became of it."""
    found = encoding_fingerprint(SampleEncoder(shape_processor(next(iter(SHAPES)))))
    assert found == "a8e3a97af00ede54dfbe9c66218c7fdbc10382f83561b4e25755c1a40b4ae4cb"
