"""One tiny, whole VLM of each family: random weights, real classes, a processor that is built here.

Where a processor's class needs torchvision (which is for videos, and for Pixtral) the same class is built
without its video part; Pixtral's text expansion is written out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    FastVlmConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Mistral3Config,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PixtralImageProcessorPil,
    PixtralVisionConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    ResNetConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)
from transformers.processing_utils import ProcessorMixin

from cachekd.models.processors import without_video
from tiny import CORPUS, MARKED_TEMPLATE

SPECIAL = ["<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCABULARY = 384  # rows of the embeddings; the tokenizers have fewer tokens


def tokenizer(*images: str, named: dict[str, str] | None = None, **kwargs: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the placeholders `images`, and special tokens that have names."""
    special = [*SPECIAL, *dict.fromkeys([*images, *(named or {}).values()])]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    plain = [token for token in special[1:4] + list(images) if token not in (named or {}).values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=plain,
        extra_special_tokens=named or {},
        **kwargs,
    )


def template(placeholder: str) -> str:
    """The chat template of the other tests, with a family's image placeholder."""
    return MARKED_TEMPLATE.replace("<image>", placeholder)


@dataclass(frozen=True)
class Tiny:
    """How to build one family.

    Attributes:
        config: from tokenizer, vision width and text width to a configuration.
        processor: builds the processor.
        refuses: feature -> why the family cannot do it.
        does: feature -> what is particular about how it does it.
        notes: what of it is not the real thing.
    """

    config: Callable[[Any, int, int], Any]
    processor: Callable[[], Any]
    refuses: dict[str, str] = field(default_factory=dict)
    does: dict[str, str] = field(default_factory=dict)
    notes: str = ""


def text_config(tok: Any, width: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        bos_token_id=None,
    )


def vision(cls: Any, width: int, **kwargs: Any) -> Any:
    """A vision config of two layers for images of 28 pixels in patches of 7."""
    sizes = {"image_size": 28, "patch_size": 7, "num_hidden_layers": 2, "num_attention_heads": 2}
    return cls(hidden_size=width, intermediate_size=2 * width, **{**sizes, **kwargs})


def ids(tok: Any, token: str) -> int:
    return int(tok.convert_tokens_to_ids(token))


def square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


# --- the Llava family -------------------------------------------------------------------------------


def llava_config(tok: Any, width: int, text_width: int) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision(CLIPVisionConfig, width),
        text_config=text_config(tok, text_width),
        image_token_index=ids(tok, "<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
    )


def llava_processor() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=square(28)),
        tokenizer=tokenizer("<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def llava_next_config(tok: Any, width: int, text_width: int) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=vision(CLIPVisionConfig, width),
        text_config=text_config(tok, text_width),
        image_token_index=ids(tok, "<image>"),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=16,
    )


def llava_next_processor() -> LlavaNextProcessor:
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size=square(28), image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer("<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


def llava_onevision_config(tok: Any, width: int, text_width: int) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=vision(SiglipVisionConfig, width, vision_use_head=False),
        text_config=text_config(tok, text_width),
        image_token_index=ids(tok, "<image>"),
        video_token_index=ids(tok, "<video>"),
        image_grid_pinpoints=PINPOINTS,
    )


def llava_onevision_processor() -> Any:
    return without_video(LlavaOnevisionProcessor)(
        image_processor=LlavaOnevisionImageProcessorPil(size=square(28), image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer("<image>", "<video>"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )


def fast_vlm_config(tok: Any, width: int, text_width: int) -> FastVlmConfig:
    tower = ResNetConfig(
        embedding_size=8, hidden_sizes=[width], depths=[1], layer_type="basic", hidden_size=width
    )
    return FastVlmConfig(
        vision_config=tower,
        text_config=text_config(tok, text_width),
        image_token_index=ids(tok, "<image>"),
        image_seq_length=49,
    )


def fast_vlm_processor() -> LlavaProcessor:
    processor = llava_processor()
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    processor.patch_size = 4  # of the ResNet: it halves an image twice
    return processor


# --- Idefics3 and SmolVLM ---------------------------------------------------------------------------

IDEFICS_TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
ROWS = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]


@dataclass(frozen=True)
class Tiles:
    """How Idefics3 and SmolVLM cut pictures: tiles of so many pixels, two along a picture's longest edge, in
    patches, so many of which along a side become one token."""

    pixels: int = 28
    patch: int = 7
    shuffle: int = 2

    @property
    def places(self) -> int:
        """Of a tile in the text."""
        return (self.pixels // self.patch // self.shuffle) ** 2


def idefics3_config(config_class: Any, tiles: Tiles = Tiles()) -> Callable[[Any, int, int], Any]:
    def build(tok: Any, width: int, text_width: int) -> Any:
        tower = vision(
            config_class.sub_configs["vision_config"], width, image_size=tiles.pixels, patch_size=tiles.patch
        )
        return config_class(
            vision_config=tower.to_dict(),
            text_config=text_config(tok, text_width).to_dict(),
            image_token_id=ids(tok, "<image>"),
            scale_factor=tiles.shuffle,
            pad_token_id=tok.pad_token_id,
        )

    return build


def idefics3_images(image_class: Any, tiles: Tiles = Tiles()) -> Any:
    return image_class(size={"longest_edge": 2 * tiles.pixels}, max_image_size={"longest_edge": tiles.pixels})


def idefics3_processor(tiles: Tiles = Tiles(), rows: list[str] = ROWS) -> Idefics3Processor:
    return Idefics3Processor(
        image_processor=idefics3_images(Idefics3ImageProcessorPil, tiles),
        tokenizer=tokenizer(*rows, named=IDEFICS_TOKENS),
        image_seq_len=tiles.places,
        chat_template=template("<image>"),
    )


def smolvlm_processor(tiles: Tiles = Tiles()) -> Any:
    return without_video(SmolVLMProcessor)(
        image_processor=idefics3_images(SmolVLMImageProcessorPil, tiles),
        tokenizer=tokenizer(*ROWS, named=IDEFICS_TOKENS),
        video_processor=None,
        image_seq_len=tiles.places,
        chat_template=template("<image>"),
    )


# --- Qwen -------------------------------------------------------------------------------------------

QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def qwen_config(config_class: Any, **tower: Any) -> Callable[[Any, int, int], Any]:
    """Patches of 7, merged two by two."""

    def build(tok: Any, width: int, text_width: int) -> Any:
        if config_class is Qwen2VLConfig:
            widths = {"embed_dim": width, "hidden_size": text_width, "mlp_ratio": 2}
        else:
            widths = {
                "hidden_size": width,
                "out_hidden_size": text_width,
                "intermediate_size": 2 * width,
            }
        text = text_config(tok, text_width).to_dict()
        text = {
            name: text[name]
            for name in text
            if name.startswith(("num_", "hidden_size", "inter", "vocab", "max_pos", "pad", "eos"))
        }
        half = text_width // 4  # of a head, in rotary sections for time, height, width
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
        return config_class(
            vision_config={
                "depth": 3,
                "num_heads": 2,
                "patch_size": 7,
                "temporal_patch_size": 2,
                **widths,
                **tower,
            },
            text_config=text | {"rope_parameters": rope, "head_dim": text_width // 2, "bos_token_id": None},
            image_token_id=ids(tok, "<|image_pad|>"),
            video_token_id=ids(tok, "<|video_pad|>"),
            vision_start_token_id=ids(tok, "<|vision_start|>"),
            vision_end_token_id=ids(tok, "<|vision_end|>"),
        )

    return build


def qwen_processor(processor_class: Any) -> Callable[[], Any]:
    def build() -> Any:
        images = Qwen2VLImageProcessorPil(
            patch_size=7, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
        )
        return without_video(processor_class)(
            image_processor=images,
            tokenizer=tokenizer(named=QWEN_TOKENS),
            chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
        )

    return build


# --- InternVL, PaliGemma, Gemma 3, Mistral 3 --------------------------------------------------------

INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


def internvl_config(tok: Any, width: int, text_width: int) -> InternVLConfig:
    tower = InternVLConfig.sub_configs["vision_config"]
    return InternVLConfig(
        vision_config=vision(tower, width, image_size=[28, 28], patch_size=[7, 7]).to_dict(),
        text_config=text_config(tok, text_width).to_dict(),
        image_token_id=ids(tok, "<IMG_CONTEXT>"),
        image_seq_length=4,
    )


def internvl_processor() -> Any:
    images = GotOcr2ImageProcessorPil(size=square(28), crop_to_patches=True, min_patches=1, max_patches=4)
    return without_video(InternVLProcessor)(
        image_processor=images,
        tokenizer=tokenizer(named=INTERNVL_TOKENS),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )


def gemma2_config(tok: Any, width: int) -> Gemma2Config:
    text = text_config(tok, width)
    return Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
        max_position_embeddings=512,
        sliding_window=512,
        final_logit_softcapping=0.5,  # so small that it shows on random weights
        pad_token_id=text.pad_token_id,
        eos_token_id=text.eos_token_id,
        bos_token_id=None,
    )


def paligemma_config(tok: Any, width: int, text_width: int) -> PaliGemmaConfig:
    return PaliGemmaConfig(
        vision_config=vision(SiglipVisionConfig, width, vision_use_head=False).to_dict(),
        text_config=gemma2_config(tok, text_width).to_dict(),
        image_token_index=ids(tok, "<image>"),
        projection_dim=text_width,
        hidden_size=text_width,
        vocab_size=VOCABULARY,
        pad_token_id=tok.pad_token_id,
    )


def paligemma_processor() -> PaliGemmaProcessor:
    images = SiglipImageProcessorPil(size=square(28))
    images.image_seq_length = 16
    tok = tokenizer(named={"image_token": "<image>"}, bos_token="<|user|>")
    return PaliGemmaProcessor(image_processor=images, tokenizer=tok)


def gemma3_config(tok: Any, width: int, text_width: int) -> Gemma3Config:
    text = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=text_width,
        intermediate_size=2 * text_width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=text_width // 2,
        max_position_embeddings=512,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=text_width // 2,
        pad_token_id=tok.pad_token_id,
        eos_token_id=tok.eos_token_id,
        bos_token_id=None,
    )
    return Gemma3Config(
        vision_config=vision(SiglipVisionConfig, width, vision_use_head=False).to_dict(),
        text_config=text.to_dict(),
        mm_tokens_per_image=4,
        image_token_index=ids(tok, "<image_soft_token>"),
        boi_token_index=ids(tok, "<start_of_image>"),
        eoi_token_index=ids(tok, "<end_of_image>"),
    )


GEMMA3_TOKENS = {
    "image_token": "<image_soft_token>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}


def gemma3_processor() -> Gemma3Processor:
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size=square(28)),
        tokenizer=tokenizer(named=GEMMA3_TOKENS),
        image_seq_length=4,
        chat_template=template("<start_of_image>"),
    )


def mistral3_config(tok: Any, width: int, text_width: int) -> Mistral3Config:
    return Mistral3Config(
        vision_config=vision(PixtralVisionConfig, width, image_size=56),
        text_config=text_config(tok, text_width),
        image_token_index=ids(tok, "[IMG]"),
        spatial_merge_size=2,
    )


class PixtralText(ProcessorMixin):
    """What PixtralProcessor makes of text and images, without the torchvision that it needs."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.patch_size, self.spatial_merge_size = "[IMG]", 7, 2
        self.image_token_id = tokenizer.convert_tokens_to_ids("[IMG]")

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        return super()._process_images(images, **kwargs | {"patch_size": 14})

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        height, width = image_inputs["image_sizes"][image_idx]
        rows = ["[IMG]" * (int(width) // 14)] * (int(height) // 14)
        return "[IMG_BREAK]".join(rows) + "[IMG_END]"


AutoProcessor.register(Mistral3Config, PixtralText, exist_ok=True)


def mistral3_processor() -> PixtralText:
    return PixtralText(
        image_processor=PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size=14),
        tokenizer=tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        chat_template=template("[IMG]"),
    )


NO_VIDEO = "processor built without its video part"
QWEN3_TAPS = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}

FAMILIES: dict[str, Tiny] = {
    "llava": Tiny(llava_config, llava_processor),
    "llava_next": Tiny(llava_next_config, llava_next_processor),
    "llava_onevision": Tiny(llava_onevision_config, llava_onevision_processor, notes=NO_VIDEO),
    "idefics3": Tiny(idefics3_config(Idefics3Config), idefics3_processor),
    "smolvlm": Tiny(idefics3_config(SmolVLMConfig), smolvlm_processor, notes=NO_VIDEO),
    "qwen2_vl": Tiny(qwen_config(Qwen2VLConfig), qwen_processor(Qwen2VLProcessor), notes=NO_VIDEO),
    "qwen2_5_vl": Tiny(
        qwen_config(Qwen2_5_VLConfig, window_size=28, fullatt_block_indexes=[1]),
        qwen_processor(Qwen2_5_VLProcessor),
        notes=NO_VIDEO,
    ),
    "qwen3_vl": Tiny(
        qwen_config(Qwen3VLConfig, **QWEN3_TAPS), qwen_processor(Qwen3VLProcessor), notes=NO_VIDEO
    ),
    "internvl": Tiny(internvl_config, internvl_processor, notes=NO_VIDEO),
    "paligemma": Tiny(
        paligemma_config,
        paligemma_processor,
        refuses={
            "two turns": "one question, and its answer as the processor's suffix",
            "text-only sample": "its processor wants an image",
        },
        does={"two images": "yes, both before the question"},
    ),
    "gemma3": Tiny(gemma3_config, gemma3_processor),
    "mistral3": Tiny(
        mistral3_config,
        mistral3_processor,
        notes="PixtralProcessor needs torchvision. Its text expansion is written out here, and its image "
        "processor is the real one.",
    ),
    "fast_vlm": Tiny(
        fast_vlm_config,
        fast_vlm_processor,
        notes="a ResNet (with BatchNorm) in the place of FastViTHD, which needs timm",
    ),
}


def build(name: str, *, width: int = 16, text_width: int = 16, seed: int = 0) -> PreTrainedModel:
    """A model of the family, in eval mode, with no parameter at zero."""
    tiny = FAMILIES[name]
    return made(tiny.config(tiny.processor().tokenizer, width, text_width), seed)


def made(config: Any, seed: int = 0) -> PreTrainedModel:
    """A model of a configuration, likewise."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    _wake(model)
    return model


def _wake(model: nn.Module) -> None:
    """Weights so large that a wrong path shows in the logits.

    At their usual start images hardly matter, and Gemma 3's projector, biases and the like are zero.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.2)
            elif parameter.ndim > 1:
                parameter.mul_(0.3 / parameter.std())
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.5)


def save(path: Path, name: str, **kwargs: Any) -> Path:
    """Write a family's tiny model and processor as a model folder."""
    build(name, **kwargs).save_pretrained(path)
    FAMILIES[name].processor().save_pretrained(path)
    return path


def save_tiles(
    path: Path, name: str, tiles: Tiles, *, width: int, text_width: int, seed: int = 0, rows: list[str] = ROWS
) -> Path:
    """Write an Idefics3 or a SmolVLM that cuts pictures in its own way.

    Args:
        rows: names of tiles that are one token each.
    """
    processor = idefics3_processor(tiles, rows) if name == "idefics3" else smolvlm_processor(tiles)
    config_class = Idefics3Config if name == "idefics3" else SmolVLMConfig
    config = idefics3_config(config_class, tiles)(processor.tokenizer, width, text_width)
    made(config, seed).save_pretrained(path)
    processor.save_pretrained(path)
    return path


__all__ = ["FAMILIES", "AutoConfig", "Tiles", "Tiny", "build", "made", "save", "save_tiles"]
