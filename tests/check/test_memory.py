"""A step's memory, reckoned from configurations: against what autograd really keeps, and for every family.
(Against a process's peak: `benchmarks/memory_by_part.py`.)"""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from cachekd.check.memory import StepSetting, step_memory
from cachekd.data import collate
from family_samples import TEXT, WIDE, encoder_of
from tiny_families import FAMILIES, build

ENCODER = encoder_of("llava")


def kept_by_autograd(model, batch) -> int:
    """Bytes of what a forward leaves, but for the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = weakref.ref(storage)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(**batch, logits_to_keep=1, use_cache=False)
    alive = [storage.nbytes() for reference in found.values() if (storage := reference()) is not None]
    assert output.logits.requires_grad  # or all would be gone
    return sum(alive)


def test_activations_are_what_autograd_keeps():
    model = build("llava", width=64, text_width=64).train()
    model.config.vision_feature_layer = -1  # so that what every layer leaves is wanted
    sample = ENCODER(WIDE)
    batch = {name: x for name, x in collate([sample] * 4, 0).items() if name != "supervised"}
    found = step_memory(model.config, None, sample, StepSetting(4, None))[False]
    assert found.activations == pytest.approx(kept_by_autograd(model, batch), rel=0.1)
    assert found.teacher == found.switched == 0


def test_weights_gradients_and_moments_are_counted():
    student, teacher = build("llava", width=32, text_width=32), build("llava", width=32, text_width=48)
    sample = ENCODER(WIDE)
    found = step_memory(student.config, teacher.config, sample, StepSetting(2, torch.bfloat16))
    own = sum(parameter.numel() for parameter in student.parameters())
    tower = sum(parameter.numel() for parameter in teacher.model.vision_tower.parameters())
    theirs = sum(parameter.numel() for parameter in teacher.parameters()) - tower
    for memory in found.values():
        assert (memory.weights, memory.gradients, memory.optimizer) == (4 * own, 4 * own, 8 * own)
        assert memory.teacher == 2 * theirs  # in bfloat16, without its vision encoder
        assert memory.peak >= 12 * own + 2 * theirs + memory.activations
    assert found[True].activations < found[False].activations
    assert found[True].switched < found[False].switched


def test_text_alone_is_not_switched():
    config = build("llava").config
    found = step_memory(config, config, ENCODER(TEXT), StepSetting(2, None))
    assert found[False].switched == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    config = build(family).config
    found = step_memory(config, config, encoder_of(family)(WIDE), StepSetting(2, None))
    assert found
    for memory in found.values():
        assert memory.peak > memory.teacher + 3 * memory.weights
        assert memory.activations > 0
        assert memory.switched > 0
