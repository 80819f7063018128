"""Fixtures shared by the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_vlm, tar_members, tiny_processor, write_tar

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    return save_vlm(folder / "teacher", tiny_processor(), text_width=48, vision_layers=3, seed=1)


@pytest.fixture(scope="session")
def student_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vlm(tmp_path_factory.mktemp("models") / "student", tiny_processor(), seed=2)


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    members = tar_members(12)
    write_tar(folder / "0.tar", members[:14])
    write_tar(folder / "1.tar", members[14:])
    return folder


@pytest.fixture(scope="session")
def cache_path(tmp_path_factory: pytest.TempPathFactory, teacher_path: Path, data_path: Path) -> Path:
    from cachekd.config import DumpConfig
    from cachekd.dump import dump

    out = tmp_path_factory.mktemp("caches") / "cache"
    dump(DumpConfig(teacher=str(teacher_path), data=str(data_path), out=out, batch_size=4))
    return out
