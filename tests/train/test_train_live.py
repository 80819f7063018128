"""Cached against live, term by term over the first steps.

At the default learning rate: at larger ones two runs that differ by 1e-4 drift
apart, since Kneedle's k jumps.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor

from cachekd.cache import LogitCache
from cachekd.config import TrainConfig
from cachekd.data import SampleEncoder, open_samples, predicting_positions
from cachekd.errors import CachekdError
from cachekd.losses.targets import DenseTargets
from cachekd.models import load_model, load_processor, logits_at
from cachekd.train.batch import collate_with_targets
from cachekd.train.open import make_trainer
from caches import ROOT, cached
from launch import output_of
from tiny import save_vlm, tiny_processor

EXAMPLE = ROOT / "examples" / "easy_vqa"
CPU = torch.device("cpu")


def first_steps(config: TrainConfig, folder: Path) -> list[dict[str, float]]:
    """The terms of each step."""
    trainer = make_trainer(config, folder)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "ce" in entry]


def drift(steps: list[dict[str, float]], reference: list[dict[str, float]]) -> dict[str, float]:
    """The largest relative difference of each term."""
    assert len(steps) == len(reference)
    return {
        name: max(abs(a[name] - b[name]) / b[name] for a, b in zip(steps, reference, strict=True))
        for name in ("ce", "align", "vsd")
    }


def test_an_exact_cache_equals_the_live_teacher(pair, tmp_path):
    settings, folder = pair
    live = first_steps(TrainConfig(**settings, live_teacher=True, out=tmp_path / "x"), tmp_path / "live")
    cache = cached(settings, folder, tail="exact")
    steps = first_steps(TrainConfig(**settings, cache=cache, out=tmp_path / "x"), tmp_path / "cached")
    assert len(steps) == 20
    assert max(drift(steps, live).values()) < 1e-3


def test_live_targets_are_the_teachers_own_forward(pair, tmp_path):
    settings, _ = pair
    trainer = make_trainer(TrainConfig(**settings, live_teacher=True, out=tmp_path / "x"), tmp_path)
    batch = collate_with_targets([trainer.train_dataset[i] for i in range(3)], 0)
    inputs, supervised = batch.student.tensors, batch.student.supervised
    targets = trainer.terms.targets_of(batch)
    teacher = load_model(settings["teacher"], dtype=torch.float32, device=CPU)
    expected = logits_at(teacher, inputs, predicting_positions(supervised))
    vocab = len(load_processor(settings["teacher"]).tokenizer)
    assert targets.vocab_size == vocab < expected.shape[1]
    everything = torch.arange(len(targets))
    reference = DenseTargets(expected[:, :vocab])
    torch.testing.assert_close(targets.select(everything).logprobs, reference.logprobs)
    assert torch.equal(targets.token_ids, inputs["input_ids"][supervised])
    assert not targets.states.requires_grad


def test_a_live_teacher_sees_images_as_its_own_processor_makes_them(pair, tmp_path):
    """The student's crop is another: the teacher must not be shown it."""
    settings, _ = pair
    processor = tiny_processor()
    processor.image_processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]
    )
    student = save_vlm(tmp_path / "student", processor, seed=2)
    config = TrainConfig(**settings | {"student": str(student)}, live_teacher=True, out=tmp_path / "x")
    trainer = make_trainer(config, tmp_path / "t")
    example = trainer.train_dataset[1]
    own = SampleEncoder(load_processor(settings["teacher"]))(open_samples(settings["data"])[1])
    assert torch.equal(example.for_teacher.inputs["pixel_values"], own.inputs["pixel_values"])
    assert not torch.equal(example.encoded.inputs["pixel_values"], own.inputs["pixel_values"])
    batch = collate_with_targets([example], 0)
    supervised = example.encoded.supervised[None]
    targets = trainer.terms.targets_of(batch)
    teacher = load_model(settings["teacher"], dtype=torch.float32, device=CPU)
    seen = {**batch.student.tensors, "pixel_values": own.inputs["pixel_values"]}
    expected = logits_at(teacher, seen, predicting_positions(supervised))[:, : targets.vocab_size]
    torch.testing.assert_close(
        targets.select(torch.arange(len(targets))).logprobs, DenseTargets(expected).logprobs
    )


def test_a_live_teacher_and_a_cache_exclude_each_other(pair, tmp_path):
    settings, folder = pair
    config = TrainConfig(**settings, live_teacher=True, cache=folder / "c", out=tmp_path / "x")
    with pytest.raises(CachekdError, match="takes the place of a cache"):
        make_trainer(config, tmp_path)


@pytest.mark.parametrize("window", [64, 256])
def test_a_window_other_than_the_caches_is_refused(pair, tmp_path, window):
    settings, folder = pair
    cache = cached(settings, folder, tail="exact")
    with pytest.raises(CachekdError, match="another Kneedle setting"):
        make_trainer(TrainConfig(**settings, cache=cache, window=window, out=tmp_path / "x"), tmp_path)


@pytest.mark.parametrize("loss", ["topk_kl", "bild"])
def test_more_ids_than_the_teacher_has_are_refused_before_the_first_step(pair, tmp_path, loss):
    settings, folder = pair
    cache = cached(settings, folder, tail="exact")
    said = settings | {"vsd": {"loss": loss, "k": 10**5}}
    with pytest.raises(CachekdError, match="more ids than the teacher has") as caught:
        make_trainer(TrainConfig(**said, cache=cache, out=tmp_path / "x"), tmp_path)
    assert caught.value.where == "setting 'vsd.k'"


def test_a_smaller_window_goes_where_every_token_has_its_logprobs(pair, tmp_path):
    """And is then that of a live teacher; of a term whose loss is no DBiLD nothing is asked."""
    settings, folder = pair
    settings = settings | {"epochs": 1, "align": {"loss": "dbild", "min_k": 2}, "vsd": "reverse_kl"}
    cache = cached(settings, folder, tail="exact", min_k=24)
    live = first_steps(
        TrainConfig(**settings, live_teacher=True, window=24, out=tmp_path / "x"), tmp_path / "live"
    )
    steps = first_steps(TrainConfig(**settings, cache=cache, window=24, out=tmp_path / "x"), tmp_path / "t")
    assert max(drift(steps, live).values()) < 1e-3
    wider = first_steps(TrainConfig(**settings, cache=cache, out=tmp_path / "x"), tmp_path / "w")
    assert drift(wider[:1], live[:1])["align"] > 0.01
    with pytest.raises(CachekdError, match="another Kneedle setting") as caught:
        make_trainer(TrainConfig(**settings, cache=cache, window=25, out=tmp_path / "x"), tmp_path)
    assert "up to 24" in caught.value.expected
    for free in ("bild", {"loss": "dbild", "direction": "student"}):
        free_of_it = TrainConfig(**settings | {"align": free}, cache=cache, window=25, out=tmp_path / "x")
        make_trainer(free_of_it, tmp_path)


@pytest.mark.slow
def test_the_demo_pair_cached_and_live(tmp_path):
    """Real logits; and how far the default cache drifts."""
    output_of(EXAMPLE / "prepare.py", "--out", tmp_path, "--images", 160, "--test-images", 10)
    settings = {
        "teacher": str(EXAMPLE / "teacher"),
        "student": str(EXAMPLE / "student"),
        "data": str(tmp_path / "train"),
        "batch_size": 8,
        "epochs": 1,
        "logging_steps": 1,
        "save_steps": 0,
    }
    live = first_steps(TrainConfig(**settings, live_teacher=True, out=tmp_path / "x"), tmp_path / "live")
    drifts = {}
    for tail in ("exact", "bytes=64"):
        cache = cached(settings, tmp_path, tail=tail)
        steps = first_steps(TrainConfig(**settings, cache=cache, out=tmp_path / "x"), tmp_path / f"t-{tail}")
        drifts[tail] = drift(steps, live)
        size = LogitCache(cache).manifest.size / LogitCache(cache).manifest.tokens
        print(tail, f"{size:.1f} bytes/token", {term: f"{x:.1e}" for term, x in drifts[tail].items()})
    assert len(live) == 20
    assert max(drifts["exact"].values()) < 1e-3
    assert max(drifts["bytes=64"].values()) < 1e-2  # the default: its logprobs are in steps of 1/16 nat


def test_a_live_teacher_of_another_template_is_refused(pair, tmp_path):
    """As a cache of one is: what it says would belong to other texts."""
    settings, _ = pair
    processor = tiny_processor()
    processor.chat_template = f"{processor.chat_template} "
    student = save_vlm(tmp_path / "student", processor, seed=2)
    config = TrainConfig(**settings | {"student": str(student)}, live_teacher=True, out=tmp_path / "x")
    with pytest.raises(CachekdError, match="different chat templates"):
        make_trainer(config, tmp_path / "t")
