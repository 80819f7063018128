"""TinyLLaVA's layout: converted, it is a Llava with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from cachekd.data import SampleEncoder, collate, predicting_positions, sample_from_llava
from cachekd.errors import CachekdError
from cachekd.models import load_config, load_model, load_processor, logits_at, prove_split
from cachekd.models.tinyllava import convert_tinyllava
from cachekd_cli.main import app
from tiny import noise_image
from tiny_families import VOCABULARY, text_config, tokenizer

LANGUAGE_MODELS = {"phi": (PhiConfig, PhiForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


class TheirModel(nn.Module):
    """What TinyLLaVA Factory computes: the encoder's features in place of the image token."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.tokenizer = tokenizer()
        config, model = LANGUAGE_MODELS[kind]
        shared = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
        values = text_config(self.tokenizer, 16).to_dict()
        sizes = {name: value for name, value in values.items() if name in shared or name.startswith("num_")}
        text = config(**sizes, tie_word_embeddings=kind == "qwen2")
        vision = SiglipVisionConfig(
            hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            image_size=28, patch_size=7,
        )  # fmt: skip
        torch.manual_seed(0)
        self.vision = SiglipVisionModel(vision).eval()
        self.connector = nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 16))
        self.language = model(text).eval()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        if kind == "phi":
            nn.init.zeros_(self.language.lm_head.bias)

    def forward(self, before: list[int], pixels: Tensor, after: list[int]) -> Tensor:
        features = self.vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        embed = self.language.get_input_embeddings()
        parts = [embed(torch.tensor([before])), self.connector(features), embed(torch.tensor([after]))]
        return self.language(inputs_embeds=torch.cat(parts, dim=1)).logits[0]

    def save(self, path: Path, **changes: object) -> Path:
        path.mkdir()
        weights = {}
        for name, value in self.vision.state_dict().items():
            weights[f"vision_tower._vision_tower.vision_model.{name}"] = value
        for name, value in self.connector.state_dict().items():
            weights[f"connector._connector.{name}"] = value
        for name, value in self.language.state_dict().items():
            if name != "lm_head.weight" or not self.language.config.tie_word_embeddings:
                weights[f"language_model.{name}"] = value
        weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        save_file({name: value.clone() for name, value in weights.items()}, path / "model.safetensors")
        settings = {
            "model_type": "tinyllava",
            "architectures": ["TinyLlavaForConditionalGeneration"],
            "auto_map": {"AutoConfig": "configuration.TinyLlavaConfig"},
            "connector_type": "mlp2x_gelu",
            "image_token_index": -200,
            "text_config": self.language.config.to_dict(),
            "vision_config": self.vision.config.to_dict(),
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "patch",
        }
        (path / "config.json").write_text(json.dumps(settings | changes))
        self.tokenizer.save_pretrained(path)
        return path


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_converted_it_is_a_llava_with_the_same_logits(kind, tmp_path: Path):
    theirs = TheirModel(kind)
    source, out = theirs.save(tmp_path / "theirs"), tmp_path / "ours"
    with pytest.raises(CachekdError, match="TinyLLaVA Factory's layout") as caught:
        load_config(str(source))
    assert f"cachekd convert {source}" in str(caught.value)
    result = CliRunner().invoke(app, ["convert", str(source), "-o", str(out)])
    assert result.exit_code == 0, result.output

    model = load_model(str(out), dtype=torch.float32, device=torch.device("cpu"))
    processor = load_processor(str(out))
    turns = [
        {"from": "human", "value": "<image>\nwhat is it?"},
        {"from": "gpt", "value": "a large green dog."},
    ]
    sample = sample_from_llava("a", turns, (noise_image(0, (40, 30)),), origin="test")
    batch = collate([SampleEncoder(processor)(sample)], processor.tokenizer.pad_token_id)
    supervised = batch.pop("supervised")
    ids = batch["input_ids"][0].tolist()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    first, count = ids.index(image), ids.count(image)
    assert count == 15  # of 16 patches; theirs leaves out the first
    before, after = ids[:first], ids[first + count :]
    text = processor.tokenizer.decode(before) + "<image>\n" + processor.tokenizer.decode(after).lstrip("\n")
    assert text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nwhat is it? ASSISTANT: "
        "a large green dog.<|end|>"
    )
    assert processor.tokenizer.decode(batch["input_ids"][supervised]) == " a large green dog.<|end|>"
    positions = predicting_positions(supervised)
    with torch.no_grad():
        expected = theirs(before, batch["pixel_values"], after)[positions[0]]
        ours = logits_at(model, batch, positions)
        torch.testing.assert_close(ours[:, :VOCABULARY], expected, atol=1e-4, rtol=1e-4)
    prove_split(model, batch, positions)
    assert type(AutoModelForImageTextToText.from_pretrained(out)) is type(model)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"connector_type": "qformer"}, "connector_type"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio"),
        ({"vision_config": {"model_type": "dinov2"}}, "vision_config.model_type"),
        ({"model_type": "llava"}, "model_type"),
    ],
)
def test_what_is_no_llava_is_refused_by_name(changes, named, tmp_path: Path):
    source = TheirModel("phi").save(tmp_path / "theirs", **changes)
    with pytest.raises(CachekdError, match="cannot be converted") as caught:
        convert_tinyllava(source, tmp_path / "ours")
    assert named in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_a_head_with_a_bias_is_refused(tmp_path: Path):
    """Phi-2's: Llava's head has none, and without it the logits would be others."""
    theirs = TheirModel("phi")
    nn.init.normal_(theirs.language.lm_head.bias)
    with pytest.raises(CachekdError, match=r"lm_head\.bias"):
        convert_tinyllava(theirs.save(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_missing_weights_are_refused(tmp_path: Path):
    source = TheirModel("phi").save(tmp_path / "theirs")
    weights = load_file(source / "model.safetensors")
    save_file(
        {name: w for name, w in weights.items() if "connector" not in name}, source / "model.safetensors"
    )
    with pytest.raises(CachekdError, match="4 missing"):
        convert_tinyllava(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
