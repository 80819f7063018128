"""Fixtures shared by the tests of training."""

from __future__ import annotations

import pytest

from tiny import save_vlm, tiny_processor, tiny_vlm, write_llava_json


@pytest.fixture
def settings(tmp_path, student_path, teacher_path, data_path, cache_path) -> dict:
    return {
        "student": str(student_path),
        "teacher": str(teacher_path),
        "data": str(data_path),
        "cache": str(cache_path),
        "out": tmp_path / "run",
        "batch_size": 4,
        "epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A teacher and a student, data, and settings that they share; and the folder that they are in."""
    folder = tmp_path_factory.mktemp("pair")
    processor = tiny_processor()
    teacher = tiny_vlm(processor, text_width=48, seed=1)
    teacher.lm_head.weight.data *= 100  # an opinion: random weights have next to none
    teacher.save_pretrained(folder / "teacher")
    processor.save_pretrained(folder / "teacher")
    settings = {
        "teacher": str(folder / "teacher"),
        "student": str(save_vlm(folder / "student", tiny_processor(), seed=2, vocab_size=448)),
        "data": str(write_llava_json(folder / "data", 16)),
        "batch_size": 4,
        "epochs": 5,
        "logging_steps": 1,
        "save_steps": 0,
    }
    return settings, folder
