"""`attn_implementation`: which kernels attention runs by, in dump, eval and train."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tiny_families
from cachekd.cache import LogitCache
from cachekd.cache.plan import read_plan
from cachekd.config import DumpConfig, EvalConfig, TrainConfig
from cachekd.dump import dump
from cachekd.dump.plan import command_of
from cachekd.errors import CachekdError
from cachekd.evaluate.run import evaluate
from cachekd.models import ModelFiles, loading
from cachekd.train.folder import STARTED_FILE, RunFolder
from cachekd.train.open import make_trainer
from caches import SMALL, files_of
from tiny_families import FAMILIES as TINY

CPU = torch.device("cpu")


@pytest.fixture
def no_weights(monkeypatch):
    """Whoever reads weights fails."""

    def fail(*_args, **_kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "_from_pretrained", fail)


def config(teacher: Path, data: Path, out: Path, **settings) -> DumpConfig:
    return DumpConfig(teacher=str(teacher), data=str(data), out=out, **SMALL | settings)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_family_runs_by_the_kernels_that_are_asked_for(tmp_path, family, implementation):
    path = tiny_families.save(tmp_path / family, family)
    files = ModelFiles(path)
    if implementation == "sdpa" and family in ("paligemma", "fast_vlm"):  # a soft cap; a ResNet
        with pytest.raises(CachekdError, match="leave it out"):
            files.require_attention(implementation)
        return
    model = files.load(dtype=torch.float32, device=CPU, attn_implementation=implementation)
    assert model.config.get_text_config()._attn_implementation == implementation
    assert files.config_sha256 == ModelFiles(path).config_sha256  # it is no part of what a model is
    model.save_pretrained(tmp_path / "saved")
    assert "attn_implementation" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("name", ["nonsense", "", "paged|sdpa", "flash_attention_2", "org/kernel"])
def test_what_cannot_run_is_refused_before_weights_are_read(
    tmp_path, teacher_path, student_path, data_path, settings, no_weights, name
):
    if find_spec("flash_attn") is not None or find_spec("kernels") is not None:
        pytest.skip("flash attention is installed")
    asked = {
        "dump": lambda: dump(config(teacher_path, data_path, tmp_path / "c", attn_implementation=name)),
        "eval": lambda: evaluate(
            EvalConfig(models=[str(student_path)], data=str(data_path), attn_implementation=name)
        ),
        "python": lambda: ModelFiles(teacher_path).load(
            dtype=torch.float32, device=CPU, attn_implementation=name
        ),
    }
    for whose in ("teacher", "student"):
        changed = settings | {f"{whose}_attn_implementation": name}
        asked[f"{whose}_attn_implementation"] = lambda changed=changed: make_trainer(
            TrainConfig(**changed), tmp_path / "checkpoints"
        )
    for what, ask in asked.items():
        with pytest.raises(CachekdError) as caught:
            ask()
        assert name in str(caught.value.found), what
        if what.endswith("implementation"):
            assert what in str(caught.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("family", TINY)
def test_flash_attention_is_refused_where_pictures_are_seen_both_ways(tmp_path, monkeypatch, family):
    """transformers' mask of flash attention drops the blocks without a word: `flash_attention_mask`."""
    installed = "transformers.modeling_utils.PreTrainedModel._flash_attn_can_dispatch"
    monkeypatch.setattr(installed, lambda *_a, **_k: True)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *_a, **_k: None)
    files = ModelFiles(tiny_families.save(tmp_path / family, family))
    if family in ("paligemma", "gemma3"):
        with pytest.raises(CachekdError, match="would not see the later ones"):
            files.require_attention("flash_attention_2")
    else:
        files.require_attention("flash_attention_2")


def test_a_dump_notes_it_and_goes_on_with_no_other(tmp_path, teacher_path, data_path):
    out = tmp_path / "c"

    def stop(phase: str, total: int | None, samples: int, tokens: int) -> None:
        if phase == "dump" and samples:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dump(config(teacher_path, data_path, out, attn_implementation="eager"), stop)
    for other in (None, "sdpa"):
        with pytest.raises(CachekdError, match="different setting attn_implementation") as caught:
            dump(config(teacher_path, data_path, out, attn_implementation=other))
        assert "eager" in str(caught.value.expected)
    plan = read_plan(out / "dump" / "plan.json")
    assert "--attn-implementation eager" in shlex.join(shlex.split(command_of(plan, out, skips=False)))
    dump(config(teacher_path, data_path, out, attn_implementation="eager"))
    assert LogitCache(out).manifest.sources[0].attn_implementation == "eager"


def test_a_dump_that_is_told_nothing_notes_nothing(tmp_path, teacher_path, data_path):
    """So that its plan and its manifest are, byte for byte, what earlier versions wrote and can read."""
    out = tmp_path / "c"
    dump(config(teacher_path, data_path, out))
    assert not any(b"attn" in content for content in files_of(out).values())


def test_a_run_that_an_earlier_version_began_goes_on(tmp_path, settings):
    """It noted no setting that came later; by default all is as it was, and otherwise it is another run."""
    trained = TrainConfig(**settings)
    trained.out.mkdir()
    noted = trained.deciding() | {"inputs": {}, "processes": 1}
    for name in TrainConfig.later():
        del noted[name]
    (trained.out / STARTED_FILE).write_text(json.dumps(noted))
    RunFolder(trained)
    with pytest.raises(CachekdError, match="begun with other settings") as caught:
        RunFolder(trained.model_copy(update={"student_attn_implementation": "eager"}))
    assert caught.value.expected == "student_attn_implementation: None"


def test_training_runs_by_the_kernels_that_each_model_is_told(tmp_path, settings):
    changed = {"teacher_attn_implementation": "eager", "student_attn_implementation": "sdpa"}
    trainer = make_trainer(TrainConfig(**settings | changed), tmp_path / "checkpoints")
    assert trainer.teacher.model.config._attn_implementation == "eager"
    assert trainer.vlm.config._attn_implementation == "sdpa"
