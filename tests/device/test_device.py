"""Dump, train, evaluate, verify and roundtrip on another device give what they give on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from cachekd.cache import LogitCache
from cachekd.cache.roundtrip import roundtrip
from cachekd.cache.topk import select_topk
from cachekd.config import DumpConfig, TrainConfig
from cachekd.data import collate
from cachekd.data.collate import ModelInputs
from cachekd.dump import dump
from cachekd.dump import run as stage_one
from cachekd.errors import CachekdError
from cachekd.lmms.answer import Answer, Answerer, Generation
from cachekd.models import (
    ModelFiles,
    SwitchedTeacher,
    capture_vision,
    default_device,
    hidden_and_logits_at,
    logits_at,
)
from cachekd.train import train
from cachekd.train.open import make_trainer
from cachekd_cli.main import app
from caches import VOCAB, dump_cache, files_of, model_states, token_ids, write_data
from devices import on_cpu
from family_samples import TALL, WIDE, encoder_of, every_family
from runs import CutShort, losses
from tiny import evaluated, save_vlm, tiny_processor, write_llava_json
from tiny_families import build, save
from tokenizer_pairs import save_student

WAITS = 16  # of the CPU for the device, in a step with all terms
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 8)


@pytest.fixture(scope="module")
def cpus_cache(tmp_path_factory, teacher_path, data) -> Path:
    with on_cpu():
        return dump_cache(tmp_path_factory.mktemp("cpu") / "cache", teacher_path, data, **DUMP)


DUMP = {"tail": "bytes=16", "dtype": "float32"}


# ---- stage one


@pytest.mark.parametrize(("tail", "dtype"), [("bytes=16", "float32"), ("none", "bfloat16")])
def test_a_dump(device, tmp_path, teacher_path, data, tail, dtype):
    """Byte for byte; on a GPU within the bounds of `verify`, asked on either of the two."""
    settings = {"tail": tail, "dtype": dtype}
    ours = dump_cache(tmp_path / "ours", teacher_path, data, **settings)
    with on_cpu():
        cpus = dump_cache(tmp_path / "cpus", teacher_path, data, **settings)
        if not device.exact:
            verify(ours, teacher_path, data)
    verify(cpus, teacher_path, data)
    if device.exact:
        assert files_of(ours) == files_of(cpus)


def verify(cache: Path, teacher: Path, data: Path) -> None:
    command = ["verify", str(cache), "--teacher", str(teacher), "--data", str(data), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, (done.output, done.exception)
    assert json.loads(done.stdout)["ok"] is True


@pytest.mark.parametrize("tail", ["none", "bytes=16", "exact"])
def test_a_roundtrip(device, tail):
    hidden, head = model_states(200, 16, VOCAB)
    values = (hidden, head, token_ids(200))
    cpus, _ = roundtrip(*values, tail=tail, top_k=16)
    ours, _ = roundtrip(*(x.to(device.device) for x in values), tail=tail, top_k=16)
    if device.exact:
        assert torch.equal(ours.everywhere(), cpus.everywhere())
    else:
        off = (ours.everywhere() - cpus.everywhere()).abs()
        assert float(off.mean()) < 0.01


@every_family
def test_a_familys_logits_and_gradients(device, family):
    """What a dump computes of a batch, and what a step does of both paths."""
    encoder = encoder_of(family)
    encoded = [encoder(one) for one in (WIDE, TALL)]
    batch = ModelInputs.of(collate(encoded, encoder.processor.tokenizer.pad_token_id))

    def found(where: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        teacher, student = (build(family, text_width=width, seed=seed) for width, seed in ((24, 1), (16, 2)))
        teacher, student, inputs = teacher.to(where), student.to(where), batch.to(where)
        with torch.no_grad():
            hidden, logits = hidden_and_logits_at(teacher, inputs.tensors, inputs.positions)
            kept = select_topk(logits, inputs.token_ids, top_k=8, window=16)
        with capture_vision(student) as vision:
            own = logits_at(student, inputs.tensors, inputs.positions)
        switched = SwitchedTeacher(teacher).logits(vision.output, inputs.tensors, inputs.positions)
        (own.logsumexp(-1).sum() + switched.logsumexp(-1).sum()).backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        mass = torch.from_numpy(kept.tail_logmass)
        return {"hidden": hidden, "logits": logits, "mass": mass, "own": own, "switched": switched}, gradients

    (ours, ours_back), (cpus, cpus_back) = found(device.device), on_the_cpu(found)
    device.assert_close(ours, cpus)
    device.assert_close(ours_back, cpus_back, share=1e-3)  # what reaches a weight twice is added in any order


def on_the_cpu(found: Any) -> Any:
    with on_cpu():
        return found(torch.device("cpu"))


# ---- stage two

TRAININGS: dict[str, dict[str, Any]] = {
    "cached": {},
    "chunked and recomputed": {"logit_chunk": 5, "gradient_checkpointing": True},
    "adapters, accumulated": {"lora": LORA, "batch_size": 2, "gradient_accumulation": 2},
    "live, by workers": {"cache": None, "live_teacher": True, "workers": 2},
    "evaluated": {"eval_data": "data", "eval_cache": "cache", "training": {"load_best_model_at_end": True}},
    "bridged": {"switch_bridge": "linear"},
    "two tokenizers": {"align_vocabulary": "cells", "logit_chunk": 5},
    "two tokenizers, live, by workers": {"cache": None, "live_teacher": True, "workers": 2}
    | {"align_vocabulary": "cells"},
}


@pytest.fixture
def settings(tmp_path, student_path, teacher_path, data, cpus_cache) -> dict[str, Any]:
    paths = {"student": student_path, "teacher": teacher_path, "data": data, "cache": cpus_cache}
    rest = {"out": tmp_path / "run", "batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "workers": 0}
    return {name: str(path) for name, path in paths.items()} | rest | {"dtype": "float32"}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training(device, settings, tmp_path, name):
    changed = dict(TRAININGS[name])
    for key in ("eval_data", "eval_cache"):
        if key in changed:
            changed[key] = settings[changed[key]]
    if name == "bridged":
        student = tiny_processor(patch_size=16)
        changed["student"] = str(
            save_vlm(tmp_path / "student", student, vision_width=48, patch_size=16, seed=2)
        )
    if name.startswith("two tokenizers"):
        changed["student"] = str(save_student(tmp_path / "student", "vicuna"))
    config = TrainConfig(**settings | changed)
    train(config)
    with on_cpu():
        cpus = config.model_copy(update={"out": tmp_path / "cpu"})
        train(cpus)
    assert len(losses(config.out)) == 2
    device.assert_close(losses(config.out), losses(cpus.out))
    assert weights(config.out).keys() == weights(cpus.out).keys()
    if device.exact:  # a GPU's rounding may turn the sign of a gradient near 0, and Adam's step with it
        device.assert_close(weights(config.out), weights(cpus.out), share=1e-4)  # see above


def weights(run: Path) -> dict[str, Any]:
    found = {}
    for file in run.rglob("*.safetensors"):
        found |= {f"{file.relative_to(run)} {name}": value for name, value in load_file(file).items()}
    return found


def test_a_run_that_is_cut_short_goes_on(device, settings, tmp_path):
    whole = TrainConfig(**settings | {"batch_size": 3, "save_steps": 2})
    train(whole)
    cut = whole.model_copy(update={"out": tmp_path / "cut"})
    with pytest.raises(KeyboardInterrupt):
        train(cut, [CutShort(2)])
    assert train(cut).resumed_from == 2
    device.assert_close(losses(cut.out), losses(whole.out))


@pytest.mark.parametrize("tokenizers", [1, 2])
def test_a_step_rarely_waits_for_the_device(device, settings, tmp_path, capsys, tokenizers):
    """For numbers and lengths that transformers asks for in each forward, not per token or term."""
    if tokenizers == 2:
        settings["student"] = str(save_student(tmp_path / "student", "vicuna"))
        settings["align_vocabulary"] = "cells"
    trainer = make_trainer(TrainConfig(**settings), settings["out"])
    trainer.create_optimizer()
    batches = list(trainer.get_train_dataloader())
    trainer.training_step(trainer.model, batches[0], None)  # what is measured once
    with device.counted_waits() as waits:
        trainer.training_step(trainer.model, batches[1], None)
    with capsys.disabled():
        print(f"\nwaits of a step: {waits.count}")
    assert 0 < waits.count <= WAITS


def test_an_evaluation(device, student_path, teacher_path, data):
    models, settings = [student_path, teacher_path], {"teacher": str(teacher_path), "dtype": "float32"}
    ours = evaluated(models, data, **settings).models
    with on_cpu():
        cpus = evaluated(models, data, **settings).models
    for one, other in zip(ours, cpus, strict=True):
        assert one.exact_match == other.exact_match
        device.assert_close((one.kl, one.top1_agreement), (other.kl, other.top1_agreement))


@every_family
def test_answers(device, tmp_path, family):
    files = ModelFiles(save(tmp_path / family, family))
    prompts = [files.encoder.prompt(replace(one, messages=one.messages[:1])) for one in (WIDE, TALL)]

    def found(where: torch.device) -> list[Answer]:
        model = files.load(dtype=torch.float32, device=where)
        return Answerer(model, files).answer(prompts, Generation(new_tokens=4))

    ours = found(default_device())
    with on_cpu():
        assert ours == found(default_device())


def test_an_evaluation_across_tokenizers(device, tmp_path, teacher_path, data):
    """Live and by a cache: what is compared over cells lies where the models do."""
    other = save_student(tmp_path, "chatml")
    cache = tmp_path / "cache"
    dump(DumpConfig(teacher=str(teacher_path), data=str(data), out=cache, tail="exact", dtype="float32"))
    for by in ({"teacher": str(teacher_path)}, {"cache": str(cache)}):
        settings = {"history": "full", "dtype": "float32", "blind": False} | by
        [ours] = evaluated([other], data, **settings).models
        with on_cpu():
            [cpus] = evaluated([other], data, **settings).models
        assert ours.over_cells == cpus.over_cells
        assert ours.over_cells.compared > 0
        device.assert_close((ours.kl, ours.top1_agreement), (cpus.kl, cpus.top1_agreement))


# ---- what goes wrong


def test_a_token_without_an_embedding_leaves_the_device_as_it_was(device, tmp_path, monkeypatch):
    """Looked up on a GPU, it is an assertion after which every other sample would be bad."""
    processor = tiny_processor()
    teacher = save_vlm(tmp_path / "teacher", processor, vocab_size=len(processor.tokenizer) - 1)
    data = write_llava_json(tmp_path / "data", 12)
    # As if no configuration said how many rows there are.
    monkeypatch.setattr(stage_one, "teacher_files", lambda path, _: ModelFiles(path))
    settings = {"batch_size": 4, "on_error": "skip", "dtype": "float32"}
    config = DumpConfig(teacher=str(teacher), data=str(data), out=tmp_path / "c", **settings)
    summary = dump(config)
    assert summary.skipped > 0
    assert summary.samples == 12 - summary.skipped > 0
    lines = map(json.loads, (tmp_path / "c" / "skipped.jsonl").read_text().splitlines())
    assert all("beyond the 317 rows" in line["reason"] for line in lines)


def test_memory_that_runs_out_in_a_dump_leaves_what_is_finished(device, tmp_path, teacher_path):
    data = write_data(tmp_path / "data", 16)
    settings = {"shard_samples": 4, "batch_size": 4, "tail": "none", "calibration_tokens": 10}
    settings["dtype"] = "float32"
    config = DumpConfig(teacher=str(teacher_path), data=str(data), out=tmp_path / "c", **settings)
    whole = dump_cache(tmp_path / "whole", teacher_path, data, **settings)
    memory = device.no_memory()

    def progress(*said: Any) -> None:
        if (tmp_path / "c" / "shards").exists() and not held:
            held.append(memory.__enter__())

    held: list[None] = []
    try:
        with pytest.raises(CachekdError, match="the GPU's memory is too small for this batch") as caught:
            dump(config, progress)
    finally:
        if held:
            memory.__exit__(None, None, None)
    assert "--batch-tokens 120: what is finished stays" in str(caught.value)
    finished, *_ = sorted((tmp_path / "c" / "shards").iterdir())
    before = finished.stat().st_mtime_ns
    assert dump(config).finished
    assert finished.stat().st_mtime_ns == before
    assert LogitCache(tmp_path / "c").manifest.tokens == LogitCache(whole).manifest.tokens
