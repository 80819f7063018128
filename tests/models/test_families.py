"""Every family, feature by feature: tiny random models, the whole pipeline, the table of families.md."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from importlib.metadata import version
from itertools import permutations
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText, GraniteConfig

import support_table
from cachekd.config import DumpConfig, TrainConfig
from cachekd.data import Encoded, Sample, SampleEncoder, collate, predicting_positions
from cachekd.dump import dump
from cachekd.errors import BadSample, CachekdError
from cachekd.models import (
    DeferredHead,
    SwitchedTeacher,
    capture_vision,
    check_switch,
    decode,
    encode,
    hidden_and_logits_at,
    load_config,
    load_model,
    load_processor,
    logits_at,
    output_head,
    parameters_by_part,
    project,
    prove_split,
)
from cachekd.models import families as known
from cachekd.models.compat import switch_differences
from cachekd.models.families import family_of, projectors_in_tower, vision_tower
from cachekd.models.loading import keep_statistics
from cachekd.paths import RUN_FILE
from cachekd.train import train
from cachekd.train.teacher import recompute_frozen_layers
from family_samples import TALL, TEXT, TWO, WIDE, encoder_of, every_family, sample
from tiny import noise_image, png_bytes, write_tar
from tiny_families import FAMILIES, build, gemma2_config, llava_config, save

FEATURES = {
    "split fp32": "V, then P, then L, against the whole forward",
    "split bf16": "the same in bfloat16",
    "switch": "the student's features in the teacher: gradient in V_S only, own features give own logits",
    "logits at positions": "against the full logits there",
    "head apart": "logits follow from final states by a matrix, a scale and a cap",
    "without V_T": "the teacher loads from a checkpoint that has no vision encoder at all",
    "padding": "left and right, against the sample alone",
    "two images": "in one sample",
    "two turns": "in one sample",
    "text-only sample": "in a batch with images",
    "recomputed layers": "gradient checkpointing of student and teacher gives the same gradients",
    "dump, train, reload": "dump, 10 steps, save, plain from_pretrained, equal logits",
}
COMMON = ("llava", "qwen2_5_vl", "smolvlm")  # the others' dump and training are slow tests


def found(family: str, feature: str, what: str = "yes") -> None:
    support_table.cell(family, feature, what, list(FAMILIES), list(FEATURES))


def encoded(family: str, *samples: Sample) -> list[Encoded]:
    return [encoder_of(family)(one) for one in samples]


def batch_of(family: str, *samples: Sample) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs, and the positions [B, S] that predict the answers."""
    pad = encoder_of(family).processor.tokenizer.pad_token_id
    batch = collate(encoded(family, *samples), pad)
    return batch, predicting_positions(batch.pop("supervised"))


def split_logits(model, inputs, positions) -> Tensor:
    return decode(model, project(model, encode(model, inputs), inputs), inputs, positions)


@every_family
def test_split_equals_whole_forward(family):
    inputs, positions = batch_of(family, WIDE, TALL)
    model = build(family)
    with torch.no_grad():
        whole = logits_at(model, inputs, positions)
        assert torch.equal(split_logits(model, inputs, positions), whole)
        others = torch.rand_like(inputs["pixel_values"]) * (inputs["pixel_values"] != 0)  # zeros are padding
        blind = logits_at(model, {**inputs, "pixel_values": others}, positions)
    assert (blind - whole).abs().max() > 0.1 * whole.std()  # a test that looks at the images
    found(family, "split fp32", "exact")


@every_family
def test_split_equals_whole_forward_in_bfloat16(family):
    inputs, positions = batch_of(family, WIDE, TALL)
    model = build(family).to(torch.bfloat16)
    with torch.no_grad():
        whole = logits_at(model, inputs, positions)
        assert whole.dtype == torch.bfloat16
        assert torch.equal(split_logits(model, inputs, positions), whole)
    found(family, "split bf16", "exact")


def test_batch_norms_keep_the_checkpoints_statistics(tmp_path: Path):
    """FastVLM's: neither the neighbours in a batch nor training change a sample's features."""
    path = save(tmp_path / "student", "fast_vlm")
    student = load_model(str(path), dtype=torch.float32, device=torch.device("cpu"))
    before = {name: value.clone() for name, value in student.named_buffers()}
    inputs, positions = batch_of("fast_vlm", WIDE, TALL)
    with torch.no_grad():
        expected = logits_at(student, inputs, positions)
        assert torch.equal(logits_at(student.train(), inputs, positions), expected)
        plain = build("fast_vlm").train()
        assert not torch.allclose(logits_at(plain, inputs, positions), expected)  # what it would be else
    assert all(torch.equal(before[name], value) for name, value in student.named_buffers())


@every_family
def test_switch(family):
    """Own features give own logits; else it is a teacher with V_S transplanted, and V_S has the gradient."""
    inputs, positions = batch_of(family, WIDE, TALL)
    teacher, student = build(family, text_width=24, seed=1), build(family, seed=2)
    transplanted = copy.deepcopy(teacher)
    name = family_of(teacher.config).tower
    setattr(transplanted.model, name, copy.deepcopy(vision_tower(student)))
    for inside in family_of(teacher.config).inside:
        setattr(vision_tower(transplanted), inside, getattr(vision_tower(teacher), inside))
    with torch.no_grad(), capture_vision(teacher) as own:
        whole = logits_at(teacher, inputs, positions)
        assert torch.equal(SwitchedTeacher(teacher).logits(own.output, inputs, positions), whole)

    before = parameters_to_vector(teacher.parameters())
    with capture_vision(student) as vision:
        student(**inputs)
    switched = SwitchedTeacher(teacher).logits(vision.output, inputs, positions)
    with torch.no_grad():
        assert torch.equal(switched, logits_at(transplanted, inputs, positions))
    switched.logsumexp(-1).sum().backward()
    touched = {id(p) for p in student.parameters() if p.grad is not None}
    v_s = {id(p) for p in vision_tower(student).parameters()}
    p_s = {id(p) for module in projectors_in_tower(student) for p in module.parameters()}
    assert touched
    assert touched <= v_s - p_s
    parts = parameters_by_part(student)
    assert {id(p) for p in parts["vision_encoder"].values()} == v_s - p_s
    assert p_s <= {id(p) for p in parts["projector"].values()}
    assert all(parts.values())
    first = next(vision_tower(student).parameters())  # of the first layer: the gradient goes all the way
    assert first.grad is not None
    assert first.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert torch.equal(parameters_to_vector(teacher.parameters()), before)
    found(family, "switch")


@every_family
def test_logits_at_positions(family):
    inputs, positions = batch_of(family, WIDE, TALL)
    model = build(family)
    with torch.no_grad():
        full = model(**inputs).logits[positions]
        # The head's matrix product has other low bits when it runs at every position.
        torch.testing.assert_close(logits_at(model, inputs, positions), full, atol=1e-5, rtol=1e-5)
    found(family, "logits at positions")


@every_family
def test_head_apart(family):
    inputs, positions = batch_of(family, WIDE, TALL)
    model = build(family)
    with torch.no_grad():
        hidden, logits = hidden_and_logits_at(model, inputs, positions)
        head = DeferredHead(model, inputs, positions)
        assert head.reason is None
        states = head.states(lambda: logits_at(model, inputs, positions))
        torch.testing.assert_close(head.logits(states), logits, atol=1e-4, rtol=1e-4)
        matrix = output_head(model, hidden, logits, logits.shape[1])
        torch.testing.assert_close(matrix.logits(hidden), logits, atol=1e-3, rtol=1e-3)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if family == "paligemma" and Version(version("transformers")) < Version("5.23"):
        cap = None  # it is in the configuration, but the model's forward does without
    assert head.softcap == cap
    found(family, "head apart", "yes" if cap is None else f"yes, with a soft cap ({cap})")


@every_family
def test_teacher_without_its_vision_encoder(family, tmp_path: Path):
    path = save(tmp_path / "teacher", family, text_width=24, seed=1)
    name, kept = family_of(load_config(str(path))).tower, family_of(load_config(str(path))).inside
    weights = load_file(path / "model.safetensors")
    parts = {key: key.split(f"{name}.", 1)[1].split(".")[0] for key in weights if f"{name}." in key}
    v_t = {key for key, part in parts.items() if part not in kept}
    assert v_t
    save_file({key: w for key, w in weights.items() if key not in v_t}, path / "model.safetensors")

    teacher = load_model(str(path), dtype=torch.float32, device=torch.device("cpu"), tower=False)
    inputs, positions = batch_of(family, WIDE, TALL)
    student = build(family, seed=2)
    with torch.no_grad(), capture_vision(student) as vision:
        student(**inputs)
        expected = SwitchedTeacher(build(family, text_width=24, seed=1))
        assert torch.equal(
            SwitchedTeacher(teacher).logits(vision.output, inputs, positions),
            expected.logits(vision.output, inputs, positions),
        )
    with pytest.raises(RuntimeError, match="without its vision encoder"):
        teacher(**inputs)
    with pytest.raises(CachekdError, match="would be random"):
        load_model(str(path), dtype=torch.float32, device=torch.device("cpu"))
    found(family, "without V_T")


def left_padded(inputs: dict[str, Tensor], positions: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The same batch with its padding in front."""
    gaps = (1 - inputs["attention_mask"]).sum(1).tolist()

    def moved(value: Tensor) -> Tensor:
        return torch.stack([row.roll(gap) for row, gap in zip(value, gaps, strict=True)])

    per_token = {name: moved(x) for name, x in inputs.items() if x.shape == positions.shape}
    return {**inputs, **per_token}, moved(positions)


@every_family
def test_padding_on_either_side(family):
    model = build(family)
    inputs, positions = batch_of(family, WIDE, TALL)
    with torch.no_grad():
        alone = torch.cat([logits_at(model, *batch_of(family, one)) for one in (WIDE, TALL)])
        assert not inputs["attention_mask"].all()
        for padded in ((inputs, positions), left_padded(inputs, positions)):
            torch.testing.assert_close(logits_at(model, *padded), alone, atol=1e-4, rtol=1e-4)
            assert torch.equal(split_logits(model, *padded), logits_at(model, *padded))
    found(family, "padding", "both, within 1e-4")


def processed(family: str, one: Sample) -> dict[str, Tensor]:
    """A sample by the processor's own method, which puts the images into the messages."""
    images = iter(one.images)
    messages = [
        {**message, "content": [part | {"image": next(images)} if part["type"] == "image" else part
                                for part in message["content"]]}
        for message in one.messages
    ]  # fmt: skip
    batch = encoder_of(family).processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    per_token = ("token_type_ids", "mm_token_type_ids")
    return {name: x[0] if name in per_token else x for name, x in batch.items()}


@every_family
def test_two_images_in_one_sample(family):
    model = build(family)
    inputs, positions = batch_of(family, WIDE, TWO)
    swapped = Sample("two", TWO.images[::-1], TWO.messages, "test")
    with torch.no_grad():
        whole = logits_at(model, inputs, positions)
        assert torch.equal(split_logits(model, inputs, positions), whole)
        other = logits_at(model, *batch_of(family, WIDE, swapped))
    assert (whole[-1] - other[-1]).abs().max() > 0.01 * whole.std()  # which is which
    if encoder_of(family).processor.chat_template and family != "smolvlm":  # its method asks for videos
        as_they_do = processed(family, TWO)
        ours = encoded(family, TWO)[0].inputs
        assert torch.equal(as_they_do["input_ids"][0], ours["input_ids"])
        assert all(torch.equal(as_they_do[name], x) for name, x in ours.items() if name != "input_ids")
    found(family, "two images", FAMILIES[family].does.get("two images", "yes"))


@every_family
def test_two_turns(family):
    turns = ("<image>what is it?", "a large green dog.", "is it red?", "no")
    talk = sample("talk", *turns, sizes=((40, 30),))
    if "two turns" in FAMILIES[family].refuses:
        with pytest.raises(BadSample, match="one question and one answer"):
            encoder_of(family)(talk)
        found(family, "two turns", "refused: " + FAMILIES[family].refuses["two turns"])
        return
    inputs, positions = batch_of(family, talk)
    ids = inputs["input_ids"][0][positions.roll(1, 1)[0]]
    said = encoder_of(family).processor.tokenizer.decode(ids)
    assert said == "a large green dog.<|end|>no<|end|>"
    model = build(family)
    with torch.no_grad():
        assert torch.equal(split_logits(model, inputs, positions), logits_at(model, inputs, positions))
    found(family, "two turns")


@every_family
def test_text_only_sample_in_a_batch(family):
    if "text-only sample" in FAMILIES[family].refuses:
        with pytest.raises(BadSample, match="0 image"):
            encoder_of(family)(TEXT)
        found(family, "text-only sample", "refused: " + FAMILIES[family].refuses["text-only sample"])
        return
    model = build(family)
    inputs, positions = batch_of(family, TEXT, WIDE, TALL)
    count = int(positions[0].sum())
    with torch.no_grad():
        whole = logits_at(model, inputs, positions)
        assert torch.equal(split_logits(model, inputs, positions), whole)
        with capture_vision(model) as vision:  # a batch without any image: V does not run
            alone = logits_at(model, *batch_of(family, TEXT))
    assert vision.output is None
    torch.testing.assert_close(whole[:count], alone, atol=1e-4, rtol=1e-4)
    found(family, "text-only sample")


@every_family
def test_recomputed_layers(family):
    """Gradients of own and switched path, with and without gradient checkpointing."""
    inputs, positions = batch_of(family, WIDE, TALL)

    def gradients(recompute: bool) -> Tensor:
        teacher, student = build(family, text_width=24, seed=1), build(family, seed=2)
        keep_statistics(student)  # as `load_model` does for every model
        if recompute:
            student.gradient_checkpointing_enable()
            student.train()
            assert recompute_frozen_layers(teacher) == 2
        with capture_vision(student) as vision:
            own = logits_at(student, inputs, positions)
        switched = SwitchedTeacher(teacher).logits(vision.output, inputs, positions)
        (own.logsumexp(-1).sum() + switched.logsumexp(-1).sum()).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    torch.testing.assert_close(gradients(True), gradients(False), atol=1e-5, rtol=1e-4)
    found(family, "recomputed layers")


def write_data(path: Path, family: str) -> Path:
    """A tar of ten samples, of one or more turns where the family takes them."""
    members = []
    for index in range(10):
        turns = 1 if "two turns" in FAMILIES[family].refuses else 1 + index % 2
        talk = [("human", "<image>what?"), ("gpt", "red"), ("human", "a dog?"), ("gpt", "yes")][: 2 * turns]
        record = {"conversations": [{"from": who, "value": text} for who, text in talk]}
        members.append((f"s{index}.png", png_bytes(noise_image(index, (28 + 4 * index, 40)))))
        members.append((f"s{index}.json", json.dumps(record).encode()))
    write_tar(path / "0.tar", members)
    return path


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in COMMON else pytest.mark.slow) for name in FAMILIES],
)
def test_dump_train_save_reload(family, tmp_path: Path):
    teacher = save(tmp_path / "teacher", family, text_width=24, seed=1)
    student = save(tmp_path / "student", family, seed=2)
    data = write_data(tmp_path / "data", family)
    cache_path, run = tmp_path / "cache", tmp_path / "run"
    dumped = DumpConfig(teacher=str(teacher), data=str(data), out=cache_path, batch_size=4, tail="step=0.2")
    assert dump(dumped).finished
    train(
        TrainConfig(
            student=str(student), teacher=str(teacher), data=str(data), cache=cache_path, out=run,
            batch_size=2, epochs=2, learning_rate=1e-3, logging_steps=1,
        )
    )  # fmt: skip
    steps = [entry for entry in json.loads((run / RUN_FILE).read_text())["log"] if "vsd" in entry]
    assert len(steps) == 10
    assert {"ce", "align"} <= steps[0].keys()

    ours = load_model(str(run), dtype=torch.float32, device=torch.device("cpu"))
    plain = AutoModelForImageTextToText.from_pretrained(run, dtype=torch.float32).eval()
    inputs, positions = batch_of(family, WIDE, TALL)
    with torch.no_grad():
        trained = logits_at(ours, inputs, positions)
        assert torch.equal(plain(**inputs, logits_to_keep=positions).logits.flatten(0, -2), trained)
        before = load_model(str(student), dtype=torch.float32, device=torch.device("cpu"))
        assert not torch.equal(logits_at(before, inputs, positions), trained)
    assert type(load_processor(str(run))) is type(load_processor(str(student)))
    found(family, "dump, train, reload")


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_a_processor_without_its_video_part(family, tmp_path: Path):
    """It loads where torchvision is missing, or was, and goes to worker processes."""
    save(tmp_path, family)
    made = encoder_of(family)(WIDE).inputs
    loaded = load_processor(str(tmp_path))
    for processor in (loaded, pickle.loads(pickle.dumps(loaded))):
        same = SampleEncoder(processor)(WIDE).inputs
        assert torch.equal(same["input_ids"], made["input_ids"])
        # Where torchvision is, it resizes, and rounds a pixel here and there to its neighbour.
        torch.testing.assert_close(same["pixel_values"], made["pixel_values"], atol=0.02, rtol=0)


def unknown_config(**changes):
    """AyaVision: built like Llava, and none of the families that are written down."""
    from transformers import AyaVisionConfig, Cohere2Config, SiglipVisionConfig

    text = Cohere2Config(
        vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, logit_scale=0.5, pad_token_id=0, bos_token_id=None, eos_token_id=4,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=7, vision_use_head=False,
    )  # fmt: skip
    return AyaVisionConfig(
        vision_config=vision, text_config=text, image_token_index=5, downsample_factor=2, **changes
    )


def unknown_batch() -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.tensor([[1, 5, 5, 5, 5, 7, 8, 9], [1, 2, 5, 5, 5, 5, 6, 9]])
    positions = torch.zeros_like(ids, dtype=torch.bool)
    positions[:, -3:] = True
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}, positions


def test_an_unknown_family_built_like_llava_proves_itself():
    config = unknown_config()
    assert config.model_type not in known.FAMILIES
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval().train()
    inputs, positions = unknown_batch()
    assert family_of(config).tower == "vision_tower"
    prove_split(model, inputs, positions)
    assert all(module.training for module in model.modules())  # as it was
    check_switch(config, unknown_config(vision_feature_layer=config.vision_feature_layer))


def test_a_split_that_is_none_is_refused(monkeypatch):
    """The proof looks at logits: here V's output is replayed wrongly."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(unknown_config())
    right = family_of(model.config)

    def reversed_patches(tower, output):
        other = copy.copy(output)
        states = (None if state is None else state.flip(1) for state in output.hidden_states)
        other["hidden_states"] = tuple(states)  # those that no projector reads are None
        return right.replay(tower, other)

    monkeypatch.setitem(known.FAMILIES, model.config.model_type, replace(right, replay=reversed_patches))
    with pytest.raises(CachekdError, match="cannot be split") as caught:
        prove_split(model, *unknown_batch())
    assert "off by" in str(caught.value)
    assert "--lambda-vsd 0" in str(caught.value)


@pytest.mark.parametrize("model_type", ["blip-2", "mllama", "idefics", "chameleon", "kosmos-2"])
def test_a_family_of_another_kind_is_refused_with_those_that_are_not(model_type, tmp_path: Path):
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(CachekdError, match="family is not supported") as caught:
        load_config(str(tmp_path))
    assert all(name in str(caught.value) for name in known.FAMILIES)


def test_a_language_model_has_no_switch(tmp_path: Path):
    config = AutoConfig.for_model("llama")
    assert family_of(config) is known.TEXT_ONLY
    with pytest.raises(CachekdError, match="no vision encoder"):
        check_switch(config, config)


@every_family
def test_an_unfit_student_is_refused_by_name(family):
    tiny = FAMILIES[family]
    tok = tiny.processor().tokenizer
    teacher, student = tiny.config(tok, 16, 24), tiny.config(tok, 16, 16)
    check_switch(teacher, student)
    with pytest.raises(CachekdError, match="vision width"):
        check_switch(teacher, tiny.config(tok, 32, 16))


def test_deepstack_layers_may_differ_but_not_their_number():
    tiny = FAMILIES["qwen3_vl"]
    tok = tiny.processor().tokenizer
    teacher, student = tiny.config(tok, 16, 24), tiny.config(tok, 16, 16)
    student.vision_config.deepstack_visual_indexes = [1, 2]
    check_switch(teacher, student)
    student.vision_config.deepstack_visual_indexes = [1]
    with pytest.raises(CachekdError, match=r"number of .*deepstack_visual_indexes"):
        check_switch(teacher, student)


@pytest.mark.parametrize("text", ["gemma2", "granite"])
def test_head_apart_where_the_language_model_caps_or_scales(text):
    """Llava's wrapper takes no notice of either; the head is measured on the wrapper."""
    tok = FAMILIES["llava"].processor().tokenizer
    config = llava_config(tok, 16, 16)
    scaled = GraniteConfig(**config.text_config.to_dict() | {"model_type": "granite", "logits_scaling": 8.0})
    config.text_config = gemma2_config(tok, 16) if text == "gemma2" else scaled
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    inputs, positions = batch_of("llava", WIDE, TALL)
    with torch.no_grad():
        hidden, logits = hidden_and_logits_at(model, inputs, positions)
        head = DeferredHead(model, inputs, positions)
        assert (head.reason, head.softcap, head.scale) == (None, None, 1.0)
        torch.testing.assert_close(head.logits(hidden), logits, atol=1e-4, rtol=1e-4)


def test_the_table_has_every_family_and_feature():
    cells = support_table.read()
    assert list(dict.fromkeys(family for family, _ in cells)) == list(FAMILIES) == list(known.FAMILIES)
    assert list(dict.fromkeys(feature for _, feature in cells)) == list(FEATURES)
    assert all(cells.values())
    text = support_table.PATH.read_text()
    assert all(f"| {name} | {meaning} |" in text for name, meaning in FEATURES.items())
    text = " ".join(text.split())
    assert all(tiny.notes in text for tiny in FAMILIES.values())


@pytest.mark.parametrize(("teacher", "student"), list(permutations(known.FAMILIES, 2)))
def test_two_families_differ_in_words(teacher, student):
    """Whatever one of them has no setting for."""
    configs = [CONFIG_MAPPING[name]() for name in (teacher, student)]
    if {teacher, student} == {"idefics3", "smolvlm"}:  # two names of one
        check_switch(*configs)
        return
    found = switch_differences(*configs)
    assert found[0].setting == "model_type"
    with pytest.raises(CachekdError, match="cannot be switched"):
        check_switch(*configs)
