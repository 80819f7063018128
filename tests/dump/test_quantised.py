"""A quantised teacher through all stages: what its cache says, and beside what it is used."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import pytest
import torch

from cachekd.cache import LogitCache
from cachekd.cache.manifest import Manifest
from cachekd.config import DataOptions, DumpConfig, TrainConfig
from cachekd.data import open_samples
from cachekd.dump import dump
from cachekd.dump.plan import command_of
from cachekd.dump.recheck import recheck, tolerance_of
from cachekd.dump.run import load_teacher, teacher_files
from cachekd.errors import CachekdError
from cachekd.train.open import make_trainer
from cachekd.train.run import train
from cachekd_cli.evaluate import short_names
from runs import losses
from tiny import evaluated

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}


def dumped(teacher: Path, data: Path, out: Path, **settings) -> Path:
    dump(DumpConfig(teacher=str(teacher), data=str(data), out=out, batch_size=4, **settings))
    return out


@pytest.fixture(scope="module")
def quantised(tmp_path_factory, teacher_path, data_path) -> Path:
    return dumped(teacher_path, data_path, tmp_path_factory.mktemp("q") / "nf4", quantization="4bit")


def test_the_manifest_says_how_the_teacher_was_quantised(quantised, cache_path):
    ours, plain = Manifest.load(quantised).teacher, Manifest.load(cache_path).teacher
    assert ours.quantization.backend == "bitsandbytes"
    assert ours.quantization.settings["bnb_4bit_quant_type"] == "nf4"
    assert ours.quantization.settings["llm_int8_skip_modules"] == ["lm_head", "model.vision_tower"]
    assert (ours.config_sha256, ours.weights_sha256) == (plain.config_sha256, plain.weights_sha256)
    assert plain.quantization is None
    assert "quantization" not in json.loads((cache_path / "manifest.json").read_text())["teacher"]


def test_a_dump_goes_on_with_its_own_quantisation_alone(teacher_path, data_path, quantised, tmp_path):
    half = {"shard_samples": 4, "quantization": "4bit"}
    out = tmp_path / "two"
    whole = dumped(teacher_path, data_path, tmp_path / "whole", **half)
    dumped(teacher_path, data_path, out, **half, world_size=2, rank=0)
    for other in (None, "8bit", FP4):
        with pytest.raises(CachekdError, match="made with a different teacher's quantisation") as caught:
            dumped(teacher_path, data_path, out, shard_samples=4, quantization=other)
        assert "more" not in caught.value.problem
        assert (caught.value.found == "teacher's quantisation none") is (other is None)
    dumped(teacher_path, data_path, out, shard_samples=4, quantization=FP4 | {"bnb_4bit_quant_type": "nf4"})
    assert (out / "manifest.json").read_bytes() == (whole / "manifest.json").read_bytes()


def test_the_command_that_goes_on_names_the_quantisation(quantised):
    from cachekd.cache.build import find_plan

    plan = find_plan(quantised)
    assert plan is not None
    words = shlex.split(command_of(plan, quantised, skips=False))
    given = json.loads(words[words.index("--quantization") + 1])
    assert given == plan.teacher.quantization.setting
    assert DumpConfig(teacher="t", data="d", out="o", quantization=json.dumps(given)).quantization == given


def test_a_part_of_a_cache_keeps_what_it_says(quantised, tmp_path):
    from caches import select_samples

    keys = list(LogitCache(quantised))[:2]
    part = select_samples(quantised, tmp_path / "part", keys)
    assert part.teacher == Manifest.load(quantised).teacher
    assert Manifest.load(tmp_path / "part").teacher == part.teacher


def test_caches_of_teachers_that_are_quantised_otherwise_are_not_merged(quantised, cache_path, tmp_path):
    from cachekd.cache.derive import merge_caches

    with pytest.raises(CachekdError, match="teacher's quantisation"):
        merge_caches([quantised, cache_path], tmp_path / "both")


# ---- verify


@pytest.mark.parametrize("setting", ["4bit", "8bit"])
def test_the_teacher_says_the_same_again(teacher_path, data_path, tmp_path, setting):
    """One by one, not in the dump's batches: the bound has to hold for a backend that looks at batches."""
    cache = LogitCache(dumped(teacher_path, data_path, tmp_path / "cache", quantization=setting))
    files, samples = teacher_files(str(teacher_path), DataOptions.of(str(data_path))), open_samples(data_path)
    said = cache.manifest.teacher.quantization.setting
    model = load_teacher(files, samples, "stop", cache.manifest.codec, "float32", quantization=said)
    result = recheck(cache, model, samples, 99)
    assert result.tokens > 0
    assert not result.mismatches
    assert (
        tolerance_of(cache.manifest.teacher) == {"4bit": 0.01, "8bit": 0.1}[setting]
    )  # float32's, float16's
    plain = load_teacher(files, samples, "stop", cache.manifest.codec, "float32")
    with pytest.raises(CachekdError, match="different teacher's quantisation"):
        recheck(cache, plain, samples, 99)


# ---- training


@pytest.fixture
def settings(tmp_path, student_path, teacher_path, data_path, quantised) -> dict:
    return {
        "student": str(student_path),
        "teacher": str(teacher_path),
        "data": str(data_path),
        "cache": str(quantised),
        "out": tmp_path / "run",
        "batch_size": 4,
        "logging_steps": 1,
    }


def test_a_plain_cache_beside_a_quantised_teacher_is_said_in_the_log(settings, cache_path, caplog):
    caplog.set_level(logging.WARNING)
    train(TrainConfig(**settings | {"cache": str(cache_path)}, teacher_quantization="4bit"))
    said = "the cache's teacher was not quantised, the one that runs is bitsandbytes (bnb_4bit_quant"
    assert sum(said in message for message in caplog.messages) == 1
    assert all(vsd > 0 for *_, vsd in losses(settings["out"]))


def test_the_same_quantisation_on_both_sides_is_no_word_worth(settings, caplog):
    train(TrainConfig(**settings, teacher_quantization=FP4 | {"bnb_4bit_quant_type": "nf4"}))
    assert not [message for message in caplog.messages if "quantised" in message]
    assert len(losses(settings["out"])) == 3


@pytest.mark.parametrize("other", [None, "8bit", FP4])
def test_a_quantised_cache_beside_another_teacher_is_refused_unless_it_is_accepted(settings, other, caplog):
    with pytest.raises(CachekdError, match="quantised differently") as caught:
        train(TrainConfig(**settings, teacher_quantization=other))
    assert "--teacher-mismatch accept" in caught.value.fix
    assert not settings["out"].exists()
    train(TrainConfig(**settings, teacher_quantization=other, teacher_mismatch="accept"))
    assert any("the cache's teacher was bitsandbytes" in message for message in caplog.messages)


def test_adapters_train_on_a_quantised_student(settings):
    """QLoRA in 4 bit, whose layers are in eval mode for the split's proof."""
    pytest.importorskip("peft")
    lora = {"r": 4, "target_modules": "all-linear"}
    config = TrainConfig(**settings, teacher_quantization="4bit", student_quantization="4bit", lora=lora)
    train(config)
    assert len(losses(config.out)) == 3


def test_a_student_that_is_saved_quantised_needs_adapters(settings, student_path, tmp_path):
    from cachekd.models import ModelFiles

    files, folder = ModelFiles(student_path), tmp_path / "small"
    files.load(dtype=torch.float32, device=torch.device("cpu"), quantization="4bit").save_pretrained(folder)
    files.processor.save_pretrained(folder)
    with pytest.raises(CachekdError, match="quantised weights cannot be trained") as caught:
        train(TrainConfig(**settings | {"student": str(folder)}, teacher_quantization="4bit"))
    assert str(folder) in caught.value.where


def test_what_is_not_packed_of_a_quantised_student_is_in_its_dtype(settings):
    lora = {"r": 2, "target_modules": "all-linear"}
    config = TrainConfig(
        **settings,
        teacher_quantization="4bit",
        student_quantization="4bit",
        student_dtype="bfloat16",
        dtype="bfloat16",
        lora=lora,
    )
    student = make_trainer(config, settings["out"]).vlm
    frozen = {p.dtype for p in student.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16, torch.uint8}
    assert {p.dtype for p in student.parameters() if p.requires_grad} == {torch.float32}


def test_held_out_data_of_a_teacher_that_was_quantised_otherwise(settings, data_path, cache_path):
    held_out = {"eval_data": str(data_path), "teacher_quantization": "4bit"}
    with pytest.raises(CachekdError, match="teacher's quantisation"):
        train(TrainConfig(**settings, **held_out, eval_cache=str(cache_path)))
    accepted = {"teacher_mismatch": "accept", "eval_cache": str(cache_path)}
    assert train(TrainConfig(**settings, **held_out, **accepted)).steps == 3


@pytest.mark.parametrize("stage", ["dump", "eval"])
def test_a_value_that_the_backend_fails_at_is_named(stage, tmp_path, teacher_path, data_path):
    setting = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp5"}
    run = {
        "dump": lambda: dumped(teacher_path, data_path, tmp_path / "c", quantization=setting),
        "eval": lambda: evaluated(
            [str(teacher_path)], data_path, teacher=str(teacher_path), quantization=setting
        ),
    }[stage]
    with pytest.raises(CachekdError, match="cannot quantise the model with these settings") as caught:
        run()
    assert "bnb_4bit_quant_type: fp5" in caught.value.found
    assert not (tmp_path / "c").exists()


# ---- evaluation


def test_scores_by_the_cache_of_a_quantised_teacher_say_so(quantised, cache_path, student_path, data_path):
    settings = {"models": [str(student_path)], "data": data_path, "history": "full"}
    by_cache = evaluated(**settings, cache=str(quantised)).teacher_quantization
    assert by_cache == Manifest.load(quantised).teacher.quantization
    assert evaluated(**settings, cache=str(cache_path)).teacher_quantization is None


def test_the_teacher_alone_is_quantised_in_an_evaluation(teacher_path, student_path, data_path):
    settings = {"teacher": str(teacher_path), "blind": False}
    plain = evaluated([str(teacher_path), str(student_path)], data_path, **settings)
    found = evaluated([str(teacher_path), str(student_path)], data_path, **settings, quantization="4bit")
    assert plain.models[0].kl == pytest.approx(0, abs=1e-6)
    assert 1e-6 < found.models[0].kl < 0.1
    assert [one.correct for one in found.models] == [one.correct for one in plain.models]
    assert plain.teacher_quantization is None
    assert found.teacher_quantization.settings["bnb_4bit_quant_type"] == "nf4"
    assert short_names(found)[f"teacher {teacher_path}"] == "teacher, quantised"
    with pytest.raises(CachekdError, match="no teacher to quantise"):
        evaluated([str(student_path)], data_path, quantization="4bit")
