"""The pairs that have a name: what the table says of each, against what cachekd finds of the published
shapes, and against models of these shapes with a few layers."""

from __future__ import annotations

import copy
import json
from functools import cache
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForImageTextToText

from cachekd.check.sizes import parameters_of
from cachekd.errors import CachekdError
from cachekd.models import capture_vision, limits_of, plan_bridge
from cachekd.models.bridge import SwitchBridge
from cachekd.models.families import family_of, vision_tower
from cachekd.models.switch import SwitchedTeacher
from cachekd.presets.fit import fit_of
from cachekd.presets.pairs import PAIRS, pair_of
from cachekd.presets.published import Published
from cachekd.presets.sample import Assumed, read_by

# Of each: billions of parameters, the width of V's output, the places of a picture of 640 x 480 pixels in the
# text, embedding rows, context. The places are worked out by hand below. The parameters are those that the
# shapes gave when they were written down, and so show a shape that is changed later, not one that is wrong:
# the hub was not looked at. Two were found as others quote them: Qwen3-VL 8B (8.77), Gemma 3 4B (4.30).
FACTS = {
    "llava-onevision-7b": (8.03, 1152, 2929, 152128, 32768),
    "llava-onevision-0.5b": (0.89, 1152, 2929, 152000, 32768),
    "qwen2.5-vl-7b": (8.29, 1280, 391, 152064, 128000),
    "qwen2.5-vl-3b": (3.75, 1280, 391, 151936, 128000),
    "qwen3-vl-8b": (8.77, 1152, 300, 151936, 262144),
    "qwen3-vl-4b": (4.44, 1024, 300, 151936, 262144),
    "qwen3-vl-2b": (2.13, 1024, 300, 151936, 262144),
    "smolvlm2-2.2b": (2.25, 1152, 1053, 49280, 8192),
    "smolvlm2-500m": (0.51, 768, 832, 49280, 8192),
    "smolvlm2-256m": (0.26, 768, 832, 49280, 8192),
    "internvl3-8b": (7.94, 1024, 3328, 151674, 32768),
    "internvl3-1b": (0.94, 1024, 3328, 151674, 32768),
    "gemma-3-12b": (12.19, 1152, 256, 262208, 131072),
    "gemma-3-4b": (4.30, 1152, 256, 262208, 131072),
    "tinyllava-3b": (3.51, 1152, 728, 151936, 32768),
    "tinyllava-0.5b": (0.91, 1152, 728, 151936, 32768),
}
published = cache(Published)
every_model = pytest.mark.parametrize("name", FACTS)
every_pair = pytest.mark.parametrize("name", PAIRS)
switched_pairs = pytest.mark.parametrize("name", [n for n, pair in PAIRS.items() if pair.switch != "none"])


def places_by_hand(name: str, width: int, height: int) -> int:
    """Places of a picture in the text, as the papers and model cards say it; of landscapes."""
    if name.startswith("llava-onevision"):
        # Two by two tiles of 27 x 27 hold it best; the bars above and below go, each row ends in a newline.
        rows = 54 - 2 * ((54 - int(54 * height / width)) // 2)
        return 27 * 27 + rows * (54 + 1)
    if name.startswith("qwen"):
        side = 28 if name.startswith("qwen2.5") else 32
        return round(width / side) * round(height / side)
    if name.startswith("smolvlm2"):
        grid, side = (27 // 3, 384) if name.endswith("2.2b") else (32 // 4, 512)
        tiles = 4 * -(-(4 * side * height // width) // side)  # the longer edge is four tiles
        return (tiles + 1) * grid**2
    if name.startswith("internvl3"):
        return (4 * 3 + 1) * 256
    return 256 if name.startswith("gemma") else 27 * 27 - 1  # the first is left out, as TinyLLaVA does


def cut(name: str):
    """The published configuration with one to three layers and a narrow language model; the vision side's
    shape, the token ids and the grid stay."""
    config = copy.deepcopy(published(name).config)
    text, vision = config.get_text_config(), config.vision_config
    # The width of a head stays: rotary positions are made for it.
    text.hidden_size = (
        64 if getattr(text, "head_dim", None) else 2 * text.hidden_size // text.num_attention_heads
    )
    text.intermediate_size, text.num_hidden_layers = 64, 3
    text.num_attention_heads = text.num_key_value_heads = 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:3]
    tapped = hasattr(vision, "deepstack_visual_indexes")
    for depth in ("depth", "num_hidden_layers"):
        if hasattr(vision, depth):
            setattr(vision, depth, 3 if tapped else 2)
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = text.hidden_size
    if tapped:
        vision.deepstack_visual_indexes = [0, 1, 2]
    if hasattr(vision, "fullatt_block_indexes"):
        vision.fullatt_block_indexes = [1]
    return config


def small(name: str):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(cut(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # Gemma 3's projector begins at zero: nothing would go through it
                parameter.normal_(std=0.02)
    return model


def inputs_of(name: str, config, assumed: Assumed) -> dict[str, torch.Tensor]:
    """A batch of one sample, with the picture's places before the text."""
    read = read_by(config, published(name).image_processor, assumed)
    inputs = dict(read.encoded.inputs)
    ids = torch.ones(1, len(read.encoded), dtype=torch.long)
    ids[0, : read.image_tokens] = config.image_token_id
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type in ("qwen2_5_vl", "qwen3_vl", "gemma3"):
        names = {"gemma3": "token_type_ids"}
        inputs[names.get(config.model_type, "mm_token_type_ids")] = (ids == config.image_token_id).long()
    return inputs


def test_every_model_of_a_pair_has_its_facts():
    named = {model for pair in PAIRS.values() for model in (pair.teacher, pair.student)}
    assert named == set(FACTS)


@every_model
def test_the_shapes_are_the_published_ones(name):
    billions, width, places, rows, context = FACTS[name]
    config = published(name).config
    assert sum(parameters_of(config).values()) / 1e9 == pytest.approx(billions, abs=0.006)
    assert getattr(config.vision_config, family_of(config).width) == width
    limits = limits_of([config])
    assert (limits.embedding_rows, limits.max_tokens) == (rows, context)
    assert config.image_token_id < rows
    read = read_by(config, published(name).image_processor, Assumed(640, 480))
    assert read.image_tokens == places == places_by_hand(name, 640, 480)
    assert len(read.encoded) == places + 250
    assert len(read.encoded.token_ids) == 100
    assert published(name).source


@every_model
def test_what_is_unverified_is_there(name):
    """A list of settings that no longer exist would tell nobody anything."""
    said = json.loads(files("cachekd.presets").joinpath("configs", f"{name}.json").read_text())
    for setting in said["unverified"]:
        value = said
        for part in setting.split("."):
            value = value[part]


@every_pair
def test_what_the_table_says_of_the_switch_is_what_a_check_finds(name):
    pair = PAIRS[name]
    teacher, student = (published(model).config for model in (pair.teacher, pair.student))
    fit = fit_of(teacher, student, own_text=pair.tokenizers == "two")
    assert fit.switch == pair.switch
    assert fit.own_text == (pair.tokenizers == "two")


def test_why_qwen3_vl_is_not_switched():
    """Its encoders of two sizes: another width, and no bridge for what is not one tensor of patches."""
    teacher, student = (published(f"qwen3-vl-{size}").config for size in ("8b", "2b"))
    assert (teacher.vision_config.depth, student.vision_config.depth) == (27, 24)
    with pytest.raises(CachekdError, match="no bridge is sound here"):
        plan_bridge(teacher, student)
    assert fit_of(published("qwen3-vl-4b").config, student, own_text=False).switch == "paper"


@pytest.mark.slow
@switched_pairs
def test_the_students_picture_goes_through_the_teacher(name):
    """Real numbers: V_S of the published shape, P_T and L_T with a few narrow layers."""
    pair = PAIRS[name]
    ours, theirs = small(pair.student), SwitchedTeacher(small(pair.teacher))
    # Small in tiles: SmolVLM makes four of the longer edge, whatever it is.
    assumed = Assumed(100, 20 if "smolvlm" in name else 100, 4, 2)
    batch = inputs_of(pair.student, ours.config, assumed)
    their_batch = inputs_of(pair.teacher, theirs.model.config, assumed)
    positions = torch.zeros(batch["input_ids"].shape, dtype=torch.bool)
    positions[0, -3:] = True
    with capture_vision(ours) as capture:
        ours(**batch, use_cache=False)
    output = capture.output
    if pair.switch == "linear":
        output = SwitchBridge(plan_bridge(theirs.model.config, ours.config))(output)
        positions = torch.zeros(their_batch["input_ids"].shape, dtype=torch.bool)
        positions[0, -3:] = True
    else:
        assert torch.equal(batch["input_ids"], their_batch["input_ids"])
    logits = theirs.logits(output, their_batch, positions)
    assert logits.shape == (3, theirs.model.config.get_text_config().vocab_size)
    logits.float().square().sum().backward()
    gradients = [p.grad for p in vision_tower(ours).parameters() if p.grad is not None]
    assert gradients
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


def test_a_name_that_is_none():
    with pytest.raises(CachekdError) as caught:
        pair_of("qwen2.5-vl-7b-3B")
    assert "did you mean qwen2.5-vl-7b-3b?" in str(caught.value)
    with pytest.raises(CachekdError, match="--teacher A --student B"):
        pair_of("xyz")
