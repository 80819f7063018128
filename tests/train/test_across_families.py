"""The switched path reads the teacher's own text with the student's pictures, in every family."""

from __future__ import annotations

import pytest
import torch

from cachekd.data import collate
from cachekd.data.collate import ModelInputs
from cachekd.errors import CachekdError
from cachekd.models import SwitchedTeacher, capture_vision
from cachekd.train.across import AcrossTokenizers
from family_samples import encoder_of, every_family, sample
from tiny_families import build

SIZES = ((40, 30), (28, 56))


def read(encoder, question: str, answer: str) -> ModelInputs:
    """Two images of other sizes, each with a question, as one batch."""
    samples = [
        sample(f"s{index}", f"<image>{question}", answer, sizes=(size,), seed=index)
        for index, size in enumerate(SIZES)
    ]
    return ModelInputs.of(collate(list(map(encoder, samples)), encoder.pad_token_id))


@every_family
def test_the_students_pictures_in_the_teachers_text(family):
    """The student's own text is a longer one, as of another tokenizer: nothing of it is seen."""
    encoder = encoder_of(family)
    theirs = read(encoder, "what is it?", "a large green dog.")
    ours = read(encoder, "is there a dog, or what is it? say it now", "a dog")
    assert ours.tensors["input_ids"].shape != theirs.tensors["input_ids"].shape
    teacher, student = SwitchedTeacher(build(family, text_width=24, seed=1)), build(family, seed=2)
    found = []
    with torch.no_grad():
        for seen, inputs in ((theirs, theirs), (ours, theirs.with_pictures_of(ours))):
            with capture_vision(student) as vision:
                student(**seen.tensors)
            assert torch.equal(inputs.tensors["input_ids"], theirs.tensors["input_ids"])
            found.append(teacher.logits(vision.output, inputs.tensors, inputs.positions))
    torch.testing.assert_close(*found)


def test_other_places_of_an_image_are_refused_where_they_matter():
    encoder = encoder_of("idefics3")
    ours, theirs = (
        encoder(sample("s", "<image>what?", "red", sizes=(size,))) for size in ((28, 28), (28, 112))
    )
    tokens = (encoder.image_token_id,) * 2
    AcrossTokenizers(same_places=True).require_places(ours, ours, tokens)
    AcrossTokenizers().require_places(ours, theirs, tokens)
    with pytest.raises(CachekdError, match="another number of places"):
        AcrossTokenizers(same_places=True).require_places(ours, theirs, tokens)
