"""What is chosen for a card, against steps that are computed one by one; and disk and time by hand."""

from __future__ import annotations

import pytest
import torch

from cachekd.check.memory import StepSetting, step_memory
from cachekd.config import TrainConfig
from cachekd.models import empty_model
from cachekd.presets.cards import ROOM, SAMPLES, WAYS, Chooser
from cachekd.presets.cost import cost_of
from cachekd.presets.sample import Assumed, Read
from family_samples import WIDE, encoder_of
from tiny_families import build

SAMPLE = encoder_of("llava")(WIDE)
STUDENT, TEACHER = (
    build("llava", width=64, text_width=64).config,
    build("llava", width=64, text_width=96).config,
)


def peak(way, batch: int, *, recomputed: bool, switched: bool) -> int:
    said = {**way, "batch_size": batch, "lambda_vsd": float(switched)}
    setting = StepSetting.of(TrainConfig(student="s", data="d", out="o", **said), torch.bfloat16)
    found = step_memory(STUDENT, TEACHER, SAMPLE, setting, as_teacher=SAMPLE, recomputed=(recomputed,))
    return found[recomputed].peak


def chooser(switched: bool) -> Chooser:
    return Chooser(TEACHER, STUDENT, SAMPLE, SAMPLE, switched=switched)


@pytest.mark.parametrize("switched", [True, False])
def test_the_first_way_that_fits_is_taken_and_is_within_the_card(switched):
    """On cards on which this or that way just fits a batch of one."""
    ways = [w for w in WAYS if switched or "student_quantization" in w or "teacher_quantization" not in w]
    least = [peak(way, 1, recomputed=True, switched=switched) for way in ways]
    found = chooser(switched)
    for size in sorted(set(least))[1::2]:
        card = 1.001 * size / ROOM / 1e9
        chosen = found.choose(card)
        first = next(way for way, other in zip(ways, least, strict=True) if other <= card * 1e9 * ROOM)
        expected = {name: value for name, value in first.items() if switched or "teacher" not in name}
        batches = ("batch_size", "gradient_accumulation", "gradient_checkpointing")
        assert {name: value for name, value in chosen.train.items() if name not in batches} == expected
        assert chosen.fits
        recomputed = chosen.train["gradient_checkpointing"]
        run = peak(first, chosen.train["batch_size"], recomputed=recomputed, switched=switched)
        assert chosen.memory.peak == run
        assert chosen.train["batch_size"] * chosen.train["gradient_accumulation"] == SAMPLES


def test_a_large_card_trains_the_whole_student_and_recomputes_nothing():
    chosen = chooser(True).choose(24)
    assert chosen.train == {"batch_size": 16, "gradient_accumulation": 2, "gradient_checkpointing": False}
    assert chosen.dump == {}


def test_what_fits_nowhere_is_said():
    chosen = chooser(True).choose(1e-6)
    assert not chosen.fits
    assert chosen.train["batch_size"] == 1
    assert chosen.train["student_quantization"] == "4bit"
    assert chosen.dump == {"device_map": "auto"}


def test_where_nothing_can_be_computed_a_sample_at_a_time_is_trained(monkeypatch):
    """As `step_memory` says of a family whose modules look at values."""
    monkeypatch.setattr("cachekd.presets.cards.step_memory", lambda *args, **settings: {})
    chosen = chooser(True).choose(24)
    assert chosen.memory is None
    assert chosen.train == {"batch_size": 1, "gradient_accumulation": 32, "gradient_checkpointing": True}


def test_a_teacher_that_fits_is_not_split():
    size = sum(parameter.numel() for parameter in empty_model(TEACHER).parameters()) * 2
    found = chooser(True)
    for share, dump in ((1.01, {}), (0.99, {"device_map": "auto"})):
        assert found.choose(share * size / ROOM / 1e9).dump == dump


def test_disk_and_time_are_those_of_the_walk_through():
    """docs/how-to/paper-pair.md: 3.1 billion parameters, 0.4 of the encoder, 729 places and 250 of text."""

    class Of:
        def __len__(self) -> int:
            return 979

    read = Read(Of(), 729, 729)  # type: ignore[arg-type]
    teacher = {"vision_encoder": 4 * 10**8, "projector": 0, "language_model": 31 * 10**8}
    student = teacher | {"language_model": 5 * 10**8}
    assumed = Assumed(samples=665_000)
    plain = cost_of(teacher, student, read, read, assumed, switched=True, recomputed=False, tflops=50)
    assert plain.cache_bytes == pytest.approx(7.4e9, rel=0.01)
    assert plain.dump_operations == pytest.approx(4.4e18, rel=0.02)
    assert plain.dump_seconds / 3600 == pytest.approx(25, rel=0.02)
    assert plain.train_operations / 665_000 == pytest.approx(16.8e12, rel=0.01)
    alone = cost_of(teacher, student, read, read, assumed, switched=False, recomputed=False, tflops=50)
    assert alone.train_operations / 665_000 == pytest.approx(4.7e12, rel=0.02)
    again = cost_of(teacher, student, read, read, assumed, switched=True, recomputed=True, tflops=50)
    assert again.train_operations / plain.train_operations == pytest.approx(
        (4 * 4.7 / 3 + 3 * 6.07) / 16.8, rel=0.01
    )
