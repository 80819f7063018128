"""Fixtures shared by the end-to-end tests."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

# What is large is imported in fixtures: the process that hands out the tests to others runs none.
if TYPE_CHECKING:
    from cards import Card
    from hub_server import HubServer

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What tests fork from has all this imported, so that a start takes a tenth of a second instead of five.
multiprocessing.set_forkserver_preload(
    [
        "cachekd.dump.run",
        "cachekd.evaluate.run",
        "cachekd.train.run",
        "cachekd_cli.main",
        "transformers.models.clip.modeling_clip",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llava.modeling_llava",
    ]
)


def pytest_configure(config: pytest.Config) -> None:
    """A GPU is hidden, from what is launched too: what the tests expect a CPU computes, but for `-m gpu`."""
    if not _sees_a_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["ACCELERATE_USE_CPU"] = "true"  # MPS and others have no such variable


def _sees_a_gpu(config: pytest.Config) -> bool:
    return "gpu" in config.option.markexpr.replace("not gpu", "")


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Files that start processes come first: one of two workers has them all, and their fork server."""
    forking = {item.module for item in items if "forkserver" in item.name or _launches(item.module)}
    items.sort(key=lambda item: item.module not in forking)


@cache
def _launches(module: ModuleType) -> bool:
    return any(getattr(value, "__module__", None) == "launch" for value in vars(module).values())


@pytest.fixture(scope="session", autouse=True)
def hash_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEKD_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread_and_nothing_made_in_vain(pytestconfig: pytest.Config) -> None:
    import torch
    import typer.testing
    from transformers import GenerationConfig, PreTrainedConfig

    import second_device

    torch.set_num_threads(1)
    if not _sees_a_gpu(pytestconfig):
        second_device.register()
    # Or a runner builds all twenty commands anew at each call.
    typer.testing._get_command = cache(typer.testing._get_command)
    # Or each model that is loaded has its configurations written out four times, for a log that nobody reads.
    PreTrainedConfig.__repr__ = GenerationConfig.__repr__ = object.__repr__


@pytest.fixture(scope="module", autouse=True)
def _what_was_imported_is_no_garbage() -> None:
    """A quarter of all time went into looking through modules for it, after every training and evaluation."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    import huggingface_hub

    from hub_server import TOKEN, running_hub

    with running_hub() as server:
        # What HF_ENDPOINT sets, but it is read when the client is imported.
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = template.replace(huggingface_hub.constants.ENDPOINT, server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_vlm, tiny_processor

    folder = tmp_path_factory.mktemp("models")
    return save_vlm(folder / "teacher", tiny_processor(), text_width=48, vision_layers=3, seed=1)


@pytest.fixture(scope="session")
def student_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import save_vlm, tiny_processor

    return save_vlm(tmp_path_factory.mktemp("models") / "student", tiny_processor(), seed=2)


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny import tar_members, write_tar

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


@pytest.fixture(scope="session")
def broken_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 samples, some of which cannot be used: one in the second shard of six, all of the third."""
    from caches import write_data

    return write_data(tmp_path_factory.mktemp("broken-data"), 20, bad=(7, 12, 13, 14, 15, 16, 17))


@pytest.fixture(scope="session")
def skipping_cache(tmp_path_factory: pytest.TempPathFactory, teacher_path: Path, broken_data: Path) -> Path:
    """A cache with everything: shards 0, 1 and 3, a tail sketch, skipped.jsonl, plan and records."""
    from caches import dump_cache

    out = tmp_path_factory.mktemp("caches") / "skipping"
    return dump_cache(out, teacher_path, broken_data, on_error="skip")


@pytest.fixture(scope="session")
def unequal_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 samples of 29 to 188 tokens."""
    from tiny import unequal_members, write_tar

    folder = tmp_path_factory.mktemp("unequal")
    write_tar(folder / "0.tar", unequal_members(96))
    return folder


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """The card of all models that are loaded; it has endless memory, until a test says how much."""
    from cachekd.models import model_files
    from cards import Card

    found = Card()
    monkeypatch.setattr(model_files, "load_model", found.load)
    return found


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 96 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a failed write's file may still be open
