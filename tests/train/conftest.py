"""Fixtures shared by the tests of training."""

from __future__ import annotations

import pytest


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
