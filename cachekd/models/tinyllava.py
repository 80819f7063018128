"""TinyLLaVA's published checkpoints (TinyLLaVA Factory's layout) as ordinary Llava folders.

They hold what a Llava holds, a SigLIP or CLIP encoder, a two-layer projector and a causal language model,
under other names; their tokenizer has no image token, and their prompt is in the code. Converted once, they
load like any other model, without remote code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME

from cachekd.atomic import make_folder
from cachekd.errors import CachekdError, first_line, writing

MODEL_TYPE = "tinyllava"
IMAGE_TOKEN = "<image>"
# Their names -> transformers' names.
_RENAMED = {
    "vision_tower._vision_tower.vision_model.": "model.vision_tower.",
    "connector._connector.0.": "model.multi_modal_projector.linear_1.",
    "connector._connector.2.": "model.multi_modal_projector.linear_2.",
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
}
_COMPUTED = ("rotary_emb.inv_freq", "position_ids")  # buffers that older versions saved
# "patch" leaves out the first token: SigLIP's first patch, as there is no class token.
_STRATEGY = {"patch": "default", "cls_patch": "full"}
_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'][0]['text'] + ' ' -}}"
    "{%- else -%}{{- 'A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user\\'s questions. ' -}}{%- endif -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{- 'USER: ' -}}"
    "{%- for p in m['content'] -%}{{- '<image>\\n' if p['type'] == 'image' else p['text'] -}}{%- endfor -%}"
    "{{- ' ASSISTANT:' -}}{%- elif m['role'] == 'assistant' -%}"
    "{%- generation -%}{{- ' ' + m['content'][0]['text'] + eos_token -}}{%- endgeneration -%}"
    "{%- endif -%}{%- endfor -%}"
)


def is_tinyllava(path: str) -> bool:
    """Whether a folder or hub name holds such a checkpoint; its code is not run."""
    try:
        config = PreTrainedConfig.get_config_dict(path)[0]
        return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE
    except (OSError, TypeError):  # TypeError: of JSON that is no object
        return False


def convert_tinyllava(source: Path, out: Path) -> PreTrainedModel:
    """Write a Llava folder: configuration, weights, processor with a chat template.

    Phi's head has a bias, which Llava's has not: those checkpoints are refused unless it is zero.

    Args:
        source: a local folder in TinyLLaVA Factory's layout.
        out: the new folder; it must not exist.

    Raises:
        CachekdError: it is another layout, or a part is of a kind that Llava does not have.
    """
    if out.exists():
        raise CachekdError("the folder is there already", where=str(out), fix="choose a new folder")
    if not (source / CONFIG_NAME).is_file():  # else its name would be asked for on the hub
        raise CachekdError(
            "this is not a model's folder", where=str(source), expected=f"a folder with {CONFIG_NAME}"
        )
    with _readable(source):
        settings = PreTrainedConfig.get_config_dict(source)[0]
    _check(settings, source)
    with _readable(source):
        tokenizer, weights = AutoTokenizer.from_pretrained(source, trust_remote_code=False), _weights(source)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = _config(settings, tokenizer)
    model = _model(config, weights, source)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    make_folder(out.parent)
    with writing(out), TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        model.save_pretrained(Path(folder, out.name))
        _processor(config, tokenizer).save_pretrained(Path(folder, out.name))
        Path(folder, out.name).rename(out)  # whole, or not there
    return model


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """What libraries raise of files that are missing, cut short or something else."""
    try:
        yield
    except (OSError, ValueError, TypeError, SafetensorError, UnpicklingError, EOFError) as error:
        raise CachekdError(
            "the checkpoint cannot be read",
            where=str(source),
            found=first_line(error),
            fix="fetch it again",
        ) from None


def _check(settings: dict[str, Any], source: Path) -> None:
    if not isinstance(settings, dict):
        raise CachekdError("this is no configuration of a model", where=str(source / CONFIG_NAME))
    text, vision = ((settings.get(name) or {}).get("model_type") for name in ("text_config", "vision_config"))
    facts = {
        "model_type": (settings.get("model_type"), (MODEL_TYPE,)),
        "connector_type": (settings.get("connector_type"), ("mlp2x_gelu",)),
        "text_config.model_type": (text, (text or "that of a language model",)),
        "vision_config.model_type": (vision, ("siglip_vision_model", "clip_vision_model")),
        "image_aspect_ratio": (settings.get("image_aspect_ratio", "square"), ("square",)),
        "vision_feature_select_strategy": (settings.get("vision_feature_select_strategy"), tuple(_STRATEGY)),
    }
    for name, (found, expected) in facts.items():
        if found not in expected:
            raise CachekdError(
                "this checkpoint cannot be converted to a Llava",
                where=f"{name} in {source / CONFIG_NAME}",
                expected=" or ".join(expected),
                found=found,
            )


def _config(settings: dict[str, Any], tokenizer: Any) -> LlavaConfig:
    def part(values: dict[str, Any]) -> Any:
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        return AutoConfig.for_model(values.pop("model_type"), **values)

    text, vision = part(settings["text_config"]), part(settings["vision_config"])
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=settings.get("vision_feature_layer", -2),
        vision_feature_select_strategy=_STRATEGY[settings["vision_feature_select_strategy"]],
        projector_hidden_act="gelu",
        tie_word_embeddings=text.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
    )


def _weights(source: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        weights |= load_file(file)
    for file in [] if weights else sorted(source.glob("pytorch_model*.bin")):
        weights |= torch.load(file, map_location="cpu", weights_only=True)
    return {_renamed(name): value for name, value in weights.items() if not name.endswith(_COMPUTED)}


def _renamed(name: str) -> str:
    prefix = next((old for old in _RENAMED if name.startswith(old)), None)
    return name if prefix is None else _RENAMED[prefix] + name.removeprefix(prefix)


def _model(config: LlavaConfig, weights: dict[str, Tensor], source: Path) -> PreTrainedModel:
    dtype = next(iter(weights.values())).dtype if weights else torch.float32
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    bias = weights.pop("lm_head.bias", None)
    if bias is not None and bias.any():
        raise CachekdError(
            "this checkpoint cannot be converted to a Llava",
            where=f"language_model.lm_head.bias in {source}",
            expected="a head without a bias, as Llava has it",
            found=f"the head of {config.text_config.model_type} with a bias that is not zero",
            fix="use a checkpoint with another language model, such as Qwen2 or Llama",
        )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if config.tie_word_embeddings:
        missing = [name for name in missing if name != "lm_head.weight"]
    if missing or unexpected:
        raise CachekdError(
            "the weights do not fit the configuration",
            where=str(source),
            expected="the parts of a Llava under TinyLLaVA Factory's names",
            found=f"{len(missing)} missing, {len(unexpected)} unknown: "
            + ", ".join([*missing, *unexpected][:3]),
        )
    model.tie_weights()
    return model


def _processor(config: LlavaConfig, tokenizer: Any) -> LlavaProcessor:
    from transformers import (  # they talk of torchvision when imported
        CLIPImageProcessor,
        SiglipImageProcessor,
    )

    vision, size = config.vision_config, config.vision_config.image_size
    square = {"height": size, "width": size}
    clip = vision.model_type == "clip_vision_model"
    images: Any = SiglipImageProcessor(size=square)
    if clip:
        images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(clip),
        image_token=IMAGE_TOKEN,
        chat_template=_TEMPLATE,
    )
