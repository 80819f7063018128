"""The split and the switch: equal to the whole forward, and with gradients where they belong."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cachekd.data import SampleEncoder, collate, predicting_positions, sample_from_llava
from cachekd.errors import CachekdError
from cachekd.models import (
    SwitchedTeacher,
    capture_vision,
    check_switch,
    check_tokenizers,
    decode,
    encode,
    hidden_and_logits_at,
    load_config,
    load_model,
    logits_at,
    project,
)
from tiny import noise_image, save_vlm, tiny_processor, tiny_vlm

TOWERS = ["clip", "siglip"]


@pytest.fixture(scope="module", params=TOWERS)
def tower(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def processor(tower: str):
    return tiny_processor(class_token=tower == "clip")


@pytest.fixture(scope="module")
def batch(processor):
    """Two conversations of different length, one with two images; inputs and positions."""
    encoder = SampleEncoder(processor)
    one = [{"from": "human", "value": "<image>what is it?"}, {"from": "gpt", "value": "a large green dog."}]
    two = [{"from": "human", "value": "<image>and <image>?"}, {"from": "gpt", "value": "red"}]
    samples = [
        sample_from_llava("a", one, (noise_image(0),), origin="test"),
        sample_from_llava("b", two, (noise_image(1), noise_image(2)), origin="test"),
    ]
    inputs = collate([encoder(sample) for sample in samples], processor.tokenizer.pad_token_id)
    return inputs, predicting_positions(inputs.pop("supervised"))


def test_split_equals_whole_forward(processor, tower, batch):
    model = tiny_vlm(processor, tower=tower)
    inputs, positions = batch
    with torch.no_grad():
        split = decode(model, project(model, encode(model, inputs), inputs), inputs, positions)
        assert torch.equal(split, logits_at(model, inputs, positions))
        # The head's matrix product has other low bits when it runs at every position.
        torch.testing.assert_close(split, model(**inputs).logits[positions], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_own_features_through_the_switch_give_own_logits(processor, tower, batch, feature_layer):
    model = tiny_vlm(processor, tower=tower, feature_layer=feature_layer)
    inputs, positions = batch
    with torch.no_grad(), capture_vision(model) as vision:
        whole = logits_at(model, inputs, positions)
        switched = SwitchedTeacher(model).logits(vision.output, inputs, positions)
    assert torch.equal(whole, switched)


def test_switched_equals_a_teacher_with_the_students_tower_transplanted(processor, tower, batch):
    teacher = tiny_vlm(processor, tower=tower, text_width=48, vision_layers=3, seed=1)
    student = tiny_vlm(processor, tower=tower, seed=2)
    inputs, positions = batch
    transplanted = copy.deepcopy(teacher)
    transplanted.model.vision_tower = student.model.vision_tower
    with torch.no_grad(), capture_vision(student) as vision:
        student(**inputs)
        switched = SwitchedTeacher(teacher).logits(vision.output, inputs, positions)
        assert torch.equal(switched, logits_at(transplanted, inputs, positions))


def test_switched_gradient_reaches_the_students_vision_encoder_and_nothing_else(processor, tower, batch):
    teacher = tiny_vlm(processor, tower=tower, text_width=48, seed=1)
    student = tiny_vlm(processor, tower=tower, seed=2)
    inputs, positions = batch
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    switch = SwitchedTeacher(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with capture_vision(student) as vision:
            student(**inputs, logits_to_keep=positions)
        switch.logits(vision.output, inputs, positions).logsumexp(-1).sum().backward()
        with_gradient = {name for name, p in student.named_parameters() if p.grad is not None}
        assert with_gradient
        assert all(name.startswith("model.vision_tower.") for name in with_gradient)
        assert any(
            p.grad.abs().sum() > 0 for p in student.model.vision_tower.parameters() if p.grad is not None
        )
        assert all(p.grad is None for p in teacher.parameters())
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_vision_runs_once_and_the_hook_leaves(processor, tower, batch):
    student = tiny_vlm(processor, tower=tower)
    inputs, positions = batch
    calls = []
    student.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    switch = SwitchedTeacher(tiny_vlm(processor, tower=tower, seed=1))
    hooks = len(student.model.vision_tower._forward_hooks)
    with capture_vision(student) as vision:
        student(**inputs)
    switch.logits(vision.output, inputs, positions)
    assert len(calls) == 1
    assert len(student.model.vision_tower._forward_hooks) == hooks


def test_hidden_states_are_what_the_head_reads(processor, tower, batch):
    model = tiny_vlm(processor, tower=tower)
    inputs, positions = batch
    with torch.no_grad():
        hidden, logits = hidden_and_logits_at(model, inputs, positions)
        assert torch.equal(model.lm_head(hidden), logits)
    assert hidden.shape == (int(positions.sum()), model.config.text_config.hidden_size)


def test_teacher_without_tower_never_reads_its_weights(processor, tower, batch, tmp_path: Path):
    path = save_vlm(tmp_path / "teacher", processor, tower=tower, text_width=48, seed=1)
    whole = tiny_vlm(processor, tower=tower, text_width=48, seed=1)
    light = load_model(str(path), dtype=torch.float32, device=torch.device("cpu"), tower=False)
    assert not any("vision_tower" in name for name, _ in light.named_parameters())
    assert not any(p.requires_grad for p in light.parameters())
    student = tiny_vlm(processor, tower=tower, seed=2)
    inputs, positions = batch
    with torch.no_grad(), capture_vision(student) as vision:
        student(**inputs)
        expected = SwitchedTeacher(whole).logits(vision.output, inputs, positions)
        assert torch.equal(SwitchedTeacher(light).logits(vision.output, inputs, positions), expected)
    with pytest.raises(RuntimeError, match="without its vision encoder"):
        light(**inputs)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vision_width": 64}, "vision width"),
        ({"patch_size": 16}, "image tokens"),
        ({"feature_layer": -2}, "layer"),
    ],
)
def test_an_unfit_student_is_refused_by_name(tmp_path: Path, change, named):
    processor = tiny_processor()
    teacher = load_config(str(save_vlm(tmp_path / "teacher", processor)))
    student = load_config(str(save_vlm(tmp_path / "student", processor, **change)))
    with pytest.raises(CachekdError, match=named) as caught:
        check_switch(teacher, student)
    assert caught.value.expected is not None
    assert caught.value.fix is not None


def test_tokenizers_differ_by_content_and_not_by_padding():
    teacher, same = tiny_processor().tokenizer, tiny_processor().tokenizer
    same.padding_side = "left"
    same(["a", "long text"], padding=True)
    check_tokenizers(teacher, same)
    with pytest.raises(CachekdError, match="different tokenizers"):
        check_tokenizers(teacher, tiny_processor(corpus=["quite other words"] * 5).tokenizer)


def test_a_checkpoint_with_missing_weights_is_refused(tmp_path: Path):
    path = save_vlm(tmp_path / "model", tiny_processor())
    weights = load_file(path / "model.safetensors")
    dropped = next(name for name in weights if "linear_1" in name)
    save_file(
        {name: w for name, w in weights.items() if name != dropped},
        path / "model.safetensors",
        {"format": "pt"},
    )
    for whole in (True, False):
        with pytest.raises(CachekdError, match="would be random"):
            load_model(str(path), dtype=torch.float32, device=torch.device("cpu"), tower=whole)


def test_unsupported_family_and_missing_model_are_named(tmp_path: Path):
    with pytest.raises(CachekdError, match="there is no such model"):
        load_config(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CachekdError, match="not supported"):
        load_config(str(tmp_path))
