"""Teacher and student with different tokenizers, templates and special tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from caches import cached
from templates import shape_processor
from tiny import save_vlm, tiny_processor, tiny_vlm, write_llava_json

from cachekd.cache import LogitCache
from cachekd.config import TrainConfig
from cachekd.errors import CachekdError
from cachekd.losses import cross_entropy_loss, dbild_loss
from cachekd.models import load_model, load_processor, logits_at
from cachekd.paths import RUN_FILE
from cachekd.train import train
from cachekd.train.open import make_trainer

CPU = torch.device("cpu")
STUDENTS = ("vicuna", "chatml", "gemma", "idefics")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A teacher, a student of its tokenizer, and students of others with the very same vision encoder."""
    folder = tmp_path_factory.mktemp("across")
    processor = tiny_processor()
    teacher = tiny_vlm(processor, text_width=48, seed=1)
    teacher.lm_head.weight.data *= 100  # an opinion
    teacher.save_pretrained(folder / "teacher")
    processor.save_pretrained(folder / "teacher")
    same = save_vlm(folder / "same", tiny_processor(), seed=2)
    eyes = load_model(str(same), dtype=torch.float32, device=CPU).model.vision_tower
    for name in STUDENTS:
        processor = shape_processor(name)
        student = tiny_vlm(processor, seed=3, vocab_size=len(processor.tokenizer) + 40)
        student.model.vision_tower.load_state_dict(eyes.state_dict())
        student.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    write_llava_json(folder / "data", 12)
    return folder


@pytest.fixture
def settings(folder, tmp_path) -> dict:
    settings = {
        "teacher": str(folder / "teacher"),
        "data": str(folder / "data" / "data.json"),
        "student": str(folder / "vicuna"),
        "batch_size": 4,
        "epochs": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_steps": 0,
        "align_vocabulary": "cells",
        "out": tmp_path / "run",
    }
    return settings | {"cache": str(cached(settings, folder, tail="exact"))}


@pytest.mark.parametrize("student", STUDENTS)
def test_a_pair_trains(settings, folder, student):
    summary = train(TrainConfig(**settings | {"student": str(folder / student)}))
    assert set(summary.terms) == {"ce", "align", "vsd"}
    print(summary)
